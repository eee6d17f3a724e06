"""Images of data sets with items: raw arrays where there are some, else items, without their transforms if possible."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_filterdiv.entropy_depth.images import ImageDataError, find_image, require_image, stacked
from lightning_filterdiv.entropy_depth.source import ImageSource, array_source, digest, joined, picked, sample_digest

__all__ = ["item_source"]


def item_source(data: Any, indices: Sequence[int] | None, max_images: int | None, workers: int) -> ImageSource:
    """Images of a data set with ``__getitem__`` and ``__len__``.

    Args:
        data: the data set; ``Subset`` and ``ConcatDataset`` are looked into.
        indices: items that count, ``None`` for all.
        max_images: so many of them, evenly spaced.
        workers: processes that read items.

    Raises:
        ImageDataError: empty, or no image in the first item.
    """
    if len(data) == 0 or (indices is not None and len(indices) == 0):
        raise ImageDataError(
            f"{type(data).__name__}: the data set is empty, there is nothing to measure; check its folder, split "
            f"or indices"
        )
    if isinstance(data, Subset):
        inner = list(data.indices) if indices is None else [data.indices[i] for i in indices]
        return item_source(data.dataset, inner, max_images, workers)
    if isinstance(data, ConcatDataset) and indices is None:
        total = len(data)
        shares = [None if max_images is None else max(1, round(max_images * len(p) / total)) for p in data.datasets]  # type: ignore[arg-type]
        pairs = zip(data.datasets, shares, strict=True)
        return joined([item_source(part, None, share, workers) for part, share in pairs])
    chosen = picked(len(data), max_images, indices)
    name = type(data).__name__
    raw = getattr(data, "data", None)
    if isinstance(raw, Tensor | np.ndarray) and len(raw) == len(data) and raw.ndim >= 3 and _is_bytes(raw):
        return array_source(raw, f"raw 8-bit images of {name}", chosen)
    if isinstance(data, TensorDataset):
        tensor = next((t for t in data.tensors if t.ndim >= 3), None)
        if tensor is None:
            shapes = ", ".join(str(tuple(t.shape)) for t in data.tensors)
            raise ImageDataError(
                f"the tensors of a TensorDataset hold no images: {shapes}; one must be (N, H, W) or (N, C, H, W)"
            )
        return array_source(tensor, "tensors of a TensorDataset", chosen)
    bare, words, notes = _without_transforms(data, chosen[0])

    def batches() -> Iterator[Tensor]:
        part: Any = Subset(bare, chosen)
        reader: DataLoader[Any] = DataLoader(part, batch_size=16, num_workers=workers, collate_fn=_tensors_of)
        yield from stacked(itertools.chain.from_iterable(reader))

    if notes:  # random transforms: a sample of the items would not be the same twice
        fingerprint = digest("items", type(data).__qualname__, len(data), len(chosen))
    else:
        fingerprint = sample_digest(name, chosen, lambda index: require_image(bare[index], 2, name))
    return ImageSource(batches, len(chosen), f"items of {name}{words}", notes, fingerprint)


def _is_bytes(array: Tensor | np.ndarray[Any, Any]) -> bool:
    return array.dtype in (torch.uint8, np.dtype(np.uint8))


def _tensors_of(items: list[Any]) -> list[Tensor]:
    """Collate function; at module level, so that workers can be given it."""
    return [require_image(item, 2, "the items of the data set") for item in items]


def _same(image: Any) -> Any:
    return image


def _same_pair(image: Any, target: Any) -> tuple[Any, Any]:
    return image, target


def _without_transforms(data: Dataset[Any], first: int) -> tuple[Any, str, list[str]]:
    """The data set without its image transforms, if that still yields images; words and notes about what was done."""
    present = [name for name in ("transform", "transforms") if getattr(data, name, None) is not None]
    for replacements in ({"transform": None, "transforms": None}, {"transform": _same, "transforms": _same_pair}):
        if not present:
            break
        bare = copy.copy(data)
        try:
            for name in present:
                setattr(bare, name, replacements[name])
            if find_image(bare[first], 2) is not None:
                return bare, " before their transforms", []
        except Exception:  # whatever a data set does without the transform it counts on
            continue
    require_image(data[first], 2, f"the items of {type(data).__name__}")
    if not present:
        return data, "", []
    return (
        data,
        " after their transforms",
        [
            "random augmentation, cropping and padding are part of what was measured: "
            "the transforms could not be left out"
        ],
    )
