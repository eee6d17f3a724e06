"""Operators of one forward body itself, from a record, compared over several calls.

A body is recorded in eval mode, and once more in training mode with another batch and image size. Differences between
such samples must be numbers that follow from the shapes of tensors. Anything else (dropout by a function, a branch only
in training) cannot be written as one graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import ChannelGraphError, GraphFormError
from .record import Node, Opaque, Record, Visit, operator_name
from .recorder import record

__all__ = ["Alignment", "Sample", "nodes_in", "other_record", "samples_of"]

_MORE = (64, 32)  # added to height and width: other shapes, which most networks still divide
_ITEMS = 10  # added to the batch: a number that is no multiple of what sizes grow by
_MODES = "in training mode, or at another batch or image size"


def nodes_in(value: Any) -> Iterator[Node]:
    """Nodes in nested containers."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nodes_in(item)
    elif isinstance(value, dict):
        yield from nodes_in(list(value.values()))


@dataclass(frozen=True)
class Sample:
    """One call of a body.

    Attributes:
        visit: arguments and result.
        steps: what its forward does, in order: operators of its own, and calls of other modules.
        same: tensors that other modules made as views of what they took or returned -> that argument or result.
        copies: copies that are made at some sizes only -> what they copy. They are no steps.
    """

    visit: Visit
    steps: tuple[Node | Visit, ...]
    same: dict[Node, Node]
    copies: dict[Node, Node] = field(default_factory=dict)


def samples_of(record: Record, path: str, *, with_copies: bool = True) -> list[Sample]:
    """Every call of the module at ``path``.

    Args:
        record: record of the network.
        path: path of the module.
        with_copies: copies that a reshape makes are steps too; else they are what they copy.

    Raises:
        GraphFormError: forward meets something that is no tensor of its own: an object among its arguments, a tensor
            that is neither an argument nor made by it, one from inside of another module.
    """
    children: dict[int, list[Visit]] = {}
    for visit in record.visits:
        children.setdefault(visit.parent, []).append(visit)
    buffers = dict(record.written)
    return [
        _sample(number, visit, children.get(number, []), buffers, with_copies)
        for number, visit in enumerate(record.visits)
        if visit.path == path and (visit.parent < 0 or record.visits[visit.parent].path != path)
    ]


def _sample(
    number: int, visit: Visit, children: Sequence[Visit], written: dict[Node, str], with_copies: bool
) -> Sample:
    given, made = set(nodes_in([visit.args, visit.kwargs])), {n for c in children for n in nodes_in(c.output)}
    waiting = [*nodes_in(visit.output), *(n for c in children for n in nodes_in([c.args, c.kwargs]))]
    # An in-place activation brings every view of its argument up to date, each with a call of its own.
    whole = {_unaliased(n): n for n in [*given, *(n for c in children for n in nodes_in(c.output))]}
    own: set[Node] = set()
    same: dict[Node, Node] = {}
    while waiting:
        node = waiting.pop()
        if node in own or node in made or node in given or node.op in ("tensor", "constant"):
            continue
        if node.visit != number and _unaliased(node) in whole:
            same[node] = whole[_unaliased(node)]
            continue
        if node.visit != number:
            raise GraphFormError(
                f"forward reads a tensor that {operator_name(node) if node.op == 'call' else 'a call'} made in "
                f"{node.module or 'another forward'}, and that is neither an argument nor a result"
            )
        if node in written:
            raise GraphFormError(f"forward writes {written[node]} itself")
        own.add(node)
        waiting += node.inputs
    results = set(nodes_in(visit.output))
    copies = {} if with_copies else {node: node.inputs[0] for node in own if _only_moved(node, results)}
    order = [(int(node.name[1:]), 1, node) for node in own if node not in copies]
    order += [(child.start, 0, child) for child in children]  # type: ignore[misc]
    return Sample(visit, tuple(step for _, _, step in sorted(order, key=lambda item: item[:2])), same, copies)


def _only_moved(node: Node, results: set[Node]) -> bool:
    """True if a node is a copy that a reshape, or a result in order in memory, needs only at some sizes."""
    if node.op != "call" or operator_name(node, raw=True) != "clone":
        return False
    return node in results or all(operator_name(user, raw=True) in ("view", "_unsafe_view") for user in node.users)


def _unaliased(node: Node) -> Node:
    while node.op == "call" and operator_name(node, raw=True) == "alias":
        node = node.inputs[0]
    return node


def other_record(model: nn.Module, call: Any, names: Any, network: str) -> Record | str:
    """A record in training mode at another batch and image size where forward accepts one, or why there is none."""
    reason = ""
    for more in (_MORE, (0, 0)):
        try:
            return record(model, _resized(call, more), names, network, training=True)
        except ChannelGraphError as error:
            reason = str(error)
    return reason


def _resized(call: Any, more: tuple[int, int]) -> Any:
    """Inputs with more items, and images (and other maps) larger by ``more``."""
    tensors = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.ndim > 1]
    batches = {leaf.shape[0] for leaf in tensors}

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or len(batches) != 1:
            return leaf
        shape = list(leaf.shape)
        shape[0] += _ITEMS
        if leaf.ndim > 2 and leaf.is_floating_point():
            for dim in range(2, leaf.ndim):
                shape[dim] += more[dim % 2]
        if leaf.is_floating_point():
            return torch.zeros(shape, dtype=leaf.dtype, device="meta" if leaf.is_meta else leaf.device)
        return torch.cat([leaf, *[leaf[:1]] * _ITEMS])

    return tree_map(other, call)


