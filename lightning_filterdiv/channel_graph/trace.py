"""Trace a network: record it, run the record on labels, collect channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from ..filters import (
    CONVOLUTIONS,
    FLOAT_FIRST,
    canonical_name,
    find_submodule,
    named_modules,
    quantised_modules,
)
from ..tensors.arguments import check_module
from . import layers, moves
from .answers import ChannelAnswers, NormSite, Operation, Table, layer_of
from .channels import (
    channel_table,
    couple_shared_rows,
    groups_of,
    linked_ranks,
    pin_idle,
    pin_impossible,
    resolve_elements,
)
from .counted import CountedNorm, counted_form
from .errors import ChannelGraphError, TraceError
from .forms import Recording
from .inputs import example_arguments
from .labels import Ints, core, unique
from .modules import bare_module, tensor_names
from .pointwise import EXTRA, pointwise
from .propagate import Propagation, Rule, unknown
from .record import Node, Record, macs_of, map_nodes, operator_name
from .recorder import record
from .regions import filter_regions, layers_in_order, neighbours, pinned_layers
from .sites import constrained_channels, find_sites

__all__ = ["kinds_of", "trace", "trace_at"]

# Some keep an activation, which follows the norm, as a child.
_PLAIN_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
Answers = TypeVar("Answers", bound=ChannelAnswers)

_RULES: dict[str, Rule] = {**dict.fromkeys(EXTRA, pointwise), **layers.RULES, **moves.RULES}


def _rule(node: Node) -> Rule:
    """Return the rule of a call: by its name, by ATen's tag for element-wise operators, or the rule that pins."""
    rule = _RULES.get(operator_name(node, raw=True))
    if rule is not None:
        return rule
    return pointwise if torch.Tag.pointwise in getattr(node.target, "tags", ()) else unknown


def trace(model: nn.Module, example_inputs: Any, network: str | None, answers: type[Answers]) -> Answers:
    """Check what is given, and trace.

    Args:
        model: see :meth:`ChannelGraph.trace`.
        example_inputs: likewise.
        network: likewise.
        answers: class of the result.

    Raises:
        ExampleInputsError: no example inputs, or forward fails on them.
        TraceError: the network cannot be recorded.
        ChannelGraphError: the network has no convolution, or there is no such submodule.
    """
    check_module("model", model)
    model = bare_module(model)
    traced = bare_module(find_submodule(model, network, ChannelGraphError))
    if quantised := list(quantised_modules(traced)):
        raise TraceError(
            f"{quantised[0]!r} is quantised, and packed integers cannot be traced; {FLOAT_FIRST}, or trace a submodule "
            f"without it: network='...'"
        )
    if sharded := next(((n, p) for n, p in traced.named_parameters() if is_traceable_wrapper_subclass(p)), None):
        raise TraceError(
            f"{canonical_name(sharded[0])!r} is a {type(sharded[1]).__name__}, a shard or a packed form, which cannot "
            f"be traced; use strategy='ddp' or a single device, with whole, plain weights"
        )
    if not any(isinstance(m, CONVOLUTIONS) for m in traced.modules()):
        raise ChannelGraphError(
            f"{type(traced).__name__} has no convolution: there are no channels to speak of; trace a network with some"
        )
    return trace_at(model, example_arguments(traced, example_inputs), network or "", answers)


def trace_at(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], network: str, answers: type[Answers]
) -> Answers:
    """Trace with (args, kwargs), without asking which widths forward can express."""
    traced = bare_module(find_submodule(model, network, ChannelGraphError))
    names = tensor_names(model)
    records, state = _labelled(model, traced, call, names, network, record(traced, call, names, network))
    return answers(**_collect(model, state, records, call, network))


def kinds_of(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], network: str, first: Record) -> set[int]:
    """The kinds of channels in a trace of ``model``; see :meth:`Table.kinds`.

    Args:
        model: the network.
        call: (args, kwargs).
        network: the traced submodule.
        first: its record in eval mode.
    """
    traced = bare_module(find_submodule(model, network, ChannelGraphError))
    _, state = _labelled(model, traced, call, tensor_names(model), network, first)
    return {*channel_table(state).kinds().values()}


def _labelled(
    model: nn.Module, traced: nn.Module, call: Any, names: Mapping[int, str], network: str, first: Record
) -> tuple[list[Record], Propagation]:
    """Complete the records of a network, and run them on labels."""
    records = [first]
    if idle := _idle_parameters(traced, names, first):
        # Auxiliary heads read channels in training only: their record is laid over the first one.
        try:
            records.append(record(traced, tree_map(_two_items, call), names, network, training=True))
        except ChannelGraphError as error:
            raise TraceError(
                f"{idle[0]!r} is not used in eval mode, and training mode cannot be traced: {error}"
            ) from error
    row_dims, norms = _row_dims(traced, names), _norms(model)
    state = propagate(records, row_dims, norms)
    if ranks := linked_ranks(state):
        state = propagate(records, row_dims, norms, ranks)
    return records, state


