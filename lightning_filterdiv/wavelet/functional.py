"""Wavelet transforms of images as tensor functions, on ``ptwt`` (transforms) and PyWavelets (filters)."""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Band", "dilated_details", "filters_of", "libraries", "local_maxima", "reconstruct"]

Band = Literal["approximation", "horizontal", "vertical", "diagonal"]
_DETAILS = ("horizontal", "vertical", "diagonal")  # the order of ptwt and PyWavelets


def libraries() -> tuple[ModuleType, ModuleType]:
    """Import and return ``ptwt`` and ``pywt``.

    Raises:
        ImportError: they are not installed. The message says how to install them.
    """
    try:
        import ptwt
        import pywt
    except ImportError as error:
        raise ImportError(
            "wavelet layers need ptwt and PyWavelets: pip install 'lightning-filterdiv[wavelets]'"
        ) from error
    return ptwt, pywt


def filters_of(wavelet: str) -> tuple[Tensor, Tensor]:
    """Return the low-pass and high-pass filters of the decomposition, ``(L,)`` each, in float64.

    Raises:
        ValueError: PyWavelets knows no discrete wavelet of this name.
    """
    _, pywt = libraries()
    if wavelet not in pywt.wavelist(kind="discrete"):
        raise ValueError(f"wavelet must be a discrete wavelet of PyWavelets ('haar', 'db2', ...), got {wavelet!r}")
    known = pywt.Wavelet(wavelet)
    low, high = (torch.tensor(taps, dtype=torch.float64) for taps in (known.dec_lo, known.dec_hi))
    return low, high


def reconstruct(x: Tensor, wavelet: str, level: int, keep: Collection[str]) -> Tensor:
    """Decompose, set the sub-bands that are not kept to zero, and reconstruct (symmetric borders).

    Args:
        x: ``(B, C, H, W)``.
        wavelet: name of a discrete wavelet.
        level: level of the decomposition; details of all levels are kept or dropped alike.
        keep: some of ``approximation`` (the coarsest), ``horizontal``, ``vertical``, ``diagonal``.

    Returns:
        ``(B, C, H, W)``. With all four sub-bands it is ``x`` up to rounding.
    """
    ptwt, _ = libraries()
    approximation, *details = ptwt.wavedec2(x, wavelet, mode="symmetric", level=level)
    if "approximation" not in keep:
        approximation = torch.zeros_like(approximation)
    chosen = [
        type(detail)(*(band if name in keep else torch.zeros_like(band)
                       for name, band in zip(_DETAILS, detail, strict=True)))
        for detail in details
    ]  # fmt: skip
    y: Tensor = ptwt.waverec2((approximation, *chosen), wavelet)
    return y[..., : x.shape[-2], : x.shape[-1]]


def _filtered(x: Tensor, taps: Tensor, dilation: int, dim: int) -> Tensor:
    """Convolve along ``dim`` (2 or 3), borders continued."""
    kernel = taps.flip(0).to(x.device, x.dtype)
    total = dilation * (len(kernel) - 1)
    pads = (total // 2, total - total // 2)
    padded = F.pad(x, (0, 0, *pads) if dim == 2 else (*pads, 0, 0), mode="replicate")
    shape, spread = ((-1, 1), (dilation, 1)) if dim == 2 else ((1, -1), (1, dilation))
    weight = kernel.reshape(1, 1, *shape).expand(x.shape[1], 1, *(len(kernel) if s < 0 else 1 for s in shape))
    return F.conv2d(padded, weight, dilation=spread, groups=x.shape[1])


def dilated_details(x: Tensor, low: Tensor, high: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """Return undecimated details (a trous) at scale ``2^level``, along x and along y.

    Args:
        x: ``(B, C, H, W)``.
        low, high: ``(L,)`` filters.
        level: ``>= 1``; filters are dilated by ``2^(level - 1)``, after ``level - 1`` smoothings.

    Returns:
        ``(B, C, H, W)`` twice.
    """
    for step in range(level - 1):
        x = _filtered(_filtered(x, low, 2**step, 2), low, 2**step, 3)
    dilation = 2 ** (level - 1)
    along_x = _filtered(_filtered(x, low, dilation, 2), high, dilation, 3)
    along_y = _filtered(_filtered(x, high, dilation, 2), low, dilation, 3)
    return along_x, along_y


def local_maxima(along_x: Tensor, along_y: Tensor) -> Tensor:
    """Return the modulus of the gradient where it is largest along the gradient's direction, and zero elsewhere.

    Mallat, Zhong (1992), with directions in steps of 45 degrees. A pixel stays if its modulus is at least that of the
    neighbour behind it along the gradient, and above that of the neighbour ahead.

    Args:
        along_x, along_y: ``(B, C, H, W)``.

    Returns:
        ``(B, C, H, W)``, non-negative.
    """
    modulus = torch.hypot(along_x, along_y)
    padded = F.pad(modulus, (1, 1, 1, 1))
    height, width = modulus.shape[-2:]

    def neighbour(dy: int, dx: int) -> Tensor:
        return padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    steep = 1 + 2**0.5  # the tangent of 67.5 degrees
    level = along_y.abs() * steep < along_x.abs()
    upright = along_y.abs() > steep * along_x.abs()
    rising = along_x * along_y > 0
    conditions = (level, upright, rising & ~level & ~upright, ~rising & ~level & ~upright)
    stays = torch.zeros_like(level)
    for condition, (dy, dx) in zip(conditions, ((0, 1), (1, 0), (1, 1), (1, -1)), strict=True):
        stays |= condition & (modulus >= neighbour(-dy, -dx)) & (modulus > neighbour(dy, dx))
    return modulus * stays
