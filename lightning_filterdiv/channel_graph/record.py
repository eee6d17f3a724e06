"""The record of one forward pass: a list of nodes, one per input, parameter, constant and ATen call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

__all__ = [
    "REPEATS",
    "TRANSPARENT",
    "Node",
    "Opaque",
    "Record",
    "Visit",
    "arguments",
    "is_shape_only",
    "live_nodes",
    "macs_of",
    "map_nodes",
    "meta_like",
    "operator_name",
]

#: Operators whose result is their input, as it is or in another type.
TRANSPARENT = frozenset({"alias", "detach", "clone", "lift_fresh", "lift_fresh_copy", "_to_copy"})
#: Those too that give it another shape or repeat it, in order.
REPEATS = TRANSPARENT | {"repeat", "view", "reshape", "expand", "unsqueeze", "squeeze", "_unsafe_view"}

# Names of ATen's inner operators, and what people call them.
_WORDS = {
    "mm": "matmul",
    "bmm": "matmul",
    "addmm": "matmul",
    "addbmm": "matmul",
    "baddbmm": "matmul",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "_unsafe_view": "view",
    "_local_scalar_dense": "item",
    "_weight_norm_interface": "weight_norm",
    "_prelu_kernel": "prelu",
    "_to_copy": "to",
    "constant_pad_nd": "pad",
    "max_pool2d_with_indices": "max_pool2d",
    "max_pool3d_with_indices": "max_pool3d",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_dropout": "dropout",
    "native_channel_shuffle": "channel_shuffle",
}


@dataclass(eq=False, slots=True)
class Node:
    """One step of the record.

    Attributes:
        name: unique within the record.
        op: ``input`` (argument of forward), ``tensor`` (parameter, buffer or tensor attribute), ``constant`` (made in
            forward), ``call`` (operator), ``item`` (one of several results of a call).
        target: the operator of a call.
        args: its arguments, with nodes in the place of tensors; of an ``item`` (call, index).
        kwargs: keyword arguments, likewise.
        value: the result on meta (shape, dtype, strides): a tensor, a tuple of tensors, or a plain number.
        module: canonical path of the module that runs the call, from the traced submodule on.
        visit: number of the module call it belongs to, -1 outside of all modules.
        in_map: the call belongs to a :class:`ChannelMap`, which stands for index arithmetic only.
        constant: the value itself where it is ``fixed`` and small.
        fixed: it depends on no input, no weight and no random number.
        inputs: the nodes that it reads, each once.
        users: the nodes that read it.
    """

    name: str
    op: Literal["input", "tensor", "constant", "call", "item"]
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    value: Any = None
    module: str = ""
    visit: int = -1
    in_map: bool = False
    constant: Any = None
    fixed: bool = False
    inputs: tuple[Node, ...] = ()
    users: list[Node] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        """Shape of a single result."""
        return torch.Size(self.value.shape)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Opaque:
    """Placeholder in a :class:`Visit` for an argument that is no tensor, container or plain value."""

    kind: str


@dataclass(eq=False, slots=True)
class Visit:
    """One call of a module.

    Attributes:
        path: canonical path, from the traced submodule on; inside of a channel map, that of the map's module.
        parent: number of the call that it was made in, -1 for the first one.
        start: number of nodes that were recorded before it.
        args: positional arguments, with nodes in the place of tensors and :class:`Opaque` in that of other objects.
        kwargs: keyword arguments, likewise.
        output: the result, likewise; ``Opaque("nothing")`` if the call did not return.
        functions: names of the custom autograd functions that forward called itself.
        checks: forward itself asked whether a tensor is finite.
    """

    path: str
    parent: int
    start: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = Opaque("nothing")
    functions: list[str] = field(default_factory=list)
    checks: bool = False


@dataclass(frozen=True)
class Record:
    """One forward pass.

    Attributes:
        nodes: those that the outputs, written buffers or read values depend on, in order of execution; also layers
            that forward calls for nothing, and what it does with their results: they must fit, too.
        outputs: nodes of the network's outputs.
        written: (node, name) of buffers and attributes that forward wrote.
        tensors: node of a parameter, buffer or attribute -> its name in the traced submodule.
        words: node of an argument -> what it is (``network input 'x'``).
        reads: nodes whose values forward read (``.item()``, ``nonzero``), where they depend on more than constants.
        visits: the module calls, by their number.
        idle: those of ``nodes`` that no output depends on.
        real: forward ran on values, because it does not run on shapes alone.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    written: tuple[tuple[Node, str], ...]
    tensors: dict[Node, str]
    words: dict[Node, str]
    reads: frozenset[Node]
    visits: tuple[Visit, ...]
    idle: frozenset[Node] = frozenset()
    real: bool = False

    @property
    def calls(self) -> Iterator[Node]:
        """The operator calls."""
        return (node for node in self.nodes if node.op == "call")

    def inside(self, node: Node, path: str) -> int | None:
        """Number of the outermost call of the module at ``path`` that ``node`` belongs to; None: it is not inside."""
        visit, found = node.visit, None
        while visit >= 0:
            if self.visits[visit].path == path:
                found = visit
            visit = self.visits[visit].parent
        return found


