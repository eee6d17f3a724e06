"""Same-shaped tensors as one ``(L, *shape)`` tensor, so that one kernel reads or writes all of them.

The cost of a per-step edit should follow the number of *distinct shapes* in a network, not its depth. Reading many
tensors at once is one ``torch.stack``. Writing them back is one ``torch._foreach_copy_``, which launches one kernel per
chunk on a GPU but one per tensor on a CPU. :class:`ParameterStack` removes even that: it lets the parameters live side
by side in one storage, where writing the stack writes the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["ParameterStack", "gather", "group_by", "is_dense", "scatter", "storage_order"]

T = TypeVar("T")
# cuDNN and vectorised CPU kernels choose by alignment: every parameter starts where an allocation of its own would.
_ALIGNMENT_BYTES = 512


def group_by(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Group ``items`` by ``key``, groups and members in order of first appearance."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def storage_order(tensor: Tensor) -> list[int]:
    """Dims from the slowest to the fastest in memory: the permutation that makes a dense tensor contiguous."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))


def gather(tensors: Sequence[Tensor]) -> Tensor:
    """Copy ``L`` tensors of one shape and dtype into a new ``(L, *shape)`` tensor, keeping their memory format.

    The inverse, :func:`scatter`, then copies between tensors of equal strides, which is what ``_foreach`` needs to use
    one kernel for all of them.
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
    """Whether the entries fill one block of memory, each once, in whatever order of dims."""
    expected = 1
    for dim in reversed(storage_order(tensor)):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            return False
        expected *= tensor.shape[dim]
    return True


def _owns_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() and is_dense(tensor)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Which storage a tensor lives in, and where: an identity that fake tensors have too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


class ParameterStack:
    """``L`` parameters of one shape, stride, dtype and device that share a storage while the stack is alive.

    The ``Parameter`` objects stay the same (optimizers, DDP and compiled graphs keep their references); only where
    their data lives changes, with values, strides and alignment kept. Where that is not safe the stack works on copies
    instead, with equal results: a parameter that is a view of somebody else's storage, or one whose data was moved
    after the stack was built (``param.data = ...``).

    Args:
        parameters: ``L >= 1`` parameters that agree in shape, stride, dtype and device.

    Raises:
        ValueError: the parameters differ in one of these.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        layouts = {(p.shape, p.stride(), p.dtype, p.device) for p in parameters}
        if len(layouts) != 1:
            raise ValueError(f"a stack needs parameters of one shape, stride, dtype and device, got {layouts}")
        self.parameters = list(parameters)
        self._storage: Tensor | None = None
        self._buffer: Tensor | None = None
        self._places: list[tuple[int, int]] = []
        if all(_owns_storage(parameter) for parameter in parameters):
            self._adopt()

    @torch.no_grad()
    def _adopt(self) -> None:
        first = self.parameters[0]
        unit = max(1, _ALIGNMENT_BYTES // first.element_size())
        pitch = -(-first.numel() // unit) * unit
        self._storage = first.new_zeros(pitch * len(self.parameters))
        self._buffer = buffer = self.shaped(self._storage)
        for row, parameter in zip(buffer, self.parameters, strict=True):
            row.copy_(parameter)
            parameter.data = row
        self._places = [_place(parameter) for parameter in self.parameters]

    @property
    def shared(self) -> bool:
        """Whether the parameters still live in the stack's storage (then reading and writing copy nothing twice)."""
        return self._buffer is not None and self._places == [_place(parameter) for parameter in self.parameters]

    def shaped(self, storage: Tensor) -> Tensor:
        """``(L, *shape)`` view of a tensor laid out like the one that :meth:`storage` returns."""
        first, pitch = self.parameters[0], storage.numel() // len(self.parameters)
        return storage.as_strided((len(self.parameters), *first.shape), (pitch, *first.stride()))

    def storage(self) -> Tensor | None:
        """The parameters as one dense one-dimensional tensor, with gaps of zeros; ``None`` where they share none."""
        return self._storage if self.shared else None

    def read(self) -> Tensor:
        """Current values ``(L, *shape)``. It may be the parameters themselves: use it before they change."""
        if self._buffer is not None and self.shared:
            return self._buffer
        return gather(self.parameters)

    def write(self, values: Tensor) -> None:
        """Overwrite the parameters with ``values``, ``(L, *shape)``; nothing to do for what :meth:`read` returned."""
        if self._buffer is not None and self.shared:
            if values is not self._buffer:
                self._buffer.copy_(values)
        else:
            scatter(self.parameters, values)

    def holds(self, values: Tensor) -> bool:
        """Whether ``values``, from :meth:`read`, are the parameters themselves, so that nothing is to be written."""
        return values is self._buffer

    @torch.no_grad()
    def release(self) -> None:
        """Give every parameter a storage of its own again; one whose data was moved meanwhile has it already."""
        if self._buffer is not None:
            for parameter in self.parameters:
                if _place(parameter)[0] == _place(self._buffer)[0]:
                    parameter.data = parameter.data.clone()
        self._storage = self._buffer = None
