"""Entropy of images, and the depth bound that follows. Pure tensor functions on any device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = [
    "DepthBound",
    "EntropyStatistics",
    "Measurement",
    "Rounding",
    "Unit",
    "depth_from_entropy",
    "image_entropy",
]

Unit = Literal["nats", "bits"]
Rounding = Literal["ceil", "floor", "round"]

# Values of a chunk are counted at once, as 64-bit integers: tens of MiB in all.
_CHUNK = 1 << 20
_LEVELS = 256


def image_entropy(images: Tensor, *, first: int = 0) -> Tensor:
    """Return the Shannon entropy of the histogram of values of each image, in nats.

    ``H = -sum_v p_v ln p_v``, where ``p_v`` is the fraction of entries (all channels pooled) that equal ``v`` exactly,
    without binning. This is scikit-image's ``shannon_entropy(image, base=e)``. It is 0 for a constant image and at most
    ``ln 256 = 5.545`` for 8-bit images.

    Args:
        images: ``(N, ...)``, any real dtype and device. ``uint8`` takes one bincount per chunk, other dtypes a sort.
        first: number of the first image, for errors.

    Returns:
        ``(N,)`` float64 on the same device.

    Raises:
        TypeError: complex numbers.
        ValueError: there is no axis ``N``, images have no entries, or an image has NaN or infinite values, by its
            number.
    """
    if images.ndim < 2:
        raise ValueError(f"images must be (N, ...) with at least one axis per image, got shape {tuple(images.shape)}")
    if images.is_complex():
        raise TypeError(f"images must be real numbers, got {images.dtype}; measure their absolute values")
    flat = images.detach().flatten(1)
    count, entries = flat.shape
    if entries == 0:
        raise ValueError(f"images must have entries, got shape {tuple(images.shape)}")
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    elif flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()  # exact, and sorted faster
    elif not flat.is_floating_point() and flat.dtype != torch.uint8:
        flat = flat.to(torch.int64)
    result = torch.empty(count, dtype=torch.float64, device=flat.device)
    rows = max(1, _CHUNK // max(entries, _LEVELS))
    for start in range(0, count, rows):
        part = flat[start : start + rows]
        if part.is_floating_point():
            _require_finite(part, first + start)
        result[start : start + rows] = (
            _entropy_of_bytes(part) if part.dtype == torch.uint8 else _entropy_of_values(part)
        )
    return result


def _require_finite(part: Tensor, start: int) -> None:
    bad = ~torch.isfinite(part).all(dim=1)
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        values = "NaN values" if bool(part[index].isnan().any()) else "infinite values"
        raise ValueError(f"image {start + index} holds {values}, which have no entropy. Repair or remove it")


def _entropy_of_bytes(part: Tensor) -> Tensor:
    count, entries = part.shape
    offsets = torch.arange(count, device=part.device)[:, None] * _LEVELS
    histogram = torch.bincount((part.to(torch.int64) + offsets).flatten(), minlength=count * _LEVELS)
    return _entropy_of_counts(histogram.view(count, _LEVELS), entries)


def _entropy_of_values(part: Tensor) -> Tensor:
    count, entries = part.shape
    ordered = part.sort(dim=1).values
    starts = torch.ones_like(ordered, dtype=torch.int64)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # Rank of each entry among the distinct values of its image.
    label = starts.cumsum(dim=1) - 1 + torch.arange(count, device=part.device)[:, None] * entries
    histogram = torch.bincount(label.flatten(), minlength=count * entries)
    return _entropy_of_counts(histogram.view(count, entries), entries)


def _entropy_of_counts(histogram: Tensor, entries: int) -> Tensor:
    entropy: Tensor = torch.special.entr(histogram.double() / entries).sum(dim=1)
    return entropy.abs()  # entr(1) is -0.0


class EntropyStatistics:
    """Mean and standard deviation of entropies that come in parts, in constant memory."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    def add(self, entropies: Tensor) -> None:
        """Add ``(n,)`` values."""
        n = entropies.numel()
        if n == 0:
            return
        values = entropies.double()
        mean = float(values.mean())
        squares = float((values - mean).square().sum())
        # Chan's update: exact for parts of any size, without the cancellation of summed squares.
        delta, total = mean - self.mean, self.count + n
        self.mean += delta * n / total
        self._squares += squares + delta * delta * self.count * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation over all values (of the population: 0 for a single image)."""
        return math.sqrt(self._squares / self.count) if self.count else 0.0


def depth_from_entropy(entropy: float, rounding: Rounding = "ceil") -> int:
    """Return the bound on the convolutions per stage: the mean entropy, rounded, at least 1. A heuristic, see the card.

    Args:
        entropy: mean entropy of the images, in nats or bits.
        rounding: ``"round"`` rounds halves up.

    Raises:
        ValueError: an unknown rounding, or a negative or non-finite entropy.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of 'ceil', 'floor', 'round', got {rounding!r}")
    if not 0 <= entropy < math.inf:
        raise ValueError(f"entropy must be a finite number >= 0, got {entropy!r}")
    # Without it the last bit of a logarithm could add a layer: 256 equally frequent values must have 8 bits, not 8 +
    # 1e-15.
    steady = round(entropy, 9)
    rounded = {"ceil": math.ceil(steady), "floor": math.floor(steady), "round": math.floor(steady + 0.5)}[rounding]
    return max(1, rounded)


@dataclass(frozen=True)
class DepthBound:
    """Bound on the convolutions per stage, and the measurement behind it.

    Attributes:
        entropy: mean over the images, in ``unit``.
        bound: convolutions per stage; see :func:`depth_from_entropy`.
        n_images: images measured.
        std: standard deviation of the entropy over the images, in ``unit``.
        unit: ``"nats"`` or ``"bits"``.
        rounding: how the bound was rounded.
        source: what was measured, in words.
        notes: what may have raised or lowered the entropy, one sentence each.
    """

    entropy: float
    bound: int
    n_images: int
    std: float
    unit: Unit = "nats"
    rounding: Rounding = "ceil"
    source: str = "images"
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return a paragraph with entropy, bound, measured images and notes."""
        lines = [
            f"entropy {self.entropy:.3f} ± {self.std:.3f} {self.unit} (mean and deviation over {self.n_images:,} "
            f"images: {self.source}). Bound: at most {self.bound} convolutions per stage (heuristic, see docs)."
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class Measurement(NamedTuple):
    """Result of a pass over images in plain values, independent of the unit of the bound.

    Attributes:
        entropy: mean over the images, in nats.
        std: standard deviation over the images, in nats.
        n_images: images measured.
        source: what was measured, in words.
        notes: what may have raised or lowered the entropy, one sentence each.
    """

    entropy: float
    std: float
    n_images: int
    source: str = "images"
    notes: tuple[str, ...] = ()

    def bound(self, unit: Unit = "nats", rounding: Rounding = "ceil") -> DepthBound:
        """Return the depth bound that follows.

        Raises:
            ValueError: an unknown unit or rounding.
        """
        if unit not in get_args(Unit):
            raise ValueError(f"unit must be one of 'nats', 'bits', got {unit!r}")
        scale = 1.0 if unit == "nats" else 1 / math.log(2)
        bound = depth_from_entropy(self.entropy * scale, rounding)
        return DepthBound(
            self.entropy * scale, bound, self.n_images, self.std * scale, unit, rounding, self.source, self.notes
        )
