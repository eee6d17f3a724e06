"""Rules for operators that own parameters: convolution, linear, normalisation, PReLU."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .answers import layer_of
from .labels import Ints, LabelTensor, core, is_increasing, mix, unique
from .moves import refuse_product
from .propagate import Event, Grouped, Propagation, Rule, Value, unknown
from .record import Node, arguments

__all__ = ["RULES"]


def _place(vector: Ints, dim: int, shape: torch.Size) -> LabelTensor:
    """Return a label tensor of ``shape`` whose values vary only along ``dim``."""
    view = [1] * len(shape)
    view[dim % len(shape)] = len(vector)
    return LabelTensor(torch.from_numpy(np.ascontiguousarray(vector)).reshape(view).expand(shape))


def _input(state: Propagation, node: Node, argument: object) -> Tensor | None:
    value = state.labels_of(argument) if isinstance(argument, Node) else None
    return None if value is None else value.labels


def _computed_weight(state: Propagation, node: Node) -> Value:
    """Handle a kernel that is not computed filter by filter: pin both sides."""
    words = _computes(state, node)
    weight = arguments(node).get("weight") or arguments(node).get("mat2")
    made_of = state.tensors_behind(weight, alone=True) if isinstance(weight, Node) else []
    for layer in (node.module, *map(layer_of, made_of)):
        state.computed_layers.setdefault(layer, f"its weight is {words}, from all of its filters at once")
    for leaf in node.inputs:
        reason = f"input of {state.where(node)}, whose weight is {words}"
        state.pin(leaf, reason, expose=False)
        state.expose_leaks(leaf)
    return state.fixed(node)


def _computes(state: Propagation, node: Node) -> str:
    """Return a description of the weight of a call: the last operator that computes it, or the parameter that it is."""
    weight = arguments(node).get("weight") or arguments(node).get("mat2")
    while isinstance(weight, Node) and state.is_move(weight):
        weight = weight.inputs[0]
    if isinstance(weight, Node) and weight.op == "item":
        weight = weight.args[0]
    if isinstance(weight, Node) and (name := state.parameter_name(weight)) is not None:
        return f"{name} in another form"
    if isinstance(weight, Node) and weight.op == "call":
        return f"computed by {state.where(weight)}"
    value = state.values.get(weight) if isinstance(weight, Node) else None
    known = value.labels.min() if isinstance(value, LabelTensor) else 0
    return state.table.fixed_reasons[-1 - int(known)] if known < 0 else "computed in forward"


def _computed_filters(state: Propagation, node: Node, labels: Tensor, bias: str | None, dim: int) -> Ints | None:
    """Return the values of the filters of a kernel that forward computes filter by filter from its weight.

    Weight norm, masks and standardised weights keep filters separate, so that filters may be removed. Input columns
    cannot be added and are pinned. Return None if filters are mixed.
    """
    table, weight = state.table, arguments(node)["weight"]
    value = state.labels_of(weight)
    if value is None or not value.is_parameter:
        return None
    if any(n > 1 for d, n in enumerate(core(state.rooted(value.labels)).shape) if d != dim):
        return None
    small = core(state.collapse(value.labels, [d for d in range(value.labels.ndim) if d != dim], node))
    rows = small.reshape(-1).expand(value.shape[dim]).numpy()
    if (rows <= 0).any() or len(unique(table.roots(table.owner[rows]))) < len(rows):
        return None
    names = [name for name in state.tensors_behind(weight) if name in state.row_owners]
    if not names:
        return None
    vector, groups = state.channels(labels, -(value.labels.ndim - 1), node), arguments(node)["groups"]
    main = max(names, key=lambda name: (state.size_of(name), name))
    if groups > 1:
        if dim:
            return None
        if groups == len(vector):
            return _computed_depthwise(state, node, vector, rows, main, names, bias)
        state.grouped[main] = Grouped(groups, (len(rows) // groups, value.shape[1]))
    reason = f"input of {state.where(node)}, whose weight is {_computes(state, node)}: columns do not add"
    state.pin(LabelTensor(labels), reason, expose=False)
    table.expose_leaks(core(labels).numpy())
    result = table.add(owner=table.owner[rows], trail=mix(table.trail[rows], state.key(node) or 0))
    for name in names:
        index = np.arange(len(rows), dtype=np.int64)
        state.record(Event("filter" if name == main else "member", name, state.row_dims[name], index, result))
    if bias is not None:
        state.record(Event("filter", bias, 0, np.arange(len(rows), dtype=np.int64), result))
    state.computed.update(names)
    for owner in table.owner[rows].tolist():
        table.exposed.setdefault(owner, f"forward computes the kernel of {layer_of(main)} from its weight")
    return result


def _computed_depthwise(
    state: Propagation, node: Node, vector: Ints, rows: Ints, main: str, names: list[str], bias: str | None
) -> Ints:
    """Handle a kernel that forward computes filter by filter, if each acts on one channel. It has no columns to add."""
    table, repeat = state.table, len(rows) // len(vector)
    each = np.repeat(vector, repeat)
    owned = each > 0
    table.unite(table.owner[rows[owned]], table.owner[each[owned]])
    state.computed.update(names)
    state.depthwise.add(main)
    tensors = dict.fromkeys([*names, *([bias] if bias is not None else [])], False)
    for origin in unique(table.origin[vector[vector > 0]]).tolist():
        table.exposed.setdefault(origin, f"forward computes the kernel of {layer_of(main)} from its weight")
    return _members(state, node, vector, tensors, repeat=repeat, silenced=False, offset=bias is not None)


def _filters(state: Propagation, node: Node, weight: str, bias: str | None, dim: int, count: int) -> Ints:
    """Fresh values, one per filter of ``weight``."""
    table, rows = state.table, np.arange(count, dtype=np.int64)
    # A weight may be used both ways round (tied encoder and decoder): those are other filters.
    owners = state.owners_of(f"{weight}|{dim}", count)
    key = state.key(node) or 0
    values = table.add(owner=owners, trail=state.first_trail(f"{weight}|{dim}", count, key), origin=owners)
    state.record(Event("filter", weight, dim, rows, values, silence=True))
    if bias is not None:
        state.record(Event("filter", bias, 0, rows, values, silence=True))
    return values


def _members(
    state: Propagation,
    node: Node,
    vector: Ints,
    tensors: dict[str, bool],
    *,
    repeat: int = 1,
    entries: Ints | None = None,
    shared: Container[str] = (),
    silenced: bool = True,
    offset: bool = False,
) -> Ints:
    """Values after a per-channel operator with entry ``i`` of every tensor acting on channel ``i``.

    Args:
        vector: (C,) values read.
        tensors: name -> whether it is set to zero to silence a channel.
        repeat: outputs per channel (depthwise convolution with a multiplier).
        entries: (C,) entry of the tensors that acts on each channel, by default its number.
        shared: tensors with one entry for all outputs of a channel.
        silenced: the output is zero if those tensors are, for every input.
        offset: the operator does not map zero to zero.
    """
    table, key = state.table, state.key(node) or 0
    vector = np.repeat(vector, repeat)
    if offset:
        vector = table.shift_zeros(vector, state.where(node))
    result = vector.copy()
    owned = np.flatnonzero(vector > 0)
    old = vector[owned]
    rows = np.arange(len(vector), dtype=np.int64) if entries is None else entries
    # A value met by several entries (a repeated channel) becomes as many different values; met by one, it stays one.
    if is_increasing(old):
        new = result[owned] = table.advance(old, key, rank=0)
    else:
        pairs, inverse = np.unique(np.stack([old, rows[owned]], axis=1), axis=0, return_inverse=True)
        starts = np.flatnonzero(np.r_[True, np.diff(pairs[:, 0]) != 0])[: len(pairs)]
        rank = np.arange(len(pairs)) - np.repeat(starts, np.diff(np.r_[starts, len(pairs)]))
        new = table.advance(pairs[:, 0], key, rank=rank)
        result[owned] = new[inverse.reshape(-1)]
    if silenced:
        table.leak[new] = 0
    for name, silence in tensors.items():
        state.record(Event("member", name, 0, rows // repeat if name in shared else rows, result, silence=silence))
    return result


def convolution(state: Propagation, node: Node) -> Value:
    """Handle a convolution. Dense or grouped, it reads channels and emits new ones. Depthwise, it is a per-channel
    operator."""
    call = arguments(node)
    labels, weight = _input(state, node, call["input"]), state.parameter_name(call["weight"])
    bias_node = call.get("bias")
    bias = state.parameter_name(bias_node)
    if labels is None or (bias_node is not None and bias is None):
        return _computed_weight(state, node)
    if weight is None:
        dim = 1 if call["transposed"] else 0
        computed = _computed_filters(state, node, labels, bias, dim)
        if computed is None:
            return _computed_weight(state, node)
        return _place(computed, -(len(call["weight"].value.shape) - 1), node.value.shape)
    state.use_as_weight(weight, bias)
    shape = call["weight"].value.shape
    out = node.value.shape
    groups = call["groups"]
    transposed = bool(call["transposed"])
    channel_dim = -(len(shape) - 1)
    vector = state.channels(labels, channel_dim, node)
    count = out[channel_dim]
    if groups > 1 and groups == len(vector):
        tensors = {weight: True} | ({bias: True} if bias else {})
        if (vector < 0).any():
            state.unowned[layer_of(weight)] = state.table.fixed_reasons[-1 - int(vector.min())]
        members = _members(
            state,
            node,
            vector,
            tensors,
            repeat=count // groups,
            shared=(weight,) if transposed else (),
            offset=bias is not None,
        )
        return _place(members, channel_dim, out)
    if groups > 1:
        known = Grouped(groups, (shape[0] // groups, shape[1]))
        if state.grouped.setdefault(weight, known) != known:
            state.read_elsewhere[weight] = "a convolution with other groups"
    state.table.expose_leaks(vector)
    columns = np.arange(len(vector), dtype=np.int64)
    state.record(Event("consumer", weight, 0 if transposed else 1, columns, vector))
    values = _filters(state, node, weight, bias, 1 if transposed else 0, count)
    if transposed and groups > 1:
        for owner in state.table.owner[values].tolist():
            state.table.exposed.setdefault(owner, f"the filters of {layer_of(weight)} are no rows of one dimension")
    return _place(values, channel_dim, out)


def matrix_product(state: Propagation, node: Node) -> Value:
    """Handle mm and addmm with the transpose of a weight: a linear layer, which reads and writes the last dimension."""
    call = arguments(node)
    inputs, factor, bias_node = call.get("mat1", call["self"]), call["mat2"], call["self"] if "mat1" in call else None
    labels, weight, bias = _input(state, node, inputs), state.matrix(factor), None
    alike = not any(state.is_owned(n) for n in (factor, bias_node) if n is not None)
    if labels is not None and alike and _along_rows(state, labels):
        return _positions(state, node, labels, bias_node)
    if weight is None and not _is_parameter(state, factor):
        return refuse_product(state, node, inputs, factor)
    if bias_node is not None:
        known = state.vector(bias_node)
        bias = known[0] if known is not None and known[1].tolist() == list(range(node.value.shape[-1])) else None
    if labels is None or weight is None or (bias_node is not None and bias is None):
        return _computed_weight(state, node)
    state.use_as_weight(weight, bias)
    vector = state.channels(labels, -1, node)
    state.table.expose_leaks(vector)
    state.record(Event("consumer", weight, 1, np.arange(len(vector), dtype=np.int64), vector))
    out = node.value.shape
    return _place(_filters(state, node, weight, bias, 0, out[-1]), -1, out)


def _along_rows(state: Propagation, labels: Tensor) -> bool:
    """True if several channels lie along the rows of a matrix, and positions along its columns."""
    small = core(labels)
    if small.shape[-1] > 1 or small.shape[0] == 1:
        return False
    values = unique(small.numpy())
    live = values[(values > 0) & (state.table.zero[np.maximum(values, 0)] == 0)]
    return len(unique(state.table.roots(state.table.owner[live]))) > 1


def _positions(state: Propagation, node: Node, labels: Tensor, bias: Node | None) -> Value:
    """Handle a linear layer that mixes positions, alike for every channel (MLP-Mixer)."""
    small = state.table.derive(labels[:, :1], state.key(node), shift=None if bias is None else state.where(node))
    return LabelTensor(small.expand(node.value.shape))


def _is_parameter(state: Propagation, node: Node) -> bool:
    value = state.values.get(node)
    return isinstance(value, LabelTensor) and value.is_parameter


def normalisation(state: Propagation, node: Node) -> Value:
    """Handle batch norm, per channel (dim 1). Instance norm is a batch norm with every channel once per item of the
    batch."""
    call = arguments(node)
    labels = _input(state, node, call["input"])
    named: dict[str, tuple[str, Ints]] = {}
    for argument in ("weight", "bias", "running_mean", "running_var"):
        if call.get(argument) is not None:
            known = state.vector(call[argument])
            if known is None or (labels is not None and _is_parameter(state, call["input"])):
                return _norm_of_parameters(state, node, call)
            named[argument] = known
    if labels is None:
        return state.fixed(node)
    if _is_parameter(state, call["input"]):
        return _norm_of_parameters(state, node, call)
    vector = state.channels(labels, 1, node)
    if not named:
        state.bare_norms[node.module] = unique(state.table.owner[vector[vector > 0]])
    affine = "weight" in named
    zeroed = {"weight", "bias"} if affine else {"bias", "running_mean"}
    members = _members(
        state,
        node,
        vector,
        {name: argument in zeroed for argument, (name, _) in named.items()},
        entries=next(iter(named.values()))[1] if named else None,
        silenced=affine,
        offset=True,
    )
    if isinstance(node.value, Tensor):
        return _place(members, 1, node.value.shape)
    # Further outputs are saved or updated statistics of the same channels: nothing in forward reads them.
    rest = state.fixed(node)
    assert isinstance(rest, list)
    return [_place(members, 1, node.value[0].shape), *rest[1:]]


def layer_norm(state: Propagation, node: Node) -> Value:
    """Norms over the last dimension. They mix channels in a mean that counts them, and scale each separately."""
    call = arguments(node)
    labels, shape = _input(state, node, call["input"]), call["normalized_shape"]
    named = [state.parameter_name(call[key]) for key in ("weight", "bias") if call.get(key) is not None]
    if labels is None or _is_parameter(state, call["input"]):
        return unknown(state, node)
    varying = {d for d, n in enumerate(core(labels).shape) if n > 1}
    if not varying & set(range(labels.ndim - len(shape), labels.ndim)):
        result = LabelTensor(state.table.derive(labels, state.key(node), shift=state.where(node)))
        return _with_statistics(state, node, result)
    if len(shape) > 1 or None in named:
        return unknown(state, node)
    vector = state.channels(labels, -1, node)
    if not state.count(node, vector):
        return unknown(state, node)
    return _normalised(state, node, vector, -1, [name for name in named if name is not None])


def group_norm(state: Propagation, node: Node) -> Value:
    """Norms over blocks of channels (dim 1)."""
    call = arguments(node)
    labels, groups = _input(state, node, call["input"]), call["group"]
    named = [state.parameter_name(call[key]) for key in ("weight", "bias") if call.get(key) is not None]
    if labels is None or _is_parameter(state, call["input"]) or None in named:
        return unknown(state, node)
    vector = state.channels(labels, 1, node)
    if groups < len(vector):
        if not state.count(node, vector):
            return unknown(state, node)
        if groups > 1:
            state.grouped[f"{node.module}.counts"] = Grouped(groups, (len(vector) // groups,))
    return _normalised(state, node, vector, 1, [name for name in named if name is not None])


def _normalised(state: Propagation, node: Node, vector: Ints, dim: int, names: list[str]) -> Value:
    silenced = any(name.endswith("weight") for name in names)
    members = _members(state, node, vector, dict.fromkeys(names, True), silenced=silenced, offset=True)
    first = node.value if isinstance(node.value, Tensor) else node.value[0]
    return _with_statistics(state, node, _place(members, dim, first.shape))


def _with_statistics(state: Propagation, node: Node, result: LabelTensor) -> Value:
    """Return the results of a norm. Forward reads only the first."""
    rest = state.fixed(node)
    return [result, *rest[1:]] if isinstance(rest, list) else result


def _norm_of_parameters(state: Propagation, node: Node, call: dict[str, Any]) -> Value:
    """Handle a weight that is standardised filter by filter, with a gain that may be computed."""
    value = state.labels_of(call["input"])
    if value is None or not value.is_parameter:
        return _computed_weight(state, node)
    table, vector = state.table, state.channels(value.labels, 1, node)
    for argument in ("weight", "bias"):
        if call.get(argument) is not None:
            scale = state.labels_of(call[argument])
            entries = None if scale is None else scale.labels.reshape(-1).numpy()
            if entries is None or (entries <= 0).any() or (vector <= 0).any():
                return _computed_weight(state, node)
            table.unite(table.owner[vector], table.owner[entries])
    members = table.advance(vector, state.key(node) or 0)
    rest = state.fixed(node)
    assert isinstance(rest, list)
    first = _place(members, 1, node.value[0].shape)
    return [LabelTensor(first.labels, is_parameter=True), *rest[1:]]


def weight_norm(state: Propagation, node: Node) -> Value:
    """Handle weight norm, whose weight has a direction and a length for every filter."""
    call = arguments(node)
    direction, length, dim = state.labels_of(call["v"]), state.labels_of(call["g"]), call["dim"]
    if direction is None or length is None or not (direction.is_parameter and length.is_parameter):
        return unknown(state, node)
    parts = [core(value.labels) for value in (direction, length)]
    if any(n > 1 for part in parts for d, n in enumerate(part.shape) if d != dim % part.ndim):
        return unknown(state, node)
    rows, lengths = (part.reshape(-1).numpy() for part in parts)
    state.table.unite(*np.broadcast_arrays(state.table.owner[rows], state.table.owner[lengths]))
    labels = state.table.derive(direction.labels, state.key(node))
    rest = state.fixed(node)
    assert isinstance(rest, list)
    return [LabelTensor(labels, is_parameter=True), *rest[1:]]


def prelu(state: Propagation, node: Node) -> Value:
    """Handle PReLU: one slope per channel (dim 1). A single shared slope is element-wise."""
    call: dict[str, Any] = arguments(node)
    labels, known = _input(state, node, call["self"]), state.vector(call["weight"])
    if labels is None or known is None:
        return _computed_weight(state, node)
    name, entries = known
    if len(entries) == 1:
        return LabelTensor(state.table.derive(labels, state.key(node)))
    vector = state.channels(labels, 1 if labels.ndim > 1 else 0, node)
    members = _members(state, node, vector, {name: True}, entries=entries, silenced=False)
    return _place(members, 1, node.value.shape)


RULES: dict[str, Rule] = {
    "convolution": convolution,
    **dict.fromkeys(("mm", "addmm"), matrix_product),
    **dict.fromkeys(
        (
            "_native_batch_norm_legit_no_training",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "_batch_norm_no_update",
            "_batch_norm_with_update",
            "_batch_norm_with_update_functional",
            "native_batch_norm",
            "cudnn_batch_norm",
            "miopen_batch_norm",
        ),
        normalisation,
    ),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
    "_prelu_kernel": prelu,
}
