"""Rules for operators that own parameters: convolution, linear, normalisation, PReLU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .labels import Ints, LabelTensor
from .propagate import Event, Propagation, Rule, Value, arguments, operator_name

__all__ = ["RULES"]


def _place(vector: Ints, dim: int, shape: torch.Size) -> LabelTensor:
    """Label tensor of ``shape`` whose values vary along ``dim`` only."""
    view = [1] * len(shape)
    view[dim % len(shape)] = len(vector)
    return LabelTensor(torch.from_numpy(np.ascontiguousarray(vector)).reshape(view).expand(shape))


def _input(state: Propagation, node: Node, argument: object) -> Tensor | None:
    value = state.labels_of(argument) if isinstance(argument, Node) else None
    return None if value is None else value.labels


def _computed_weight(state: Propagation, node: Node) -> Value:
    for leaf in node.all_input_nodes:
        reason = f"input of {state.where(node)}, whose weight is computed in forward"
        state.pin(leaf, reason, expose=False)
        state.expose_leaks(leaf)
    return state.fixed(node)


def _filters(
    state: Propagation, node: Node, weight: str, bias: str | None, dim: int, count: int, pinned: str | None = None
) -> Ints:
    """Fresh values, one per filter of ``weight``."""
    table, rows = state.table, np.arange(count, dtype=np.int64)
    # A weight may be used both ways round (tied encoder and decoder): those are other filters.
    owners = state.owners_of(f"{weight}|{dim}", count)
    key = state.key(node) or 0
    values = table.add(owner=owners, trail=np.full(count, key, dtype=np.int64), origin=owners)
    state.record(Event("filter", weight, dim, rows, values, silence=True))
    if bias is not None:
        state.record(Event("filter", bias, 0, rows, values, silence=True))
    if pinned:
        for owner in owners.tolist():
            table.pins.setdefault(owner, pinned)
    return values


def _members(
    state: Propagation,
    node: Node,
    vector: Ints,
    tensors: dict[str, bool],
    *,
    repeat: int = 1,
    silenced: bool = True,
    offset: bool = False,
) -> Ints:
    """Values after a per-channel operator with entry ``i`` of every tensor acting on channel ``i``.

    Args:
        vector: (C,) values read.
        tensors: name -> whether it is set to zero to silence a channel.
        repeat: outputs per channel (depthwise convolution with a multiplier).
        silenced: the output is zero once those tensors are, whatever came in.
        offset: the operator does not map zero to zero.
    """
    table, key = state.table, state.key(node) or 0
    vector = np.repeat(vector, repeat)
    if offset:
        vector = table.shift_zeros(vector, state.where(node))
    result = vector.copy()
    owned = np.flatnonzero(vector > 0)
    old = vector[owned]
    # A value met by several entries (a repeated channel) becomes as many different values.
    order = np.argsort(old, kind="stable")
    rank = np.empty(len(old), dtype=np.int64)
    starts = np.r_[0, np.flatnonzero(np.diff(old[order])) + 1] if len(old) else np.zeros(0, np.int64)
    rank[order] = np.arange(len(old)) - np.repeat(starts, np.diff(np.r_[starts, len(old)]))
    result[owned] = table.advance(old, key, rank=rank)
    if silenced:
        table.leak[result[owned]] = 0
    rows = np.arange(len(vector), dtype=np.int64)
    for name, silence in tensors.items():
        state.record(Event("member", name, 0, rows, result, silence=silence))
    return result


def convolution(state: Propagation, node: Node) -> Value:
    """Dense: reads every channel, emits new ones. Depthwise: a per-channel operator. Grouped: pinned on both sides."""
    call = arguments(node)
    labels, weight = _input(state, node, call["input"]), state.parameter_name(call["weight"])
    if labels is None or weight is None:
        return _computed_weight(state, node)
    bias_node = call.get("bias")
    bias = state.parameter_name(bias_node)
    if bias_node is not None and bias is None:
        return _computed_weight(state, node)
    state.use_as_weight(weight, bias)
    shape = call["weight"].meta["val"].shape
    out = node.meta["val"].shape
    groups = call["groups"]
    transposed = "transpose" in operator_name(node) or bool(call.get("transposed", False))
    channel_dim = -(len(shape) - 1)
    vector = state.channels(labels, channel_dim, node)
    count = out[channel_dim]
    if groups > 1 and groups == len(vector):
        tensors = {weight: True} | ({bias: True} if bias else {})
        if (vector < 0).any():
            state.unowned[weight.rpartition(".")[0]] = state.table.fixed_reasons[-1 - int(vector.min())]
        members = _members(state, node, vector, tensors, repeat=count // groups, offset=bias is not None)
        return _place(members, channel_dim, out)
    state.table.expose_leaks(vector)
    pinned = None
    if groups == 1:
        columns = np.arange(len(vector), dtype=np.int64)
        state.record(Event("consumer", weight, 0 if transposed else 1, columns, vector))
    else:
        layer = weight.rpartition(".")[0]
        state.table.pin(vector, f"input of {layer}, a grouped convolution (groups={groups})", expose=False)
        pinned = f"a grouped convolution (groups={groups}) that is not depthwise"
        if not transposed:
            reads, writes = len(vector) // groups, count // groups
            for g in range(groups):
                part = vector[g * reads : (g + 1) * reads]
                columns = np.arange(reads, dtype=np.int64)
                block = (g * writes, (g + 1) * writes)
                state.record(Event("consumer", weight, 1, columns, part, block=block))
    if transposed and groups > 1:
        # Filter j is a slice of dim 0 and an index of dim 1: not rows of one dimension.
        state.table.pin(vector, f"input of {weight.rpartition('.')[0]}, a grouped transposed convolution")
        return state.fixed(node)
    values = _filters(state, node, weight, bias, 1 if transposed else 0, count, pinned)
    return _place(values, channel_dim, out)


def linear(state: Propagation, node: Node) -> Value:
    """Reads and writes the last dimension."""
    call = arguments(node)
    labels, weight = _input(state, node, call["input"]), state.parameter_name(call["weight"])
    bias = state.parameter_name(call["bias"])
    if labels is None or weight is None or (call["bias"] is not None and bias is None):
        return _computed_weight(state, node)
    state.use_as_weight(weight, bias)
    vector = state.channels(labels, -1, node)
    state.table.expose_leaks(vector)
    state.record(Event("consumer", weight, 1, np.arange(len(vector), dtype=np.int64), vector))
    out = node.meta["val"].shape
    return _place(_filters(state, node, weight, bias, 0, out[-1]), -1, out)


def normalisation(state: Propagation, node: Node) -> Value:
    """Batch and instance norm: per channel (dim 1)."""
    call = arguments(node)
    labels = _input(state, node, call["input"])
    named: dict[str, str] = {}
    for argument in ("weight", "bias", "running_mean", "running_var"):
        if call.get(argument) is not None:
            name = state.parameter_name(call[argument])
            if name is None:
                return _computed_weight(state, node)
            named[argument] = name
    if labels is None:
        return state.fixed(node)
    vector = state.channels(labels, 1, node)
    affine = "weight" in named
    zeroed = {"weight", "bias"} if affine else {"bias", "running_mean"}
    members = _members(
        state,
        node,
        vector,
        {name: argument in zeroed for argument, name in named.items()},
        silenced=affine,
        offset=True,
    )
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return _place(members, 1, value.shape)
    # Further outputs are saved or updated statistics of the same channels: nothing in forward reads them.
    rest = state.fixed(node)
    assert isinstance(rest, list)
    return [_place(members, 1, value[0].shape), *rest[1:]]


def prelu(state: Propagation, node: Node) -> Value:
    """One slope per channel (dim 1); a single shared slope is element-wise."""
    call: dict[str, Any] = arguments(node)
    labels = _input(state, node, call["self"])
    weight = state.parameter_name(call["weight"])
    if labels is None or weight is None:
        return _computed_weight(state, node)
    if call["weight"].meta["val"].numel() == 1:
        return LabelTensor(state.table.derive(labels, state.key(node)))
    vector = state.channels(labels, 1 if labels.ndim > 1 else 0, node)
    members = _members(state, node, vector, {weight: True}, silenced=False)
    return _place(members, 1, node.meta["val"].shape)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution"),
        convolution,
    ),
    "linear": linear,
    **dict.fromkeys(
        (
            "_native_batch_norm_legit_no_training",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "_batch_norm_no_update",
            "_batch_norm_with_update",
            "_batch_norm_with_update_functional",
            "native_batch_norm",
            "batch_norm",
            "cudnn_batch_norm",
            "instance_norm",
        ),
        normalisation,
    ),
    "prelu": prelu,
}
