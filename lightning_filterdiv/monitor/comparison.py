"""One layer before and after, or several layers, side by side on one scale."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from lightning_filterdiv.monitor.views import LayerView
from lightning_filterdiv.similarity import expected_abs_cosine

__all__ = ["compare_heat_maps"]

_SIDE = 2.1  # inches of one heat map


def compare_heat_maps(views: Mapping[str, LayerView]) -> Figure:
    """Heat maps of ``|cos|`` between the filters of a layer, side by side; for reports and notebooks.

    Each map is in an order of its own that puts alike filters side by side, so that duplicates are bright blocks.

    Args:
        views: what to write above a map -> the layer, from :func:`~lightning_filterdiv.monitor.views.view_layer`.

    Raises:
        ValueError: no view.
    """
    if not views:
        raise ValueError("views is empty: give at least one layer to draw")
    figure = Figure(figsize=(_SIDE * len(views) + 0.6, _SIDE + 0.75), dpi=180, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(views), squeeze=False)[0]
    for axes, (label, view) in zip(panels, views.items(), strict=True):
        ordered = view.cosine[view.order][:, view.order]
        image = axes.imshow(ordered.numpy(), vmin=0.0, vmax=1.0, cmap="magma", interpolation="nearest")
        mean = float(view.pairs().mean()) if view.count > 1 else 0.0
        axes.set_title(
            f"{label}\nmean |cos| {mean:.3f}; random {expected_abs_cosine(view.fan_in):.3f}", fontsize=8, loc="left"
        )
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"{view.count} filters of {view.name}", fontsize=8)
    bar = figure.colorbar(image, ax=list(panels), ticks=[0, 0.5, 1], shrink=0.8)
    bar.ax.tick_params(labelsize=7.5)
    bar.set_label("|cos|", fontsize=8)
    return figure
