"""Rule for element-wise operators on one or several tensors, with broadcasting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .labels import Ints, LabelTensor, core, distinct, mix, unique
from .propagate import FLAT, Event, Grouped, Propagation, Value, nullified
from .record import Node, map_nodes, operator_name

__all__ = ["EXTRA", "pointwise"]

# Element-wise, but without the ``pointwise`` tag in some release of torch.
EXTRA = ("hardswish", "leaky_relu", "log_sigmoid", "log_sigmoid_forward", "fill")
_PRODUCTS = ("mul",)
_SUMS = ("add", "sub", "rsub")


def maps_zero_to_zero(node: Node) -> bool:
    """Evaluate the operator, with its own scalar arguments, on zeros."""
    args, kwargs = map_nodes((node.args, node.kwargs), lambda n: torch.zeros([1] * n.value.ndim, dtype=n.value.dtype))
    try:
        result = node.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(result, Tensor) and bool(result == 0)


def pointwise(state: Propagation, node: Node) -> Value:
    """Join the channels of positions that meet. Zero is neutral in a sum, and dominates a product."""
    operands = [_before_expansion(state, n, value) for n in node.inputs if (value := state.labels_of(n)) is not None]
    out = node.value.shape
    if operator_name(node) in _PRODUCTS and any(isinstance(a, (int, float)) and a == 0 for a in node.args):
        return LabelTensor(nullified(state, node, operands[0][1].labels.expand(out)))
    if state.counts and operator_name(node) in _PRODUCTS:
        weighed = [value for n, value in operands if (known := state.vector(n)) is None or known[0] not in state.counts]
        if len(weighed) < len(node.inputs) == 2:
            labels = weighed[0].labels.expand(out)
            if sizes := getattr(state.norms.get(node.module), "sizes", None):  # it takes means of parts, see along_dim
                state.count(node, state.channels(labels, 1, node))
                state.grouped[f"{node.module}.counts"] = Grouped(len(sizes), (), tuple(sizes))
            return LabelTensor(state.table.derive(labels, state.key(node)), weighed=True)
    if all(value.uniform for _, value in operands):
        fixed = state.fixed(node)
        assert isinstance(fixed, LabelTensor)
        return LabelTensor(fixed.labels, uniform=True)
    parameters = all(value.is_parameter for _, value in operands)
    varying = {
        dim - value.labels.ndim
        for _, value in operands
        for dim, size in enumerate(core(value.labels).shape)
        if size > 1 and (parameters or not value.is_parameter) and not value.uniform
    }
    across: set[int] | None = None
    joined: list[tuple[Node, LabelTensor]] = []
    neutral: list[tuple[Node, LabelTensor]] = []
    for n, value in operands:
        unowned = bool((core(value.labels) < 0).all()) or (value.is_parameter and not parameters)
        alike = _spans_none(value, varying)
        if unowned and not alike and not value.uniform:  # states of one channel may lie along more dimensions
            if across is None:
                across = {d for _, v in operands if not v.is_parameter for d in _channel_dims(state, v)}
            alike = _spans_none(value, across) and bool(across)
        # The same number for every channel: a scalar, a spatial mask, a gate that broadcasts over channels, what a norm
        # that weighs its channels computes for a block of them.
        if value.uniform or (
            unowned and (alike or (not value.is_parameter and f"{node.module}.counts" in state.counts))
        ):
            neutral.append((n, value))
        elif varying and alike and not parameters:
            state.pin(value, f"acts on all channels at once in {state.where(node)}")
            neutral.append((n, value))
        else:
            joined.append((n, value))
    if not joined:
        return state.fixed(node)
    if not parameters and any(value.is_parameter and _by_slices(state, value) for _, value in joined):
        for _, value in joined:
            state.pin(value, f"meets the weight of a layer in {state.where(node)}")
        return state.fixed(node)
    join = _Join(state, node, joined, bool(neutral))
    if len(joined) == 1:
        return LabelTensor(join.unary(joined[0][1].labels).expand(out), is_parameter=parameters)
    return LabelTensor(join.run([value.labels for _, value in joined], out), is_parameter=parameters)


def _before_expansion(state: Propagation, node: Node, value: LabelTensor) -> tuple[Node, LabelTensor]:
    """Return a tensor as it was before it was expanded, which shows the dimensions along which it is constant."""
    while _expands(node) and (not value.is_parameter or bool((core(value.labels) < 0).all())):
        source = state.labels_of(node.args[0])
        if source is None:
            break
        node, value = node.args[0], source
    return node, value


def _expands(node: Node) -> bool:
    """True for ``expand``, and for ``repeat`` where it does the same."""
    if node.op != "call" or (name := operator_name(node, raw=True)) not in ("expand", "repeat"):
        return False
    before = [1] * (len(node.shape) - len(node.args[0].shape)) + list(node.args[0].shape)
    return name == "expand" or all(n in (1, after) for n, after in zip(before, node.shape, strict=True))


def _spans_none(value: LabelTensor, dims: Iterable[int]) -> bool:
    """True if a tensor broadcasts along all of ``dims``, which count from the last dimension."""
    return all(value.labels.ndim < -dim or value.shape[dim] == 1 for dim in dims)


def _channel_dims(state: Propagation, value: LabelTensor) -> Iterator[int]:
    """Dimensions along which channels differ, from the last one."""
    small = core(state.rooted(value.labels))
    return (dim - small.ndim for dim, size in enumerate(small.shape) if size > 1)


def _by_slices(state: Propagation, value: LabelTensor) -> bool:
    """True if different entries have one label because they belong to one filter."""
    small = core(value.labels)
    if not state.row_owners or small.numel() == value.labels.numel():
        return False
    values = small.reshape(-1).numpy()
    return bool(np.isin(state.table.owner[values[values > 0]], np.concatenate(list(state.row_owners.values()))).any())


def _distinct_rows(columns: Sequence[Ints]) -> tuple[Ints, Ints]:
    """(n, len(columns)) sorted distinct combinations of entries, and the position of each combination among them."""
    values, code = distinct(columns[0])
    rows = values[:, None]
    for column in columns[1:]:
        others, inverse = distinct(column)
        pairs, code = distinct(code * len(others) + inverse)
        rows = np.concatenate([rows[pairs // len(others)], others[pairs % len(others), None]], axis=1)
    return rows, code


class _Join:
    """One element-wise call, which joins the values that meet at a position."""

    def __init__(
        self, state: Propagation, node: Node, operands: Sequence[tuple[Node, LabelTensor]], has_neutral: bool
    ) -> None:
        self.state, self.node, self.table = state, node, state.table
        self.name, self.where = operator_name(node), state.where(node)
        self.nodes = [n for n, _ in operands]
        self.is_parameter = np.asarray([value.is_parameter for _, value in operands])
        self.key = state.key(node)
        self.product = self.name in _PRODUCTS
        # What an unknown neutral operand does to zero is known for a product only.
        self.keeps_zero = self.product or (not has_neutral and maps_zero_to_zero(node))
        self.silencers = [_silencing(state, n) if value.is_parameter else frozenset() for n, value in operands]
        # Which raw entries each value computed from parameters stands for, before activations join them.
        self.entries = [
            _raw_entries(state, value.labels, names or ()) if value.is_parameter else {}
            for (_, value), names in zip(operands, self.silencers, strict=True)
        ]
        self.private: dict[str, list[tuple[int, int]]] = {}  # tensor -> (row, value after it)

    def unary(self, labels: Tensor) -> Tensor:
        """A function of one labelled tensor."""
        return self.table.derive(labels, self.key, shift=None if self.keeps_zero else self.where)

    def run(self, operands: Sequence[Tensor], out: torch.Size) -> Tensor:
        """Labels of the result, of shape ``out``."""
        wide = [labels.expand(out) for labels in operands]
        for d in range(len(out)):
            if all(w.stride(d) == 0 for w in wide):
                wide = [w.narrow(d, 0, 1) for w in wide]
        columns, inverse = _distinct_rows([w.reshape(-1).numpy() for w in wide])
        results = self._meet_alike(columns)
        if results is None:
            results = self._meet_parameters(columns)
        if results is None:
            results = np.empty(len(columns), dtype=np.int64)
            unowned = (columns < 0).any(axis=1)
            results[unowned] = self._meet_unowned(columns[unowned])
            for i in np.flatnonzero(~unowned).tolist():
                results[i] = self._meet(columns[i])
        for tensor, pairs in self.private.items():
            rows, values = np.asarray(pairs, dtype=np.int64).T
            self.state.record(Event("private", tensor, FLAT, rows, values, silence=True))
        return torch.from_numpy(results[inverse.reshape(-1)]).reshape(wide[0].shape).expand(out)

    def _meet_alike(self, columns: Ints) -> Ints | None:
        """:meth:`_meet` of all ``columns`` (n, operands) at once, where only channels meet in one order of positions.

        Return None if a zero, a parameter, an unowned value, or a function that exposes its operands is among them.
        """
        table = self.table
        if self.is_parameter.any() or (columns <= 0).any() or table.zero[columns].any():
            return None
        slots, origins, leaks = table.slot[columns], table.origin[columns], table.leak[columns]
        if (slots != slots[:, :1]).any():
            return None
        apart = (origins != origins[:, :1]).any(axis=1)
        if apart.any() and not self.product and self.name not in _SUMS:
            return None
        private = ~apart & (origins[:, 0] >= 0)
        table.expose_leaks_in_order(np.sort(columns[~private], axis=1).reshape(-1))
        leak = leaks.min(axis=1) if self.product else leaks.max(axis=1)
        if not self.product and not self.keeps_zero and (private & (leak == 0)).any():
            leak = np.where(leak > 0, leak, table.add_leak(f"{self.where} does not map zero to zero"))
        owners = table.owner[columns]
        for i in range(1, columns.shape[1]):
            table.unite(owners[:, 0], owners[:, i])
        return table.add(
            owner=owners[:, 0],
            trail=mix(self.key or 0, *table.trail[columns].T),
            slot=slots[:, 0],
            origin=np.where(private, origins[:, 0], -1),
            leak=np.where(private, leak, 0),
        )

    def _meet_parameters(self, columns: Ints) -> Ints | None:
        """:meth:`_meet` of all ``columns`` at once, where an activation meets entries of parameters; None elsewhere."""
        table = self.table
        if (~self.is_parameter).sum() != 1 or (columns <= 0).any() or table.zero[columns].any():
            return None
        given = columns[:, int(np.flatnonzero(~self.is_parameter)[0])]
        origins, leak = table.origin[given], table.leak[given]
        private = origins >= 0
        table.expose_leaks_in_order(given[~private])
        vanish = self.keeps_zero and all(self.silencers[i] for i in np.flatnonzero(self.is_parameter))
        quotient = self.name == "div" and not self.is_parameter[0] and self.nodes[0] is self.node.args[0]
        if not (self.product or vanish or quotient) and (private & (leak == 0)).any():
            leak = np.where(leak > 0, leak, table.add_leak(f"{self.where} does not map zero to zero"))
        owners = table.owner[columns]
        for i in range(1, columns.shape[1]):
            table.unite(owners[:, 0], owners[:, i])
        for i in np.flatnonzero(self.is_parameter).tolist():
            table.slot[columns[:, i]] = table.slot[given]
        results = table.add(
            owner=owners[:, 0],
            trail=mix(self.key or 0, *table.trail[columns].T),
            slot=table.slot[given],
            origin=np.where(private, origins, -1),
            leak=np.where(private, leak, 0),
        )
        for i in np.flatnonzero(self.is_parameter).tolist():
            for value, result in zip(columns[:, i].tolist(), results.tolist(), strict=True):
                for tensor, row in self.entries[i].get(value, ()):
                    self.private.setdefault(tensor, []).append((row, result))
        return results

    def _meet_unowned(self, columns: Ints) -> int:
        """Label of what results where a value that no channel owns is among those that meet."""
        table = self.table
        others = columns.min(axis=1, initial=0)
        for other in unique(others)[::-1].tolist():
            values = columns[others == other]
            reason = f"meets values that no channel owns ({table.fixed_reasons[-1 - other]}) in {self.where}"
            table.pin(values[values > 0], reason, expose=False)
            table.expose_leaks(values[values > 0])
        return table.add_fixed(f"computed by {self.where}")

    def _meet(self, column: Ints) -> int:
        """The value that results where ``column[i]`` of operand ``i`` meet."""
        table, owned = self.table, column > 0
        values = column[owned]
        live = owned & (table.zero[column] == 0)
        activations = column[live & ~self.is_parameter]
        zero = not live.any() or (self.product and not live.all())
        if zero and not self.keeps_zero:
            table.pin(values, f"zero padding is shifted by {self.where}")
            return table.add_fixed(f"zero padding shifted by {self.where}")
        slots = unique(table.slot[activations]) if len(activations) else np.zeros(1, np.int64)
        if len(slots) > 1:
            table.pin(values, f"meets another order of positions in {self.where}")
            return table.add_fixed(f"computed by {self.where}")
        origin, leak = (-1, 0) if zero else self._private(column, activations)
        owners = table.owner[values]
        if len(owners) > 1:
            table.unite(owners[:-1], owners[1:])
        # Entries of a flattened parameter follow the order of positions of the channel they act on.
        table.slot[column[owned & self.is_parameter]] = slots[0]
        trail = mix(self.key or 0, *table.trail[column].tolist())
        result = table.add(
            owner=owners[:1], trail=trail.reshape(1), slot=slots[:1], origin=origin, leak=leak, zero=int(zero)
        )
        for i in np.flatnonzero(owned & self.is_parameter).tolist() if len(activations) else ():
            for tensor, row in self.entries[i].get(int(column[i]), ()):
                self.private.setdefault(tensor, []).append((row, int(result[0])))
        return int(result[0])

    def _private(self, column: Ints, activations: Ints) -> tuple[int, int]:
        """(origin, leak) of the result. Values whose private region ends here must be zero once silenced."""
        table = self.table
        origins, leaks = unique(table.origin[activations]), table.leak[activations]
        if len(origins) != 1 or origins[0] < 0:
            if len(origins) > 1 and not self.product and self.name not in _SUMS:
                # Zero is neutral in a sum and wins in a product; what another function makes of it is not "nothing".
                for origin in origins.tolist():
                    table.exposed.setdefault(origin, f"joined by {self.where}")
            table.expose_leaks(activations)
            return -1, 0
        if self.product:
            return int(origins[0]), int(leaks.min())
        if leaks.any():
            return int(origins[0]), int(leaks.max())
        if self.name == "div" and column[0] > 0 and self.nodes[0] is self.node.args[0] and self.is_parameter[1:].all():
            return int(origins[0]), 0
        vanish = all(self.silencers[i] for i in np.flatnonzero(self.is_parameter & (column > 0)))
        if self.keeps_zero and vanish:
            return int(origins[0]), 0
        return int(origins[0]), table.add_leak(f"{self.where} does not map zero to zero")


def _silencing(state: Propagation, node: Node) -> frozenset[str]:
    """Parameters to set to zero so that a tensor computed from parameters vanishes; empty if that is not known."""
    name = state.parameter_name(node)
    if name is not None:
        return frozenset({name})
    if node.op != "call" or node.fixed:
        return frozenset()
    parts = [_silencing(state, n) for n in node.inputs]
    known = [part for part in parts if part]
    if operator_name(node) in _PRODUCTS:
        # One factor will do; running statistics are the last choice.
        order = sorted(known, key=lambda part: (any("running_" in t for t in part), len(part), sorted(part)))
        return order[0] if order else frozenset()
    if len(known) < len(parts) or not parts:
        return frozenset()
    element_wise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if operator_name(node) in _RESHAPES or (element_wise and maps_zero_to_zero(node)):
        return frozenset().union(*known)
    return frozenset()


_RESHAPES = (
    "view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "expand",
    "permute",
    "transpose",
    "clone",
    "_to_copy",
    "alias",
    "detach",
)


def _raw_entries(
    state: Propagation, labels: Tensor, tensors: Sequence[str] | frozenset[str]
) -> dict[int, list[tuple[str, int]]]:
    """Value -> the (parameter, row) pairs it is computed from."""
    values = unique(core(labels).numpy())
    values = values[values > 0]
    roots = state.table.roots(state.table.owner[values])
    found: dict[int, list[tuple[str, int]]] = {int(v): [] for v in values}
    for tensor in sorted(tensors):
        rows: dict[int, list[int]] = {}
        for row, root in enumerate(state.table.roots(state.owners_of(tensor, 0)).tolist()):
            rows.setdefault(root, []).append(row)
        for value, root in zip(values.tolist(), roots.tolist(), strict=True):
            found[value].extend((tensor, row) for row in rows.get(root, ()))
    return found
