"""Facts about each layer from a trace: how to silence its filters, which layers read them, why they are pinned."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from ..filters import CONVOLUTIONS
from .answers import ConsumerColumns, FilterRegion, Table, layer_of, ranges
from .labels import Ints, is_increasing, unique
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
    names = list(dict.fromkeys(event.tensor for event in state.events))
    position = {tensor: i for i, tensor in enumerate(names)}
    silencing = [event for event in state.events if event.silence]
    reading = [event for event in state.events if event.kind == "consumer" and not event.silence]
    ids, filters, rows, number = _private(state, silencing, layer_number, filter_of)
    tensors = np.asarray([position[event.tensor] for event in silencing], dtype=np.int64)[number]
    silenced = _by_layer_and_tensor(ids, tensors, filters, rows, len(order))
    keys = list(dict.fromkeys((event.tensor, event.dim) for event in reading))
    place_of = {key: i for i, key in enumerate(keys)}
    ids, filters, rows, number = _private(state, reading, layer_number, filter_of)
    # Columns of a grouped kernel count through its blocks.
    sizes = [state.grouped[t].sizes[1] if d == 1 and t in state.grouped else 0 for t, d in keys]
    places = np.asarray([place_of[event.tensor, event.dim] for event in reading], dtype=np.int64)[number]
    size = np.asarray(sizes, dtype=np.int64)[places]
    block: Ints = np.where(size > 0, rows // np.maximum(size, 1), 0)
    blocks = 1 + int(block.max(initial=0))
    read = _by_layer_and_tensor(ids, places * blocks + block, filters, rows - block * size, len(order))
    exposed: list[dict[int, str]] = [{} for _ in order]
    for origin_owner, reason in table.exposed.items():
        if origin_owner >= 0 and layer_number[origin_owner] >= 0:
            exposed[layer_number[origin_owner]][int(filter_of[origin_owner])] = reason
    counts = np.zeros(len(order) + 1, dtype=np.int64)
    np.maximum.at(counts, layer_number, filter_of + 1)
    return {
        layer: FilterRegion(
            int(counts[i]),
            tuple((names[tensor], rows, filters) for tensor, filters, rows in silenced[i]),
            tuple(
                ConsumerColumns(
                    *keys[place // blocks],
                    torch.from_numpy(columns),
                    torch.from_numpy(filters),
                    _block_rows(state, keys[place // blocks][0], place % blocks) if sizes[place // blocks] else None,
                )
                for place, filters, columns in read[i]
            ),
            exposed[i],
        )
        for i, layer in enumerate(order)
    }


def _private(
    state: Propagation, events: list[Event], layer_number: Ints, filter_of: Ints
) -> tuple[Ints, Ints, Ints, Ints]:
    """(layer, filter, row, number of the event) of everything in ``events`` that a single filter feeds."""
    if not events:
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing, nothing, nothing
    origin = state.table.origin[np.concatenate([event.values for event in events])]
    number = np.repeat(np.arange(len(events)), [len(event.rows) for event in events])
    private = np.flatnonzero(origin >= 0)
    origin, rows = origin[private], np.concatenate([event.rows for event in events])[private]
    return layer_number[origin], filter_of[origin], rows, number[private]


def _block_rows(state: Propagation, tensor: str, block: int) -> tuple[int, int]:
    """The rows of dimension 0 that a block of a grouped kernel owns."""
    size = state.grouped[tensor].sizes[0]
    return block * size, (block + 1) * size


def _by_layer_and_tensor(
    ids: Ints, tensors: Ints, filters: Ints, rows: Ints, layers: int
) -> list[list[tuple[int, Ints, Ints]]]:
    """(tensor, filters, rows) for every layer, each pair of filter and row once."""
    split: list[list[tuple[int, Ints, Ints]]] = [[] for _ in range(layers)]
    known = ids >= 0
    if not known.any():
        return split
    columns = [column[known] for column in (ids, tensors, filters, rows)]
    sizes = tuple(1 + int(column.max()) for column in columns)
    code = unique(np.ravel_multi_index(tuple(columns), sizes))
    ids, tensors, filters, rows = np.unravel_index(code, sizes)
    bounds = np.flatnonzero((ids[1:] != ids[:-1]) | (tensors[1:] != tensors[:-1])) + 1
    edges = [0, *bounds.tolist(), len(code)]
    for start, stop in itertools.pairwise(edges):
        split[ids[start]].append((int(tensors[start]), filters[start:stop].copy(), rows[start:stop].copy()))
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
        acting = [e for e in events if e.kind != "member" or e.silence]
        if len(acting) == 1 and is_increasing(acting[0].rows):
            continue  # each entry acts on one value
        rows = np.concatenate([e.rows for e in acting])
        origins = np.concatenate([table.origin[e.values] for e in acting])
        pairs = np.unique(np.stack([rows, origins], axis=1), axis=0)
        again = pairs[1:, 0] == pairs[:-1, 0]
        for origin in pairs[np.r_[False, again] | np.r_[again, False], 1].tolist():
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
