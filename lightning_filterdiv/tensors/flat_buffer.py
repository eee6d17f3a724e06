"""Many tensors of any shapes side by side, so that one operation reads or edits all of them.

The cost of a per-step edit should follow the number of *distinct shapes* in a network, not its depth.
:class:`FlatBuffer` keeps room and views from step to step. It holds copies, or, after :meth:`FlatBuffer.adopt`, the
tensors themselves: then nothing is copied at all. :class:`Bank` orders tensors by layout, so that those of one layout
are one ``(L, n, d)`` batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_filterdiv.tensors.stacking import is_dense

__all__ = ["Bank", "FlatBuffer", "ParameterBuffer", "Run", "owns_storage"]

# Vectorised loads want it at the start of a tensor. An adopted tensor starts where an allocation of its own would:
# cuDNN chooses its kernels by alignment.
_ALIGNMENT_BYTES, _ALLOCATION_BYTES = 64, 512
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class FlatBuffer:
    """A one-dimensional buffer with a view for each of several tensors, shaped and strided like it.

    Neighbours of one layout lie at equal distances, so that :meth:`stack` can show them as one tensor; unless the
    buffer is for adoption there is no gap between them.

    Args:
        like: at least one tensor; only their layouts count. What has gaps or repeated entries gets a contiguous view.
        dtype: of the buffer; ``None``: that of the first tensor. Copies convert.
        device: of the buffer; ``None``: that of the first tensor.
        adoptable: align every tensor as an allocation of its own would be.
    """

    #: On a CPU, where ``_foreach_copy_`` is a loop of copies. Off to count there what a GPU would do.
    stacks_on_cpu: ClassVar[bool] = True

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
        #: ``(N,)``, zeros at first. What lies between tensors is written by no copy.
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

    def start(self, i: int) -> int:
        """Where tensor ``i`` begins in :attr:`flat`; its end for ``i`` = number of tensors."""
        return self._starts[i] if i < len(self._starts) else self.flat.numel()

    def stack(self, first: int, count: int) -> Tensor:
        """Tensors ``first`` to ``first + count - 1``, neighbours of one layout, as a ``(count, *shape)`` view."""
        view = self.views[first]
        pitch = self._starts[first + 1] - self._starts[first] if count > 1 else view.numel()
        return self.flat.as_strided((count, *view.shape), (pitch, *view.stride()), self._starts[first])

    def read(self, tensors: list[Tensor], members: Sequence[int] | None = None) -> None:
        """Copy ``tensors``, at least one, to the places ``members``; ``None``: one tensor for every place."""
        with torch.no_grad():
            if self.stacks_on_cpu and self.flat.is_cpu and len(tensors) == len(self.views):
                for first, end, stacked in self._runs:
                    torch.stack(tensors[first:end], out=stacked)
            else:  # on a GPU one kernel per chunk, whatever the shapes
                torch._foreach_copy_(self._places(members), tensors)

    def write(self, tensors: list[Tensor], members: Sequence[int] | None = None) -> None:
        """Copy what lies at the places ``members`` into ``tensors``, at least one, in place."""
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
        """Whether adopted tensors still live here, all of them: ``tensor.data = ...`` moves one elsewhere."""
        return bool(self._adopted) and self._addresses == [self._address(tensor) for tensor in self._adopted]

    @torch.no_grad()
    def release(self) -> None:
        """Give every adopted tensor a storage of its own again; one whose data was moved meanwhile has it already."""
        for tensor in self._adopted:
            if _place(tensor)[0] == _place(self.flat)[0]:
                tensor.data = tensor.data.clone()
        self._adopted = []


class ParameterBuffer:
    """Parameters of one dtype and device side by side: themselves where that is safe, else copies of them.

    Results are the same. It is not safe where one is a view of somebody else's storage, and no longer where the data of
    one was moved after the buffer was built.

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
        """Let the buffer hold the current values; nothing to do where it holds the parameters themselves."""
        if not self.buffer.shared:
            self.buffer.release()  # some may still be here, and not in their own place
            self.buffer.read(self.parameters)

    def write(self) -> None:
        """Let the parameters have the values of the buffer."""
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
        """Their places in the buffers."""
        return range(self.first, self.first + self.count)

    def stacked(self, buffer: FlatBuffer) -> Tensor:
        """``(L, *shape)``, a view."""
        return buffer.stack(self.first, self.count)

    def rows(self, buffer: FlatBuffer, count: int, dim: int = 0, *, ordered: bool = False) -> Tensor | None:
        """``(L * parts, count, d)``, a view of the same memory; ``None`` if a row along ``dim`` is not one block of it.

        Args:
            buffer: of the bank.
            count: rows of a matrix; a divisor of the size along ``dim``, where a tensor holds several matrices.
            dim: whose slices are the rows.
            ordered: whether the entries of a row must be in the order of the dims.
        """
        stacked = self.stacked(buffer).movedim(dim + 1, 1)
        block = math.prod(stacked.shape[2:])
        in_order = stacked.is_contiguous() if ordered else stacked.stride()[:2] == (block * stacked.shape[1], block)
        if not in_order:
            return None
        return buffer.flat.narrow(0, buffer.start(self.first), stacked.numel()).view(-1, count, block)


class Bank:
    """Tensors ordered by layout, and buffers for them that are laid out alike.

    Args:
        runs: tensors of one shape, stride and device each.
        dtype: of the buffers.
    """

    def __init__(self, runs: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        self.tensors: list[Tensor] = []
        self.runs: list[Run] = []
        for run in runs:
            self.runs.append(Run(len(self.tensors), len(run)))
            self.tensors += run
        self.dtype = dtype

    def buffer(self) -> FlatBuffer:
        """A new one, of zeros."""
        return FlatBuffer(self.tensors, self.dtype)

    def gradients(self) -> tuple[list[Tensor], Sequence[int] | None]:
        """The gradients there are and their places, ``None`` if there is one for every tensor."""
        found = [gradient for tensor in self.tensors if (gradient := tensor.grad) is not None]
        if len(found) == len(self.tensors):
            return found, None
        return found, [i for i, tensor in enumerate(self.tensors) if tensor.grad is not None]


def owns_storage(tensor: Tensor) -> bool:
    """Whether the tensor fills its storage alone, without gaps."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() and is_dense(tensor)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Which storage a tensor lives in, and where: an identity that fake tensors have too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides[: len(shape)])
