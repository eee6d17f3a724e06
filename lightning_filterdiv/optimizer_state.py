"""Hold rows of parameters and of optimizer state still through a step, or reset them.

A zero gradient does not freeze a row. Weight decay and momentum still move it, and so do Adam's moments.
:class:`RowHold` is exact: it remembers the rows of the parameter *and of every same-shaped optimizer state* before the
step, and puts them back after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, Rprop

from lightning_filterdiv.tensors.flat_buffer import FlatBuffer
from lightning_filterdiv.tensors.stacking import group_by

__all__ = ["HeldRows", "RowHold", "initial_state", "reset_rows", "row_state"]

_Slot = tuple[str, torch.dtype, torch.device]  # key of optimizer state, device and dtype


def row_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer state of ``parameter`` that has its shape, by key: momentum buffers, first and second
    moments.

    Raises:
        ValueError: the optimizer keeps other multi-element state for the parameter (factored moments, quantised or
            flattened history), whose rows cannot be told apart.
    """
    state_rows: dict[str, Tensor] = {}
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, LBFGS):  # one flattened history of all parameters, stored under the first of them
        state = {"old_dirs": []}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state_rows[key] = value
        elif (isinstance(value, Tensor) and value.numel() > 1) or isinstance(value, list | tuple | dict):
            raise ValueError(
                f"{type(optimizer).__name__} keeps state {key!r} that does not have the shape of its parameter "
                f"{tuple(parameter.shape)}, so single filters cannot be held or reset exactly; "
                f"use an optimizer with element-wise state such as SGD, Adam or AdamW"
            )
    return state_rows


def reset_rows(optimizer: Optimizer, parameter: nn.Parameter, index: Tensor, dim: int = 0) -> None:
    """Start the rows ``index`` (along ``dim``) of every same-shaped state of ``parameter`` afresh, in place.

    They become zero, as every torch optimizer starts them; Rprop's step sizes become its learning rate.

    Adam's ``step`` counts per tensor, not per row, and is left alone: after a reset late in training the bias
    correction no longer compensates, and the first update of a reset row is up to ``(1-b1)/sqrt(1-b2)`` (3.16 at the
    defaults) times the learning rate.

    Args:
        optimizer: the optimizer that owns ``parameter``.
        parameter: the parameter, shape ``(..., n, ...)`` with ``n`` rows along ``dim``.
        index: ``(k,)`` int64 row indices on the parameter's device.
        dim: the dimension that counts rows.

    Raises:
        ValueError: as :func:`row_state`.
    """
    with torch.no_grad():
        for key, state in row_state(optimizer, parameter).items():
            state.index_fill_(dim, index, initial_state(optimizer, parameter, key))


def initial_state(optimizer: Optimizer, parameter: nn.Parameter, key: str) -> float:
    """Return the value that a row of state ``key`` starts from: 0, but the learning rate for Rprop's step sizes."""
    if isinstance(optimizer, Rprop) and key == "step_size":
        return float(next(g["lr"] for g in optimizer.param_groups if any(p is parameter for p in g["params"])))
    return 0.0


@dataclass(frozen=True)
class HeldRows:
    """Rows ``index`` (int64, ``(k,)``) of ``parameter`` along ``dim``.

    ``block = (start, stop)`` restricts them to a range of dim 0. A grouped convolution has the columns of an input
    channel in one group only.
    """

    parameter: nn.Parameter
    index: Tensor
    dim: int = 0
    block: tuple[int, int] | None = None

    def fill(self, tensor: Tensor, value: float) -> None:
        """Overwrite these rows of ``tensor``, shaped like the parameter, in place."""
        part = tensor if self.block is None else tensor.narrow(0, self.block[0], self.block[1] - self.block[0])
        part.index_fill_(self.dim, self.index.to(tensor.device), value)


