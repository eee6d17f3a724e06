"""Buffers that hold many tensors of any shapes, so that one operation reads or edits all of them.

The cost of a per-step edit should follow the number of *distinct shapes* in a network, not its depth.
:class:`FlatBuffer` keeps its memory and views from step to step. It holds copies of tensors. After
:meth:`FlatBuffer.adopt` it holds the tensors themselves, and nothing is copied. :class:`Bank` orders tensors by layout,
so that those of one layout are one ``(L, n, d)`` batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_filterdiv.tensors.stacking import is_dense

__all__ = ["Bank", "FlatBuffer", "ParameterBuffer", "Run", "owns_storage"]

# Alignment of tensors, for vectorised loads. An adopted tensor starts where an allocation of its own would, because
# cuDNN chooses its kernels by alignment.
_ALIGNMENT_BYTES, _ALLOCATION_BYTES = 64, 512
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class FlatBuffer:
    """A one-dimensional buffer with a view for each of several tensors, shaped and strided like it.

    Neighbours of one layout lie at equal distances, so that :meth:`stack` can view them as one tensor. Only a buffer
    for adoption has gaps between them.

    Args:
        like: at least one tensor; only the layouts matter. A tensor with gaps or repeated entries gets a contiguous
            view.
        dtype: dtype of the buffer; ``None``: that of the first tensor. Copies convert.
        device: device of the buffer; ``None``: that of the first tensor.
        adoptable: align every tensor as an allocation of its own would be.
    """

    #: Use what is cheap on a CPU alone. Off when kernels are counted as on a GPU.
    cpu_shortcuts: ClassVar[bool] = True

    def __init__(
        self,
        like: Sequence[Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        *,
        adoptable: bool = False,
    ) -> None:
        dtype = like[0].dtype if dtype is None else dtype
        unit = max(1, (_ALLOCATION_BYTES if adoptable else _ALIGNMENT_BYTES) // dtype.itemsize)
        layouts = [
            (tensor.shape, tensor.stride() if is_dense(tensor) else _contiguous_strides(tensor.shape))
            for tensor in like
        ]
        self._starts: list[int] = []
        firsts: list[int] = []  # of runs of one layout
        size = 0
        for i, layout in enumerate(layouts):
            new = not i or layout != layouts[i - 1]
            if new:
                firsts.append(i)
            if new or adoptable:
                size = -(-size // unit) * unit
            self._starts.append(size)
            size += layout[0].numel()
        if adoptable:
            size = -(-size // unit) * unit
        #: ``(N,)``, zeros at first. No copy writes into the gaps between tensors.
        self.flat = torch.zeros(size, dtype=dtype, device=like[0].device if device is None else device)
        #: One view per tensor.
        self.views = [
            self.flat.as_strided(shape, strides, start)
            for (shape, strides), start in zip(layouts, self._starts, strict=True)
        ]
        #: The same memory as integers, for edits that neither rounding nor NaN can disturb.
        self.bits = self.flat.view(_BITS.get(dtype.itemsize, torch.int64))
        ends = [*firsts[1:], len(like)]
        self._runs = [(first, end, self.stack(first, end - first)) for first, end in zip(firsts, ends, strict=True)]
        self._adopted: list[Tensor] = []
        self._address: Callable[[Tensor], object] = Tensor.data_ptr
        self._addresses: list[object] = []

    @property
    def on_cpu(self) -> bool:
        """True on a CPU, where no number has to be waited for and a ``_foreach`` operation is a loop over tensors."""
        return self.cpu_shortcuts and self.flat.is_cpu

    def start(self, i: int) -> int:
        """Return where tensor ``i`` begins in :attr:`flat`; the end of all for ``i`` = number of tensors."""
        return self._starts[i] if i < len(self._starts) else self.flat.numel()

    def stack(self, first: int, count: int) -> Tensor:
        """Return tensors ``first`` to ``first + count - 1``, which have one layout, as a ``(count, *shape)`` view."""
        view = self.views[first]
        pitch = self._starts[first + 1] - self._starts[first] if count > 1 else view.numel()
        return self.flat.as_strided((count, *view.shape), (pitch, *view.stride()), self._starts[first])

    def read(self, tensors: list[Tensor], members: Sequence[int] | None = None) -> None:
        """Copy ``tensors`` (at least one) to the places ``members``; ``None``: one tensor for every place."""
        with torch.no_grad():
            if self.on_cpu and len(tensors) == len(self.views):
                for first, end, stacked in self._runs:
                    torch.stack(tensors[first:end], out=stacked)
            else:  # on a GPU one kernel per chunk, whatever the shapes
                torch._foreach_copy_(self._places(members), tensors)

    def write(self, tensors: list[Tensor], members: Sequence[int] | None = None) -> None:
        """Copy the values at the places ``members`` into ``tensors`` (at least one), in place."""
        with torch.no_grad():
            torch._foreach_copy_(tensors, self._places(members))

    def _places(self, members: Sequence[int] | None) -> list[Tensor]:
        if members is None or len(members) == len(self.views):
            return self.views
        return [self.views[i] for i in members]

    @torch.no_grad()
    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Move the data of ``tensors`` into the buffer, with values, strides and alignment kept.

        The objects stay the same: optimizers, DDP and compiled graphs keep their references.

        Args:
            tensors: one per place, of the buffer's dtype and device, each alone in its storage (:func:`owns_storage`).
        """
        self.read(list(tensors))
        for tensor, view in zip(tensors, self.views, strict=True):
            tensor.data = view
        self._adopted = list(tensors)
        try:
            self._addresses = [view.data_ptr() for view in self.views]
        except RuntimeError:  # fake tensors have no address
            self._address = _place
            self._addresses = [_place(view) for view in self.views]

    @property
    def shared(self) -> bool:
        """True if all adopted tensors are still in the buffer. ``tensor.data = ...`` moves one out."""
        return bool(self._adopted) and self._addresses == [self._address(tensor) for tensor in self._adopted]

    @torch.no_grad()
    def release(self) -> None:
        """Give every adopted tensor a storage of its own again, unless its data were moved meanwhile."""
        for tensor in self._adopted:
            if _place(tensor)[0] == _place(self.flat)[0]:
                tensor.data = tensor.data.clone()
        self._adopted = []


