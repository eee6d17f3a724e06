"""What is measured: batches of images with a description, notes and a fingerprint."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_filterdiv.entropy_depth.images import ImageDataError, as_tensor

__all__ = ["ImageSource", "array_source", "digest", "joined", "picked", "sample_digest", "undisturbed"]

_ROWS = 1024
_SAMPLED = 16


@dataclass
class ImageSource:
    """Images to measure.

    Attributes:
        batches: starts a pass over ``(n, ...)`` tensors of images.
        length: images in a pass, ``None`` if unknown.
        description: what is measured, in words.
        notes: what the reader should know about it, one sentence each.
        fingerprint: tells data sets apart: type, length and a sample of the images where items can be picked; of a
            stream the type and length only.
        stream: read in order from a loader, not picked by index.
        once: reading it uses it up.
        generators: random generators that reading advances, beside the global ones.
    """

    batches: Callable[[], Iterator[Tensor]]
    length: int | None
    description: str
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""
    stream: bool = False
    once: bool = False
    generators: tuple[torch.Generator, ...] = ()


@contextmanager
def undisturbed(*generators: torch.Generator) -> Iterator[None]:
    """Put the global generators of Python, numpy and torch, and ``generators``, back: measuring must not show later."""
    states = [(generator, generator.get_state()) for generator in generators]
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        for generator, state in states:
            generator.set_state(state)


def picked(length: int, max_images: int | None, indices: Sequence[int] | None = None) -> Sequence[int]:
    """Evenly spaced indices: data sets are often sorted by class."""
    if indices is not None:
        return [indices[i] for i in picked(len(indices), max_images)]
    if length == 0:
        raise ImageDataError("the data set is empty: there is nothing to measure; check its folder, split or indices")
    if max_images is None or max_images >= length:
        return range(length)
    return [i * length // max_images for i in range(max_images)]


def digest(*parts: object) -> str:
    """A fingerprint of plain values."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def sample_digest(kind: str, chosen: Sequence[int], image: Callable[[int], Tensor]) -> str:
    """A fingerprint of the number of images and of a sample of them, evenly spaced."""
    step = max(1, len(chosen) // _SAMPLED)
    sample = [image(index) for index in chosen[::step][:_SAMPLED]]
    return digest(kind, len(chosen), [(t.shape, str(t.dtype), _bytes(t)) for t in sample])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def array_source(data: Any, description: str, chosen: Sequence[int]) -> ImageSource:
    """Rows ``chosen`` of an ``(N, ...)`` tensor or array.

    Raises:
        ImageDataError: fewer than two axes per image.
    """

    def rows(indices: Sequence[int]) -> Tensor:
        # A range is a view of the rows; a list copies no more than one batch.
        pick = slice(indices.start, indices.stop, indices.step) if isinstance(indices, range) else list(indices)
        tensor = as_tensor(data[pick])
        assert tensor is not None
        return tensor

    first = rows(chosen[:1])
    if first.ndim < 3:
        raise ImageDataError(f"{description} holds no images: they need at least height and width")

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(chosen), _ROWS):
            yield rows(chosen[start : start + _ROWS])

    fingerprint = sample_digest("array", chosen, lambda index: rows([index])[0])
    return ImageSource(batches, len(chosen), description, fingerprint=fingerprint)


def joined(sources: list[ImageSource]) -> ImageSource:
    """One after the other."""
    if len(sources) == 1:
        return sources[0]
    lengths = [source.length for source in sources if source.length is not None]
    return ImageSource(
        lambda: itertools.chain.from_iterable(source.batches() for source in sources),
        sum(lengths) if len(lengths) == len(sources) else None,
        "; ".join(dict.fromkeys(source.description for source in sources)),
        list(dict.fromkeys(note for source in sources for note in source.notes)),
        digest([source.fingerprint for source in sources]),
        any(source.stream for source in sources),
        any(source.once for source in sources),
        tuple(generator for source in sources for generator in source.generators),
    )
