"""Facts about each layer from a trace: how to silence its filters, which layers read them, why they are pinned."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from ..filters import CONVOLUTIONS
from .answers import ConsumerColumns, FilterRegion, Table, layer_of, ranges
from .labels import Ints, unique
from .propagate import Event, Propagation

__all__ = ["filter_regions", "layers_in_order", "neighbours", "pinned_layers"]


def layers_in_order(
    modules: Mapping[str, nn.Module], events: Iterable[Event], depthwise: Container[str] = ()
) -> tuple[list[str], set[str]]:
    """(layers in order of execution, their weights): convolutions and linear layers with filters of their own.

    Args:
        modules: modules of the network.
        events: events of the trace.
        depthwise: tensors that forward computes depthwise kernels of.
    """
    order: dict[str, None] = {}
    weights: set[str] = set()
    for event in events:
        path, attribute = layer_of(event.tensor), event.tensor.rpartition(".")[2]
        conv = isinstance(modules.get(path), CONVOLUTIONS) and (attribute == "weight" or event.tensor in depthwise)
        if event.kind == "filter" or (event.kind == "member" and conv):
            order[path] = None
            if attribute == "weight" or event.tensor in depthwise or (event.kind == "filter" and attribute != "bias"):
                weights.add(event.tensor)
    return list(order), weights


def pinned_layers(
    state: Propagation, table: Table, pins: dict[int, str], order: list[str], weights: set[str]
) -> dict[str, str]:
    """Layer -> why its filters are pinned; which ones, if not all."""
    reasons_of: dict[str, str] = {}
    index_of = {layer_of(tensor): index for index, tensor in enumerate(table.tensors) if tensor in weights}
    owned = np.flatnonzero(table.kind < 2)
    owned = owned[np.lexsort((table.root[owned], table.row[owned], table.tensor[owned]))]
    tensor_of = table.tensor[owned]
    pinned = np.isin(table.root[owned], np.asarray(sorted(pins), dtype=np.int64))
    for layer in order:
        if layer not in index_of:
            reasons_of[layer] = state.unowned.get(layer, "the trace follows none of its channels")
            continue
        start, stop = np.searchsorted(tensor_of, [index_of[layer], index_of[layer] + 1])
        here = owned[start:stop][pinned[start:stop]]
        reasons: dict[str, list[int]] = {}
        for row, root in zip(table.row[here].tolist(), table.root[here].tolist(), strict=True):
            reasons.setdefault(pins[root], []).append(row)
        if reasons:
            reasons_of[layer] = "; ".join(
                reason if len(chosen) == stop - start else f"filters {ranges(chosen)}: {reason}"
                for reason, chosen in reasons.items()
            )
    return reasons_of


def filter_regions(state: Propagation, order: list[str]) -> dict[str, FilterRegion]:
    """Return the rows that silence each filter, from the values before any union."""
    table = state.table
    _expose_shared(state)
    layer_number = np.full(table.owner_count, -1, dtype=np.int64)
    filter_of = np.full(table.owner_count, -1, dtype=np.int64)
    for event in state.events:
        if event.kind == "filter":
            owners = table.owner[event.values]
            layer_number[owners] = order.index(layer_of(event.tensor))
            filter_of[owners] = event.rows
    position = {tensor: i for i, tensor in enumerate(dict.fromkeys(e.tensor for e in state.events))}
    silence: list[list[Ints]] = []  # columns: layer, tensor, filter, row
    places: dict[tuple[str, int, int], int] = {}  # tensor, dim, block
    reads: list[list[Ints]] = []  # columns: layer, place, filter, column
    for event in state.events:
        if not event.silence and event.kind != "consumer":
            continue
        origin = table.origin[event.values]
        private = np.flatnonzero(origin >= 0)
        if not len(private):
            continue
        ids, filters, rows = layer_number[origin[private]], filter_of[origin[private]], event.rows[private]
        if event.silence:
            silence.append([ids, np.full_like(ids, position[event.tensor]), filters, rows])
            continue
        block, size = np.zeros_like(rows), 0
        if event.dim == 1 and event.tensor in state.grouped:
            size = state.grouped[event.tensor].sizes[1]
            block, rows = np.divmod(rows, size)
        numbers = unique(block).tolist()
        known = {b: places.setdefault((event.tensor, event.dim, b if size else -1), len(places)) for b in numbers}
        reads.append([ids, np.asarray([known[b] for b in numbers])[np.searchsorted(numbers, block)], filters, rows])
    names, keys = list(position), list(places)
    exposed: list[dict[int, str]] = [{} for _ in order]
    for origin_owner, reason in table.exposed.items():
        if origin_owner >= 0 and layer_number[origin_owner] >= 0:
            exposed[layer_number[origin_owner]][int(filter_of[origin_owner])] = reason
    silenced = _by_layer_and_tensor(silence, len(order))
    read = _by_layer_and_tensor(reads, len(order))
    counts = np.zeros(len(order) + 1, dtype=np.int64)
    np.maximum.at(counts, layer_number, filter_of + 1)
    return {
        layer: FilterRegion(
            int(counts[i]),
            tuple((names[tensor], rows, filters) for tensor, filters, rows in silenced[i]),
            tuple(
                ConsumerColumns(
                    *keys[place][:2],
                    torch.from_numpy(columns),
                    torch.from_numpy(filters),
                    _block_rows(state, *keys[place]),
                )
                for place, filters, columns in read[i]
            ),
            exposed[i],
        )
        for i, layer in enumerate(order)
    }


def _block_rows(state: Propagation, tensor: str, dim: int, block: int) -> tuple[int, int] | None:
    """The rows of dimension 0 that a block of a grouped kernel owns."""
    if block < 0:
        return None
    size = state.grouped[tensor].sizes[0]
    return block * size, (block + 1) * size


def _by_layer_and_tensor(blocks: list[list[Ints]], layers: int) -> list[list[tuple[int, Ints, Ints]]]:
    """(tensor, filters, rows) for every layer, each pair of filter and row once."""
    split: list[list[tuple[int, Ints, Ints]]] = [[] for _ in range(layers)]
    if not blocks:
        return split
    columns = np.stack([np.concatenate(column) for column in zip(*blocks, strict=True)])
    order = np.lexsort(columns[::-1])
    columns = columns[:, order]
    fresh = np.r_[True, (np.diff(columns, axis=1) != 0).any(axis=0)]
    columns = columns[:, fresh]
    bounds = np.flatnonzero((np.diff(columns[:2], axis=1) != 0).any(axis=0)) + 1
    for part in np.split(columns, bounds, axis=1):
        if part[0, 0] >= 0:
            split[part[0, 0]].append((int(part[1, 0]), part[2].copy(), part[3].copy()))
    return split


def _expose_shared(state: Propagation) -> None:
    """A per-channel entry that also acts on other channels (a shared norm) cannot be set to zero for one of them."""
    table = state.table
    users: dict[str, list[Event]] = {}
    for event in state.events:
        if event.kind != "consumer":
            users.setdefault(event.tensor, []).append(event)
    for tensor, events in users.items():
        if not any(e.silence for e in events):
            continue
        rows = np.concatenate([e.rows for e in events if e.kind != "member" or e.silence])
        origins = np.concatenate([table.origin[e.values] for e in events if e.kind != "member" or e.silence])
        pairs = np.unique(np.stack([rows, origins], axis=1), axis=0)
        met, counts = np.unique(pairs[:, 0], return_counts=True)
        shared = np.isin(pairs[:, 0], met[counts > 1])
        for origin in pairs[shared, 1].tolist():
            table.exposed.setdefault(origin, f"{tensor} is shared with other channels")


def neighbours(
    table: Table, order: list[str], weights: set[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """(layers that read a channel of each layer, layers that share a channel with it)."""
    position = {layer: i for i, layer in enumerate(order)}
    readers: dict[str, set[str]] = {layer: set() for layer in order}
    coupled: dict[str, set[int]] = {layer: set() for layer in order}
    # Channels with one signature have the same layers and consumers: the first of each will do.
    starts, ends = table.starts, np.r_[table.starts[1:], len(table.root)]
    _, first = np.unique(table.signatures(), return_index=True)
    for start, stop in zip(starts[first].tolist(), ends[first].tolist(), strict=True):
        tensors = [table.tensors[t] for t in table.tensor[start:stop].tolist()]
        names = list(zip(tensors, table.kind[start:stop].tolist(), strict=True))
        owners = dict.fromkeys(layer_of(t) for t, kind in names if kind < 2 and t in weights)
        others = {position[o] for o in owners if o in position}
        reading = {layer_of(t) for t, kind in names if kind == 2}
        for layer in owners:
            if layer in position:
                readers[layer] |= reading
                coupled[layer] |= others
    return (
        {n: tuple(sorted(s, key=lambda name: (position.get(name, len(order)), name))) for n, s in readers.items()},
        {n: tuple(order[i] for i in sorted(s) if order[i] != n) for n, s in coupled.items()},
    )
