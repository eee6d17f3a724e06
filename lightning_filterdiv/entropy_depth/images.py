"""Read images from tensors, data sets, loaders and data modules, as batches of ``(n, ...)`` tensors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

__all__ = ["UNSIZED_LIMIT", "ImageDataError", "ImageSource", "image_source", "loader_source"]

#: Images to measure if data have no length, because they may never end.
UNSIZED_LIMIT = 50_000
_ROWS = 1024
_AS_SEEN = "measured as the network sees them: random augmentation, cropping and padding are part of it"


class ImageDataError(ValueError):
    """Data hold no images that can be measured. The message says what was found and what is needed."""


class ImageSource(NamedTuple):
    """Images to measure.

    Attributes:
        batches: one pass over ``(n, ...)`` tensors of images.
        length: number of batches; ``None`` if unknown.
        description: description of the images.
        notes: remarks for the reader, one sentence each.
        generators: random generators, other than the global ones, that reading advances.
    """

    batches: Iterator[Tensor]
    length: int | None
    description: str
    notes: tuple[str, ...] = ()
    generators: tuple[torch.Generator, ...] = ()


def image_source(data: Any, max_images: int | None = None) -> ImageSource:
    """Find the images of ``data``.

    Args:
        data: images ``(N, ...)``; a data set or sequence whose items are an image or begin with one; a data module,
            whose training data are used; or a loader.
        max_images: number of images to measure: evenly spaced over data with items, else the first ones.

    Raises:
        ImageDataError: ``data`` hold no images.
    """
    name = type(data).__name__
    if isinstance(data, Tensor | np.ndarray):
        return _array_source(data, f"{name} of shape {tuple(data.shape)}", range(len(data)), max_images)
    if hasattr(data, "train_dataloader") and hasattr(data, "setup"):
        data.prepare_data()
        data.setup("fit")
        return loader_source(data.train_dataloader(), max_images)
    if isinstance(data, IterableDataset):
        return _read(data, 2, f"items of {name}", max_images)
    has_items = hasattr(data, "__getitem__") and isinstance(data, Sized)
    if isinstance(data, str | bytes) or not (has_items or hasattr(data, "__iter__")):
        raise ImageDataError(
            f"cannot find images in {name}: give a tensor (N, ...), a data set, a DataLoader or a LightningDataModule"
        )
    if not has_items or isinstance(data, Mapping):
        return loader_source(data, max_images)
    if (raw := _raw_images(data)) is not None:
        return _array_source(*raw, max_images)
    chosen = _evenly_spaced(range(len(data)), max_images)
    items = (_first_images(data[index], 2, f"items of {name}")[None] for index in chosen)
    return ImageSource(items, len(chosen), f"items of {name}")


def loader_source(loader: Any, max_images: int | None = None) -> ImageSource:
    """Find the images in the batches of ``loader``: the first tensor with three or more dimensions in each.

    The raw 8-bit images that torchvision's data sets keep in ``.data`` are read instead of batches, un-augmented.

    Args:
        loader: yields batches; or several ``DataLoader`` in a list or dict, which are read one after the other.
        max_images: number of images to measure: evenly spaced over raw images, else the first ones.
    """
    several = list(loader.values()) if isinstance(loader, Mapping) else loader
    if isinstance(several, list | tuple) and several and all(isinstance(part, DataLoader) for part in several):
        each = None if max_images is None else -(-max_images // len(several))
        sources = [loader_source(part, each) for part in several]
        return ImageSource(
            chain.from_iterable(source.batches for source in sources),
            None,
            "; ".join(dict.fromkeys(source.description for source in sources)),
            tuple(dict.fromkeys(note for source in sources for note in source.notes)),
            tuple(generator for source in sources for generator in source.generators),
        )
    if not isinstance(loader, DataLoader):
        return _read(loader, 3, f"batches of {type(loader).__name__}", max_images)
    # Another sampler may leave images out, or draw some of them more often.
    draws_each_once = isinstance(loader.sampler, DistributedSampler | RandomSampler | SequentialSampler)
    if draws_each_once and (raw := _raw_images(loader.dataset)) is not None:
        return _array_source(*raw, max_images)
    return _read(loader, 3, f"batches of a DataLoader over {type(loader.dataset).__name__}", max_images)


def _as_tensor(value: Any) -> Tensor | None:
    """Return a tensor, numpy array or PIL image as a tensor; ``None`` for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    is_pil = hasattr(value, "getbands") and hasattr(value, "tobytes")
    if not is_pil and not (isinstance(value, np.ndarray) and value.dtype.kind in "uifbc"):
        return None
    return torch.from_numpy(np.array(value))  # a copy: the buffers of PIL and of memory maps are read-only


