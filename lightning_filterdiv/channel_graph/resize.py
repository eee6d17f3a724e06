"""Which groups forward lets nobody narrow: ``x.view(-1, 400)`` looks like a flatten until it is narrower."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence

import numpy as np
import torch
from torch import nn

from ..filters import find_submodule, named_modules
from .answers import ChannelAnswers, ChannelGroup
from .counted import CountedNorm
from .errors import ChannelGraphError, GraphFormError
from .forms import Masks, find_deviation, fixing_bodies, graph_bodies, refusal
from .modules import (
    bare_module,
    meta_stand_ins,
    replace_tensors,
    tensor_names,
    unchanged,
    without_compilation,
)
from .narrow import Narrowing, cut_in_place, leave_out, masks_of
from .record import Record, operator_name
from .recorder import MetaRun, run_on_meta
from .trace import kinds_of
from .widths import stuck_sets, unresizable_sets, why_stuck

__all__ = ["find_unresizable", "pin_unresizable"]


Runs = dict[tuple[str, ...], MetaRun]  # names of narrowed groups -> the run, all bodies as they are


def pin_unresizable(graph: ChannelAnswers) -> None:
    """Pin the groups that no other width of theirs would fit into forward, in neither form."""
    if graph.constrained:
        _try_graphs(graph)
    _pin_uncountable(graph)
    tied = unresizable_sets(graph) if graph.constrained else []
    graph.exclude({group.name: f"{_fixed_by(graph, group)}, and {reason}" for group, reason in tied})
    settled: set[str] = set()
    runs: Runs = {}
    while groups := find_unresizable(graph, settled, runs):
        settled.update(group.name for group in groups)
        if (reason := _why_not_written(graph, groups, runs)) is not None:
            graph.exclude({group.name: reason for group in groups})
    if graph.constrained:
        _write_what_fails_beside_graphs(graph)


def _write_what_fails_beside_graphs(graph: ChannelAnswers) -> None:
    """Find bodies that hold the width of their input as a number; it shows once those before them are graphs.

    Cross-covariance attention reads ``C`` off its input and shapes what its pinned layers put out by it.
    """
    model, tried = graph.model, set[str]()
    while not graph.read_values:
        keep = {s.group.name: s.kept for s in leave_out([group for group in graph.groups if group.size > 1])}
        try:
            narrowing = Narrowing(graph, keep, form="graph")
            with without_compilation(model), unchanged(model):
                replace_tensors(model, meta_stand_ins(model))
                narrow = narrowing(model)
        except ChannelGraphError:
            return  # these counts do not fit, others may
        traced = bare_module(find_submodule(narrow, graph.network))
        path = run_on_meta(traced, graph.inputs, tensor_names(narrow), graph.network).failed_in
        modules = named_modules(model)
        if not path or path in tried or path not in modules:
            return
        alike = [name for name, module in modules.items() if type(module) is type(modules[path])]
        for name in alike:
            if (reason := refusal(graph, name)) is None:
                graph.recording.literal[name] = "a shape that forward computes"
            else:
                why = f"the forward of {name} holds their number in a shape, and {reason}"
                graph.exclude({group.name: why for group in graph.groups if "consumer" in _kinds_in(group, name)})
        tried.update(alike)


def _pin_uncountable(graph: ChannelAnswers) -> None:
    """Pin groups that forward itself reduces (``x.mean(1)``) in a body without a graph form, which would count them."""
    reductions = graph.recording.state.reductions
    if not reductions:
        return
    stuck = frozenset().union(*stuck_sets(graph))
    narrower = masks_of(graph, leave_out(graph.groups))
    for path in dict.fromkeys(site.node.module for site in reductions.values()):
        _try_graph(graph, path, "a reduction", narrower)
        if refusal(graph, path) is None and _counts_differ(graph, path):
            again = f"{path or 'the whole model'} is called several times, with other channels to count"
            graph.recording.aligned[path] = again
    for name, site in reductions.items():
        reason = refusal(graph, site.node.module)
        for group in graph.groups:
            if any(part.tensor == f"{name}.counts" for part in group.counted):
                why = reason or (why_stuck(graph, group.channels.tolist()) if int(group.channels[0]) in stuck else None)
                if why is not None:
                    where = graph.recording.state.where(site.node)
                    graph.exclude({group.name: f"input of {where} over channels, which must count them, and {why}"})


def _counts_differ(graph: ChannelAnswers, path: str) -> bool:
    """Whether calls of the body at ``path`` reduce different channels, which one graph cannot count."""
    state, aligned = graph.recording.state, graph.recording.aligned[path]
    counted = {
        name: state.table.roots(state.table.owner[event.values])
        for event in state.events
        if event.kind == "counted" and (name := event.tensor.removesuffix(".counts")) in state.reductions
    }
    names = {site.node: name for name, site in state.reductions.items()}
    nothing = np.zeros(0, dtype=np.int64)
    return any(
        not np.array_equal(counted.get(names[mine], nothing), counted.get(names[theirs], nothing))
        for twin in aligned.twins
        for mine, theirs in twin.items()
        if mine in names and theirs in names
    )


def _kinds_in(group: ChannelGroup, path: str) -> set[str]:
    """Return what the tensors of the module at ``path`` are to the channels of ``group``."""
    return {part.kind for part in group.parts if part.tensor.startswith(f"{path}.")}


def _why_not_written(graph: ChannelAnswers, groups: Sequence[ChannelGroup], runs: Runs) -> str | None:
    """Find the bodies that hold a number for ``groups``; None if their graph forms make these narrowable."""
    model, selections = graph.model, leave_out(groups)
    run = runs.get(_names(groups)) or _run_narrower(graph, groups, {}, graphs=False)
    masks = masks_of(graph, selections)
    fixing = find_deviation(graph.recording.record, masks, run.nodes)
    if fixing is None:
        return _fixed_by(graph, groups[0])
    literal, before, path = graph.recording.literal, dict(graph.recording.literal), fixing.module
    reason, tried, where, operator = "", set[str](), graph.recording.state.where(fixing), operator_name(fixing)
    before_part = bool(run.failed_in) and path.startswith(f"{run.failed_in}.")  # it failed before it called that
    if run.failed_in and (before_part or (refusal(graph, path) is not None and _has_children(model, run.failed_in))):
        path, where, operator = run.failed_in, f"the forward of {run.failed_in}", "a number"
    while path not in tried:
        if (refused := refusal(graph, path)) is not None:
            reason = f", and {refused}"
            break
        modules = named_modules(model)
        alike = [name for name, module in modules.items() if type(module) is type(modules[path])]
        tried.update(alike)
        literal |= {name: operator for name in alike if refusal(graph, name) is None}
        try:
            narrowing = Narrowing(graph, {s.group.name: s.kept for s in selections}, form="graph")
            with without_compilation(model), unchanged(model):
                replace_tensors(model, meta_stand_ins(model))
                narrow = narrowing(model)
        except ChannelGraphError as error:
            reason = f", and {error}"
            break
        traced = bare_module(find_submodule(narrow, graph.network))
        again = run_on_meta(traced, graph.inputs, tensor_names(narrow), graph.network)
        if again.failed_in is not None and again.failed_in in modules:  # there is another body
            path = again.failed_in
            continue
        if again.shapes == graph.output_shapes:
            return None
        break
    literal.clear()
    literal.update(before)
    return f"their number is fixed by {where}{reason}"


def _counted_norms(model: nn.Module) -> int:
    return sum(isinstance(module, CountedNorm) for module in model.modules())


def _has_children(model: nn.Module, path: str) -> bool:
    module = named_modules(model).get(path)
    return module is not None and next(module.children(), None) is not None


def _try_graphs(graph: ChannelAnswers) -> None:
    """Note which bodies cannot be written as graphs for fewer channels."""
    channels = frozenset().union(*graph.constrained)
    groups = [g for g in graph.groups if int(g.channels[0]) in channels]
    masks = masks_of(graph, leave_out(groups, unlike=True))  # a body that is called twice keeps what it keeps by chance
    for path, operator in fixing_bodies(graph, channels).items():
        _try_graph(graph, path, operator, masks)


def _try_graph(graph: ChannelAnswers, path: str, operator: str, masks: Masks) -> None:
    if refusal(graph, path) is None:
        try:
            graph_bodies(graph, {path: operator}, masks)
        except GraphFormError as error:
            graph.recording.aligned[path] = str(error)


def _fixed_by(graph: ChannelAnswers, group: ChannelGroup) -> str:
    return f"their number is fixed by {graph.moved_by(group)}"


def _names(groups: Sequence[ChannelGroup]) -> tuple[str, ...]:
    return tuple(group.name for group in groups)


def find_unresizable(
    graph: ChannelAnswers, settled: Container[str] = (), runs: Runs | None = None
) -> list[ChannelGroup]:
    """A group that forward lets nobody narrow, beside the graph forms that are known to be needed; empty if there is
    none.

    Runs on shapes alone; no weight is copied. Groups of the same layers and readers (blocks of a norm) are asked about
    together. Groups whose counts forward ties together are left out: they have been traced at other widths already. A
    forward that reads values, or asks for their device, does not run on shapes: the numerical check of a narrowing has
    the last word there.

    Args:
        graph: channel graph of the network.
        settled: names of groups that are not asked about.
        runs: takes up the runs in which every body was as it is.
    """
    if graph.read_values or graph.recording.record.real:
        return []
    runs = {} if runs is None else runs
    bound = frozenset().union(*graph.constrained)
    alike: dict[tuple[tuple[str, str, int], ...], list[ChannelGroup]] = {}
    for group in graph.groups:
        if group.size > 1 and int(group.channels[0]) not in bound and group.name not in settled:
            alike.setdefault(tuple((p.tensor, p.kind, p.dim) for p in group.parts), []).append(group)

    def fits(part: Sequence[list[ChannelGroup]]) -> bool:
        return not part or _run_narrower(graph, list(itertools.chain(*part)), runs).shapes == graph.output_shapes

    part = list(alike.values())
    if not part:
        return []
    run = _run_narrower(graph, list(itertools.chain(*part)), runs)
    if run.shapes == graph.output_shapes:
        return []
    if run.failed_in is not None:  # mostly a layer in the module whose forward fails
        for suspects in part:
            if _kinds_in(suspects[0], run.failed_in) and not fits([suspects]):
                return suspects
    while len(part) > 1:
        half = part[: len(part) // 2]
        part = half if not fits(half) else part[len(part) // 2 :]
    return [] if fits(part) else part[0]


def _run_narrower(graph: ChannelAnswers, groups: Sequence[ChannelGroup], runs: Runs, graphs: bool = True) -> MetaRun:
    """Run forward with fewer channels in ``groups``.

    Two thirds remain: a count that rarely divides what the full one divides.

    Args:
        graph: the channel graph.
        groups: groups to narrow.
        runs: takes up the run if no body took graph form.
        graphs: whether the bodies that are known to hold numbers take graph form.
    """
    model, selections = graph.model, leave_out(groups)
    original, counting = model, _counted_norms(model)
    with without_compilation(model), unchanged(model):
        replace_tensors(model, meta_stand_ins(model))
        try:
            if graphs and graph.recording.literal and groups:
                model = Narrowing(graph, {s.group.name: s.kept for s in selections})(model)
            else:
                cut_in_place(model, graph, selections, torch.device("cpu"))
        except ChannelGraphError:
            return MetaRun([], None, None)
        traced = bare_module(find_submodule(model, graph.network))
        run = run_on_meta(traced, graph.inputs, tensor_names(model), graph.network)
        if model is original:
            runs[_names(groups)] = run
        # Shapes do not tell whether branches are what they were; norms that count and graphs are other operators.
        plain = model is original and _counted_norms(model) == counting
        if graphs and graph.stacked and plain and run.record is not None and not _keeps_kinds(graph, model, run.record):
            return run._replace(shapes=None)
        return run


def _keeps_kinds(graph: ChannelAnswers, narrower: nn.Module, record: Record) -> bool:
    """True if the channels of a narrower network are of kinds that occur in the network of ``graph``."""
    try:
        return kinds_of(narrower, graph.inputs, graph.network, record) <= {*graph.table.kinds().values()}
    except ChannelGraphError:
        return False