class _Group:
    """Parameters of one dtype on one device with held rows, and buffers that every step reuses."""

    def __init__(self, held: Sequence[Sequence[HeldRows]]) -> None:
        self.held = held
        self.parameters = [rows[0].parameter for rows in held]
        self._buffers: dict[tuple[str, torch.dtype, torch.device], FlatBuffer] = {}
        # Index of a parameter -> its optimizer state when last read, and the result of row_state for it.
        self._known: dict[int, tuple[dict[str, Any], dict[str, Tensor]]] = {}
        self.keep(self.parameters[0])  # made here rather than in a step; raises for rows that do not exist

    def buffer(self, use: str, like: Tensor) -> FlatBuffer:
        """Return the buffer for ``use`` in the dtype and on the device of ``like``."""
        key = (use, like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = FlatBuffer(self.parameters, like.dtype, like.device)
        return self._buffers[key]

    def keep(self, like: Tensor) -> Tensor:
        """Return a bit mask as a :class:`FlatBuffer`: all bits set where an entry may move, none where it is held."""
        known = ("keep", like.dtype, like.device) in self._buffers
        buffer = self.buffer("keep", like)
        if not known:
            buffer.bits.fill_(-1)
            for view, rows in zip(buffer.views, self.held, strict=True):
                for held in rows:
                    held.fill(view, 0.0)
        return buffer.bits

    def row_state(self, optimizer: Optimizer, place: int) -> dict[str, Tensor]:
        """Return :func:`row_state` of a parameter. The result is cached until the optimizer holds other objects."""
        parameter = self.parameters[place]
        state = optimizer.state.get(parameter)
        if not state:
            return row_state(optimizer, parameter)
        seen, rows = self._known.get(place, ({}, {}))
        if len(seen) != len(state) or any(seen.get(key) is not value for key, value in state.items()):
            rows = row_state(optimizer, parameter)
            self._known[place] = dict(state), rows
        return rows

    def slots(self, optimizer: Optimizer, members: Sequence[int]) -> dict[_Slot, tuple[list[int], list[Tensor]]]:
        """Return the state of ``members`` by key, dtype and device: the places that have it, and the tensors."""
        slots: dict[_Slot, tuple[list[int], list[Tensor]]] = {}
        for i in members:
            for key, value in self.row_state(optimizer, i).items():
                places, tensors = slots.setdefault((key, value.dtype, value.device), ([], []))
                places.append(i)
                tensors.append(value)
        return slots

    def zero(self, tensors: list[Tensor], members: Sequence[int]) -> None:
        """Assign zero to the held rows of ``tensors``. A product would not do: after an fp16 overflow inf * 0 is
        NaN."""
        work = self.buffer("work", tensors[0])
        work.read(tensors, members)
        work.bits.bitwise_and_(self.keep(tensors[0]))
        work.write(tensors, members)

    def restore(self, tensors: list[Tensor], members: Sequence[int], saved: FlatBuffer) -> None:
        """Put the held rows of ``saved`` back, bit for bit; ``saved`` is used up."""
        work = self.buffer("work", tensors[0])
        work.read(tensors, members)
        # saved ^ ((now ^ saved) & keep) is now where an entry may move, saved where it is held.
        saved.bits.bitwise_xor_(work.bits.bitwise_xor_(saved.bits).bitwise_and_(self.keep(tensors[0])))
        saved.write(tensors, members)


class _Saved(NamedTuple):
    group: _Group
    members: list[int]
    values: FlatBuffer
    states: dict[_Slot, tuple[list[int], FlatBuffer]]  # indices of parameters that had such state, and its values


class RowHold:
    """Keeps rows of parameters bit-identical through the steps of any optimizer.

    Protocol, once per step: :meth:`before_step` when the gradients are final (it zeroes those of held rows, so that
    gradient clipping does not see them), then the step, then :meth:`after_step`. A step that never happens (an fp16
    overflow) leaves a pending snapshot, which the next :meth:`before_step` discards. Parameters without gradient are
    skipped and never given one. State that the step creates gets zero rows.

    The number of operations depends neither on the number nor on the shapes of the parameters. The buffers for it, made
    in the first step, are as large as three copies of the parameters and one of every element-wise state.

    Args:
        rows: what to hold; the same parameter may be named several times, along any dims.
    """

    def __init__(self, rows: Iterable[HeldRows]) -> None:
        self._held = {id(held[0].parameter): held for held in group_by(rows, lambda held: id(held.parameter))}
        self._saved: list[_Saved] | None = None
        self._group(self._held.keys())

    @property
    def pending(self) -> bool:
        """True between :meth:`before_step` and the end of that step."""
        return self._saved is not None

    def discard(self) -> None:
        """Forget a pending snapshot: the step it was taken for did not happen."""
        self._saved = None

    def _group(self, owned: Collection[int]) -> None:
        mine = [held for key, held in self._held.items() if key in owned]
        kinds = group_by(mine, lambda held: (held[0].parameter.dtype, held[0].parameter.device))
        self._groups, self._owned = [_Group(members) for members in kinds], set(owned)

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Snapshot the held rows of the parameters that ``optimizer`` is about to update and zero their gradients.

        Raises:
            ValueError: the optimizer keeps state whose rows cannot be held, see :func:`row_state`.
        """
        self.discard()
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]} & self._held.keys()
        if owned != self._owned:
            self._group(owned)
        saved: list[_Saved] = []
        for group in self._groups:
            gradients = [(i, p.grad) for i, p in enumerate(group.parameters) if p.grad is not None]
            if not gradients:
                continue
            members = [i for i, _ in gradients]
            for alike in group_by(gradients, lambda item: (item[1].dtype, item[1].device)):
                group.zero([gradient for _, gradient in alike], [i for i, _ in alike])
            states: dict[_Slot, tuple[list[int], FlatBuffer]] = {}
            for slot, (holders, tensors) in group.slots(optimizer, members).items():
                states[slot] = holders, group.buffer(f"state {slot[0]}", tensors[0])
                states[slot][1].read(tensors, holders)
            parameters: list[Tensor] = [group.parameters[i] for i in members]
            saved.append(_Saved(group, members, group.buffer("value", parameters[0]), states))
            saved[-1].values.read(parameters, members)
        self._saved = saved

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Put the held rows back.

        Raises:
            RuntimeError: no :meth:`before_step` announced this step.
        """
        if self._saved is None:
            raise RuntimeError("optimizer.step() ran without RowHold.before_step(optimizer) before it")
        for group, members, values, states in self._saved:
            group.restore([group.parameters[i] for i in members], members, values)
            for slot, (holders, tensors) in group.slots(optimizer, members).items():
                known = states[slot][0] if slot in states else []
                if known == holders:
                    group.restore(tensors, holders, states[slot][1])
                    continue
                by_place = dict(zip(holders, tensors, strict=True))
                if before := [i for i in holders if i in known]:
                    group.restore([by_place[i] for i in before], before, states[slot][1])
                if born := [i for i in holders if i not in known]:
                    group.zero([by_place[i] for i in born], born)
        self._saved = None
