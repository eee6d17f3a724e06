"""One layer before and after, or several layers, side by side on one scale."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from lightning_filterdiv.monitor.figures import heat_map_top
from lightning_filterdiv.monitor.views import LayerView

__all__ = ["compare_heat_maps"]

_SIDE = 2.1  # inches of one heat map


def compare_heat_maps(views: Mapping[str, LayerView]) -> Figure:
    """Draw heat maps of ``|cos|`` between the filters of a layer, side by side, for reports and notebooks.

    Each map has its own order of filters that puts alike ones side by side, so that duplicates are bright blocks. All
    share one scale, the widest of those that :func:`~lightning_filterdiv.monitor.figures.similarity_heat_map` has.

    Args:
        views: title of a map -> layer, from :func:`~lightning_filterdiv.monitor.views.view_layer`.

    Raises:
        ValueError: there is no view.
    """
    if not views:
        raise ValueError("views is empty: give at least one layer to draw")
    figure = Figure(figsize=(_SIDE * len(views) + 0.6, _SIDE + 0.75), dpi=180, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(views), squeeze=False)[0]
    top = max(map(heat_map_top, views.values()))
    for axes, (label, view) in zip(panels, views.items(), strict=True):
        ordered = view.cosine[view.order][:, view.order]
        image = axes.imshow(ordered.numpy(), vmin=0.0, vmax=top, cmap="magma", interpolation="nearest")
        ratio = view.mean / view.chance
        axes.set_title(f"{label}\nmean |cos| {view.mean:.3f} = {ratio:.2f} x chance", fontsize=8, loc="left")
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"{view.count} filters of {view.name}", fontsize=8)
    bar = figure.colorbar(image, ax=list(panels), ticks=[0, top / 2, top], shrink=0.8)
    bar.ax.set_yticklabels(["0", f"{top / 2:.2f}", f"{top:.2f}"])
    bar.ax.tick_params(labelsize=7.5)
    bar.set_label("|cos|", fontsize=8)
    return figure
