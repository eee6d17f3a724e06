"""Finding images: in an item or a batch of any usual form, and what their values look like."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["ImageDataError", "Looks", "as_tensor", "find_image", "is_empty", "require_image", "stacked", "what_is"]

#: Names that data sets give to the image of an item, in order of preference.
_NAMES = ("image", "images", "img", "pixel_values", "x", "input", "inputs", "data")
#: Entries that are pooled into one stack, so that large images do not fill the memory: 64 MiB as 64-bit integers.
_STACK = 1 << 23


class ImageDataError(ValueError):
    """Data that hold no images, or none that can be measured. The message says what was found and what would do."""


def as_tensor(value: Any) -> Tensor | None:
    """A tensor, numpy array or PIL image as a tensor without copying more than needed; ``None`` for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    if hasattr(value, "getbands") and hasattr(value, "tobytes"):
        value = np.array(value)  # PIL; a copy, because PIL's own buffer is read-only
    if isinstance(value, np.ndarray) and value.dtype.kind in "uifb":
        wide = value.dtype.kind == "u" and value.dtype.itemsize > 1
        return torch.from_numpy(np.require(value.astype(np.int64) if wide else value, requirements=["C", "W"]))
    return None


def find_image(value: Any, axes: int) -> Tensor | None:
    """The image in an item (``axes=2``: at least height and width) or the images of a batch (``axes=3``).

    Tuples and lists are searched in order; dicts by the usual names first. ``None`` where there is none.
    """
    tensor = as_tensor(value)
    if tensor is not None:
        return tensor if tensor.ndim >= axes and tensor.numel() and not tensor.is_complex() else None
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = [*(value[name] for name in _NAMES if name in value), *value.values()]
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = value
    return next((found for part in parts if (found := find_image(part, axes)) is not None), None)


def is_empty(batch: Any) -> bool:
    """Whether a batch holds tensors or arrays, and all of them no row."""
    parts = [part for part in tree_leaves(batch) if isinstance(part, Tensor | np.ndarray)]
    return bool(parts) and all(part.ndim and not len(part) for part in parts)


def what_is(value: Any) -> str:
    """A short description of an item or batch for an error message."""
    tensor = as_tensor(value)
    if tensor is not None:
        return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {what_is(part)}" for key, part in list(value.items())[:4]) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(what_is(part) for part in value[:4]) + (", ...)" if len(value) > 4 else ")")
    return type(value).__name__


def require_image(part: Any, axes: int, description: str) -> Tensor:
    """The image of an item (``axes=2``) or the images of a batch (``axes=3``).

    Raises:
        ImageDataError: there is none; with what was found instead.
    """
    image = find_image(part, axes)
    if image is None:
        kind = "a batch" if axes == 3 else "an item"
        raise ImageDataError(
            f"{description} hold no images: {kind} is {what_is(part)}. Give a data set of images, or a loader whose "
            f"batches hold them as a tensor (N, ...), alone, first in a tuple, or under 'image' in a dict"
        )
    return image


def stacked(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Gather single images into ``(n, ...)`` stacks of one shape and type, of limited size."""
    waiting: list[Tensor] = []
    for image in images:
        first = waiting[0] if waiting else image
        full = len(waiting) * first.numel() >= _STACK or len(waiting) >= 256
        if waiting and (full or image.shape != first.shape or image.dtype != first.dtype):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)


class Looks:
    """Notices, batch by batch, whether images were normalised, and says what that means for their entropy."""

    def __init__(self) -> None:
        self._low, self._high, self._channels, self._floating = float("inf"), float("-inf"), 1, False

    def see(self, images: Tensor) -> None:
        """Look at ``(n, ...)`` images; floating ones are taken to be channels first."""
        if not images.is_floating_point():
            return
        self._floating = True
        low, high = torch.aminmax(images)
        self._low, self._high = min(self._low, float(low)), max(self._high, float(high))
        self._channels = max(self._channels, images.shape[1] if images.ndim >= 4 else 1)

    def notes(self) -> list[str]:
        """Sentences about what was seen; empty for raw images."""
        if not self._floating or self._low >= 0:
            return []
        span = f"float images between {self._low:.3g} and {self._high:.3g} look normalised"
        if self._channels == 1:
            return [f"{span}; they have one channel, where that leaves the entropy unchanged"]
        return [
            f"{span}; normalised per channel, channels no longer share values and the entropy comes out higher than "
            f"that of the raw images. They were measured as they are: measure the raw images for the bound of the data"
        ]
