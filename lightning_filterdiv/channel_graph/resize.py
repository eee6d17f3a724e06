"""Which groups forward lets nobody narrow: ``x.view(-1, 400)`` looks like a flatten until it is narrower."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..filters import find_submodule
from .answers import ChannelAnswers, ChannelGroup
from .errors import ChannelGraphError
from .modules import (
    bare_module,
    meta_stand_ins,
    replace_tensors,
    tensor_names,
    unchanged,
    without_compilation,
)
from .narrow import cut_in_place, leave_out
from .recorder import record
from .trace import trace_at
from .widths import unresizable_sets

__all__ = ["find_unresizable", "pin_unresizable"]


def pin_unresizable(graph: ChannelAnswers) -> None:
    """Pin the groups that no other width of theirs would fit into forward."""
    tied = unresizable_sets(graph) if graph.constrained else []
    graph.exclude({group.name: _fixed_by(graph, group) for group in tied})
    graph.exclude({group.name: _fixed_by(graph, group) for group in find_unresizable(graph)})


def _fixed_by(graph: ChannelAnswers, group: ChannelGroup) -> str:
    return f"their number is fixed by {graph.moved_by(group)}"


def find_unresizable(graph: ChannelAnswers) -> list[ChannelGroup]:
    """Groups without which every other group can be narrowed. Runs on shapes alone; no weight is copied.

    Groups whose counts forward ties together are left out: they have been traced at other widths already. A forward
    that reads values does not run on shapes: the numerical check of a narrowing has the last word there.
    """
    if graph.read_values:
        return []
    bound = frozenset().union(*graph.constrained)
    groups = [g for g in graph.groups if g.size > 1 and int(g.channels[0]) not in bound]
    shapes = _shapes(graph, groups)
    if shapes == graph.output_shapes or (shapes is None and _shapes(graph, ()) is None):
        return []  # all fit; or forward runs on no shapes at all, for example because it asks a device for autocast

    def culprits(part: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        # Two thirds remain: a count that rarely divides what the full one divides.
        if not part or _shapes(graph, part) == graph.output_shapes:
            return []
        if len(part) == 1:
            return list(part)
        return culprits(part[: len(part) // 2]) + culprits(part[len(part) // 2 :])

    return culprits(groups)


def _shapes(graph: ChannelAnswers, groups: Sequence[ChannelGroup]) -> tuple[torch.Size, ...] | None:
    """Shapes of the outputs with fewer channels in ``groups``; None if forward does not run."""
    model = graph.model
    with without_compilation(model), unchanged(model):
        replace_tensors(model, meta_stand_ins(model))
        cut_in_place(model, graph, leave_out(groups), torch.device("cpu"))
        traced = bare_module(find_submodule(model, graph.network))
        try:
            if graph.stacked:  # shapes do not tell whether branches are still what they were
                narrow = trace_at(model, graph.inputs, graph.network, ChannelAnswers)
                alike = {*narrow.table.kinds().values()} <= {*graph.table.kinds().values()}
                return narrow.output_shapes if alike else None
            outputs = record(traced, graph.inputs, tensor_names(model), graph.network).outputs
        except ChannelGraphError:
            return None
        return tuple(node.shape for node in outputs)
