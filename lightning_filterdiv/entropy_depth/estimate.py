"""``estimate_depth_bound``: one pass over the images, in constant memory."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lightning_filterdiv.entropy_depth.functional import (
    DepthBound,
    EntropyStatistics,
    Measurement,
    Rounding,
    Unit,
    image_entropy,
)
from lightning_filterdiv.entropy_depth.images import ImageDataError, ImageSource, image_source
from lightning_filterdiv.tensors.arguments import check_choice, check_integer

__all__ = ["NormalizationCheck", "estimate_depth_bound", "measure", "preserve_rng_state"]


class NormalizationCheck:
    """Notices, batch by batch, whether images were normalised, and says what that means for their entropy."""

    def __init__(self) -> None:
        self._low, self._high, self._channels = math.inf, -math.inf, 1

    def update(self, images: Tensor) -> None:
        """Take in ``(n, ...)`` images; floating ones are taken to be channels first."""
        if not images.is_floating_point() or not images.numel():
            return
        low, high = torch.aminmax(images)
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        self._channels = max(self._channels, images.shape[1] if images.ndim >= 4 else 1)

    def notes(self) -> list[str]:
        """Sentences about what was seen; empty for raw images."""
        if not self._low < 0:
            return []
        span = f"float images between {self._low:.3g} and {self._high:.3g} look normalised"
        if self._channels == 1:
            return [f"{span}; they have one channel, where that leaves the entropy unchanged"]
        return [
            f"{span}; normalised per channel, channels no longer share values and the entropy comes out higher than "
            f"that of the raw images. Measure the raw images for the bound of the data"
        ]


@contextmanager
def preserve_rng_state(*generators: torch.Generator) -> Iterator[None]:
    """Put the global generators of Python, numpy and torch, and ``generators``, back: measuring must not show later."""
    states = [(generator, generator.get_state()) for generator in generators]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in states:
            generator.set_state(state)


def measure(source: ImageSource, progress: bool = True) -> Measurement:
    """Read ``source``; all random generators are left as they were.

    Args:
        source: images.
        progress: show a line on a terminal while it takes long.

    Raises:
        ImageDataError: no image came, or one that has no entropy (NaN), with its number.
    """
    statistics, check = EntropyStatistics(), NormalizationCheck()
    line = tqdm(
        source.batches,
        desc="entropy of images",
        total=source.length,
        unit="batch",
        delay=1.0,
        leave=False,
        disable=None if progress else True,  # None: on a terminal only
    )
    with preserve_rng_state(*source.generators), line as batches:
        for images in batches:
            try:
                statistics.add(image_entropy(images, first=statistics.count))
            except ValueError as error:
                raise ImageDataError(f"{source.description}: {error}") from error
            check.update(images)
    if statistics.count == 0:
        raise ImageDataError(
            f"{source.description}: no image came, there is nothing to measure; check the folder, split or indices"
        )
    notes = (*source.notes, *check.notes())
    if statistics.mean > math.log(256):
        notes += ("more entropy than 8-bit images can have (ln 256): values were interpolated or rescaled",)
    return Measurement(statistics.mean, statistics.std, statistics.count, source.description, notes)


def estimate_depth_bound(
    data: Any,
    unit: Unit = "nats",
    rounding: Rounding = "ceil",
    max_images: int | None = None,
    *,
    progress: bool = True,
) -> DepthBound:
    """Estimate how many convolutions per stage are useful for these images.

    The bound is the rounded mean over the training images of each image's entropy: a heuristic after EBCLE (Gowdra et
    al., Pattern Recognition 2021), see the card. Nats give at most 6 (``ln 256 = 5.545``), bits at most 8.

    Args:
        data: images ``(N, ...)``, a data set, a ``DataLoader`` or a ``LightningDataModule``. Of torchvision data sets
            that keep raw 8-bit images those are measured; all others as they come, transforms included.
        unit: unit of the entropy that is rounded.
        rounding: rounding of the mean entropy.
        max_images: measure so many: evenly spaced over a data set, the first ones of a loader.
        progress: show a line on a terminal while it takes long.

    Returns:
        The bound, with entropy, deviation, number of images, source and notes.

    Raises:
        TypeError, ValueError: a bad argument, by name.
        ImageDataError: data that are empty, hold no images, or hold NaN.
    """
    check_choice("unit", unit, Unit)
    check_choice("rounding", rounding, Rounding)
    if max_images is not None:
        check_integer("max_images", max_images, low=1)
    with preserve_rng_state():
        source = image_source(data, max_images)
    return measure(source, progress).bound(unit, rounding)
