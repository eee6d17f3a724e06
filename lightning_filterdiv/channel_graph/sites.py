"""Where forward fixes channel counts: submodules that a channel map can stand for, and bodies that it cannot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph, Node

from ..filters import canonical_name
from .labels import LabelTensor, core
from .propagate import Move, Propagation

__all__ = ["MapSite", "constrained_channels", "find_sites", "module_of"]


@dataclass(frozen=True)
class MapSite:
    """A parameter-free submodule that moves channels, called once, with one tensor in and one out.

    ``reads`` and ``writes`` name the channel at each position of dimension 1 (-1: no channel).
    """

    module: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


def module_of(node: Node, network: str = "") -> tuple[str, bool]:
    """(canonical path of the module that runs a node, whether that is a channel map).

    Paths start at ``network``, the path of the traced submodule. What a channel map wraps goes by the path of the map,
    so that paths are the same before and after narrowing.
    """
    names: list[str] = []
    previous, in_map = "", False
    for path, kind in node.meta.get("nn_module_stack", {}).values():
        path = path.partition("@")[0]
        step = path.removeprefix(previous).removeprefix(".") if path.startswith(previous) else path
        if not in_map and step:
            names.append(step)
        previous, in_map = path, str(getattr(kind, "__qualname__", kind)).rpartition(".")[2] == "ChannelMap"
    path = canonical_name(".".join(names).removeprefix("network").removeprefix("."))
    return ".".join(part for part in (network, path) if part), in_map


def find_sites(
    model: nn.Module, graphs: Sequence[Graph], state: Propagation, network: str
) -> tuple[list[MapSite], list[Move]]:
    """(sites that can be mapped, moves made by forward bodies that cannot)."""
    modules = {canonical_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    sites: dict[str, MapSite | None] = {}
    for path in dict.fromkeys(move.module for move in state.moves):
        module = modules.get(path)
        found: set[MapSite | None] = {None}
        if module is not None and path != network and next(module.parameters(), None) is None:
            found = {_site(state, path, graph, path.removeprefix(network).removeprefix(".")) for graph in graphs}
        sites[path] = found.pop() if len(found) == 1 else None
    return [s for s in sites.values() if s is not None], [m for m in state.moves if sites[m.module] is None]


def _call(node: Node, path: str) -> str:
    """Which call of the module at ``path`` a node belongs to."""
    for key, (full, _) in node.meta["nn_module_stack"].items():
        if canonical_name(full.partition("@")[0].removeprefix("network").removeprefix(".")) == path:
            return f"{key}|{full}"
    return ""


def _site(state: Propagation, path: str, graph: Graph, local: str) -> MapSite | None:
    paths = {n: state.module_of(n)[0] for n in graph.nodes if n.op == "call_function"}
    inside = [n for n, p in paths.items() if p == path or p.startswith(f"{path}.")]
    if len({_call(n, local) for n in inside}) != 1:
        return None
    members = set(inside)
    read = dict.fromkeys(
        n for node in inside for n in node.all_input_nodes if n not in members and _channels(state, n) is not None
    )
    written = [n for n in inside if any(user not in members for user in n.users)]
    others = [
        n
        for node in inside
        for n in node.all_input_nodes
        if n not in members and n.op != "placeholder" and n not in read
    ]
    if len(read) != 1 or len(written) != 1 or others:
        return None
    reads, writes = _channels(state, next(iter(read))), _channels(state, written[0])
    return None if reads is None or writes is None else MapSite(path, reads, writes)


def _channels(state: Propagation, node: Node) -> tuple[int, ...] | None:
    """The channel at each index of dimension 1, or None if channels are not laid out along it."""
    value = state.values.get(node)
    if not isinstance(value, LabelTensor) or value.is_parameter or value.labels.ndim < 2:
        return None
    small = core(value.labels)
    if any(small.shape[d] > 1 for d in range(small.ndim) if d != 1):
        return None
    row = small.reshape(-1).expand(value.shape[1]).tolist()
    return tuple(state.table.root(int(state.table.owner[v])) if v > 0 else -1 for v in row)


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

    def free(owners: Iterable[int]) -> frozenset[int]:
        return frozenset(r for r in (table.root(int(o)) for o in owners) if r not in pinned)

    bodies = [free(move.owners.tolist()) for move in moves]
    maps = [frozenset(c for c in (*s.reads, *s.writes) if c >= 0 and c not in pinned) for s in sites]
    fixed = frozenset().union(*bodies)
    found = _components([s for s in [*bodies, *maps] if s])
    return [c for c in found if c & fixed]