def map_nodes(value: Any, function: Callable[[Node], Any]) -> Any:
    """``value`` with ``function`` applied to every node in it."""
    if isinstance(value, Node):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_nodes(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_nodes(item, function) for key, item in value.items()}
    return value


_names: dict[Any, str] = {}
_raw_names: dict[Any, str] = {}


def operator_name(node: Node, *, raw: bool = False) -> str:
    """``conv2d`` for ``aten.convolution.default`` in two dimensions; operators of other libraries with their namespace.

    Args:
        node: a call.
        raw: ATen's own name (``native_layer_norm``) instead of the usual one (``layer_norm``).
    """
    name = _raw_names.get(node.target)
    if name == "convolution" and not raw:
        call = arguments(node)
        return f"conv{'_transpose' if call['transposed'] else ''}{len(call['stride'])}d"
    if name is None:
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            name = str(getattr(node.target, "__name__", node.target))
        else:
            namespace, _, short = str(schema.name).partition("::")
            name = short if namespace == "aten" else f"{namespace}.{short}"
        _raw_names[node.target] = name
        _names[node.target] = _WORDS.get(name, name)
        return operator_name(node, raw=raw)
    return name if raw else _names[node.target]


_defaults: dict[Any, tuple[tuple[str, ...], dict[str, Any]]] = {}


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call by name, defaults filled in."""
    known = _defaults.get(node.target)
    if known is None:
        schema = node.target._schema
        named = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        known = _defaults[node.target] = tuple(a.name for a in schema.arguments), named
    names, defaults = known
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


@cache
def is_shape_only(func: Any) -> bool:
    """``zeros_like`` and the like: their tensor argument gives no more than a shape and a type."""
    name = func._schema.name.rpartition("::")[2]
    return bool(name.endswith("_like") or name.startswith("new_"))


def macs_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Multiply-accumulate operations of a call, as torch counts them; 0 for all but convolutions and products.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: keyword arguments.
        result: what it returned.
    """
    formula = flop_registry.get(getattr(func, "_overloadpacket", None))
    if formula is None:
        return 0
    # Torch wraps its formulas of shapes in one of tensors, which takes several times as long.
    of_shapes = getattr(formula, "__wrapped__", None)
    if of_shapes is None:
        return int(formula(*args, **kwargs, out_val=result)) // 2
    named = {key: _shapes(value) for key, value in kwargs.items()}
    return int(of_shapes(*map(_shapes, args), **named, out_shape=_shapes(result))) // 2


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    return type(value)(map(_shapes, value)) if type(value) in (list, tuple) else value


def live_nodes(nodes: Sequence[Node], roots: Sequence[Node]) -> tuple[list[Node], frozenset[Node]]:
    """The nodes that ``roots`` depend on or that layers without a use are called with, in order; and the latter."""
    alive = set(roots)
    for node in reversed(nodes):
        if node in alive:
            alive.update(node.inputs)
    idle: set[Node] = set()
    for node in nodes:
        if node not in alive and (_is_layer(node) or not idle.isdisjoint(node.inputs)):
            idle.add(node)
    if idle:
        for node in reversed(nodes):
            if node in idle:
                idle.update(node.inputs)
        idle -= alive
    return [node for node in nodes if node in alive or node in idle], frozenset(idle)


def _is_layer(node: Node) -> bool:
    if node.op != "call":
        return False
    name = operator_name(node, raw=True)
    return name in _LAYERS or "batch_norm" in name


_LAYERS = ("convolution", "mm", "addmm", "native_layer_norm", "native_group_norm", "_prelu_kernel")


def meta_like(tensor: Tensor) -> Tensor:
    """Shape, strides and dtype of ``tensor`` on meta."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