def propagate(
    records: Sequence[Record],
    row_dims: Mapping[str, int],
    norms: Mapping[str, nn.Module],
    ranks: Mapping[str, Ints] | None = None,
) -> Propagation:
    """Run records of one network on labels, and join what is one channel."""
    counts = frozenset(f"{name}.counts" for name, module in norms.items() if isinstance(module, CountedNorm))
    state = Propagation(row_dims=row_dims, ranks=ranks or {}, norms=norms, counts=counts)
    for one in records:
        state.run(one, _rule, layers.RULES)
    resolve_elements(state)
    couple_shared_rows(state)
    state.settle_moves()
    return state


def _idle_parameters(model: nn.Module, names: Mapping[int, str], record: Record) -> list[str]:
    """Parameters that forward does not use."""
    used = {record.tensors[node] for node in record.nodes if node in record.tensors}
    return [name for p in model.parameters() if (name := names[id(p)]) not in used]


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may be norms over channels."""
    return {
        name: module
        for name, module in named_modules(model).items()
        if hasattr(module, "eps")
        and (isinstance(module, (*_PLAIN_NORMS, CountedNorm)) or next(module.children(), None) is None)
    }


def _norm_sites(model: nn.Module, state: Propagation) -> tuple[dict[str, NormSite], dict[str, str]]:
    """Return norms over channels, and unknown ones: ``counts`` -> reason."""
    modules, sites, unknown = _norms(model), {}, {}
    for name, places in state.counted.items():
        (shape, dim), where = next(iter(places.items()))
        alike = len({(len(shape), dim) for shape, dim in places}) == 1
        form = counted_form(modules[name], shape, dim) if alike else None
        if form is None:
            unknown[f"{name}.counts"] = f"input of {where}, which mixes channels"
        else:
            sites[name] = NormSite(form, shape[dim])
    return sites, unknown


def _row_dims(model: nn.Module, names: Mapping[int, str]) -> dict[str, int]:
    """Tensors of layers with one slice per filter -> the dimension of those slices."""
    dims: dict[str, int] = {}
    for layer in model.modules():
        if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
            transposed = isinstance(layer, CONVOLUTIONS) and layer.transposed
            count = layer.out_channels if isinstance(layer, CONVOLUTIONS) else layer.out_features
            for tensor in [*layer.parameters(), *layer.buffers()]:
                dim = 1 if transposed and tensor.ndim > 1 and tensor.shape[1] == count else 0
                if tensor.ndim > 1 and tensor.shape[dim] == count:
                    dims[names[id(tensor)]] = dim
    return dims


def _two_items(leaf: Any) -> Any:
    """A batch of one cannot be normalised over 1 x 1 positions in training."""
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[0] == 1 else leaf


def _obstacles(model: nn.Module, state: Propagation, table: Table, network: str) -> dict[str, str]:
    """Tensors that cannot be narrowed -> why."""
    modules, outside = named_modules(model), _names_outside(model, network)
    found: dict[str, str] = {}
    dense_tensors = set(unique(table.tensor[(table.kind == 0) | (table.kind == 2)]).tolist())
    for index, tensor in enumerate(table.tensors):
        path, attribute = layer_of(tensor), tensor.rpartition(".")[2]
        dense = index in dense_tensors
        if tensor in outside:
            found[tensor] = f"{tensor} is shared with {outside[tensor]}, outside of {network}"
        elif dense and not (
            isinstance(modules[path], (*CONVOLUTIONS, nn.Linear))
            and (attribute in ("weight", "bias") or tensor in state.computed)
        ):
            found[tensor] = f"{tensor} belongs to a {type(modules[path]).__name__}, which cannot be narrowed"
    return found


def _idle_tensors(records: Sequence[Record]) -> set[str]:
    """Weights of layers that forward calls for nothing."""
    idle = {one.tensors[node] for one in records for node in one.idle if node in one.tensors}
    if not idle:
        return idle
    return idle - {one.tensors[node] for one in records for node in one.nodes if node in one.tensors.keys() - one.idle}


def _names_outside(model: nn.Module, network: str) -> dict[str, str]:
    """Tensors of the traced submodule that also belong to other parts of the model -> their name there."""
    names = tensor_names(model)
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if not network:
        return {}
    return {names[id(t)]: n for n, t in pairs if not f"{canonical_name(n)}.".startswith(f"{network}.")}


def _collect(
    model: nn.Module, state: Propagation, records: Sequence[Record], call: Any, network: str
) -> dict[str, Any]:
    table = channel_table(state)
    norms, unknown_norms = _norm_sites(model, state)
    pin_impossible(state, table, _obstacles(model, state, table, network) | unknown_norms)
    pin_idle(state, table, _idle_tensors(records))
    pins: dict[int, str] = {}
    roots = state.table.roots(np.fromiter(state.table.pins, dtype=np.int64, count=len(state.table.pins)))
    for root, reason in zip(roots.tolist(), state.table.pins.values(), strict=True):
        pins.setdefault(root, reason)
    order, layer_tensors = layers_in_order(named_modules(model), state.events, state.depthwise)
    sites, bodies = find_sites(model, records, state, network)
    constrained = constrained_channels(sites, bodies, state, set(pins))
    fixed = set().union(*constrained)
    groups, refused = groups_of(table, set(pins), order, layer_tensors, fixed, state.grouped)
    pins |= refused
    regions = filter_regions(state, order)
    pinned = pinned_layers(state, table, pins, order, layer_tensors)
    modules = named_modules(model)
    for layer, reason in state.computed_layers.items():
        if layer not in order and isinstance(modules.get(layer), (*CONVOLUTIONS, nn.Linear)):
            pinned[layer] = reason
    consumers, coupled = neighbours(table, order, layer_tensors)
    row_dims = {e.tensor: e.dim for e in state.events if e.kind == "filter" and e.dim}
    return {
        "model": model,
        "groups": groups,
        "pinned": pinned,
        "regions": regions,
        "consumers": consumers,
        "coupled": coupled,
        "row_dims": row_dims,
        "operations": tuple(_operations(records[0], state)),
        "norms": norms,
        "counted_sizes": {name: site.size for name, site in (norms | state.reductions).items()},
        "map_sites": tuple(s for s in sites if not fixed & {*s.reads, *s.writes}),
        "constrained": constrained,
        "table": table,
        "body_moves": {
            root: f"{m.operator} in {m.module or 'forward'}"
            for m in (*state.reshapes, *state.stacked, *reversed(bodies))
            for root in state.table.roots(m.owners).tolist()
        },
        "arguments": call,
        "network": network,
        "output_shapes": tuple(node.shape for node in records[0].outputs),
        "recording": Recording(records[0], state),
        "stacked": bool(state.stacked),
        "read_values": next((state.where(node) for node in records[0].nodes if node in records[0].reads), ""),
    }


def _operations(record: Record, state: Propagation) -> Iterable[Operation]:
    behind = _weights_behind(record)
    for node in record.nodes:
        if node.op in ("call", "item"):
            first = node.value[0] if isinstance(node.value, tuple) and node.value else node.value
            shape = tuple(int(n) for n in first.shape) if isinstance(first, Tensor) else None
            operator = operator_name(node) if node.op == "call" else "getitem"
            inputs = tuple(record.tensors.get(n, n.name) for n in node.inputs)
            macs = _macs(node)
            weight = next((behind[n] for n in node.inputs[1:] if behind.get(n)), "") if macs else ""
            if weight not in state.weights and weight not in state.computed:
                weight = ""  # it mixes positions, or its rows are no filters
            channels = _channels_of(node, state) if macs and not weight else ()
            yield Operation(node.name, operator, node.module, inputs, shape, macs, weight, channels)


def _channels_of(node: Node, state: Propagation) -> tuple[int, ...]:
    """The channels that a product of activations holds, or sums over: its work is linear in their number."""
    if "scaled_dot_product" in operator_name(node, raw=True):  # two products: queries by keys, and that by values
        both = [_held(node.inputs[0], state), _held(node.inputs[2], state)]
        return tuple(np.concatenate(both).tolist()) if all(len(part) for part in both) else ()
    held = [part for n in (node, *node.inputs[:1]) if len(part := _held(n, state)) > 1]
    return tuple(held[0].tolist()) if held else ()


def _held(node: Node, state: Propagation) -> Ints:
    """The channel of each value that differs, -1 for none; empty where channels lie along rows and columns."""
    value = state.labels_of(node)
    small = torch.zeros(0, dtype=torch.int64) if value is None else core(value.labels)
    if value is None or (small.ndim > 1 and min(small.shape[-2:]) > 1):
        return np.zeros(0, dtype=np.int64)
    values = small.reshape(-1).numpy()
    channels = np.full(len(values), -1)
    channels[values > 0] = state.table.roots(state.table.owner[values[values > 0]])
    return channels


def _macs(node: Node) -> int:
    """:func:`macs_of` of a node."""
    if node.op != "call" or getattr(node.target, "_overloadpacket", None) not in flop_registry:
        return 0
    args, kwargs = (map_nodes(part, lambda n: n.value) for part in (node.args, node.kwargs))
    return macs_of(node.target, args, kwargs, node.value)


def _weights_behind(record: Record) -> dict[Node, str]:
    """Node that depends on parameters alone -> the matrix or kernel that it is made of; the largest one."""
    behind: dict[Node, tuple[int, str] | None] = {}
    for node in record.nodes:
        if node.op == "tensor" and node in record.tensors:
            matrix = isinstance(node.value, Tensor) and node.value.ndim > 1
            behind[node] = (node.value.numel(), record.tensors[node]) if matrix else (0, "")
        elif node.inputs:
            parts = [behind.get(n) for n in node.inputs]
            behind[node] = None if None in parts else max(part for part in parts if part is not None)
        else:
            behind[node] = None if node.op == "input" else (0, "")
    return {node: found[1] for node, found in behind.items() if found is not None}
