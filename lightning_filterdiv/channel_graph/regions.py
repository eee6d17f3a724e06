"""What a trace says about each layer: how to silence its filters, who reads them, why they are pinned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from ..filters import CONVOLUTIONS
from .classes import Table
from .graph import ConsumerColumns, FilterRegion, ranges
from .propagate import Event, Propagation

__all__ = ["filter_regions", "layers_in_order", "neighbours", "pinned_layers"]


def layers_in_order(modules: Mapping[str, nn.Module], events: Iterable[Event]) -> tuple[list[str], set[str]]:
    """(layers in order of execution, their weights): convolutions and linear layers with filters of their own."""
    order: dict[str, None] = {}
    weights: set[str] = set()
    for event in events:
        path, _, attribute = event.tensor.rpartition(".")
        conv = isinstance(modules.get(path), CONVOLUTIONS) and attribute == "weight"
        if event.kind == "filter" or (event.kind == "member" and conv):
            order[path] = None
            if attribute == "weight" or (event.kind == "filter" and attribute != "bias"):
                weights.add(event.tensor)
    return list(order), weights


def pinned_layers(
    state: Propagation, table: Table, pins: dict[int, str], order: list[str], weights: set[str]
) -> dict[str, str]:
    """Layer -> why its filters are pinned; which ones, if not all."""
    found: dict[str, str] = {}
    by_layer = {tensor.rpartition(".")[0]: index for index, tensor in enumerate(table.tensors) if tensor in weights}
    for layer in order:
        if layer not in by_layer:
            found[layer] = state.unowned.get(layer, "not reached by any channel")
            continue
        here = (table.tensor == by_layer[layer]) & (table.kind < 2)
        rows, roots = table.row[here], table.root[here]
        reasons: dict[str, list[int]] = {}
        for row, root in sorted(zip(rows.tolist(), roots.tolist(), strict=True)):
            if root in pins:
                reasons.setdefault(pins[root], []).append(row)
        if reasons:
            found[layer] = "; ".join(
                reason if len(chosen) == len(rows) else f"filters {ranges(chosen)}: {reason}"
                for reason, chosen in reasons.items()
            )
    return found


def filter_regions(state: Propagation, order: list[str]) -> dict[str, FilterRegion]:
    """What silences each filter, read off the values before any union."""
    table = state.table
    _expose_shared(state)
    layer_of = np.full(len(table._parent), -1, dtype=np.int64)
    filter_of = np.full(len(table._parent), -1, dtype=np.int64)
    for event in state.events:
        if event.kind == "filter":
            owners = table.owner[event.values]
            layer_of[owners] = order.index(event.tensor.rpartition(".")[0])
            filter_of[owners] = event.rows
    silence: list[dict[tuple[str, int, int], None]] = [{} for _ in order]
    columns: list[dict[tuple[str, int, tuple[int, int] | None], dict[tuple[int, int], None]]] = [{} for _ in order]
    for event in state.events:
        origin = table.origin[event.values]
        private = origin >= 0
        if not private.any():
            continue
        layer_ids, filters, rows = layer_of[origin[private]], filter_of[origin[private]], event.rows[private]
        for i in np.unique(layer_ids).tolist():
            mine = layer_ids == i
            if event.silence:
                pairs = sorted(zip(filters[mine].tolist(), rows[mine].tolist(), strict=True))
                silence[i].update(((event.tensor, j, row), None) for j, row in pairs)
            elif event.kind == "consumer":
                pairs = sorted(zip(filters[mine].tolist(), rows[mine].tolist(), strict=True))
                columns[i].setdefault((event.tensor, event.dim, event.block), {}).update(dict.fromkeys(pairs))
    exposed: list[dict[int, str]] = [{} for _ in order]
    for origin_owner, reason in table.exposed.items():
        if origin_owner >= 0 and layer_of[origin_owner] >= 0:
            exposed[layer_of[origin_owner]][int(filter_of[origin_owner])] = reason
    regions = {}
    for i, layer in enumerate(order):
        by_tensor: dict[str, list[tuple[int, int]]] = {}
        for tensor, j, row in silence[i]:
            by_tensor.setdefault(tensor, []).append((row, j))
        parts = []
        for tensor, pairs_of_tensor in by_tensor.items():
            rows, filters = np.asarray(pairs_of_tensor, dtype=np.int64).T
            parts.append((tensor, rows, filters))
        count = int(filter_of[layer_of == i].max(initial=-1)) + 1
        read = []
        for (tensor, dim, block), found in columns[i].items():
            filters_read, columns_read = torch.tensor(list(found)).T
            read.append(ConsumerColumns(tensor, dim, columns_read, filters_read, block))
        regions[layer] = FilterRegion(count, tuple(parts), tuple(read), exposed[i])
    return regions


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
        unique, counts = np.unique(pairs[:, 0], return_counts=True)
        shared = np.isin(pairs[:, 0], unique[counts > 1])
        for origin in pairs[shared, 1].tolist():
            table.exposed.setdefault(origin, f"{tensor} is shared with other channels")


def neighbours(
    table: Table, order: list[str], weights: set[str]
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """(layers that read a channel of each layer, layers that share a channel with it)."""
    is_layer = np.asarray([t in weights for t in table.tensors], dtype=bool)
    owns = is_layer[table.tensor] & (table.kind < 2)
    reads = table.kind == 2
    position = {layer: i for i, layer in enumerate(order)}
    layer_id = np.asarray([position.get(t.rpartition(".")[0], -1) for t in table.tensors], dtype=np.int64)
    consumers, coupled = {}, {}
    for layer, i in position.items():
        roots = np.unique(table.root[owns & (layer_id[table.tensor] == i)])
        member = np.isin(table.root, roots)
        readers = {table.tensors[t].rpartition(".")[0] for t in np.unique(table.tensor[member & reads]).tolist()}
        consumers[layer] = tuple(sorted(readers, key=lambda name: position.get(name, len(order))))
        others = np.unique(layer_id[table.tensor[member & owns]]).tolist()
        coupled[layer] = tuple(order[k] for k in others if k >= 0 and k != i)
    return consumers, coupled
