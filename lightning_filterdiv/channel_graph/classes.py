"""From events on labels to channels, groups of interchangeable channels, and the reasons of pinned ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .labels import Ints, mix, stable_hash
from .propagate import FLAT, Event, Propagation

__all__ = [
    "ChannelGroup",
    "Table",
    "TensorRows",
    "channel_table",
    "couple_shared_rows",
    "groups_of",
    "pin_impossible",
    "resolve_elements",
]

Kind = Literal["filter", "member", "consumer"]


@dataclass(frozen=True, eq=False)
class TensorRows:
    """The part of one tensor that belongs to the channels of a group.

    Attributes:
        tensor: canonical name.
        kind: ``filter`` (produces the channel), ``member`` (acts on it alone) or ``consumer`` (columns that read it).
        dim: the dimension that ``rows`` index.
        rows: (size, k) indices; row ``i`` belongs to channel ``i``, and the k-th entries of all channels correspond.
    """

    tensor: str
    kind: Kind
    dim: int
    rows: Tensor


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that may be clustered together: same producers, same members, same consumers, same operators between.

    Attributes:
        name: the first layer of the group, numbered where a layer is split into several groups.
        layers: layers with one filter in each channel, coupled layers together, in order of execution.
        size: number of channels.
        parts: every part of every tensor that lives and dies with these channels.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    parts: tuple[TensorRows, ...]
    channels: Tensor  # (size,) number of each channel in the trace

    @property
    def producers(self) -> tuple[str, ...]:
        """Those of ``layers`` that write the channel; the others act on it depthwise."""
        writers = {part.tensor.rpartition(".")[0] for part in self.parts if part.kind == "filter"}
        return tuple(layer for layer in self.layers if layer in writers)

    def rows(self, layer: str) -> Tensor:
        """(size,) index of the filter of ``layer`` in each channel.

        Raises:
            KeyError: ``layer`` is not one of ``layers``.
        """
        if layer in self.layers:
            for part in self.parts:
                if part.kind != "consumer" and part.tensor == f"{layer}.weight":
                    return part.rows[:, 0]
        raise KeyError(f"{layer!r} has no filters in group {self.name!r}; its layers are {', '.join(self.layers)}")


@dataclass(frozen=True)
class Table:
    """Every row of every tensor that some channel owns, as parallel arrays sorted by channel, then by key."""

    tensors: tuple[str, ...]
    root: Ints
    kind: Ints  # index into KINDS
    tensor: Ints
    dim: Ints
    row: Ints
    key: Ints

    def channels(self) -> list[slice]:
        """The entries of each channel."""
        if not len(self.root):
            return []
        bounds = [0, *(np.flatnonzero(np.diff(self.root)) + 1).tolist(), len(self.root)]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def entries_by_tensor(self) -> list[Ints]:
        """The entries of each tensor, in order."""
        if not self.tensors:
            return []
        order = np.argsort(self.tensor, kind="stable")
        return np.split(order, np.searchsorted(self.tensor[order], np.arange(1, len(self.tensors))))

    def kinds(self) -> dict[int, bytes]:
        """Channel -> what it is made of, the same for interchangeable channels and in a narrowed network."""
        return {int(self.root[part.start]): np.sort(self.key[part]).tobytes() for part in self.channels()}

    def filters(self) -> dict[str, list[int]]:
        """Producing tensor -> the channel of each of its filters."""
        found = {}
        for index, name in enumerate(self.tensors):
            here = (self.tensor == index) & (self.kind == 0)
            if here.any():
                found[name] = self.root[here][np.argsort(self.row[here])].tolist()
        return found

    def rows_by_channel(self) -> dict[tuple[str, int], dict[int, list[int]]]:
        """(tensor, dim) -> channel -> its rows, corresponding ones in the same order."""
        found: dict[tuple[str, int], dict[int, list[int]]] = {}
        for root, tensor, dim, row in zip(
            self.root.tolist(), self.tensor.tolist(), self.dim.tolist(), self.row.tolist(), strict=True
        ):
            found.setdefault((self.tensors[tensor], dim), {}).setdefault(root, []).append(row)
        return found


KINDS: tuple[Kind, ...] = ("filter", "member", "consumer")


def resolve_elements(state: Propagation) -> None:
    """Turn parameters met element-wise into members: slices along the one dimension that follows the channels."""
    table = state.table
    dims: dict[str, int] = {}
    for name, shape in state.elements.items():
        owners = state.owners_of(name, 0).reshape(shape)
        roots = table.roots(owners)
        candidates = [d for d in range(len(shape)) if (roots == roots[_first_along(len(shape), d)]).all()]
        if not candidates:
            reason = f"meets parameter {name}, whose entries do not follow the channels"
            for owner in owners.reshape(-1).tolist():
                table.pins.setdefault(owner, reason)
            continue
        dim = max(candidates, key=lambda d: shape[d])
        dims[name] = dim
        first = owners[tuple(slice(None) if d == dim else 0 for d in range(len(shape)))].reshape(-1)
        # The value of an entry is the one made when the parameter was first read.
        node_values = np.flatnonzero(np.isin(table.owner, first))
        by_owner = {int(table.owner[v]): int(v) for v in node_values[::-1].tolist()}
        values = np.fromiter((by_owner[int(o)] for o in first), dtype=np.int64, count=len(first))
        state.record(Event("member", name, dim, np.arange(len(first), dtype=np.int64), values))
    for i, event in enumerate(state.events):
        if event.dim == FLAT:
            shape = state.elements.get(event.tensor, torch.Size([0]))
            dim = dims.get(event.tensor, 0)
            rows = np.unravel_index(event.rows, tuple(shape))[dim] if event.tensor in dims else event.rows
            state.events[i] = Event(event.kind, event.tensor, dim, np.asarray(rows), event.values, event.silence)


def _first_along(ndim: int, dim: int) -> tuple[slice, ...]:
    return tuple(slice(None) if d == dim else slice(0, 1) for d in range(ndim))


def couple_shared_rows(state: Propagation) -> None:
    """Channels that meet at one row of a tensor (a layer called several times) become one channel."""
    table = state.table
    met: dict[tuple[str, int], list[tuple[Ints, Ints]]] = {}
    for event in state.events:
        if event.kind != "private" and event.block is None:
            met.setdefault((event.tensor, event.dim), []).append((event.rows, table.owner[event.values]))
    for (tensor, dim), pairs in met.items():
        rows, owners = (np.concatenate(column) for column in zip(*pairs, strict=True))
        order = np.lexsort((owners, rows))
        rows, owners = rows[order], owners[order]
        for k in np.flatnonzero((np.diff(rows) == 0) & (np.diff(owners) != 0)).tolist():
            table.unite(int(owners[k]), int(owners[k + 1]))
        foreign = np.isin(rows, np.asarray(sorted(state.unowned_rows.get((tensor, dim), ())), dtype=np.int64))
        for owner in np.unique(owners[foreign]).tolist():
            table.pins.setdefault(owner, f"{tensor} is also used on values that no channel owns")


def channel_table(state: Propagation) -> Table:
    """All events, by channel. Calls that share a tensor count once per row."""
    table = state.table
    names: dict[str, int] = {}
    blocks: list[list[Ints]] = []
    for event in state.events:
        if event.kind == "private":
            continue
        index = names.setdefault(event.tensor, len(names))
        tag = stable_hash(f"{event.kind}|{event.tensor}|{event.dim}")
        count = len(event.rows)
        constants = (np.full(count, n, dtype=np.int64) for n in (KINDS.index(event.kind), index, event.dim))
        key = mix(table.trail[event.values], table.slot[event.values], tag)
        blocks.append([table.roots(table.owner[event.values]), *constants, event.rows, key])
    if not blocks:  # no channel is owned: forward computes every kernel
        return Table((), *(np.zeros(0, dtype=np.int64) for _ in range(6)))
    columns = [np.concatenate(column) for column in zip(*blocks, strict=True)]
    # A row that several calls meet (a shared layer) is one row, its keys added up.
    identity, inverse = np.unique(np.stack(columns[:-1], axis=1), axis=0, return_inverse=True)
    keys = np.zeros(len(identity), dtype=np.int64)
    with np.errstate(over="ignore"):
        np.add.at(keys, inverse.reshape(-1), columns[-1])
    order = np.lexsort((identity[:, 4], keys, *identity[:, 3::-1].T))
    roots, kinds, tensors, dims, rows = (np.ascontiguousarray(column) for column in identity[order].T)
    return Table(tuple(names), roots, kinds, tensors, dims, rows, keys[order])


def pin_impossible(state: Propagation, table: Table, obstacles: Mapping[str, str]) -> None:
    """Pin channels that hold several filters of one tensor, or parts of tensors that cannot be narrowed.

    Args:
        obstacles: tensor name -> why it cannot be narrowed.
    """
    pins = state.table.pins
    for name, here in zip(table.tensors, table.entries_by_tensor(), strict=True):
        root_of, kind, dims = table.root[here], table.kind[here], table.dim[here]
        reason = obstacles.get(name)
        if reason is not None:
            for root in np.unique(root_of).tolist():
                pins.setdefault(root, reason)
        if name in state.read_elsewhere:
            for root in np.unique(root_of[kind != 1]).tolist():
                pins.setdefault(
                    root, f"{name} is also read by {state.read_elsewhere[name]}, not as the weight of a layer"
                )
        for dim in (0, 1):  # one dimension cannot lose rows and add up columns at once (tied encoder and decoder)
            along = dims == dim
            for root in np.intersect1d(root_of[along & (kind < 2)], root_of[along & (kind == 2)]).tolist():
                pins.setdefault(root, f"{name} is the weight of layers that use it in different ways")
        roots, counts = np.unique(root_of[kind == 0], return_counts=True)
        for root in roots[counts > 1].tolist():
            pins.setdefault(root, f"several filters of {name.rpartition('.')[0]} meet in one channel")


def groups_of(
    table: Table, pinned: set[int], order: Sequence[str], layer_tensors: set[str], constrained: set[int]
) -> list[ChannelGroup]:
    """Channels with equal signatures, in order of execution.

    Args:
        table: all rows of all channels.
        pinned: roots of pinned channels.
        order: layer names in order of execution.
        layer_tensors: weights of convolutions and linear layers.
        constrained: channels whose counts a forward body fixes: there a group is a run of consecutive filters.
    """
    position = {layer: i for i, layer in enumerate(order)}
    alike: dict[bytes, list[slice]] = {}
    for part in table.channels():
        if int(table.root[part.start]) in pinned or not (table.kind[part] == 0).any():
            continue
        columns = (table.kind[part], table.tensor[part], table.dim[part], table.key[part])
        alike.setdefault(b"".join(c.tobytes() for c in columns), []).append(part)
    found: list[tuple[tuple[str, ...], tuple[TensorRows, ...], Tensor]] = []
    for members in alike.values():
        channels = torch.from_numpy(table.root[[part.start for part in members]])
        parts = _parts(table, members)
        by_row = torch.argsort(next(p for p in parts if p.kind == "filter").rows[:, 0])
        runs = [by_row]
        if int(channels[0]) in constrained:
            filters = torch.cat([p.rows[by_row] for p in parts if p.kind == "filter"], dim=1)
            breaks = (filters.diff(dim=0) != 1).any(dim=1).nonzero().squeeze(1) + 1
            runs = list(torch.tensor_split(by_row, breaks))
        for run in runs:
            chosen = tuple(TensorRows(p.tensor, p.kind, p.dim, p.rows[run]) for p in parts)
            found.append((_layers_of(chosen, position, layer_tensors), chosen, channels[run]))
    found.sort(key=lambda item: (position[item[0][0]], int(item[1][0].rows[0, 0])))
    names = [layers[0] for layers, _, _ in found]
    return [
        ChannelGroup(
            name if names.count(name) == 1 else f"{name}[{names[:i].count(name)}]",
            layers,
            len(channels),
            parts,
            channels,
        )
        for i, (name, (layers, parts, channels)) in enumerate(zip(names, found, strict=True))
    ]


def _parts(table: Table, members: Sequence[slice]) -> tuple[TensorRows, ...]:
    """The rows of channels with equal signatures, one entry per tensor and dimension."""
    first = members[0]
    rows = np.stack([table.row[part] for part in members])
    labels = np.stack([table.kind[first], table.tensor[first], table.dim[first]], axis=1)
    starts = [0, *(np.flatnonzero((np.diff(labels, axis=0) != 0).any(axis=1)) + 1).tolist(), len(labels)]
    return tuple(
        TensorRows(
            table.tensors[labels[a, 1]], KINDS[labels[a, 0]], int(labels[a, 2]), torch.from_numpy(rows[:, a:b].copy())
        )
        for a, b in itertools.pairwise(starts)
    )


def _layers_of(parts: Sequence[TensorRows], position: Mapping[str, int], layer_tensors: set[str]) -> tuple[str, ...]:
    names = {
        p.tensor.rpartition(".")[0]
        for p in parts
        if p.kind != "consumer" and p.tensor in layer_tensors and p.rows.shape[1] == 1
    }
    return tuple(sorted(names, key=lambda name: position[name]))
