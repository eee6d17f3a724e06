"""Where images come from: arrays, data sets, loaders and data modules, un-augmented where that can be had."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_filterdiv.entropy_depth.datasets import item_source
from lightning_filterdiv.entropy_depth.images import (
    ImageDataError,
    as_tensor,
    is_empty,
    require_image,
    stacked,
    what_is,
)
from lightning_filterdiv.entropy_depth.source import ImageSource, array_source, digest, joined, picked

__all__ = ["UNSIZED_LIMIT", "image_source"]

#: Images measured of data that do not know their length: they may never end.
UNSIZED_LIMIT = 50_000
_EACH_ONCE = (DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler)


def image_source(data: Any, max_images: int | None = None, *, loader: bool = False) -> ImageSource:
    """Find the images of ``data``.

    In this order: arrays ``(N, ...)``; data modules (their training data); loaders (the data set behind them, or the
    batches of one that has no items); data sets: raw 8-bit arrays in ``.data`` as torchvision keeps them, the tensors
    of a ``TensorDataset``, items without their transforms, items as they come.

    Args:
        data: any of these.
        max_images: measure so many: evenly spaced over data with items, the first ones of a stream.
        loader: iterables that are no ``DataLoader`` yield batches (what a Trainer takes), not items.

    Raises:
        ImageDataError: empty, or holding no images.
    """
    tensor = as_tensor(data)
    if tensor is not None:
        return array_source(
            tensor, f"{type(data).__name__} of shape {tuple(tensor.shape)}", picked(len(tensor), max_images)
        )
    if hasattr(data, "train_dataloader") and hasattr(data, "setup"):
        data.prepare_data()
        data.setup("fit")
        return image_source(data.train_dataloader(), max_images, loader=True)
    if isinstance(data, DataLoader):
        return _loader(data, max_images)
    parts = list(data.values()) if isinstance(data, Mapping) else data
    if isinstance(parts, list | tuple) and parts and all(isinstance(part, DataLoader) for part in parts):
        each = None if max_images is None else -(-max_images // len(parts))
        return joined([_loader(part, each) for part in parts])
    if isinstance(data, IterableDataset):
        return _stream(data, 2, max_images, f"items of {type(data).__name__}")
    if not loader and hasattr(data, "__getitem__") and isinstance(data, Sized) and not isinstance(data, str | Mapping):
        return item_source(data, None, max_images, workers=0)
    if hasattr(data, "__iter__") and not isinstance(data, str | bytes | Mapping):
        return _stream(data, 3, max_images, f"batches of {type(data).__name__}")
    raise ImageDataError(
        f"cannot find images in {what_is(data)}: give a tensor (N, ...), a data set, a DataLoader or a "
        f"LightningDataModule"
    )


def _loader(loader: DataLoader[Any], max_images: int | None) -> ImageSource:
    data, sampler = loader.dataset, loader.sampler
    name = type(data).__name__
    if isinstance(data, IterableDataset) or loader.batch_sampler is None:
        return _stream(loader, 3, max_images, f"batches of a DataLoader over {name}, as the network sees them")
    indices = list(sampler.indices) if isinstance(sampler, SubsetRandomSampler) else None
    try:
        source = item_source(data, indices, max_images, workers=loader.num_workers)
    except ImageDataError:
        # Its collate function may make images of what the items hold.
        if isinstance(data, Sized) and len(data) == 0:
            raise
        return _stream(loader, 3, max_images, f"batches of a DataLoader over {name}, as the network sees them")
    if not isinstance(sampler, _EACH_ONCE):
        source.notes.append(f"every image counts once, however often the loader's {type(sampler).__name__} draws it")
    return source


def _stream(data: Any, axes: int, max_images: int | None, description: str) -> ImageSource:
    """Batches (``axes=3``) or items (``axes=2``) in the order in which ``data`` yields them."""
    length = _images_in(data) if axes == 3 else _length(data)
    if length == 0:
        raise ImageDataError(
            f"{description}: the data set is empty, there is nothing to measure; check its folder, split or indices"
        )
    inner = data.dataset if isinstance(data, DataLoader) else data
    held = vars(inner).values() if hasattr(inner, "__dict__") else ()
    once = isinstance(data, Iterator) or any(isinstance(value, Iterator) for value in held)
    notes = ["random augmentation, cropping and padding are part of what was measured"] if axes == 3 else []
    limit = max_images
    if length is None and limit is None:
        limit = UNSIZED_LIMIT
        notes.append(f"the data do not know their length: at most the first {limit:,} images count; see max_images")

    def batches() -> Iterator[Tensor]:
        seen = 0
        parts = (part for part in _reader(data) if axes == 2 or not is_empty(part))
        found = (require_image(part, axes, description) for part in parts)
        for images in found if axes == 3 else stacked(found):
            images = images if limit is None else images[: limit - seen]
            seen += len(images)
            yield images
            if seen == limit:
                return

    expected = min((n for n in (length, limit) if n is not None), default=None)
    mark = digest("stream", type(data).__qualname__, type(inner).__qualname__, length, max_images)
    source = ImageSource(batches, expected, description, notes, mark, stream=True, once=once)
    if isinstance(data, DataLoader) and data.generator is not None:
        source.generators = (data.generator,)
    return source


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _images_in(loader: Any) -> int | None:
    """Images in a pass over a loader, as far as it tells; a last batch that is not full counts as full."""
    count = _length(loader)
    if isinstance(loader, DataLoader) and loader.batch_sampler is not None:
        return _length(loader.dataset)
    size = getattr(loader, "batch_size", None)
    return count * size if count is not None and isinstance(size, int) else 0 if count == 0 else None


def _reader(data: Any) -> Any:
    """A shallow copy, so that a loader's own position in its epoch does not move."""
    try:
        clone = copy.copy(data)
    except TypeError:
        return data
    if isinstance(clone, DataLoader):
        vars(clone).update(_iterator=None, dataset=copy.copy(data.dataset), persistent_workers=False)
    return clone
