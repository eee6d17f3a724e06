"""Run an exported graph once on labels: the driver, and what every operator rule needs from it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .labels import Ints, LabelTensor, ValueTable, compress, core, mix, stable_hash

__all__ = ["FLAT", "Event", "Move", "Propagation", "Rule", "arguments", "operator_name"]

FLAT = -1  # "dimension" of an event whose rows are positions in the flattened tensor
Value = LabelTensor | list[Any] | None
Rule = Callable[["Propagation", Node], Value]


@dataclass(frozen=True)
class Event:
    """Rows of one tensor met by labelled values: ``rows[i]`` along ``dim`` belongs to ``values[i]``.

    Kinds: ``filter`` (rows that produce a channel), ``member`` (entries of a per-channel tensor), ``private`` (entries
    that silence a channel, listed a second time), ``consumer`` (columns that read a channel). ``silence``: these rows
    are set to zero to silence the channel. ``block``: for a grouped convolution, the filters (dim 0) whose columns are
    meant.
    """

    kind: Literal["filter", "member", "private", "consumer"]
    tensor: str
    dim: int
    rows: Ints
    values: Ints
    silence: bool = False
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Move:
    """A data movement whose result depends on how many channels there are: a split, a shuffle, a pad over channels."""

    operator: str
    module: str
    owners: Ints


@dataclass
class Propagation:
    """State of one run over the graph.

    Args:
        module_of: the canonical path of the module that runs a node, and whether that module is a channel map.
    """

    module_of: Callable[[Node], tuple[str, bool]]
    parameters: Mapping[str, tuple[str, torch.Size]] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    table: ValueTable = field(default_factory=ValueTable)
    values: dict[Node, Value] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    reshapes: list[Move] = field(default_factory=list)  # flattens, where forward may hold a number
    weights: set[str] = field(default_factory=set)  # weights and biases of convolutions and linear layers
    read_elsewhere: dict[str, str] = field(default_factory=dict)  # tensor read other than as a layer's -> by what
    owners: dict[str, Ints] = field(default_factory=dict)  # tensor name -> owner of each filter or entry
    elements: dict[str, torch.Size] = field(default_factory=dict)  # per-channel tensors met element-wise -> shape
    unowned_rows: dict[tuple[str, int], set[int]] = field(
        default_factory=dict
    )  # (tensor, dim) -> rows met by no channel
    unowned: dict[str, str] = field(default_factory=dict)  # depthwise layer on values no channel owns -> whose they are
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _keys: dict[Node, int | None] = field(default_factory=dict)

    def run(
        self,
        graph: torch.fx.Graph,
        rules: Mapping[str, Rule],
        parameters: Mapping[str, tuple[str, torch.Size]],
        words: Mapping[str, str],
        constants: Mapping[str, Tensor],
    ) -> None:
        """Propagate through ``graph``; a second graph of the same network may follow.

        Args:
            graph: exported graph.
            rules: operator name -> rule.
            parameters: graph input name -> (canonical tensor name, shape) of parameters and buffers.
            words: graph input or output name -> what it is ("network input 'x'").
            constants: graph input name -> value of integer buffers, which may index channels.
        """
        self.parameters, self.words, self.constants = parameters, words, constants
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "output":
                for leaf in node.all_input_nodes:
                    self.pin(leaf, words.get(leaf.name, "network output"), expose=False)
                    self.expose_leaks(leaf)
            elif node.target is operator.getitem:
                parts = self.values[node.args[0]]
                self.values[node] = parts[node.args[1]] if isinstance(parts, list) else None
            else:
                rule = rules.get(operator_name(node)) if node.op == "call_function" else None
                self.values[node] = (rule or unknown)(self, node)

    def _placeholder(self, node: Node) -> Value:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or node.name in self.constants:
            return None
        if node.name not in self.parameters:
            reason = self.words.get(node.name, "a tensor created inside forward")
            return LabelTensor(fixed_labels(value.shape, self.table.add_fixed(reason)))
        name, shape = self.parameters[node.name]
        if value.numel() == 1:  # shared by all channels
            return LabelTensor(fixed_labels(shape, self.table.add_fixed(f"parameter {name}")), is_parameter=True)
        # Labelled when something other than a layer rule reads it, see ``labels_of``.
        return None

    # -- what rules ask ----------------------------------------------------------------------------------------------

    def parameter_name(self, node: object) -> str | None:
        """Canonical name if ``node`` is a parameter or buffer itself (through copies that change no value)."""
        while isinstance(node, Node) and node.op == "call_function" and operator_name(node) in _TRANSPARENT:
            node = node.args[0]
        if isinstance(node, Node) and node.op == "placeholder" and node.name in self.parameters:
            return self.parameters[node.name][0]
        return None

    def labels_of(self, node: Node) -> LabelTensor | None:
        """Labels of a tensor node; a bare parameter gets one owner per entry the first time it is asked for."""
        value = self.values.get(node)
        if value is None and (name := self.parameter_name(node)) in self.weights:
            self.read_elsewhere[str(name)] = "an operator"
            label = self.table.add_fixed(f"parameter {name}")
            value = self.values[node] = LabelTensor(fixed_labels(node.meta["val"].shape, label), is_parameter=True)
        if value is None and node.op == "placeholder" and node.name in {*self.parameters} - {*self.constants}:
            name, shape = self.parameters[node.name]
            self.elements[name] = shape
            owners = self.owners_of(name, shape.numel())
            trail = np.full(len(owners), stable_hash(name), dtype=np.int64)
            labels = torch.from_numpy(self.table.add(owner=owners, trail=trail)).reshape(shape)
            value = self.values[node] = LabelTensor(labels, is_parameter=True)
        return value if isinstance(value, LabelTensor) else None

    def owners_of(self, tensor: str, count: int) -> Ints:
        """The owners of the filters (entries) of a tensor: the same ones in every call of a shared layer."""
        if tensor not in self.owners:
            self.owners[tensor] = self.table.new_owners(count)
        return self.owners[tensor]

    def use_as_weight(self, *tensors: str | None) -> None:
        """Note that a layer has these for its weight and bias: they must serve nothing else."""
        for tensor in tensors:
            if tensor is not None:
                self.weights.add(tensor)
                if tensor in self.elements:
                    self.read_elsewhere[tensor] = "an operator"

    def key(self, node: Node) -> int | None:
        """Hash that names this call in the original network and in a narrowed one alike.

        It is made of the module that runs the node, the operator, and how many such calls that module made before. None
        inside a channel map, which stands for nothing but index arithmetic.
        """
        if node not in self._keys:
            module, is_map = self.module_of(node)
            name = operator_name(node)
            self._counts[module, name] += 1
            self._keys[node] = None if is_map else stable_hash(f"{module}|{name}|{self._counts[module, name]}")
        return self._keys[node]

    def where(self, node: Node) -> str:
        """Words for a node: ``softmax in attention``."""
        module = self.module_of(node)[0]
        return f"{operator_name(node)} in {module or 'forward'}"

    def record(self, event: Event) -> None:
        """Keep the rows of ``event`` that meet a value some channel owns."""
        owned = event.values > 0
        if not owned.all() and event.block is None:
            self.unowned_rows.setdefault((event.tensor, event.dim), set()).update(event.rows[~owned].tolist())
        if owned.any():
            self.events.append(
                Event(
                    event.kind,
                    event.tensor,
                    event.dim,
                    event.rows[owned],
                    event.values[owned],
                    event.silence,
                    event.block,
                )
            )

    def pin(self, value: object, reason: str, *, expose: bool = True) -> None:
        """Pin whatever labels a node (or list of nodes) holds; bare parameters that nothing labelled yet are not."""
        if isinstance(value, Node):
            value = self.values.get(value)
        if isinstance(value, LabelTensor):
            self.table.pin(value.labels, reason, expose=expose)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.pin(item, reason, expose=expose)

    def expose_leaks(self, value: object) -> None:
        """The values of a node leave the private region of their filters: they must be zero once silenced."""
        if isinstance(value, Node):
            value = self.values.get(value)
        if isinstance(value, LabelTensor):
            self.table.expose_leaks(core(value.labels).numpy())
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.expose_leaks(item)

    def collapse(self, labels: Tensor, dims: Sequence[int], node: Node, *, silent: bool = True) -> Tensor:
        """Labels with ``dims`` reduced to size 1: what an operator that treats these positions as one thing reads.

        A channel must be the same along ``dims`` (zeros are neutral); where it is not, everything met is pinned.
        """
        dims = sorted(d % labels.ndim for d in dims)
        small = core(labels)
        varying = [d for d in dims if small.shape[d] > 1]
        if not varying:
            return _shrink(labels, dims)
        kept = [d for d in range(small.ndim) if d not in varying]
        matrix = (
            small.permute(*kept, *varying).reshape(int(np.prod([small.shape[d] for d in kept], initial=1)), -1).numpy()
        )
        rows = np.fromiter((self._one_value(row, node, silent) for row in matrix), dtype=np.int64, count=len(matrix))
        shape = [1 if d in varying else small.shape[d] for d in range(small.ndim)]
        target = [1 if d in dims else labels.shape[d] for d in range(labels.ndim)]
        return torch.from_numpy(rows).reshape(shape).expand(target)

    def _one_value(self, row: Ints, node: Node, silent: bool) -> int:
        table, found = self.table, np.unique(row)
        owned, fixed = found[found > 0], found[found < 0]
        live = owned[table.zero[owned] == 0]
        if len(owned) + len(fixed) == 1:
            return int(found[0])
        if not len(owned):
            return int(fixed[0])
        if len(fixed) or len(np.unique(table.roots(table.owner[live]))) > 1:
            table.pin(row, f"input of {self.where(node)}, which reads several channels as one", expose=not silent)
            table.expose_leaks(row)
            return table.add_fixed(f"computed by {self.where(node)}")
        # One channel in several states (a flatten, a mosaic, zeros beside it): their pattern becomes part of the trail.
        for owner in table.owner[owned[1:]].tolist():
            table.unite(int(table.owner[owned[0]]), owner)
        with np.errstate(over="ignore"):
            trail = mix(table.trail[row], table.slot[row], np.arange(len(row))).sum()
        origins = np.unique(table.origin[live])
        if len(origins) > 1:
            table.expose_leaks(live)
        alone = len(origins) == 1
        values = table.add(
            owner=table.owner[owned[:1]],
            trail=np.asarray([trail]),
            origin=origins if alone else -1,
            leak=table.leak[live].max() if alone else 0,
            zero=int(not len(live)),
        )
        return int(values[0])

    def channels(self, labels: Tensor, dim: int, node: Node) -> Ints:
        """The value of each channel along ``dim``: one per index, everything else collapsed."""
        dim %= labels.ndim
        rest = [d for d in range(labels.ndim) if d != dim]
        return self.collapse(labels, rest, node).reshape(-1).numpy() if rest else labels.numpy()

    def fixed(self, node: Node, reason: str | None = None) -> Value:
        """Output(s) of a node that no channel owns."""
        label = self.table.add_fixed(reason or f"computed by {self.where(node)}")
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return LabelTensor(fixed_labels(value.shape, label))
        if isinstance(value, (list, tuple)):
            return [LabelTensor(fixed_labels(v.shape, label)) if isinstance(v, Tensor) else None for v in value]
        return None


_TRANSPARENT = frozenset({"alias", "detach", "clone", "lift_fresh_copy"})


def operator_name(node: Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``; other functions by their own name."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    namespace, _, name = str(schema.name).partition("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of an ATen call by name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    named.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    named.update(node.kwargs)
    return named


def fixed_labels(shape: Sequence[int], label: int) -> Tensor:
    """Label tensor of values no channel owns; only its literal size says along which dimensions they are equal."""
    return torch.full((), label, dtype=torch.int64).expand(tuple(shape))


def nullified(state: Propagation, node: Node, labels: Tensor) -> Tensor:
    """Labels of zeros in the places of ``labels`` (``x * 0``, ``zeros_like(x)``)."""
    result = state.table.derive(labels, state.key(node))
    values = np.unique(core(result).numpy())
    values = values[values > 0]
    state.table.zero[values], state.table.origin[values], state.table.leak[values] = 1, -1, 0
    return result


def unknown(state: Propagation, node: Node) -> Value:
    """An operator without a rule pins what it reads."""
    known_mixers = {
        "layer_norm",
        "native_layer_norm",
        "group_norm",
        "native_group_norm",
        "matmul",
        "bmm",
        "mm",
        "einsum",
    }
    name = operator_name(node)
    why = "which mixes channels" if name in known_mixers else "an operator the channel graph has no rule for"
    for leaf in node.all_input_nodes:
        state.pin(leaf, f"input of {state.where(node)}, {why}")
        if (tensor := state.parameter_name(leaf)) is not None:
            state.read_elsewhere[tensor] = state.where(node)
    return state.fixed(node)


def moved(state: Propagation, node: Node, labels: Tensor, index: int = 0) -> LabelTensor:
    """Result number ``index`` of a data movement: compressed, with the call added to its trail."""
    key = state.key(node)
    return LabelTensor(state.table.derive(compress(labels), None if key is None else int(mix(key, index))))


def _shrink(labels: Tensor, dims: Sequence[int]) -> Tensor:
    for d in dims:
        labels = labels.narrow(d, 0, 1)
    return labels
