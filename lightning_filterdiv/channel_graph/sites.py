"""Places where forward fixes numbers of channels: submodules that a channel map can replace, and other bodies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import nn

from ..filters import named_modules
from .answers import MapSite
from .labels import LabelTensor, core
from .propagate import Move, Propagation
from .record import Node, Record

__all__ = ["constrained_channels", "find_sites"]


def find_sites(
    model: nn.Module, records: Sequence[Record], state: Propagation, network: str
) -> tuple[list[MapSite], list[Move]]:
    """Return (sites that can be mapped, moves of forward bodies that cannot)."""
    modules = named_modules(model)
    sites: dict[str, MapSite | None] = {}
    for path in dict.fromkeys(move.module for move in state.moves):
        module = modules.get(path)
        candidates: set[MapSite | None] = {None}
        if module is not None and path != network and next(module.parameters(), None) is None:
            candidates = {_site(state, path, record) for record in records}
        sites[path] = candidates.pop() if len(candidates) == 1 else None
    return [s for s in sites.values() if s is not None], [m for m in state.moves if sites[m.module] is None]


def _site(state: Propagation, path: str, record: Record) -> MapSite | None:
    visits = {node: record.inside(node, path) for node in record.nodes if node.op in ("call", "item")}
    members = {node for node, visit in visits.items() if visit is not None}
    if len({visits[node] for node in members}) != 1:
        return None
    inside = [node for node in record.nodes if node in members]
    outer = dict.fromkeys(n for node in inside for n in node.inputs if n not in members)
    read = [n for n in outer if _channels(state, n) is not None]
    others = [n for n in outer if n not in read and n.op not in ("input", "tensor", "constant")]
    returned = {*record.outputs, *(node for node, _ in record.written)}
    written = [n for n in inside if n in returned or any(user in visits and user not in members for user in n.users)]
    if len(read) != 1 or len(written) != 1 or others:
        return None
    reads, writes = _channels(state, read[0]), _channels(state, written[0])
    return None if reads is None or writes is None else MapSite(path, reads, writes)


def _channels(state: Propagation, node: Node) -> tuple[int, ...] | None:
    """The channel at each index of dimension 1, or None if channels are not laid out along it."""
    value = state.values.get(node)
    if not isinstance(value, LabelTensor) or value.is_parameter or value.labels.ndim < 2:
        return None
    small = core(value.labels)
    if any(small.shape[d] > 1 for d in range(small.ndim) if d != 1):
        return None
    row = small.reshape(-1).expand(value.shape[1]).numpy()
    return tuple(np.where(row > 0, state.table.roots(state.table.owner[np.maximum(row, 0)]), -1).tolist())


def _components(sets: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """Merge sets that share an element."""
    merged: list[set[int]] = []
    for item in sets:
        touching = [m for m in merged if m & item]
        merged = [m for m in merged if not m & item]
        merged.append(set(item).union(*touching))
    return [frozenset(m) for m in merged]


def constrained_channels(
    sites: Sequence[MapSite], moves: Sequence[Move], state: Propagation, pinned: set[int]
) -> list[frozenset[int]]:
    """Sets of channels whose counts a forward body ties together; map sites they pass are run as they are."""
    table = state.table

    bodies = [frozenset(table.roots(move.owners).tolist()) - pinned for move in moves]
    maps = [frozenset(c for c in (*s.reads, *s.writes) if c >= 0 and c not in pinned) for s in sites]
    fixed = frozenset().union(*bodies)
    found = _components([s for s in [*bodies, *maps] if s])
    return [c for c in found if c & fixed]
