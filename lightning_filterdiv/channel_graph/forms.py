"""The two forms of a narrow network: find forward bodies that fix widths, and write them as graphs where possible."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import nn

from ..filters import find_submodule, named_modules
from .answers import KINDS, ChannelAnswers
from .counted import CountedReduction
from .errors import GraphFormError
from .graph_form import BodyGraph, Mask, RaggedError, is_movement, kept_positions, move, write_body
from .labels import Ints, LabelTensor, core, unique
from .modules import bare_module, tensor_names
from .propagate import Propagation
from .record import Node, Record
from .samples import Alignment, other_record, samples_of

__all__ = [
    "FORMS",
    "Form",
    "FormChoice",
    "LostRecording",
    "Masks",
    "Recording",
    "find_deviation",
    "fixing_bodies",
    "graph_bodies",
    "refusal",
    "take_graph_form",
]

Form = Literal["auto", "module", "graph"]
FORMS: tuple[Form, ...] = ("auto", "module", "graph")


@dataclass(frozen=True)
class FormChoice:
    """The form that one submodule took.

    Attributes:
        submodule: canonical name, empty for the whole model.
        form: ``"module"`` (its class, forward untouched) or ``"graph"``.
        reason: the data movement in its forward that fixes widths.
    """

    submodule: str
    form: Literal["module", "graph"]
    reason: str

    def __str__(self) -> str:
        return f"{self.submodule or 'the whole model'}: {self.form} form ({self.reason})"


@dataclass
class LostRecording:
    """Placeholder for a :class:`Recording` after pickling."""

    literal: dict[str, str]


@dataclass
class Recording:
    """Record of a trace, kept for graph forms.

    Attributes:
        record: the forward pass in eval mode.
        state: its labels.
        literal: bodies with a number of channels in a shape, found by narrowing -> operator.
        other: record in training mode at another size, or the reason why there is none; None before it is needed.
        aligned: path of a body -> its aligned calls, or the reason why it cannot be written as a graph.
    """

    record: Record
    state: Propagation
    literal: dict[str, str] = field(default_factory=dict)
    other: Record | str | None = None
    aligned: dict[str, Alignment | str] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> Recording:
        return self  # it says nothing about the tensors of one copy

    def __reduce__(self) -> tuple[type[LostRecording], tuple[dict[str, str]]]:
        return LostRecording, (self.literal,)  # operators cannot be pickled


def fixing_bodies(graph: ChannelAnswers, channels: Iterable[int]) -> dict[str, str]:
    """Return path of each forward body that itself decides where ``channels`` go -> operator."""
    state, wanted = graph.recording.state, np.fromiter(channels, dtype=np.int64)
    mapped = {mapping.module for mapping in graph.map_sites}
    found: dict[str, str] = {}
    literal = (m for m in (*state.reshapes, *state.stacked) if m.module in graph.recording.literal)
    for site in (*state.moves, *literal):
        known = site.module in mapped or site.module in found
        if not known and np.isin(state.table.roots(site.owners), wanted).any():
            found[site.module] = site.operator
    unknown = graph.recording.literal.keys() - found.keys()
    if unknown and len(wanted):
        # They shape what no channel owns by the width of what they read.
        table = graph.table
        read = unique(table.tensor[(table.kind == KINDS.index("consumer")) & np.isin(table.root, wanted)])
        readers = [table.tensors[tensor] for tensor in read.tolist()]
        for path in sorted(unknown):
            if any(name.startswith(f"{path}.") for name in readers):
                found[path] = graph.recording.literal[path]
    return found


def refusal(graph: ChannelAnswers, path: str) -> str | None:
    """Return why the body at ``path`` has no graph form; None if it may have one."""
    aligned = _aligned(graph, path)
    return aligned if isinstance(aligned, str) else None


def _aligned(graph: ChannelAnswers, path: str) -> Alignment | str:
    recording: Recording = graph.recording
    if path not in recording.aligned:
        try:
            recording.aligned[path] = _align(graph, path)
        except GraphFormError as error:
            recording.aligned[path] = f"{path or 'the whole model'} has no graph form: {error}"
    return recording.aligned[path]


def _align(graph: ChannelAnswers, path: str) -> Alignment:
    recording = graph.recording
    module = named_modules(graph.model).get(path)
    if module is None:
        raise GraphFormError("there is no such submodule")
    if any(kind.__name__ == "LightningModule" for kind in type(module).__mro__):
        raise GraphFormError(
            f"it is the forward of {type(module).__name__}, a LightningModule, which keeps its class; move those lines "
            "into a submodule"
        )
    if graph.read_values:
        raise GraphFormError(f"forward reads values ({graph.read_values})")
    called = [name for visit in recording.record.visits if visit.path == path for name in visit.functions]
    # Checkpointing changes no gradient.
    if function := next((name for name in called if name != "CheckpointFunction"), None):
        raise GraphFormError(
            f"forward calls the autograd function {function}, whose gradient would be lost; call it in a submodule"
        )
    if recording.other is None:
        names = tensor_names(graph.model)
        traced = bare_module(find_submodule(graph.model, graph.network))
        recording.other = other_record(traced, graph.inputs, names, graph.network)
    if isinstance(recording.other, str):
        raise GraphFormError(f"training mode cannot be recorded: {recording.other}")
    both = (*recording.record.visits, *recording.other.visits)
    if any(visit.checks for visit in both if visit.path == path):
        raise GraphFormError("forward asks whether its tensors are finite, which a graph would not")
    try:
        return _side_by_side(recording.record, recording.other, path, with_copies=True)
    except GraphFormError as error:
        try:  # whether a reshape copies depends on sizes
            return _side_by_side(recording.record, recording.other, path, with_copies=False)
        except GraphFormError:
            raise error from None


def _side_by_side(record: Record, other: Record, path: str, *, with_copies: bool) -> Alignment:
    samples = samples_of(record, path, with_copies=with_copies)
    others = samples_of(other, path, with_copies=with_copies)
    if not samples or not others:
        raise GraphFormError("forward is not called in eval mode and in training mode alike")
    return Alignment(samples[0], [*samples[1:], *others])


class Masks:
    """Masks of the positions of each tensor that remain.

    Args:
        graph: channel graph of the network.
        target: channel -> channel that replaces it, -1 for none. Others stay.
        removed: (tensor, dim) -> rows that go.
    """

    def __init__(
        self, graph: ChannelAnswers, target: Mapping[int, int], removed: Mapping[tuple[str, int], Ints]
    ) -> None:
        self._state, self._removed = graph.recording.state, removed
        self._names = graph.recording.record.tensors
        gone = np.asarray([c for c, into in target.items() if c != into], dtype=np.int64)
        table = self._state.table
        self._alive = ~np.isin(table.roots(np.arange(table.owner_count, dtype=np.int64)), gone)
        self._known: dict[Node, Mask] = {}

    def __call__(self, node: Node) -> Mask:
        """Return the mask of ``node``. Dimensions along which it is constant have size one."""
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def shape(self, node: Node) -> torch.Size:
        """Of what remains.

        Raises:
            RaggedError: it has none.
        """
        kept = kept_positions(self(node), node.shape)
        return torch.Size(n if k is None else len(k) for n, k in zip(node.shape, kept, strict=True))

    def _find(self, node: Node) -> Mask:
        if not isinstance(node.value, torch.Tensor):
            return np.ones(1, dtype=np.bool_)
        if node.op == "tensor":
            return self._parameter(node)
        value = self._state.values.get(node)
        if isinstance(value, LabelTensor):
            labels = core(value.labels).numpy()
            owner = self._state.table.owner[np.maximum(labels, 0)]
            alive: Mask = (labels <= 0) | self._alive[np.maximum(owner, 0)]
            return alive
        # A parameter that is only moved has no labels, nor has what only a call without a use reads.
        call = node.args[0] if node.op == "item" else node
        if call.op == "call" and is_movement(call):
            moved = move(call, lambda n: torch.from_numpy(np.broadcast_to(self(n), tuple(n.shape)).copy()))
            return np.asarray((moved[node.args[1]] if node.op == "item" else moved).numpy())
        return np.ones([1] * len(node.shape), dtype=np.bool_)

    def _parameter(self, node: Node) -> Mask:
        mask = np.ones([1] * len(node.shape), dtype=np.bool_)
        for dim, size in enumerate(node.shape):
            rows = self._removed.get((self._names.get(node, ""), dim))
            if rows is not None:
                along = np.ones(size, dtype=np.bool_)
                along[rows] = False
                mask = mask & along.reshape([-1 if d == dim else 1 for d in range(len(node.shape))])
        return mask


def graph_bodies(
    graph: ChannelAnswers,
    paths: Mapping[str, str],
    masks: Masks,
    counted: Mapping[Node, CountedReduction] | None = None,
) -> list[BodyGraph]:
    """Return graphs of the bodies at ``paths`` without removed channels, inner ones first.

    Args:
        graph: channel graph of the network.
        paths: path -> the operator that fixes widths.
        masks: remaining positions of each tensor.
        counted: reductions over channels -> replacements.

    Raises:
        GraphFormError: one of them cannot be written; the message names it.
    """
    counted = counted or {}
    names = graph.recording.record.tensors
    written = []
    for path in sorted(paths, key=lambda p: (-p.count("."), p) if p else (1, p)):
        aligned = _aligned(graph, path)
        if isinstance(aligned, str):
            raise GraphFormError(aligned)
        try:
            _check_visits(graph, aligned, masks, counted)
            written.append(write_body(path, graph.model, aligned, masks, names, counted))
        except GraphFormError as error:
            raise GraphFormError(f"{path or 'the whole model'} has no graph form at these widths: {error}") from error
    return written


def _check_visits(
    graph: ChannelAnswers, aligned: Alignment, masks: Masks, counted: Mapping[Node, CountedReduction]
) -> None:
    """Check that all calls of a body keep the same positions, because a body has one graph."""
    labelled = graph.recording.state.values
    for twin in aligned.twins:
        for mine, theirs in twin.items():
            if theirs in labelled and (mine in counted or theirs in counted):
                first_counts, other_counts = (counted[n].counts if n in counted else None for n in (mine, theirs))
                if first_counts is None or other_counts is None or not torch.equal(first_counts, other_counts):
                    raise GraphFormError("forward is called several times, with different channels to count")
            if theirs in labelled and isinstance(mine.value, torch.Tensor):
                first, second = masks(mine), masks(theirs)
                if first.size == second.size == 1 and bool(first.all()) == bool(second.all()):
                    continue
                if not np.array_equal(np.broadcast_to(first, mine.shape), np.broadcast_to(second, mine.shape)):
                    raise GraphFormError("forward is called several times, with different channels")


def take_graph_form(model: nn.Module, bodies: Iterable[BodyGraph]) -> nn.Module:
    """Insert graphs into ``model``. Return it, or the graph that replaces it."""
    for body in bodies:
        model = body.install(model)
    return model


def find_deviation(record: Record, masks: Masks, nodes: Iterable[Node]) -> Node | None:
    """Find the first call of ``record`` that the narrower network does not repeat with the remaining channels.

    Args:
        record: record of the network.
        masks: what remains.
        nodes: recorded with the narrower network, as far as its forward ran.
    """
    repeated = {node.name: node for node in nodes}
    for node in record.calls:
        other = repeated.get(node.name)
        if other is None or other.target is not node.target:
            return node
        if isinstance(node.value, torch.Tensor):
            try:
                if masks.shape(node) != other.shape:
                    return node
            except RaggedError:
                return node
    return None