def _first_images(part: Any, axes: int, description: str) -> Tensor:
    """Return the first tensor with at least ``axes`` dimensions: 2 for an item, 3 for a batch."""
    leaves = tree_leaves(part)
    for leaf in leaves:
        if (images := _as_tensor(leaf)) is not None and images.ndim >= axes:
            return images
    raise ImageDataError(
        f"{description} hold no images: {'a batch' if axes == 3 else 'an item'} has "
        f"{', '.join(map(_shape, leaves[:4])) or 'no part'}. Give a data set of images, or a loader whose batches hold "
        f"them as a tensor (N, ...) with two or more dimensions per image"
    )


def _shape(leaf: Any) -> str:
    tensor = _as_tensor(leaf)
    return type(leaf).__name__ if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).split('.')[-1]}"


def _raw_images(data: Any) -> tuple[Any, str, Sequence[int]] | None:
    """Return the raw array of a data set such as torchvision's CIFAR10, its description, and the rows to use."""
    indices: Sequence[int] = range(len(data))
    while isinstance(data, Subset):
        inner = data.indices
        indices, data = [inner[i] for i in indices], data.dataset
    raw = getattr(data, "data", None)
    if not isinstance(raw, Tensor | np.ndarray) or raw.ndim < 3 or str(raw.dtype).split(".")[-1] != "uint8":
        return None
    return (raw, f"raw 8-bit images of {type(data).__name__}", indices) if len(raw) == len(data) else None


def _evenly_spaced(indices: Sequence[int], max_images: int | None) -> Sequence[int]:
    """Return ``max_images`` evenly spaced indices, because data are often sorted by class."""
    length = len(indices)
    if max_images is None or max_images >= length:
        return indices
    return [indices[i * length // max_images] for i in range(max_images)]


def _array_source(array: Any, description: str, indices: Sequence[int], max_images: int | None) -> ImageSource:
    if array.ndim < 3:
        raise ImageDataError(f"{description} holds no images: they need at least height and width")
    chosen = _evenly_spaced(indices, max_images)
    starts = range(0, len(chosen), _ROWS)
    batches = (_first_images(array[list(chosen[start : start + _ROWS])], 3, description) for start in starts)
    return ImageSource(batches, len(starts), description)


def _read(data: Iterable[Any], axes: int, description: str, max_images: int | None) -> ImageSource:
    """Yield batches (``axes=3``) or items (``axes=2``) in the order of ``data``."""
    length = _length(data)
    notes = [_AS_SEEN] if axes == 3 else []
    limit = max_images
    if length is None and limit is None:
        limit = UNSIZED_LIMIT
        notes.append(f"the data do not know their length: at most the first {limit:,} images count; see max_images")
    generator = getattr(data, "generator", None)
    generators = (generator,) if isinstance(generator, torch.Generator) else ()
    batches = _batches(data, axes, description, limit or sys.maxsize)
    return ImageSource(batches, length if limit is None else None, description, tuple(notes), generators)


def _batches(data: Iterable[Any], axes: int, description: str, limit: int) -> Iterator[Tensor]:
    for part in _reader(data):
        images = _first_images(part, axes, description)
        images = (images if axes == 3 else images[None])[:limit]
        yield images
        limit -= len(images)
        if not limit:
            return


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _reader(data: Any) -> Any:
    """Return a shallow copy, so that a loader keeps its position in the epoch and does not start its workers."""
    try:
        clone = copy.copy(data)
    except TypeError:
        return data
    if isinstance(clone, DataLoader):
        vars(clone).update(_iterator=None, dataset=copy.copy(data.dataset), persistent_workers=False)
    return clone
