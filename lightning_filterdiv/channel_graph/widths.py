"""Which widths a forward body can express, found by running it at other widths.

A forward that splits, shuffles or pads channels itself ties channel counts together, in a way that only the code knows
(``chunk(2)`` follows the width, ``x[:, :8]`` does not). So the network is rebuilt without weights at the wanted widths,
every layer taking whatever it receives, and traced again: the labels then say how many channels of each kind these
widths mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from ..filters import CONVOLUTIONS, canonical_name
from .capture import find_submodule
from .classes import ChannelGroup
from .errors import ChannelGraphError
from .export import quiet
from .narrow import copy_network, update_attributes

if TYPE_CHECKING:
    from .graph import ChannelGraph

__all__ = ["Layout", "layout_for", "nearest_counts", "rigid_groups", "widths_of"]

_STEPS = (1.0, 0.75, 0.5, 0.25)
_MOST_SINGLE_TRIALS = 24


@dataclass(frozen=True)
class Layout:
    """The traced network at other widths, channel by channel.

    Attributes:
        model: the network at the new widths, without weights.
        graph: its channel graph.
        counts: group name -> channels there.
        channels: channel of ``graph`` -> (group name, index within the group), or ("", channel of the original).
    """

    model: nn.Module
    graph: ChannelGraph
    counts: dict[str, int]
    channels: dict[int, tuple[str, int]]


def nearest_counts(graph: ChannelGraph, counts: dict[str, int]) -> dict[str, int]:
    """See :meth:`ChannelGraph.expressible_counts`."""
    result = dict(counts)
    shrinking = []
    for groups in _tied_groups(graph):
        result.update({g.name: g.size for g in groups})
        if any(counts[g.name] < g.size for g in groups):
            shrinking.append((groups, sum(counts[g.name] for g in groups) / sum(g.size for g in groups)))
    if (at_once := _all_at_once(graph, shrinking)) is not None:
        return result | at_once
    for groups, ratio in shrinking:
        result.update(_together(graph, [(groups, ratio)]) or _one_by_one(graph, groups, counts))
    return result


def rigid_groups(graph: ChannelGraph) -> list[ChannelGroup]:
    """Groups that forward does not let anyone narrow."""
    tied = _tied_groups(graph)
    if _all_at_once(graph, [(groups, 0.75) for groups in tied]) is not None:
        return []
    rigid = []
    for groups in tied:
        if _together(graph, [(groups, 0.75)]) is None:
            flexible = _one_by_one(graph, groups, {g.name: (g.size + 1) // 2 for g in groups})
            rigid += [g for g in groups if g.size > 1 and g.name not in flexible]
    return rigid


def _tied_groups(graph: ChannelGraph) -> list[list[ChannelGroup]]:
    found = [[g for g in graph.groups if int(g.channels[0]) in channels] for channels in graph.constrained]
    return [groups for groups in found if groups]


def _all_at_once(graph: ChannelGraph, sets: Sequence[tuple[list[ChannelGroup], float]]) -> dict[str, int] | None:
    """One trace instead of one per set, for networks of many sets that forward lets shrink as wanted (ShuffleNet)."""
    return _together(graph, sets, _STEPS[:1]) if len(sets) > 1 else None


def _together(
    graph: ChannelGraph, sets: Sequence[tuple[list[ChannelGroup], float]], steps: Sequence[float] = _STEPS
) -> dict[str, int] | None:
    """Counts when all layers shrink to about the ratio of their set, or else to less and less; None if a set keeps all.

    Args:
        graph: of the network.
        sets: tied groups, and the ratio that is wanted for them.
        steps: shares of the shrinkage to try.
    """
    totals: dict[str, int] = {}
    removed: dict[str, float] = {}
    for groups, ratio in sets:
        for group in groups:
            for layer in group.producers:
                totals[layer] = totals.get(layer, 0) + group.size
                removed[layer] = removed.get(layer, 0.0) + (1 - ratio) * group.size
    tried = set()
    for step in steps:
        widths = {layer: n - round(step * removed[layer]) for layer, n in totals.items()}
        if widths != totals and (key := tuple(widths.values())) not in tried:
            tried.add(key)
            layout = layout_for(
                graph, {layer: graph.filter_count(layer) - n + widths[layer] for layer, n in totals.items()}
            )
            if layout is not None and all(any(layout.counts[g.name] < g.size for g in groups) for groups, _ in sets):
                return {g.name: layout.counts[g.name] for groups, _ in sets for g in groups}
    return None


def _one_by_one(graph: ChannelGraph, groups: list[ChannelGroup], wanted: Mapping[str, int]) -> dict[str, int]:
    """Counts of those groups that can be narrowed while the others keep all their channels."""
    if len(groups) > _MOST_SINGLE_TRIALS:
        return {}

    def fits(counts: dict[str, int]) -> bool:
        layout = layout_for(graph, widths_of(graph, counts))
        return layout is not None and all(layout.counts[g.name] == counts.get(g.name, g.size) for g in groups)

    narrowed = {g.name: wanted[g.name] for g in groups if wanted[g.name] < g.size}
    alone = {name: count for name, count in narrowed.items() if fits({name: count})}
    return alone if len(alone) < 2 or fits(alone) else dict([next(iter(alone.items()))])


def widths_of(graph: ChannelGraph, counts: Mapping[str, int]) -> dict[str, int]:
    """Layer -> filters left with ``counts`` channels in each group (all channels in groups not mentioned)."""
    widths: dict[str, int] = {}
    for group in graph.groups:
        if counts.get(group.name, group.size) < group.size:
            for layer in group.producers:
                widths[layer] = widths.get(layer, graph.filter_count(layer)) - group.size + counts[group.name]
    return widths


def layout_for(graph: ChannelGraph, widths: Mapping[str, int]) -> Layout | None:
    """Trace the network with layers of these widths (others unchanged); None if it does not run, or differs."""
    from .trace import trace_at

    blank = _blank_copy(graph.model)
    inputs = tree_map(_on_cpu, graph.inputs)
    try:
        with quiet():
            _adapt(blank, graph.network, widths, inputs)
        narrow = trace_at(blank, inputs, graph.network)
    except (ChannelGraphError, RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return None
    return _match(graph, blank, narrow)


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return torch.empty(leaf.shape, dtype=leaf.dtype) if leaf.is_floating_point() else leaf.cpu()
    return leaf


def _blank_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose floating tensors are uninitialised (never touched, so never paged in)."""
    blank: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        new = torch.empty(tensor.shape, dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            blank[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad)
        else:
            blank[id(tensor)] = new if tensor.is_floating_point() or tensor.is_meta else tensor.detach().cpu().clone()
    return copy_network(model, blank).eval()


@contextmanager
def _hooks(model: nn.Module, hook: Any) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if next(m.children(), None) is None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapt(model: nn.Module, network: str, widths: Mapping[str, int], inputs: Any) -> None:
    """Run ``model`` on shapes alone; each layer first takes the width of its input, and ``widths`` for its output."""
    names = {id(m): canonical_name(n) for n, m in reversed(list(model.named_modules(remove_duplicate=False)))}
    shapes: dict[tuple[int, str], tuple[nn.Module, torch.Size]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        for name, shape in _shapes(module, args[0], widths.get(names[id(module)])).items():
            old = getattr(module, name)
            if old.shape != torch.Size(shape):
                new = torch.empty(shape, dtype=old.dtype)
                setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
                shapes[id(module), name] = module, torch.Size(shape)
        update_attributes(module)

    def fake(leaf: Any) -> Any:
        return mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), _hooks(model, hook):
        args, kwargs = tree_map(fake, inputs)
        find_submodule(model, network)(*args, **kwargs)
    for (_, name), (module, shape) in shapes.items():
        old = getattr(module, name)
        new = torch.empty(shape, dtype=old.dtype)
        setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _shapes(module: nn.Module, input: Tensor, width: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of ``module`` when it reads ``input`` and writes ``width`` channels."""
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(module, CONVOLUTIONS):
        reads, writes, kernel = input.shape[1], width or module.out_channels, module.weight.shape[2:]
        if module.groups == 1:
            order = (reads, writes) if module.transposed else (writes, reads)
        elif module.groups == module.in_channels:
            each = module.out_channels // module.groups
            order, writes = ((reads, each) if module.transposed else (reads * each, 1)), reads * each
        else:
            return {}
        shapes["weight"] = (*order, *kernel)
        if module.bias is not None:
            shapes["bias"] = (writes,)
    elif isinstance(module, nn.Linear):
        writes = width or module.out_features
        shapes["weight"] = (writes, input.shape[-1])
        if module.bias is not None:
            shapes["bias"] = (writes,)
    elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.PReLU)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if tensor is not None and tensor.numel() > 1:
                shapes[name] = (input.shape[1],)
    return shapes


def _match(graph: ChannelGraph, model: nn.Module, narrow: ChannelGraph) -> Layout | None:
    """Recognise the channels of ``graph`` in ``narrow``: along every layer the same kinds in the same order."""
    constrained = frozenset().union(*graph.constrained)
    group_of = {int(c): g.name for g in graph.groups for c in g.channels.tolist() if int(c) in constrained}
    kinds, narrow_kinds = graph.table.kinds(), narrow.table.kinds()
    rows, narrow_rows = graph.table.filters(), narrow.table.filters()
    if rows.keys() != narrow_rows.keys():
        return None
    counts: dict[str, int] = {}
    channels: dict[int, tuple[str, int]] = {}
    for tensor, old in rows.items():
        before = _runs([(kinds[c], group_of.get(c, "")) for c in old], old)
        after = _runs([(narrow_kinds[c], "") for c in narrow_rows[tensor]], narrow_rows[tensor])
        # Neighbouring groups differ in kind, so that runs correspond one to one.
        if [kind for (kind, _), _ in before] != [kind for (kind, _), _ in after]:
            return None
        for ((_, name), members), (_, found) in zip(before, after, strict=True):
            size = counts.setdefault(name, len(found)) if name else len(members)
            if len(found) != size or len(found) > len(members):
                return None
            for i, channel in enumerate(found):
                place = (name, i) if name else ("", members[i])
                if channels.setdefault(channel, place) != place:
                    return None
    return Layout(model, narrow, {**{g.name: g.size for g in graph.groups}, **counts}, channels)


def _runs(kinds: list[tuple[bytes, str]], channels: list[int]) -> list[tuple[tuple[bytes, str], list[int]]]:
    runs: list[tuple[tuple[bytes, str], list[int]]] = []
    for kind, channel in zip(kinds, channels, strict=True):
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(channel)
        else:
            runs.append((kind, [channel]))
    return runs
