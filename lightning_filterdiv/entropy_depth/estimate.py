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
    """Detect batch by batch if images were normalised, and describe the effect on their entropy."""

    def __init__(self) -> None:
        self._low, self._high, self._channels = math.inf, -math.inf, 1

    def update(self, images: Tensor) -> None:
        """Add ``(n, ...)`` images. Floating ones are assumed to have channels first."""
        if not images.is_floating_point() or not images.numel():
            return
        low, high = torch.aminmax(images)
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        self._channels = max(self._channels, images.shape[1] if images.ndim >= 4 else 1)

    def notes(self) -> list[str]:
        """Return sentences about the images; empty for raw images."""
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
    """Restore the global generators of Python, numpy and torch, and ``generators``, so that measuring has no effect
    later."""
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
    """Measure ``source``. All random generators are restored.

    Args:
        source: images.
        progress: show a line on a terminal while it takes long.

    Raises:
        ImageDataError: there is no image, or one has NaN; the message gives its number.
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

    The bound is the mean entropy of the training images, rounded. It is a heuristic after EBCLE (Gowdra et al., Pattern
    Recognition 2021), see the card. For 8-bit images it is at most 6 in nats (``ln 256 = 5.545``) and 8 in bits.

    Args:
        data: images ``(N, ...)``, a data set, a ``DataLoader`` or a ``LightningDataModule``. Raw 8-bit images are
            measured if a torchvision data set keeps them. All other images are measured with their transforms.
        unit: unit of the entropy that is rounded.
        rounding: rounding of the mean entropy.
        max_images: number of images to measure: evenly spaced over a data set, the first ones of a loader.
        progress: show a line on a terminal while it takes long.

    Returns:
        The bound, with entropy, deviation, number of images, source and notes.

    Raises:
        TypeError, ValueError: a bad argument, by name.
        ImageDataError: the data are empty, hold no images, or hold NaN.
    """
    check_choice("unit", unit, Unit)
    check_choice("rounding", rounding, Rounding)
    if max_images is not None:
        check_integer("max_images", max_images, low=1)
    with preserve_rng_state():
        source = image_source(data, max_images)
    return measure(source, progress).bound(unit, rounding)