class ParameterBuffer:
    """Parameters of one dtype and device in one buffer: the parameters themselves if that is safe, else copies.

    Results do not depend on it. Holding a parameter itself is unsafe if it is a view of another storage, or if its data
    were moved after the buffer was built.

    Args:
        parameters: at least one.

    Raises:
        ValueError: they differ in dtype or device.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(f"a buffer of parameters needs parameters of one dtype and device, got {kinds}")
        self.parameters = list(parameters)
        self.buffer = FlatBuffer(parameters, adoptable=True)
        if all(map(owns_storage, parameters)):
            self.buffer.adopt(parameters)

    def read(self) -> None:
        """Copy the current values into the buffer. No copy is needed where it holds the parameters themselves."""
        if not self.buffer.shared:
            self.buffer.release()  # some may still be in the buffer, at another place than their own
            self.buffer.read(self.parameters)

    def write(self) -> None:
        """Copy the values of the buffer into the parameters."""
        if not self.buffer.shared:
            self.buffer.write(self.parameters)

    def release(self) -> None:
        """Give every parameter a storage of its own again."""
        self.buffer.release()


class Run:
    """Neighbours of one layout in a :class:`Bank`."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    @property
    def members(self) -> range:
        """Places of the tensors in the buffers."""
        return range(self.first, self.first + self.count)

    def stacked(self, buffer: FlatBuffer) -> Tensor:
        """Return the tensors as a ``(L, *shape)`` view."""
        return buffer.stack(self.first, self.count)

    def rows(self, buffer: FlatBuffer, count: int, dim: int = 0, *, ordered: bool = False) -> Tensor | None:
        """Return the rows as a ``(L * parts, count, d)`` view; ``None`` if a row along ``dim`` is not one block of
        memory.

        Args:
            buffer: a buffer of the bank.
            count: rows of a matrix; a divisor of the size along ``dim``, where a tensor holds several matrices.
            dim: whose slices are the rows.
            ordered: require the entries of a row in the order of the dims.
        """
        stacked = self.stacked(buffer).movedim(dim + 1, 1)
        block = math.prod(stacked.shape[2:])
        in_order = stacked.is_contiguous() if ordered else stacked.stride()[:2] == (block * stacked.shape[1], block)
        if not in_order:
            return None
        return buffer.flat.narrow(0, buffer.start(self.first), stacked.numel()).view(-1, count, block)


class Bank:
    """Tensors ordered by layout, and buffers with the same layout.

    Args:
        runs: tensors of one shape, stride and device each.
        dtype: dtype of the buffers.
    """

    def __init__(self, runs: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        self.tensors: list[Tensor] = []
        self.runs: list[Run] = []
        for run in runs:
            self.runs.append(Run(len(self.tensors), len(run)))
            self.tensors += run
        self.dtype = dtype

    def buffer(self) -> FlatBuffer:
        """Return a new buffer of zeros."""
        return FlatBuffer(self.tensors, self.dtype)

    def gradients(self) -> tuple[list[Tensor], Sequence[int] | None]:
        """Return the gradients and the places of their tensors; ``None`` for the places if every tensor has a
        gradient."""
        found = [gradient for tensor in self.tensors if (gradient := tensor.grad) is not None]
        if len(found) == len(self.tensors):
            return found, None
        return found, [i for i, tensor in enumerate(self.tensors) if tensor.grad is not None]


def owns_storage(tensor: Tensor) -> bool:
    """True if the tensor is alone in its storage and fills it."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() and is_dense(tensor)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return storage and offset of a tensor. Unlike an address, fake tensors have them too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])
