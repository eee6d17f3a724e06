"""Copies of many tensors of any shapes side by side, so that one operation edits all of them.

:mod:`lightning_filterdiv.tensors.stacking` needs one operation per distinct shape and, for tensors that do not
share a storage, Python work per tensor. :class:`FlatBuffer` keeps its room and its views from step to step: filling or
emptying it is one ``torch._foreach_copy_`` (one kernel per chunk on a GPU, a loop in C++ on a CPU), whatever
the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_filterdiv.tensors.stacking import is_dense

__all__ = ["FlatBuffer"]

# Vectorised loads want it at the start of a tensor.
_ALIGNMENT_BYTES = 64
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class FlatBuffer:
    """A one-dimensional buffer with a view for each of several tensors, shaped and strided like it.

    Neighbours of one layout lie without a gap between them, so that :meth:`stack` can show them as one tensor.

    Args:
        like: at least one tensor; only their layouts count. What has gaps or repeated entries gets a contiguous view.
        dtype: of the buffer; ``None``: that of the first tensor. Copies convert.
        device: of the buffer; ``None``: that of the first tensor.
    """

    def __init__(
        self, like: Sequence[Tensor], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        dtype = like[0].dtype if dtype is None else dtype
        unit = max(1, _ALIGNMENT_BYTES // dtype.itemsize)
        layouts = [
            (tensor.shape, tensor.stride() if is_dense(tensor) else _contiguous_strides(tensor.shape))
            for tensor in like
        ]
        self._starts: list[int] = []
        size = 0
        for i, layout in enumerate(layouts):
            if i and layout != layouts[i - 1]:
                size = -(-size // unit) * unit
            self._starts.append(size)
            size += layout[0].numel()
        #: ``(N,)``, zeros at first. What lies between tensors is written by no copy.
        self.flat = torch.zeros(size, dtype=dtype, device=like[0].device if device is None else device)
        #: One view per tensor.
        self.views = [
            self.flat.as_strided(shape, strides, start)
            for (shape, strides), start in zip(layouts, self._starts, strict=True)
        ]
        #: The same memory as integers, for edits that neither rounding nor NaN can disturb.
        self.bits = self.flat.view(_BITS.get(dtype.itemsize, torch.int64))

    def start(self, i: int) -> int:
        """Where tensor ``i`` begins in :attr:`flat`; its end for ``i`` = number of tensors."""
        return self._starts[i] if i < len(self._starts) else self.flat.numel()

    def stack(self, first: int, count: int) -> Tensor:
        """Tensors ``first`` to ``first + count - 1``, neighbours of one layout, as a ``(count, *shape)`` view."""
        view = self.views[first]
        return self.flat.as_strided((count, *view.shape), (view.numel(), *view.stride()), self._starts[first])

    def read(self, tensors: list[Tensor], members: Sequence[int]) -> None:
        """Copy ``tensors``, at least one, to the places ``members``."""
        with torch.no_grad():
            torch._foreach_copy_(self._places(members), tensors)

    def write(self, tensors: list[Tensor], members: Sequence[int]) -> None:
        """Copy what lies at the places ``members`` into ``tensors``, at least one, in place."""
        with torch.no_grad():
            torch._foreach_copy_(tensors, self._places(members))

    def _places(self, members: Sequence[int]) -> list[Tensor]:
        return self.views if len(members) == len(self.views) else [self.views[i] for i in members]


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])
