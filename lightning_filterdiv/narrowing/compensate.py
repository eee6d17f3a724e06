"""Move the constant part of the contribution of removed channels into the next bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.answers import layer_of
from lightning_filterdiv.filters import CONVOLUTIONS, named_modules, named_tensors
from lightning_filterdiv.narrowing.cutting import removed_mask

__all__ = ["Compensation", "compensate", "constant_contributions"]

#: Spread of a contribution, relative to its size, that counts as rounding.
_CONSTANT = 1e-4


@dataclass(frozen=True)
class Compensation:
    """Destination of the constant part of removed channels.

    Attributes:
        exact: layers to which they contributed a constant.
        mean: layers whose contribution was not constant, and whose measured mean was used.
        nowhere: layer -> reason why the constant part was lost.
    """

    exact: tuple[str, ...] = ()
    mean: tuple[str, ...] = ()
    nowhere: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"corrected exactly in {len(self.exact)} layers"] if self.exact else []
        parts += [f"corrected by measured means in {len(self.mean)} layers"] if self.mean else []
        parts += (
            [f"not corrected in {len(self.nowhere)} layers ({next(iter(self.nowhere.values()))})"]
            if self.nowhere
            else []
        )
        return ", ".join(parts) or "need no correction"


@dataclass
class _Reader:
    """A layer that reads removed channels, and their contribution to its outputs."""

    layer: nn.Module
    removed: Tensor  # (inputs,) whether each input channel goes
    low: Tensor | None = None  # (inputs,) smallest and largest value of each input channel
    high: Tensor | None = None
    total: Tensor | None = None  # (outputs,)
    least: Tensor | None = None
    most: Tensor | None = None
    count: int = 0
    busy: bool = False

    @property
    def axis(self) -> int:
        """Return the dimension of channels of inputs and outputs, from the end."""
        return -(self.layer.weight.ndim - 1) if isinstance(self.layer, CONVOLUTIONS) else -1

    def _by_channel(self, value: Tensor) -> Tensor:
        return value.movedim(self.axis, 0).flatten(1)

    def watch_inputs(self, x: Tensor) -> None:
        """Widen the range of each input channel."""
        values = self._by_channel(x)
        low, high = values.amin(1), values.amax(1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def keep_constant(self) -> None:
        """Count only channels that never changed."""
        if self.low is not None and self.high is not None:
            size = torch.maximum(self.low.abs(), self.high.abs())
            self.removed = self.removed & ((self.high - self.low) <= 1e-6 * size).cpu()

    def add(self, x: Tensor) -> None:
        """Add the contribution of removed channels to the outputs for input ``x``."""
        shape = [1] * x.ndim
        shape[self.axis] = len(self.removed)
        alone = x * self.removed.to(x.device, x.dtype).reshape(shape)
        bias = getattr(self.layer, "bias", None)
        changed = {} if bias is None else {"bias": torch.zeros_like(bias)}
        self.busy = True  # the call below does not run the hook that made it
        part = self._by_channel(functional_call(self.layer, changed, (alone,))).double()
        self.busy = False
        least, most = part.amin(1), part.amax(1)
        self.total = part.sum(1) if self.total is None else self.total + part.sum(1)
        self.least = least if self.least is None else torch.minimum(self.least, least)
        self.most = most if self.most is None else torch.maximum(self.most, most)
        self.count += part.shape[1]

    @property
    def shift(self) -> Tensor:
        """Return the ``(outputs,)`` mean contribution."""
        assert self.total is not None
        return self.total / self.count

    @property
    def is_constant(self) -> bool:
        """True if the contribution was the same at all positions of all inputs."""
        assert self.least is not None
        assert self.most is not None
        size = torch.maximum(self.least.abs(), self.most.abs()).max()
        return bool((self.most - self.least).max() <= _CONSTANT * size)


def _readers(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> dict[str, _Reader]:
    modules = named_modules(model)
    readers: dict[str, _Reader] = {}
    for group in graph.groups:
        if group.name not in keep or len(keep[group.name]) == group.size:
            continue
        removed = removed_mask(group, keep[group.name])
        for part in group.parts:
            layer = modules.get(layer_of(part.tensor))
            if part.kind != "consumer" or not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
                continue
            inputs = layer.in_channels if isinstance(layer, CONVOLUTIONS) else layer.in_features
            reader = readers.setdefault(layer_of(part.tensor), _Reader(layer, torch.zeros(inputs, dtype=torch.bool)))
            reader.removed[part.rows[removed].reshape(-1)] = True
    return readers


def constant_contributions(
    model: nn.Module,
    graph: ChannelGraph,
    keep: Mapping[str, Tensor],
    run: Callable[[], Iterable[None]],
    *,
    constant_only: bool,
) -> dict[str, tuple[Tensor, bool]]:
    """Measure the mean contribution of removed channels to the layers that read them.

    Args:
        model: the network with all its channels, in eval mode.
        graph: its channel graph.
        keep: group name -> channels that stay.
        run: function that calls the network on every input; it may be called twice.
        constant_only: count only channels that are constant over all of these inputs.

    Returns:
        Layer -> ``(outputs,)`` float64 mean over inputs and positions, and true if it is the same everywhere.
    """
    readers = _readers(model, graph, keep)

    def passing(action: Callable[[_Reader, Tensor], None]) -> None:
        handles = [
            reader.layer.register_forward_pre_hook(lambda _module, args, reader=reader: action(reader, args[0]))
            for reader in readers.values()
        ]
        try:
            with torch.no_grad():
                for _ in run():
                    pass
        finally:
            for handle in handles:
                handle.remove()

    if constant_only:
        passing(lambda reader, x: reader.watch_inputs(x))
        for reader in readers.values():
            reader.keep_constant()

    def add(reader: _Reader, x: Tensor) -> None:
        if not reader.busy and bool(reader.removed.any()):
            reader.add(x)

    passing(add)
    return {name: (reader.shift, reader.is_constant) for name, reader in readers.items() if reader.count}


@torch.no_grad()
def compensate(model: nn.Module, graph: ChannelGraph, contributions: Mapping[str, tuple[Tensor, bool]]) -> Compensation:
    """Move contributions into biases or into the running means of the norms behind, in place.

    Args:
        model: a copy of the traced network, whose consumers ignore the removed channels.
        graph: its channel graph.
        contributions: result of :func:`constant_contributions`.
    """
    tensors = named_tensors(model)
    exact: list[str] = []
    mean: list[str] = []
    nowhere: dict[str, str] = {}
    for layer, (shift, constant) in contributions.items():
        if not bool(shift.any()):
            continue
        place = _place(graph, layer, tensors)
        if not place:
            nowhere[layer] = "no bias, and no norm with running statistics follows alone"
            continue
        name, sign = place
        tensors[name].add_(sign * shift.to(tensors[name].device, tensors[name].dtype))
        (exact if constant else mean).append(layer)
    return Compensation(tuple(exact), tuple(mean), nowhere)


def _place(graph: ChannelGraph, layer: str, tensors: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the tensor that can take a constant shift of the outputs of ``layer``, and the sign."""
    if f"{layer}.bias" in tensors:
        return f"{layer}.bias", 1
    made = [operation.name for operation in graph.operations if operation.weight == f"{layer}.weight"]
    if len(made) != 1:
        return None
    readers = [operation for operation in graph.operations if made[0] in operation.inputs]
    means = [f"{operation.module}.running_mean" for operation in readers if operation.operator == "batch_norm"]
    if len(readers) == 1 and len(means) == 1 and means[0] in tensors:
        return means[0], -1
    return None
