"""Derive channels from events on labels: groups of interchangeable channels, and reasons of pinned ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor

from .answers import KINDS, ChannelGroup, Table, TensorRows, layer_of
from .labels import Ints, mix, stable_hash, unique
from .propagate import FLAT, Event, Grouped, Propagation

__all__ = [
    "channel_table",
    "couple_shared_rows",
    "groups_of",
    "linked_ranks",
    "pin_idle",
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
        dims[name] = state.element_dims[name] = dim
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
        if event.kind != "private":
            met.setdefault((event.tensor, event.dim), []).append((event.rows, table.owner[event.values]))
    for (tensor, dim), pairs in met.items():
        rows, owners = (np.concatenate(column) for column in zip(*pairs, strict=True))
        order = np.lexsort((owners, rows))
        rows, owners = rows[order], owners[order]
        again = np.flatnonzero((np.diff(rows) == 0) & (np.diff(owners) != 0))
        table.unite(owners[again], owners[again + 1])
        foreign = np.isin(rows, np.asarray(sorted(state.unowned_rows.get((tensor, dim), ())), dtype=np.int64))
        for owner in unique(owners[foreign]).tolist():
            table.pins.setdefault(owner, f"{tensor} is also used on values that no channel owns")


def linked_ranks(state: Propagation) -> dict[str, Ints]:
    """Number the filters (entries) of a tensor that belong to one channel.

    Keys are those of :attr:`Propagation.owners`. Another run with these numbers tells the filters of a channel apart,
    so that filter k of one channel is the counterpart of filter k of another only if the network treats them alike.
    """
    table, ranks = state.table, {}
    pinned = table.roots(np.fromiter(table.pins, dtype=np.int64, count=len(table.pins)))
    for name, owners in state.owners.items():
        shape = state.elements.get(name)
        if shape is not None and name not in state.element_dims:
            continue
        dim = 0 if shape is None else state.element_dims[name]
        view = owners if shape is None else owners.reshape(shape).swapaxes(0, dim).reshape(shape[dim], -1)[:, 0]
        roots = table.roots(view)
        order = np.argsort(roots, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(roots[order]) != 0])
        if len(starts) == len(roots):
            continue
        rank = np.empty(len(roots), dtype=np.int64)
        rank[order] = np.arange(len(roots)) - np.repeat(starts, np.diff(np.r_[starts, len(roots)]))
        if np.isin(roots[rank > 0], pinned).all():
            continue
        if shape is not None:
            rank = np.broadcast_to(rank.reshape([-1 if d == dim else 1 for d in range(len(shape))]), shape).reshape(-1)
        ranks[name] = rank
    return ranks


def channel_table(state: Propagation) -> Table:
    """Return all events by channel. Calls that share a tensor count once per row."""
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
    """Pin channels with parts of tensors that cannot be narrowed.

    Args:
        obstacles: tensor name -> why it cannot be narrowed.
    """
    pins = state.table.pins
    for index, name in enumerate(table.tensors):
        reason = obstacles.get(name)
        other = state.read_elsewhere.get(name)
        if reason is not None:
            for root in unique(table.root[table.tensor == index]).tolist():
                pins.setdefault(root, reason)
        if other is not None:
            for root in unique(table.root[(table.tensor == index) & (table.kind != 1)]).tolist():
                pins.setdefault(root, f"{name} is also read by {other}, not as the weight of a layer")
    # One dimension cannot lose rows and add up columns at once (tied encoder and decoder).
    count = 1 + len(table.tensors)
    place = (table.root * count + table.tensor) * 2 + table.dim
    narrow = table.dim < 2
    cut, added = place[narrow & (table.kind < 2)], place[narrow & (table.kind == 2)]
    both = unique(np.intersect1d(unique(cut), unique(added), assume_unique=True) // 2)
    for root, index in zip((both // count).tolist(), (both % count).tolist(), strict=True):
        pins.setdefault(root, f"{table.tensors[index]} is the weight of layers that use it in different ways")


def pin_idle(state: Propagation, table: Table, idle: Set[str]) -> None:
    """Pin channels that only layers write whose results forward does not use."""
    if not idle:
        return
    unused = np.isin(table.tensor, [i for i, name in enumerate(table.tensors) if name in idle])
    filters = table.kind == KINDS.index("filter")
    for root in np.setdiff1d(table.root[filters & unused], table.root[filters & ~unused]).tolist():
        state.table.pins.setdefault(root, "forward does not use what it computes")


def groups_of(
    table: Table,
    pinned: set[int],
    order: Sequence[str],
    layer_tensors: set[str],
    constrained: set[int],
    grouped: Mapping[str, Grouped],
) -> tuple[list[ChannelGroup], dict[int, str]]:
    """Return groups of channels with equal signatures, in order of execution, and channels that cannot be narrowed ->
    reason.

    Args:
        table: all rows of all channels.
        pinned: roots of pinned channels.
        order: layer names in order of execution.
        layer_tensors: weights of convolutions and linear layers.
        constrained: channels whose number a forward body fixes. Their groups are runs of consecutive filters.
        grouped: blocks of tensors that read or write channels block by block.
    """
    position = {layer: i for i, layer in enumerate(order)}
    starts = table.starts
    free = ~np.isin(table.root[starts], np.asarray(sorted(pinned), dtype=np.int64))
    if len(starts):
        free &= np.logical_or.reduceat(table.kind == 0, starts)
    starts, signatures = starts[free], table.signatures()[free]
    _, first, inverse = np.unique(signatures, return_index=True, return_inverse=True)
    found: list[tuple[tuple[str, ...], tuple[TensorRows, ...], Tensor, Tensor | None]] = []
    refused: dict[int, str] = {}
    sizes = np.bincount(inverse.reshape(-1), minlength=len(first))
    by_signature = np.split(np.argsort(inverse.reshape(-1), kind="stable"), np.cumsum(sizes))
    for members in by_signature[: len(first)]:
        channels = torch.from_numpy(table.root[starts[members]])
        parts = _parts(table, starts[members], grouped)
        by_row = torch.argsort(next(p for p in parts if p.kind == "filter").rows[:, 0])
        runs = [by_row]
        if int(channels[0]) in constrained:
            together = torch.stack([_follow(p.rows[by_row]) for p in parts if p.kind == "filter"]).all(dim=0)
            runs = list(torch.tensor_split(by_row, (~together).nonzero().squeeze(1) + 1))
        for run in itertools.chain.from_iterable(_by_unequal_blocks(parts, run, grouped) for run in runs):
            chosen = tuple(TensorRows(p.tensor, p.kind, p.dim, p.rows[run], p.groups) for p in parts)
            blocks = _blocks_of(chosen, grouped)
            if isinstance(blocks, str):
                refused |= dict.fromkeys(channels[run].tolist(), blocks)
            else:
                found.append((_layers_of(chosen, position, layer_tensors), chosen, channels[run], blocks))
    found.sort(key=lambda item: (position[item[0][0]], int(item[1][0].rows[0, 0])))
    names = [layers[0] for layers, *_ in found]
    groups = [
        ChannelGroup(
            name if names.count(name) == 1 else f"{name}[{names[:i].count(name)}]",
            layers,
            len(channels),
            tuple(p for p in parts if p.kind != "counted"),
            channels,
            blocks,
            tuple(p for p in parts if p.kind == "counted"),
        )
        for i, (name, (layers, parts, channels, blocks)) in enumerate(zip(names, found, strict=True))
    ]
    return groups, refused


def _follow(rows: Tensor) -> Tensor:
    """Return a ``(size - 1,)`` mask: the filters of the next channel follow those of a channel, each of them or all at
    once."""
    rows = rows.sort(dim=1).values
    steps, each = rows.diff(dim=0), rows.shape[1]
    whole = (rows[1:, -1] - rows[1:, 0] == each - 1) & (rows[:-1, -1] - rows[:-1, 0] == each - 1)
    return (steps == 1).all(dim=1) | (whole & (steps == each).all(dim=1))


def _by_unequal_blocks(parts: Sequence[TensorRows], run: Tensor, grouped: Mapping[str, Grouped]) -> Sequence[Tensor]:
    """``run`` in parts that lie in one block each of every norm whose blocks have unequal shares of it.

    Such a norm counts its channels block by block: no block has to lose as many as another.
    """
    for part in parts:
        if part.kind == "counted" and part.tensor in grouped:
            place = grouped[part.tensor].blocks_of(part.rows[run], part.dim)
            found, index = place.unique(dim=0, return_inverse=True)
            counts = torch.bincount(place.reshape(-1), minlength=grouped[part.tensor].groups)
            if len(found) > 1 < len(counts.unique()):
                runs = (_by_unequal_blocks(parts, run[index == i], grouped) for i in range(len(found)))
                return list(itertools.chain.from_iterable(runs))
    return [run]


def _blocks_of(parts: Sequence[TensorRows], grouped: Mapping[str, Grouped]) -> Tensor | str | None:
    """Return the block of each channel, None without blocks, or the reason why blocks cannot lose equally many."""
    several = next((p for p in parts if p.kind == "filter" and len(p.rows) == 1 < p.rows.numel()), None)
    if several is not None:
        return f"{several.rows.numel()} filters of {layer_of(several.tensor)} meet in one channel"
    columns = []
    for part in parts:
        if part.tensor not in grouped:
            continue
        groups = grouped[part.tensor].groups
        place = grouped[part.tensor].blocks_of(part.rows, part.dim)
        if place.shape[1] == groups and bool((place.sort(dim=1).values == torch.arange(groups)).all()):
            continue  # every channel has a row in each block
        if part.kind == "counted" and len(place.unique(dim=0)) == 1:
            continue  # of a norm with unequal blocks, see _by_unequal_blocks
        if len(torch.bincount(place.reshape(-1), minlength=groups).unique()) > 1:
            return f"the blocks of {layer_of(part.tensor)} (groups={groups}) have unequal shares of them"
        columns.append((part, groups, place))
    if not columns:
        return None
    keys = torch.cat([place for *_, place in columns], dim=1)
    _, index, counts = keys.unique(dim=0, return_inverse=True, return_counts=True)
    if len(counts) == 1:
        return None
    part, groups, _ = columns[0]
    if len(counts.unique()) > 1:
        return f"the blocks of {layer_of(part.tensor)} (groups={groups}) do not fit the blocks of other layers"
    if int(counts[0]) == 1:
        return f"every block of {layer_of(part.tensor)} (groups={groups}) has one channel of them"
    # Numbered in the order in which their first channels come.
    first = torch.full((len(counts),), len(index)).scatter_reduce_(0, index, torch.arange(len(index)), "amin")
    return first.argsort().argsort()[index]


def _parts(table: Table, starts: Ints, grouped: Mapping[str, Grouped]) -> tuple[TensorRows, ...]:
    """The rows of channels with equal signatures, one entry per tensor and dimension."""
    after = np.flatnonzero(table.root[starts[0] :] != table.root[starts[0]])
    length = int(after[0]) if len(after) else len(table.root) - int(starts[0])
    rows = table.row[starts[:, None] + np.arange(length)]
    first = slice(int(starts[0]), int(starts[0]) + length)
    labels = np.stack([table.kind[first], table.tensor[first], table.dim[first]], axis=1)
    bounds = [0, *(np.flatnonzero((np.diff(labels, axis=0) != 0).any(axis=1)) + 1).tolist(), len(labels)]
    parts = []
    for a, b in itertools.pairwise(bounds):
        tensor, dim = table.tensors[labels[a, 1]], int(labels[a, 2])
        groups = grouped[tensor].groups if dim == 1 and tensor in grouped else 1
        parts.append(TensorRows(tensor, KINDS[labels[a, 0]], dim, torch.from_numpy(rows[:, a:b].copy()), groups))
    return tuple(parts)


def _layers_of(parts: Sequence[TensorRows], position: Mapping[str, int], layer_tensors: set[str]) -> tuple[str, ...]:
    names = {layer_of(p.tensor) for p in parts if p.kind != "consumer" and p.tensor in layer_tensors}
    return tuple(sorted(names, key=lambda name: position[name]))
