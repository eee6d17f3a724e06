"""Rows of parameters and of optimizer state: hold them still through a step, reset them.

A zero gradient is no freeze: weight decay and momentum still move the row, and Adam's moments move it even without
them. Exact is what :class:`RowHold` does: remember the rows of the parameter *and of every same-shaped optimizer state*
before the step, put them back after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer, Rprop

from lightning_filterdiv.stacking import gather, group_by, scatter

__all__ = ["HeldRows", "RowHold", "initial_state", "reset_rows", "row_state"]


def row_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Optimizer state of ``parameter`` that has its shape, by key: momentum buffers, first and second moments.

    Raises:
        ValueError: the optimizer keeps other multi-element state for the parameter (factored moments, quantised or
            flattened history), whose rows cannot be told apart.
    """
    found: dict[str, Tensor] = {}
    state = optimizer.state.get(parameter, {})
    if isinstance(optimizer, LBFGS):  # one flattened history of all parameters, filed under the first of them
        state = {"old_dirs": []}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            found[key] = value
        elif (isinstance(value, Tensor) and value.numel() > 1) or isinstance(value, list | tuple | dict):
            raise ValueError(
                f"{type(optimizer).__name__} keeps state {key!r} that does not have the shape of its parameter "
                f"{tuple(parameter.shape)}, so single filters cannot be held or reset exactly; "
                f"use an optimizer with element-wise state such as SGD, Adam or AdamW"
            )
    return found


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
    """The value that a row of state ``key`` starts from: 0, but the learning rate for Rprop's step sizes."""
    if isinstance(optimizer, Rprop) and key == "step_size":
        return float(next(g["lr"] for g in optimizer.param_groups if any(p is parameter for p in g["params"])))
    return 0.0


@dataclass(frozen=True)
class HeldRows:
    """Rows ``index`` (int64, ``(k,)``) of ``parameter`` along ``dim``.

    ``block = (start, stop)`` restricts them to that range of dim 0: the columns that one group of a grouped convolution
    has for an input channel.
    """

    parameter: nn.Parameter
    index: Tensor
    dim: int = 0
    block: tuple[int, int] | None = None

    def fill(self, tensor: Tensor, value: float) -> None:
        """Overwrite these rows of ``tensor``, shaped like the parameter, in place."""
        part = tensor if self.block is None else tensor.narrow(0, self.block[0], self.block[1] - self.block[0])
        part.index_fill_(self.dim, self.index.to(tensor.device), value)


@dataclass
class _Group:
    """Parameters of one layout with their mask ``(L, 1, .., n, .., 1)``: true where a row is held."""

    parameters: list[nn.Parameter]
    masks: list[Tensor]
    stacked: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def mask(self, members: Sequence[int]) -> Tensor:
        key = tuple(members)
        if key not in self.stacked:
            self.stacked[key] = torch.stack([self.masks[member] for member in members])
        return self.stacked[key]


@dataclass
class _Saved:
    group: _Group
    members: list[int]
    values: Tensor
    # state key -> (members that had it, their values)
    states: dict[str, tuple[list[int], Tensor]]


class RowHold:
    """Holds rows of parameters bit-still through optimizer steps, whatever the optimizer does with them.

    Protocol, once per step: :meth:`before_step` when the gradients are final (it zeroes those of held rows, so that
    gradient clipping does not see them), then the step, then :meth:`after_step`. A step that never happens (an fp16
    overflow) leaves a pending snapshot, which the next :meth:`before_step` discards. Parameters without gradient are
    skipped and never given one. State that the step creates gets zero rows.

    Args:
        rows: what to hold; the same parameter may be named several times, along any dims of equal layout.
    """

    def __init__(self, rows: Iterable[HeldRows]) -> None:
        rows = list(rows)
        self._groups: list[_Group] = []
        by_parameter = group_by(rows, lambda held: id(held.parameter))
        entries: list[tuple[nn.Parameter, Tensor]] = []
        for held_rows in by_parameter:
            parameter = held_rows[0].parameter
            mask = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
            for held in held_rows:
                held.fill(mask, True)
            # One dim is enough to broadcast from; rows along several dims need the whole mask.
            dims = {range(mask.dim())[held.dim] for held in held_rows}
            if len(dims) == 1 and all(held.block is None for held in held_rows):
                keep = dims.pop()
                for dim in range(mask.dim()):
                    if dim != keep:
                        mask = mask.narrow(dim, 0, 1)
                mask = mask.clone()
            entries.append((parameter, mask))
        for members in group_by(entries, lambda e: (e[0].shape, e[0].stride(), e[0].dtype, e[0].device, e[1].shape)):
            self._groups.append(_Group([parameter for parameter, _ in members], [mask for _, mask in members]))
        self._saved: list[_Saved] | None = None

    @property
    def pending(self) -> bool:
        """Whether a step was announced by :meth:`before_step` and has not been concluded."""
        return self._saved is not None

    def discard(self) -> None:
        """Forget a pending snapshot: the step it was taken for did not happen."""
        self._saved = None

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Snapshot the held rows of the parameters that ``optimizer`` is about to update and zero their gradients.

        Raises:
            ValueError: the optimizer keeps state whose rows cannot be held, see :func:`row_state`.
        """
        self.discard()
        owned = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        saved: list[_Saved] = []
        for group in self._groups:
            members = [i for i, parameter in enumerate(group.parameters) if id(parameter) in owned]
            if not members:
                continue
            parameters = [group.parameters[i] for i in members]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            scatter(gradients, gather(gradients).masked_fill_(group.mask(members), 0))
            states: dict[str, tuple[list[int], Tensor]] = {}
            for key, holders in self._states(optimizer, group, members).items():
                states[key] = (holders, gather([optimizer.state[group.parameters[i]][key] for i in holders]))
            saved.append(_Saved(group, members, gather(parameters), states))
        self._saved = saved

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Put the held rows back.

        Raises:
            RuntimeError: no :meth:`before_step` announced this step.
        """
        if self._saved is None:
            raise RuntimeError("optimizer.step() ran without RowHold.before_step(optimizer) before it")
        for saved in self._saved:
            group, members = saved.group, saved.members
            self._restore([group.parameters[i] for i in members], group.mask(members), saved.values)
            for key, holders in self._states(optimizer, group, members).items():
                known, values = saved.states.get(key, ([], None))
                born = [i for i in holders if i not in known]
                for names, before in ((known, values), (born, None)):
                    if names:
                        tensors = [optimizer.state[group.parameters[i]][key] for i in names]
                        self._restore(tensors, group.mask(names), before)
        self._saved = None

    @staticmethod
    def _states(optimizer: Optimizer, group: _Group, members: Sequence[int]) -> dict[str, list[int]]:
        holders: dict[str, list[int]] = {}
        for i in members:
            for key in row_state(optimizer, group.parameters[i]):
                holders.setdefault(key, []).append(i)
        return holders

    @staticmethod
    def _restore(tensors: Sequence[Tensor], mask: Tensor, values: Tensor | None) -> None:
        current = gather(tensors)
        restored = current.masked_fill(mask, 0) if values is None else torch.where(mask, values, current)
        scatter(tensors, restored)
