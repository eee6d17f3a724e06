"""Trace a network: export, run on labels, collect channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from ..filters import CONVOLUTIONS, FLOAT_FIRST, canonical_name, quantised_modules
from ..tensors.arguments import check_module
from . import layers, moves
from .capture import find_submodule
from .classes import Table, channel_table, couple_shared_rows, groups_of, pin_impossible, resolve_elements
from .errors import ChannelGraphError, TraceError
from .export import bare_module, example_arguments, export, tensor_names
from .graph import ChannelGraph, Operation
from .pointwise import EXTRA, pointwise
from .propagate import Propagation, Rule, Value, operator_name, unknown
from .regions import filter_regions, layers_in_order, neighbours, pinned_layers
from .sites import constrained_channels, find_sites, module_of

__all__ = ["trace"]

_PREFIX = "network."
_RULES: dict[str, Rule] = {**dict.fromkeys(EXTRA, pointwise), **layers.RULES, **moves.RULES}


def _dispatch(state: Propagation, node: Node) -> Value:
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return pointwise(state, node)
    return unknown(state, node)


class _Rules(dict[str, Rule]):
    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, _dispatch)


def trace(model: nn.Module, example_inputs: Any, network: str | None = None) -> ChannelGraph:
    """See :meth:`ChannelGraph.trace`."""
    check_module("model", model)
    model = bare_module(model)
    traced = bare_module(find_submodule(model, network))
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
    graph = trace_at(model, example_arguments(traced, example_inputs), network or "")
    graph.pin_rigid()
    return graph


def trace_at(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], network: str) -> ChannelGraph:
    """Trace with (args, kwargs), without asking which widths forward can express."""
    args, kwargs = arguments
    traced = bare_module(find_submodule(model, network))
    state = Propagation(lambda node: module_of(node, network))
    programs = [export(traced, args, kwargs)]
    _propagate(model, state, programs[0], network)
    if idle := _idle_parameters(traced, programs[0]):
        # Auxiliary heads read channels in training only: their graph is laid over the first one.
        try:
            programs.append(export(traced, *tree_map(_two_items, (args, kwargs)), training=True))
        except ChannelGraphError as error:
            raise TraceError(
                f"{idle[0]!r} is not used in eval mode, and training mode cannot be traced: {error}"
            ) from error
        _propagate(model, state, programs[1], network)
    return _collect(model, state, programs, tree_map(_shape_only, (args, kwargs)), network)


def _idle_parameters(model: nn.Module, program: ExportedProgram) -> list[str]:
    """Parameters that forward does not use, under any of their names."""
    alive = {node.name for node in program.graph.nodes if node.users}
    tensors = {canonical_name(n): t for n, t in model.named_parameters(remove_duplicate=False)}
    names = [
        canonical_name(str(s.target).removeprefix(_PREFIX))
        for s in program.graph_signature.input_specs
        if s.arg.name in alive
    ]
    used = {id(tensors[name]) for name in names if name in tensors}
    return [name for name, tensor in tensors.items() if id(tensor) not in used]


def _two_items(leaf: Any) -> Any:
    """A batch of one cannot be normalised over 1 x 1 positions in training."""
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[0] == 1 else leaf


def _propagate(model: nn.Module, state: Propagation, program: ExportedProgram, network: str) -> None:
    names = tensor_names(model)
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    by_name = {canonical_name(n): t for n, t in pairs}
    parameters: dict[str, tuple[str, torch.Size]] = {}
    words: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            tensor = by_name[canonical_name(spec.target.replace(_PREFIX, f"{network}." if network else "", 1))]
            parameters[spec.arg.name] = (names[id(tensor)], tensor.shape)
            if tensor.dtype in (torch.int32, torch.int64) and tensor.ndim and not tensor.is_meta:
                constants[spec.arg.name] = tensor.detach().cpu()
        elif spec.kind == InputKind.CONSTANT_TENSOR and isinstance(
            value := program.constants.get(str(spec.target)), Tensor
        ):
            if value.dtype in (torch.int32, torch.int64) and value.ndim:
                constants[spec.arg.name] = value.detach().cpu()
        elif spec.kind == InputKind.USER_INPUT:
            words[spec.arg.name] = f"network input {spec.arg.name!r}"
    for out in program.graph_signature.output_specs:
        if out.kind == OutputKind.BUFFER_MUTATION and out.target is not None:
            words[out.arg.name] = f"written to buffer {out.target.removeprefix(_PREFIX)}"
    state.run(program.graph, _Rules(_RULES), parameters, words, constants)


def _shape_only(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.to("meta") if leaf.is_floating_point() else leaf.clone()
    return leaf


def _owner_module(model: nn.Module) -> dict[str, nn.Module]:
    return {canonical_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def _obstacles(model: nn.Module, table: Table, network: str) -> dict[str, str]:
    """Tensors that cannot be narrowed -> why."""
    modules, outside = _owner_module(model), _names_outside(model, network)
    found: dict[str, str] = {}
    for index, tensor in enumerate(table.tensors):
        path, _, attribute = tensor.rpartition(".")
        dense = bool(np.isin(table.kind[table.tensor == index], (0, 2)).any())
        if tensor in outside:
            found[tensor] = f"{tensor} is shared with {outside[tensor]}, outside of {network}"
        elif dense and not (isinstance(modules[path], (*CONVOLUTIONS, nn.Linear)) and attribute in ("weight", "bias")):
            found[tensor] = f"{tensor} belongs to a {type(modules[path]).__name__}, which cannot be narrowed"
    return found


def _names_outside(model: nn.Module, network: str) -> dict[str, str]:
    """Tensors of the traced submodule that also belong to other parts of the model -> their name there."""
    names = tensor_names(model)
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    if not network:
        return {}
    return {names[id(t)]: n for n, t in pairs if not f"{canonical_name(n)}.".startswith(f"{network}.")}


def _collect(
    model: nn.Module, state: Propagation, programs: Sequence[ExportedProgram], inputs: Any, network: str
) -> ChannelGraph:
    resolve_elements(state)
    couple_shared_rows(state)
    table = channel_table(state)
    pin_impossible(state, table, _obstacles(model, table, network))
    pins: dict[int, str] = {}
    for owner, reason in state.table.pins.items():
        pins.setdefault(state.table.root(owner), reason)
    order, layer_tensors = layers_in_order(_owner_module(model), state.events)
    sites, bodies = find_sites(model, [p.graph for p in programs], state, network)
    constrained = constrained_channels(sites, bodies, state, set(pins))
    fixed = set().union(*constrained)
    groups = groups_of(table, set(pins), order, layer_tensors, fixed)
    regions = filter_regions(state, order)
    consumers, coupled = neighbours(table, order, layer_tensors)
    row_dims = {e.tensor: e.dim for e in state.events if e.kind == "filter" and e.dim}
    return ChannelGraph(
        model=model,
        groups=groups,
        pinned=pinned_layers(state, table, pins, order, layer_tensors),
        regions=regions,
        consumers=consumers,
        coupled=coupled,
        row_dims=row_dims,
        operations=tuple(_operations(programs[0], state)),
        map_sites=tuple(s for s in sites if not fixed & {*s.reads, *s.writes}),
        constrained=constrained,
        table=table,
        body_moves={
            state.table.root(int(o)): f"{m.operator} in {m.module or 'forward'}"
            for m in (*state.reshapes, *reversed(bodies))
            for o in m.owners.tolist()
        },
        inputs=inputs,
        network=network,
    )


def _operations(program: ExportedProgram, state: Propagation) -> Iterable[Operation]:
    for node in program.graph.nodes:
        if node.op == "call_function":
            value = node.meta.get("val")
            first = value[0] if isinstance(value, (list, tuple)) and value else value
            shape = tuple(int(n) for n in first.shape) if isinstance(first, Tensor) else None
            inputs = tuple(n.name for n in node.all_input_nodes)
            yield Operation(node.name, operator_name(node), state.module_of(node)[0], inputs, shape)
