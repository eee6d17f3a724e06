"""Figures of layers at one moment, as plain matplotlib objects without pyplot or global state, safe in any thread.

TensorBoard shows every image 350 pixels wide. All figures are therefore 3.6 inches wide at 180 dots per inch: text is
about 11 pixels high when they are halved, and sharp at full size. Background is white and text dark, for light and dark
pages. The title explains the figure without a legend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_filterdiv.files import printable
from lightning_filterdiv.monitor.activations import Pair
from lightning_filterdiv.monitor.views import LayerView
from lightning_filterdiv.tensors.randomness import keyed_generator

__all__ = [
    "BLUE",
    "RED",
    "channel_heat_map",
    "cosine_distribution",
    "heat_map_top",
    "kernel_mosaic",
    "kernel_planes",
    "new_figure",
    "project_kernels",
    "shorten",
    "similarity_heat_map",
    "tile_cells",
    "title",
    "to_rgb",
]

BLUE, RED = "#2166ac", "#c0392b"
_MOSAIC_KERNELS = 256
_DIRECTIONS = 32
_ITERATIONS = 8  # iterations of the subspace; more would not be visible
_HEAT_MAP_CELLS = 400
_TITLE = 56  # characters of a title's line that fit at full size
_TICKS = 4  # largest number of ticks per axis: drawing labels takes longer than drawing the picture
# A square under a title of three lines, in fractions of its side. These figures differ only in the width of their tick
# labels, and laying out each anew takes half of the time to draw it.
_MARGIN, _BELOW_TITLE = 0.0116, 0.854


def new_figure(height: float, *, width: float = 3.6, layout: Literal["constrained", "none"] = "constrained") -> Figure:
    """Return an empty white figure of ``height`` and ``width`` inches. With layout ``none`` the caller places the
    axes."""
    figure = Figure(figsize=(width, height), dpi=180, facecolor="white")
    figure.set_layout_engine(layout)
    return figure


def _left_of(count: int) -> float:
    """Return the left edge of axes with a y label and ticks below ``count``."""
    return 0.0849 + 0.0185 * len(str(max(1, count - 1)))


def to_rgb(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return the pixels ``(height, width, 3)`` of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def shorten(name: str, limit: int = 17) -> str:
    """Shorten a layer name to fit beside an axis. Its end is kept, because it distinguishes layers. Characters special
    to matplotlib are escaped."""
    name = printable(name)
    return (name if len(name) <= limit else f"…{name[1 - limit :]}").replace("$", r"\$")


def title(figure: Figure, *lines: str) -> None:
    """Write a title over the whole width of the figure. Empty lines are left out, long ones are smaller."""
    size = 8 * min(1.0, _TITLE / max(1, *map(len, lines)))
    text = figure.suptitle("\n".join(line for line in lines if line), x=0.02, ha="left", fontsize=size)
    if figure.get_layout_engine() is None:
        text.set_y(1 - _MARGIN)


def _heading(view: LayerView, when: str) -> str:
    return f"{shorten(view.name, 36)}{f', {when}' if when else ''}"


def _without_out(view: LayerView) -> str:
    return f"; {view.out} are out and do not count" if view.out else ""


def similarity_heat_map(view: LayerView, when: str = "") -> Figure:
    """Draw a heat map of ``|cos|`` between the filters of one layer. Duplicates are bright blocks on the diagonal.

    The scale follows the data, because wide layers would be black otherwise. It ends at the 99th percentile of all
    pairs, and at least at twice the mean of random filters. Title and colour bar show the end.

    Args:
        view: the layer.
        when: the moment, for the title.
    """
    top = heat_map_top(view)
    return _heat_map(
        view.cosine,
        view.order,
        top,
        ("|cos|", view.chance, "random"),
        (
            _heading(view, when),
            f"Which of {view.count} filters (of {view.fan_in} weights) are alike{_without_out(view)}?",
            f"mean |cos| {view.mean:.3f} = {view.mean / view.chance:.2f} x chance;  "
            f"brightest: {top:.2f} = {top / view.chance:.1f} x or more",
        ),
        ("filters, alike ones side by side", "the same filters"),
    )


def heat_map_top(view: LayerView) -> float:
    """Return the ``|cos|`` at which a heat map of the layer is brightest."""
    pairs = view.pairs()
    return min(1.0, max(2 * view.chance, float(np.quantile(pairs, 0.99)) if pairs.size else 0.0))


def channel_heat_map(view: LayerView, correlation: Tensor, pairs: Sequence[Pair], when: str = "") -> Figure:
    """Draw a heat map of ``|correlation|`` between the channels of one layer, in the order of the filters' heat map.

    Args:
        view: the layer.
        correlation: ``(J, J)`` correlation of the channels of its filters.
        pairs: pairs that are alike in function but not in weights, the most alike first.
        when: the moment, for the title.
    """
    overlap = correlation.abs().float()
    above = torch.ones_like(overlap, dtype=torch.bool).triu(diagonal=1)
    mean = float(overlap[above].mean()) if view.count > 1 else 0.0
    first = ""
    if pairs:
        one, two = view.numbers[pairs[0].first], view.numbers[pairs[0].second]
        first = f", e.g. {one}, {two}: {abs(pairs[0].correlation):.2f}, |cos| {abs(pairs[0].cosine):.2f}"
    return _heat_map(
        torch.nan_to_num(overlap),
        view.order,
        1.0,
        ("|correlation|", mean, "mean"),
        (
            f"{_heading(view, when)}: its {view.count} channels",
            f"Which are alike on a fixed batch? Mean |correlation| {mean:.3f}",
            f"{len(pairs)} pairs in function only{first}",
        ),
        ("channels, in the order of the filters", "the same channels"),
    )


def _heat_map(
    values: Tensor,
    order: Sequence[int],
    top: float,
    scale: tuple[str, float, str],
    lines: Sequence[str],
    labels: tuple[str, str],
) -> Figure:
    """Draw values of pairs with the diagonal in grey and a mark on the colour bar."""
    count = len(order)
    what, mark, meaning = scale
    figure = new_figure(3.6, layout="none")
    left = _left_of(count)
    axes = figure.add_axes((left, 0.125, 0.779 - left, 0.657))
    ordered = values[list(order)][:, list(order)].clone()
    if count > _HEAT_MAP_CELLS:
        # With more filters than pixels, average over blocks of pairs. This is many times faster than matplotlib's
        # resampling.
        ordered.fill_diagonal_(0.0)
        ordered = torch.nn.functional.adaptive_avg_pool2d(ordered[None], _HEAT_MAP_CELLS)[0]
    else:
        ordered.fill_diagonal_(math.nan)
    extent = (-0.5, count - 0.5, count - 0.5, -0.5)
    colours = colormaps["magma"].with_extremes(bad="0.6")
    image = axes.imshow(ordered.numpy(), vmin=0.0, vmax=top, cmap=colours, interpolation="nearest", extent=extent)
    beside = figure.add_axes((0.8115, 0.093, 0.036, 0.721))
    bar = figure.colorbar(image, cax=beside, ticks=[0, top / 2, top])
    bar.ax.set_yticklabels(["0", f"{top / 2:.2f}", f"{top:.2f}"])
    bar.ax.tick_params(labelsize=7.5)
    bar.ax.axhline(min(mark, top), color="white", linewidth=2.4)
    bar.ax.axhline(min(mark, top), color=RED, linewidth=1.2)
    bar.set_label(f"{what};  red line: {meaning}", fontsize=8)
    title(figure, *lines)
    axes.set_xlabel(labels[0], fontsize=8)
    axes.set_ylabel(labels[1], fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.locator_params(integer=True, nbins=_TICKS)
    return figure


def cosine_distribution(views: Sequence[LayerView], when: str = "") -> Figure:
    """Draw the distribution of ``|cos|`` over chance between two filters, one row per layer; 1 is the mean of random
    filters.

    Chance is ``E|cos|`` of random directions, ``Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))``.

    Args:
        views: layers; those with at least one pair of filters are drawn.
        when: the moment, for the title.
    """
    rows = [view for view in views if view.count > 1]
    figure = new_figure(1.2 + 0.48 * max(1, len(rows)))
    axes = figure.add_subplot()
    ratios = [view.pairs() / view.chance for view in rows]
    limit = max([4.0, *(float(np.quantile(ratio, 0.995)) for ratio in ratios)]) * 1.05
    edges = np.linspace(0.0, limit, 81)
    for row, (view, ratio) in enumerate(zip(rows, ratios, strict=True)):
        base = len(rows) - 1 - row
        counts = np.histogram(ratio.clip(0.0, limit), edges)[0].astype(float)
        heights = base + 0.86 * counts / max(1.0, counts.max())
        axes.stairs(heights, edges, baseline=base, fill=True, color=BLUE, alpha=0.75, linewidth=0)
        axes.plot([ratio.mean()] * 2, [base, base + 0.93], color="black", linewidth=1.2)
        text = f"mean {ratio.mean():.2f} x,  max |cos| {view.pairs().max():.2f}"
        axes.text(limit, base + 0.42, text, fontsize=7, ha="right", va="center")
        axes.axhline(base, color="0.7", linewidth=0.6)
    axes.axvline(1.0, color=RED, linestyle=(0, (3, 1.5)), linewidth=1.2)
    axes.set_yticks([len(rows) - 1 - row + 0.35 for row in range(len(rows))])
    axes.set_yticklabels([shorten(view.name) for view in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5)
    axes.set(xlim=(0.0, limit * 1.02), ylim=(0.0, max(1, len(rows))))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("|cos| of two filters / mean of random ones", fontsize=8)
    title(
        figure,
        f"How alike are two filters of a layer{f' {when}' if when else ''}?",
        "blue: pairs;  black: their mean;  dashed red: random filters",
    )
    return figure


def kernel_mosaic(view: LayerView, when: str = "") -> Figure:
    """Draw the kernels in the order of the heat map.

    Kernels over three input channels are shown in colour (grey is 0). Others are projected on the layer's first
    principal input direction, blue negative, red positive. Kernels of one weight per channel are rows of coefficients
    in the leading principal directions. 3-D kernels are shown by their middle slice.

    Args:
        view: the layer.
        when: the moment, for the title.
    """
    kernels = view.kernels[view.order]
    shown = kernels
    if len(kernels) > _MOSAIC_KERNELS:
        shown = kernels[torch.linspace(0, len(kernels) - 1, _MOSAIC_KERNELS).long()]
    figure = new_figure(3.6, layout="none")
    part = "" if len(shown) == len(kernels) else f"{len(shown)} of "
    size = "x".join(map(str, kernels.shape[2:]))
    heading = (
        _heading(view, when),
        f"{part}{len(kernels)} kernels {size}, alike ones side by side{_without_out(view)}",
    )
    if kernels[0, 0].numel() == 1:
        left, bottom = _left_of(len(shown)), 0.114
        axes = figure.add_axes((left, bottom, 1 - _MARGIN - left, _BELOW_TITLE - 0.009 - bottom))
        coefficients = project_kernels(shown, min(_DIRECTIONS, *kernels.shape[:2])).flatten(2).squeeze(-1)
        _paint(axes, coefficients.numpy(), aspect="auto")
        title(figure, *heading, "one row per kernel;  red +, blue -")
        axes.set_xlabel("principal input directions, the strongest first", fontsize=8)
        axes.set_ylabel("kernels", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.locator_params(integer=True, nbins=_TICKS)
        return figure
    axes = figure.add_axes((_MARGIN, _MARGIN, 1 - 2 * _MARGIN, _BELOW_TITLE - _MARGIN))
    colour = kernels.shape[1] == 3 and kernels.dim() == 4
    cells = kernel_planes(shown if colour else project_kernels(shown, 1))
    grid = tile_cells(cells)
    if colour:
        axes.imshow(grid.nan_to_num(1.0).numpy(), interpolation="nearest")
        title(figure, *heading, "in the colours they respond to;  grey is 0")
    else:
        _paint(axes, grid[..., 0].numpy())
        what = "their weights" if kernels.shape[1] == 1 else "along their main input direction"
        title(figure, *heading, f"{what};  red +, blue -, grey: gaps")
    axes.set_axis_off()
    return figure


def _paint(axes: Axes, values: npt.NDArray[np.float32], aspect: Literal["equal", "auto"] = "equal") -> None:
    finite = np.abs(values[np.isfinite(values)])
    limit = float(finite.max()) if finite.size else 0.0
    colours = colormaps["RdBu_r"].with_extremes(bad="0.8")
    axes.imshow(values, cmap=colours, vmin=-(limit or 1.0), vmax=limit or 1.0, interpolation="nearest", aspect=aspect)


def project_kernels(kernels: Tensor, directions: int) -> Tensor:
    """Project kernels ``(J, C, *k)`` on the leading principal directions of the input channels, ``(J, directions,
    *k)``."""
    if kernels.shape[1] == 1:
        return kernels
    columns = kernels.flatten(2).transpose(0, 1).flatten(1).float()  # (C, J * k)
    leading = _leading_directions(columns, directions)
    # Eigenvectors have no sign. Choose the one in which most weight is positive, so that pictures do not flip between
    # epochs.
    leading = leading * torch.where(leading.sum(dim=0) < 0, -1.0, 1.0)
    return torch.einsum("jc...,cn->jn...", kernels.float(), leading)


def _leading_directions(columns: Tensor, count: int) -> Tensor:
    """Return the left singular directions of the ``count`` largest singular values, ``(C, n)`` to orthonormal ``(C,
    count)``.

    It uses subspace iteration, because a picture needs few directions and all directions of a 2048-channel layer would
    take seconds.
    """
    extra = min(count + 8, *columns.shape)
    start = torch.randn(columns.shape[1], extra, generator=keyed_generator("directions"), dtype=columns.dtype)
    basis = torch.linalg.qr(columns @ start.to(columns.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(columns @ (columns.mT @ basis)).Q
    left, _, _ = torch.linalg.svd(basis.mT @ columns, full_matrices=False)
    projected = basis @ left[:, :count]
    missing = count - projected.shape[1]
    return projected if missing <= 0 else torch.nn.functional.pad(projected, (0, missing))


def kernel_planes(kernels: Tensor) -> Tensor:
    """Return kernels ``(J, C, *k)`` as images ``(J, h, w, C)``: the middle slice of 3-D kernels, one row for 1-D
    kernels."""
    if kernels.dim() == 5:
        kernels = kernels[:, :, kernels.shape[2] // 2]
    if kernels.dim() == 3:
        kernels = kernels.unsqueeze(2)
    return kernels.float().permute(0, 2, 3, 1)


def tile_cells(cells: Tensor) -> Tensor:
    """Arrange images ``(J, h, w, C)`` in a near-square grid ``(H, W, C)`` with gaps of NaN. Colours are scaled to [0,
    1] around grey."""
    count, height, width, channels = cells.shape
    columns = max(1, round(math.sqrt(count * height / width)))
    rows = math.ceil(count / columns)
    if channels == 3:
        peak = cells.abs().amax()
        cells = 0.5 + cells / (2 * peak if peak > 0 else 1.0)
    grid = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), math.nan)
    for index, cell in enumerate(cells):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        grid[top : top + height, left : left + width] = cell
    return grid
