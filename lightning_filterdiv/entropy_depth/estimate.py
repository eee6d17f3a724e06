"""``estimate_depth_bound``: one pass over the images, in constant memory."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, TextIO

from lightning_filterdiv.entropy_depth.functional import DepthBound, EntropyStatistics, Rounding, Unit, image_entropy
from lightning_filterdiv.entropy_depth.images import ImageDataError, Looks
from lightning_filterdiv.entropy_depth.loaders import image_source
from lightning_filterdiv.entropy_depth.source import ImageSource, undisturbed
from lightning_filterdiv.tensors.arguments import check_choice, check_integer

__all__ = ["Measured", "estimate_depth_bound", "measure"]

#: Mean, deviation (nats), number of images, description, notes: plain values, for a checkpoint and a broadcast.
Measured = tuple[float, float, int, str, list[str]]


class _Progress:
    """A line on a terminal for passes that take longer than a moment; nothing elsewhere."""

    delay, every = 1.0, 0.2

    def __init__(self, total: int | None, stream: TextIO | None = None) -> None:
        self.total, self.stream = total, sys.stderr if stream is None else stream
        self._started = time.monotonic()
        self._shown = 0.0

    def update(self, done: int) -> None:
        """Show ``done`` images, now and then."""
        now = time.monotonic()
        if now - self._started < self.delay or now - self._shown < self.every or not self.stream.isatty():
            return
        self._shown = now
        if self.total:
            share = min(1.0, done / self.total)
            filled = int(24 * share)
            text = f"[{'#' * filled}{'.' * (24 - filled)}] {100 * share:3.0f} % of {self.total:,}"
        else:
            text = f"{done:,}"
        rate = done / (now - self._started)
        self.stream.write(f"\rentropy of images: {text} ({rate:,.0f}/s)\033[K")
        self.stream.flush()

    def close(self) -> None:
        """Wipe the line."""
        if self._shown:
            self.stream.write("\r\033[K")
            self.stream.flush()


def measure(source: ImageSource, progress: bool = True) -> Measured:
    """Read ``source`` once; the global random generators are left as they were.

    Raises:
        ImageDataError: no image came, or one that has no entropy (NaN), with its number.
    """
    statistics, looks = EntropyStatistics(), Looks()
    line = _Progress(source.length) if progress else None
    with undisturbed(*source.generators):
        for images in source.batches():
            try:
                statistics.add(image_entropy(images))
            except ValueError as error:
                raise ImageDataError(
                    f"{source.description}, in the {len(images)} images after the first {statistics.count:,}: {error}"
                ) from error
            looks.see(images)
            if line is not None:
                line.update(statistics.count)
    if line is not None:
        line.close()
    if statistics.count == 0:
        raise ImageDataError(f"{source.description}: no image came, there is nothing to measure")
    notes = [*source.notes, *looks.notes()]
    if statistics.mean > math.log(256):
        notes.append("more entropy than 8-bit images can have (ln 256): values were interpolated or rescaled")
    return statistics.mean, statistics.std, statistics.count, source.description, notes


def estimate_depth_bound(
    data: Any,
    unit: Unit = "nats",
    rounding: Rounding = "ceil",
    max_images: int | None = None,
    *,
    progress: bool = True,
) -> DepthBound:
    """How many convolutions per stage are useful for these images.

    The mean over the training images of each image's entropy, rounded. That entropy bounds the useful depth is the
    finding of EBCLE (Gowdra et al., Pattern Recognition 2021); **the rule is a reconstruction: the paper's depth
    equation could not be read**. Nats give at most 6 (``ln 256 = 5.545``), bits at most 8.

    Args:
        data: images ``(N, ...)``, a data set, a ``DataLoader`` or a ``LightningDataModule``. Raw images are preferred
            over transformed ones where both can be had; the result says what was measured.
        unit: of the entropy that is rounded.
        rounding: of the mean entropy.
        max_images: measure so many, evenly spaced over the data set (of a stream: the first ones).
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
    with undisturbed():
        source = image_source(data, max_images)
    mean, std, count, description, notes = measure(source, progress)
    return DepthBound.from_nats(mean, std, count, unit=unit, rounding=rounding, source=description, notes=tuple(notes))
