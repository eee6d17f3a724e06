"""From events on labels to channels, groups of interchangeable channels, and the reasons of pinned ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .answers import KINDS, ChannelGroup, Table, TensorRows, layer_of
from .labels import Ints, mix, stable_hash
from .propagate import FLAT, Event, Propagation

__all__ = [
    "channel_table",
    "couple_shared_rows",
    "groups_of",
    "pin_impossible",
    "resolve_elements",
]


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
        again = np.flatnonzero((np.diff(rows) == 0) & (np.diff(owners) != 0))
        table.unite(owners[again], owners[again + 1])
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
    roots, kinds, tensors, dims, rows, keys = (np.concatenate(column) for column in zip(*blocks, strict=True))
    # A row that several calls meet (a shared layer) is one row, its keys added up.
    code = (kinds * len(names) + tensors) * (1 + int(dims.max())) + dims
    identity = (roots * (1 + int(code.max())) + code) * (1 + int(rows.max())) + rows
    sorting = np.argsort(identity, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(identity[sorting]) != 0])
    first = sorting[starts]
    with np.errstate(over="ignore"):
        total = np.add.reduceat(keys[sorting], starts)
    order = np.lexsort((rows[first], total, code[first], roots[first]))
    chosen = first[order]
    return Table(tuple(names), roots[chosen], kinds[chosen], tensors[chosen], dims[chosen], rows[chosen], total[order])


def pin_impossible(state: Propagation, table: Table, obstacles: Mapping[str, str]) -> None:
    """Pin channels that hold several filters of one tensor, or parts of tensors that cannot be narrowed.

    Args:
        obstacles: tensor name -> why it cannot be narrowed.
    """
    pins = state.table.pins
    for index, name in enumerate(table.tensors):
        reason = obstacles.get(name)
        other = state.read_elsewhere.get(name)
        if reason is not None:
            for root in np.unique(table.root[table.tensor == index]).tolist():
                pins.setdefault(root, reason)
        if other is not None:
            for root in np.unique(table.root[(table.tensor == index) & (table.kind != 1)]).tolist():
                pins.setdefault(root, f"{name} is also read by {other}, not as the weight of a layer")
    # One dimension cannot lose rows and add up columns at once (tied encoder and decoder).
    count = 1 + len(table.tensors)
    place = (table.root * count + table.tensor) * 2 + table.dim
    narrow = table.dim < 2
    both = np.unique(np.intersect1d(place[narrow & (table.kind < 2)], place[narrow & (table.kind == 2)]) // 2)
    for root, index in zip((both // count).tolist(), (both % count).tolist(), strict=True):
        pins.setdefault(root, f"{table.tensors[index]} is the weight of layers that use it in different ways")
    filters = table.kind == 0
    root_of, tensor_of = table.root[filters], table.tensor[filters]
    again = np.flatnonzero((np.diff(root_of) == 0) & (np.diff(tensor_of) == 0))
    for root, index in zip(root_of[again].tolist(), tensor_of[again].tolist(), strict=True):
        pins.setdefault(root, f"several filters of {layer_of(table.tensors[index])} meet in one channel")


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
    starts = table.starts
    free = ~np.isin(table.root[starts], np.asarray(sorted(pinned), dtype=np.int64))
    if len(starts):
        free &= np.logical_or.reduceat(table.kind == 0, starts)
    starts, signatures = starts[free], table.signatures()[free]
    _, first, inverse = np.unique(signatures, return_index=True, return_inverse=True)
    found: list[tuple[tuple[str, ...], tuple[TensorRows, ...], Tensor]] = []
    sizes = np.bincount(inverse.reshape(-1), minlength=len(first))
    by_signature = np.split(np.argsort(inverse.reshape(-1), kind="stable"), np.cumsum(sizes))
    for members in by_signature[: len(first)]:
        channels = torch.from_numpy(table.root[starts[members]])
        parts = _parts(table, starts[members])
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


def _parts(table: Table, starts: Ints) -> tuple[TensorRows, ...]:
    """The rows of channels with equal signatures, one entry per tensor and dimension."""
    after = np.flatnonzero(table.root[starts[0] :] != table.root[starts[0]])
    length = int(after[0]) if len(after) else len(table.root) - int(starts[0])
    rows = table.row[starts[:, None] + np.arange(length)]
    first = slice(int(starts[0]), int(starts[0]) + length)
    labels = np.stack([table.kind[first], table.tensor[first], table.dim[first]], axis=1)
    bounds = [0, *(np.flatnonzero((np.diff(labels, axis=0) != 0).any(axis=1)) + 1).tolist(), len(labels)]
    return tuple(
        TensorRows(
            table.tensors[labels[a, 1]], KINDS[labels[a, 0]], int(labels[a, 2]), torch.from_numpy(rows[:, a:b].copy())
        )
        for a, b in itertools.pairwise(bounds)
    )


def _layers_of(parts: Sequence[TensorRows], position: Mapping[str, int], layer_tensors: set[str]) -> tuple[str, ...]:
    names = {
        layer_of(p.tensor) for p in parts if p.kind != "consumer" and p.tensor in layer_tensors and p.rows.shape[1] == 1
    }
    return tuple(sorted(names, key=lambda name: position[name]))
