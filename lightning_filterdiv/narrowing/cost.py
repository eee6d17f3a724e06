"""Parameters and multiply-accumulate operations as exact functions of the channels that each group keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup
from lightning_filterdiv.filters import named_tensors

__all__ = ["Cost", "Measure", "network_cost"]

Measure = Literal["macs", "parameters", "channels"]
Counts = npt.NDArray[np.float64]


class Cost:
    """Cost as a sum of products, because the entries of a tensor are the product of the lengths of its dimensions.

    The work of a convolution or a matrix product grows with the entries of its weight, that of a product of activations
    with the channels along one of its dimensions. The length of a dimension is linear in the channels that the groups
    keep. No narrower network is made to count.

    Args:
        weights: ``(T,)`` cost of one entry of each tensor.
        constant: cost that does not depend on any group.
        lengths: ``(A,)`` full length of each dimension that a group shortens, tensor after tensor.
        shares: (A, G) entries of that dimension per channel of each group.
        owners: (A,) the tensor of each dimension, ascending.
        sizes: (G,) channels of each group.
    """

    def __init__(
        self,
        weights: Sequence[float],
        constant: float,
        lengths: Sequence[float],
        shares: npt.NDArray[np.float64],
        owners: Sequence[int],
        sizes: Sequence[int],
    ) -> None:
        self._weights, self._constant = np.asarray(weights, dtype=np.float64), float(constant)
        self._lengths, self._shares = np.asarray(lengths, dtype=np.float64), shares
        self._starts = np.flatnonzero(np.r_[True, np.diff(np.asarray(owners, dtype=np.int64)) != 0][: len(owners)])
        self._sizes = np.asarray(sizes, dtype=np.float64)
        self.full = self.of(self._sizes)

    def of(self, counts: Sequence[int] | Counts) -> float:
        """Return the cost with ``counts`` channels left, ``(G,)`` in the order of the groups."""
        return float(self._totals(self._remaining(np.asarray(counts, dtype=np.float64))))

    def with_changes(self, counts: Sequence[int], changes: Sequence[int]) -> Counts:
        """Return the ``(G,)`` costs if each group alone changes by its entry of ``changes``."""
        remaining = self._remaining(np.asarray(counts, dtype=np.float64))
        shifted = remaining[:, None] + self._shares * np.asarray(changes, dtype=np.float64)[None, :]
        return self._totals(shifted)

    def _remaining(self, counts: Counts) -> Counts:
        return self._lengths - self._shares @ (self._sizes - counts)

    def _totals(self, remaining: Counts) -> Counts:
        if not len(self._starts):
            return np.full(remaining.shape[1:], self._constant)
        entries = np.multiply.reduceat(remaining, self._starts, axis=0)
        return self._constant + self._weights @ entries


def network_cost(graph: ChannelGraph, measure: Measure) -> Cost:
    """Return the cost of a traced network.

    Args:
        graph: its channel graph.
        measure: ``"macs"`` of the traced submodule on the example inputs of the trace, ``"parameters"`` of the whole
            network, or ``"channels"`` of all groups.
    """
    groups = graph.groups
    sizes = [group.size for group in groups]
    if measure == "channels":
        return Cost([1.0], 0.0, [float(sum(sizes))], np.ones((1, len(groups))), [0], sizes)
    tensors = named_tensors(graph.model)
    price = _macs(graph) if measure == "macs" else _parameters(tensors)
    constant = price.pop("", 0.0)
    shortened: dict[str, dict[int, npt.NDArray[np.float64]]] = {}
    for index, group in enumerate(groups):
        for part in group.parts:
            if part.tensor in price:
                row = shortened.setdefault(part.tensor, {}).setdefault(part.dim, np.zeros(len(groups)))
                row[index] += part.rows.shape[1] / part.groups
    weights, lengths, shares, owners = [], [], [], []
    for name, unit in price.items():
        if name not in shortened:
            constant += unit * tensors[name].numel()
            continue
        shape = tensors[name].shape
        weights.append(unit * math.prod(n for d, n in enumerate(shape) if d not in shortened[name]))
        for dim, row in shortened[name].items():
            lengths.append(float(shape[dim]))
            shares.append(row)
            owners.append(len(weights) - 1)
    for operation in graph.operations if measure == "macs" else ():
        if operation.channels and operation.macs:
            weights.append(operation.macs / len(operation.channels))
            lengths.append(float(len(operation.channels)))
            shares.append(_per_channel(operation.channels, groups))
            owners.append(len(weights) - 1)
    return Cost(weights, constant, lengths, np.reshape(shares, (len(shares), len(groups))), owners, sizes)


def _per_channel(channels: Sequence[int], groups: Sequence[ChannelGroup]) -> npt.NDArray[np.float64]:
    """(G,) positions that each channel of a group holds among ``channels``."""
    return np.array([np.isin(channels, group.channels.numpy()).sum() / group.size for group in groups])


def _macs(graph: ChannelGraph) -> dict[str, float]:
    """Weight -> operations per entry; under no name those that grow with no weight and no channels."""
    tensors = named_tensors(graph.model)
    price: dict[str, float] = {}
    for operation in graph.operations:
        if operation.macs and not operation.channels:
            entries = tensors[operation.weight].numel() if operation.weight in tensors else 1
            name = operation.weight if operation.weight in tensors else ""
            price[name] = price.get(name, 0.0) + operation.macs / entries
    return price


def _parameters(tensors: Mapping[str, object]) -> dict[str, float]:
    """Return name of each parameter -> 1. A shared parameter counts under its first name, as in the graph."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            first.setdefault(id(tensor), name)
    return dict.fromkeys(first.values(), 1.0)