@dataclass
class Alignment:
    """The first of several samples beside the others.

    Attributes:
        first: the sample that is written down.
        others: further ones, which must do the same.
        twins: for each of ``others``: node of the first sample -> the corresponding one.
    """

    first: Sample
    others: Sequence[Sample]
    twins: list[dict[Node, Node]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for other in self.others:
            self.twins.append({})
            self._align(other, self.twins[-1])

    @property
    def copies_result(self) -> bool:
        """True if a sample copies its result at the end, which is no step."""
        return any(n in s.copies for s in (self.first, *self.others) for n in nodes_in(s.visit.output))

    def sizes(self, node: Node, dim: int) -> tuple[int, ...]:
        """Size of ``node`` along ``dim`` in every sample."""
        return tuple(int(n.shape[dim]) for n in (node, *(twin[node] for twin in self.twins if node in twin)))

    def _align(self, other: Sample, twin: dict[Node, Node]) -> None:
        def pair(mine: Any, theirs: Any, twin: dict[Node, Node], where: str) -> None:
            _pair(_originals(mine, self.first.copies), _originals(theirs, other.copies), twin, where)

        pair(self.first.visit.args, other.visit.args, twin, "its arguments")
        pair(self.first.visit.kwargs, other.visit.kwargs, twin, "its arguments")
        drawn, again = (next(filter(_is_random, sample.steps), None) for sample in (self.first, other))
        if drawn is None and again is not None:
            raise GraphFormError(
                f"forward itself draws random numbers in training mode ({_words(again)}, as dropout by a function "
                "does); make it a submodule, such as nn.Dropout"
            )
        for mine, theirs in zip(self.first.steps, other.steps, strict=False):
            if isinstance(mine, Visit) or isinstance(theirs, Visit):
                if not (isinstance(mine, Visit) and isinstance(theirs, Visit) and mine.path == theirs.path):
                    raise GraphFormError(f"forward runs {_words(theirs)} instead of {_words(mine)} {_MODES}")
                where = f"the arguments of {mine.path}"
                pair(mine.args, theirs.args, twin, where)
                pair(mine.kwargs, theirs.kwargs, twin, where)
                pair(mine.output, theirs.output, twin, f"the result of {mine.path}")
            else:
                if mine.op != theirs.op or _target(mine) != _target(theirs):
                    raise GraphFormError(f"forward runs {_words(theirs)} instead of {_words(mine)} {_MODES}")
                where = f"an argument of {_words(mine)}"
                pair(mine.args, theirs.args, twin, where)
                pair(mine.kwargs, theirs.kwargs, twin, where)
                twin[mine] = theirs
        if len(self.first.steps) != len(other.steps):
            steps = max(self.first.steps, other.steps, key=len)
            extra = steps[min(len(self.first.steps), len(other.steps))]
            raise GraphFormError(f"forward runs {_words(extra)} only {_MODES}")
        pair(self.first.visit.output, other.visit.output, twin, "its result")


def _target(node: Node) -> Any:
    """Return the operator. A reshape is the same with and without a copy."""
    return torch.ops.aten.view.default if node.target is torch.ops.aten._unsafe_view.default else node.target


def _is_random(step: Node | Visit) -> bool:
    return isinstance(step, Node) and torch.Tag.nondeterministic_seeded in getattr(step.target, "tags", ())


def _words(step: Node | Visit) -> str:
    if isinstance(step, Visit):
        return f"submodule {step.path}"
    return operator_name(step.args[0] if step.op == "item" else step)


def _originals(value: Any, copies: dict[Node, Node]) -> Any:
    """``value`` with what copies were made of in their place."""
    if isinstance(value, Node):
        while value in copies:
            value = copies[value]
        return value
    if isinstance(value, (list, tuple)):
        parts = [_originals(item, copies) for item in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        return {key: _originals(item, copies) for key, item in value.items()}
    return value


def _pair(mine: Any, theirs: Any, twin: dict[Node, Node], where: str) -> None:
    """Note the nodes of two values as corresponding. Integers may differ.

    Raises:
        GraphFormError: something else does.
    """
    if isinstance(mine, Node) and isinstance(theirs, Node):
        outer = mine.op in ("tensor", "constant")
        if (mine.op != theirs.op and outer) or (twin.setdefault(mine, theirs) is not theirs and not outer):
            raise GraphFormError(f"{where} is another tensor {_MODES}")
    elif isinstance(mine, (list, tuple)) and type(mine) is type(theirs) and len(mine) == len(theirs):
        for a, b in zip(mine, theirs, strict=True):
            _pair(a, b, twin, where)
    elif isinstance(mine, dict) and isinstance(theirs, dict) and mine.keys() == theirs.keys():
        for key, value in mine.items():
            _pair(value, theirs[key], twin, where)
    elif isinstance(mine, Opaque) or isinstance(theirs, Opaque):
        raise GraphFormError(f"{where} holds an object ({mine.kind if isinstance(mine, Opaque) else theirs.kind})")
    elif type(mine) is int and type(theirs) is int:
        return
    elif type(mine) is not type(theirs) or mine != theirs:
        raise GraphFormError(f"{where} is {theirs!r} instead of {mine!r} {_MODES}")
