"""Pictures of a layer as bare pixels, for a page that scales and labels them. They are fast enough for every layer."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from lightning_filterdiv.monitor.figures import kernel_planes, project_kernels, tile_cells
from lightning_filterdiv.monitor.views import LayerView

__all__ = ["as_data", "as_png", "gradient", "heat_map_pixels", "kernel_pixels", "mosaic_pixels"]

Pixels = npt.NDArray[np.uint8]
_CELLS = 192  # of a heat map, per side; more filters than that are averaged
_KERNELS = 256
_DIRECTIONS = 32
_GREY = 150


def as_png(pixels: Pixels, *, optimize: bool = False, palette: Sequence[int] | None = None) -> bytes:
    """Return the content of a PNG file of ``(h, w, 3 or 4)`` pixels, or of ``(h, w)`` indices into a palette."""
    image = Image.fromarray(pixels)
    if palette is not None:
        image = image.convert("P")
        image.putpalette(palette)
    file = io.BytesIO()
    image.save(file, format="png", optimize=optimize)
    return file.getvalue()


def as_data(content: bytes) -> str:
    """Return a PNG file as a ``data:`` address."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _palette(name: str) -> list[int]:
    """Return 254 colours of a map, then grey."""
    colours = (colormaps[name](np.linspace(0, 1, 255))[:, :3] * 255).round().astype(int)
    return [*colours.ravel().tolist(), _GREY, _GREY, _GREY]


def heat_map_pixels(values: Tensor, order: Sequence[int], top: float) -> bytes:
    """Return a PNG file of values between pairs: black is 0, yellow ``top`` and more, the diagonal grey."""
    ordered = values[list(order)][:, list(order)].float().clone()
    many = len(order) > _CELLS
    ordered.fill_diagonal_(0.0 if many else torch.nan)
    if many:
        ordered = torch.nn.functional.adaptive_avg_pool2d(ordered[None], _CELLS)[0]
    scaled = (ordered / max(top, 1e-12)).clamp(0.0, 1.0).mul(254).round().nan_to_num(255.0)
    return as_png(scaled.numpy().astype(np.uint8), optimize=True, palette=_palette("magma"))


def gradient() -> bytes:
    """Return a PNG file of the heat map's scale, from left to right."""
    return as_png(np.arange(255, dtype=np.uint8)[None], palette=_palette("magma"))


def _cells(kernels: Tensor) -> tuple[Tensor, Literal["colour", "weights", "direction", "directions"]]:
    """Return images ``(J, h, w, C)`` and a description."""
    if kernels.shape[1] == 3 and kernels.dim() == 4:
        return kernel_planes(kernels), "colour"
    if kernels[0, 0].numel() == 1:
        count = min(_DIRECTIONS, *kernels.shape[:2])
        return project_kernels(kernels, count).flatten(1)[:, None, :, None], "directions"
    return kernel_planes(project_kernels(kernels, 1)), "weights" if kernels.shape[1] == 1 else "direction"


def _painted(values: Tensor, peak: float) -> Pixels:
    """Return pixels ``(h, w, 4)``: blue for negative, red for positive, transparent for NaN. Three channels are colours
    already."""
    if values.shape[-1] == 3:
        alpha = values[..., :1].isfinite().float()
        return (torch.cat([values.clamp(0.0, 1.0).nan_to_num(), alpha], -1) * 255).round().numpy().astype(np.uint8)
    scaled = (0.5 + values[..., 0] / (2 * peak or 1.0)).numpy()
    painted: npt.NDArray[np.float64] = colormaps["RdBu_r"].with_extremes(bad=(0.0, 0.0, 0.0, 0.0))(
        np.ma.masked_invalid(scaled)
    )
    return (painted * 255).round().astype(np.uint8)


def mosaic_pixels(view: LayerView) -> tuple[bytes, str, int]:
    """Return a PNG file of the kernels in the order of the heat map, a description, and their number."""
    picked = torch.linspace(0, view.count - 1, min(view.count, _KERNELS)).long()
    cells, what = _cells(view.kernels[view.order][picked])
    grid = tile_cells(cells)
    shown = {
        "colour": "in the colours they respond to; grey is 0",
        "weights": "their weights; red is positive, blue negative",
        "direction": "along the main input direction; red is positive, blue negative",
        "directions": "one line each: coefficients in the main input directions, the strongest first",
    }[what]
    return as_png(_painted(grid, float(cells.abs().amax())), optimize=True), shown, len(picked)


def kernel_pixels(view: LayerView, positions: Sequence[int]) -> dict[int, bytes]:
    """Return PNG files of single kernels, in the colours of the mosaic."""
    cells, what = _cells(view.kernels)
    peak = float(cells.abs().amax())
    if what == "colour":
        cells = 0.5 + cells / (2 * peak or 1.0)
    return {position: as_png(_painted(cells[position], peak)) for position in positions}
