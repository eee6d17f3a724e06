"""Find the widths that a forward body allows, by running it at other widths.

A forward that splits, shuffles or pads channels ties numbers of channels together in its code (``chunk(2)`` follows the
width, ``x[:, :8]`` does not). The network is therefore rebuilt without weights at the wanted widths, with every layer
adapted to its input, and traced again. The labels then tell the number of channels of each kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..filters import CONVOLUTIONS, canonical_name, find_submodule
from .answers import ChannelAnswers, ChannelGroup
from .errors import ChannelGraphError
from .forms import LostRecording, fixing_bodies, refusal
from .modules import copy_network, meta_stand_ins, tensor_names, update_attributes
from .recorder import record
from .trace import trace_at

__all__ = ["Layout", "layout_for", "nearest_counts", "record_again", "stuck_sets", "unresizable_sets", "widths_of"]

_STEPS = (1.0, 0.75, 0.5, 0.25)


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
    graph: ChannelAnswers
    counts: dict[str, int]
    channels: dict[int, tuple[str, int]]


def nearest_counts(graph: ChannelAnswers, counts: dict[str, int]) -> dict[str, int]:
    """See :meth:`ChannelAnswers.expressible_counts`.

    One trial shows if forward itself follows these widths, so that every class stays. Otherwise its graph form takes
    any widths. More trials are made for forwards without graph form, and for that of the whole network, so that its
    class stays.
    """
    record_again(graph)
    shrinking = [
        (groups, sum(counts[g.name] for g in groups) / sum(g.size for g in groups))
        for groups in _tied_groups(graph, graph.constrained)
        if any(counts[g.name] < g.size for g in groups)
    ]
    if not shrinking:
        return dict(counts)
    if (together := _together(graph, shrinking, _STEPS[:1])) is not None:
        return counts | together
    result = dict(counts)
    stuck = frozenset().union(*stuck_sets(graph))
    for groups, ratio in shrinking:
        channel = int(groups[0].channels[0])
        if channel in stuck:
            result.update(_together(graph, [(groups, ratio)], _STEPS) or {g.name: g.size for g in groups})
        elif graph.network in fixing_bodies(graph, {int(c) for g in groups for c in g.channels}):
            result.update(_together(graph, [(groups, ratio)], _STEPS) or {})
    return result


def record_again(graph: ChannelAnswers) -> None:
    """Give a graph that was pickled its recording back."""
    if isinstance(graph.recording, LostRecording):
        literal = graph.recording.literal
        graph.recording = trace_at(graph.model, graph.arguments, graph.network, ChannelAnswers).recording
        graph.recording.literal.update(literal)


def stuck_sets(graph: ChannelAnswers) -> list[frozenset[int]]:
    """The sets of :attr:`ChannelAnswers.constrained` of which a forward has no graph form."""
    return [channels for channels in graph.constrained if why_stuck(graph, channels)]


def why_stuck(graph: ChannelAnswers, channels: Iterable[int]) -> str | None:
    """Return why a forward that decides where ``channels`` go has no graph form; None if each has one."""
    return next((reason for path in fixing_bodies(graph, channels) if (reason := refusal(graph, path))), None)


def unresizable_sets(graph: ChannelAnswers) -> list[tuple[ChannelGroup, str]]:
    """Return groups that forward does not allow to narrow in either form, and why it has no graph form."""
    found: list[tuple[ChannelGroup, str]] = []
    for channels in stuck_sets(graph):
        for groups in _tied_groups(graph, [channels]):
            # Blocks that alternate along a layer stay where forward looks for them only by chance.
            alternating = any(g.blocks is not None and bool((g.blocks.diff() < 0).any()) for g in groups)
            if alternating or _together(graph, [(groups, 0.75)], _STEPS) is None:
                found += [(g, why_stuck(graph, channels) or "") for g in groups if g.size > 1]
    return found


def _tied_groups(graph: ChannelAnswers, sets: Iterable[frozenset[int]]) -> list[list[ChannelGroup]]:
    found = [[g for g in graph.groups if int(g.channels[0]) in channels] for channels in sets]
    return [groups for groups in found if groups]


def _together(
    graph: ChannelAnswers, sets: Sequence[tuple[list[ChannelGroup], float]], steps: Sequence[float]
) -> dict[str, int] | None:
    """Counts when all layers shrink to about the ratio of their set, or else to less and less; None if a set keeps all.

    Args:
        graph: channel graph of the network.
        sets: tied groups, and the ratio that is wanted for them.
        steps: shares of the shrinkage to try.
    """
    totals: dict[str, int] = {}
    removed: dict[str, float] = {}
    for groups, ratio in sets:
        for group in groups:
            for layer in group.producers:
                rows = group.rows(layer).numel()
                totals[layer] = totals.get(layer, 0) + rows
                removed[layer] = removed.get(layer, 0.0) + (1 - ratio) * rows
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


def widths_of(graph: ChannelAnswers, counts: Mapping[str, int]) -> dict[str, int]:
    """Layer -> filters left with ``counts`` channels in each group (all channels in groups not mentioned)."""
    widths: dict[str, int] = {}
    for group in graph.groups:
        if counts.get(group.name, group.size) < group.size:
            for layer in group.producers:
                each = group.rows(layer).numel() // group.size
                widths[layer] = widths.get(layer, graph.filter_count(layer)) - each * (group.size - counts[group.name])
    return widths


def layout_for(graph: ChannelAnswers, widths: Mapping[str, int]) -> Layout | None:
    """Trace the network with layers of these widths (others unchanged); None if it does not run, or differs."""
    blank = copy_network(graph.model, meta_stand_ins(graph.model)).eval()
    try:
        _adapt(blank, graph.network, widths, graph.inputs)
        narrow = trace_at(blank, graph.inputs, graph.network, ChannelAnswers)
    except (ChannelGraphError, RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return None
    return _match(graph, blank, narrow)


@contextmanager
def _hooks(model: nn.Module, hook: Any) -> Iterator[None]:
    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if next(m.children(), None) is None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapt(model: nn.Module, network: str, widths: Mapping[str, int], inputs: Any) -> None:
    """Give the layers of a network on meta other widths: the width of their input, and ``widths`` for their output."""
    names = {id(m): canonical_name(n) for n, m in reversed(list(model.named_modules(remove_duplicate=False)))}
    adapted: dict[tuple[int, str], tuple[nn.Module, tuple[int, ...]]] = {}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        for name, shape in _shapes(module, args[0], widths.get(names[id(module)])).items():
            old = getattr(module, name)
            if old.shape != torch.Size(shape):
                _tensors_of(module, name)[name] = torch.empty(shape, dtype=old.dtype)
                adapted[id(module), name] = module, shape
        update_attributes(module)

    with _hooks(model, hook):
        record(find_submodule(model, network), inputs, tensor_names(model), network)
    for (_, name), (module, shape) in adapted.items():
        table = _tensors_of(module, name)
        old = table[name]
        new = torch.empty(shape, dtype=old.dtype, device="meta")
        table[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        update_attributes(module)


def _tensors_of(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers


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
            groups = module.groups
            order = (reads, writes // groups) if module.transposed else (writes, reads // groups)
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


def _match(graph: ChannelAnswers, model: nn.Module, narrow: ChannelAnswers) -> Layout | None:
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
            if name:  # a channel may have several filters of a layer
                members, found = list(dict.fromkeys(members)), list(dict.fromkeys(found))
            size = counts.setdefault(name, len(found)) if name else len(members)
            if len(found) != size or len(found) > len(members):
                return None
            for i, channel in enumerate(found):
                place = (name, i) if name else ("", members[i])
                if channels.setdefault(channel, place) != place:
                    return None
    return Layout(model, narrow, {**{g.name: g.size for g in graph.groups}, **counts}, channels)


def _runs(kinds: list[tuple[int, str]], channels: list[int]) -> list[tuple[tuple[int, str], list[int]]]:
    runs: list[tuple[tuple[int, str], list[int]]] = []
    for kind, channel in zip(kinds, channels, strict=True):
        if runs and runs[-1][0] == kind:
            runs[-1][1].append(channel)
        else:
            runs.append((kind, [channel]))
    return runs
