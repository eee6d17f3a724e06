"""Stack same-shaped tensors into one ``(L, *shape)`` tensor, so that one kernel reads or writes all of them.

Reading many tensors at once is one ``torch.stack``. Writing them back is one ``torch._foreach_copy_``, which launches
one kernel per chunk on a GPU but one per tensor on a CPU. :mod:`~lightning_filterdiv.tensors.flat_buffer` has buffers
that are reused from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["gather", "group_by", "is_dense", "scatter", "storage_order"]

T = TypeVar("T")


def group_by(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group ``items`` by ``key``, groups and members in order of first appearance."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def storage_order(tensor: Tensor) -> list[int]:
    """Return the dims from the slowest to the fastest in memory: the permutation that makes a dense tensor
    contiguous."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """Copy ``L`` tensors of one shape and dtype into a new ``(L, *shape)`` tensor, keeping their memory format.

    The inverse, :func:`scatter`, then copies between tensors of equal strides. ``_foreach`` needs that to use one
    kernel for all of them.
    """
    order = storage_order(tensors[0])
    stacked = torch.stack([tensor.detach().permute(order) for tensor in tensors])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return stacked.permute(0, *(1 + dim for dim in inverse))


def scatter(tensors: Sequence[Tensor], stacked: Tensor) -> None:
    """Copy row ``l`` of ``stacked`` into ``tensors[l]`` in place."""
    with torch.no_grad():
        torch._foreach_copy_([tensor.detach() for tensor in tensors], list(stacked.unbind()))


def is_dense(tensor: Tensor) -> bool:
    """True if the entries fill one block of memory, each once, in any order of dims."""
    expected = 1
    for dim in reversed(storage_order(tensor)):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            return False
        expected *= tensor.shape[dim]
    return True
