"""Record one forward pass: every ATen call on shapes alone, or on real values where forward reads some."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._decomp import get_decompositions
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.func import functional_call, functionalize
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ..filters import CONVOLUTIONS, all_modules, canonical_name, named_modules, walk_modules, walk_tensors
from .channel_map import ChannelMap
from .errors import ExampleInputsError, TraceError
from .modules import find_tensors, quiet, unchanged, without_compilation
from .record import REPEATS, Node, Opaque, Record, Visit, is_shape_only, live_nodes, meta_like, operator_name
from .shapes import is_dense, meta_results

__all__ = ["MetaRun", "record", "run_on_meta"]

_META = torch.device("meta")
_FOLDED = 1 << 16  # entries of a constant that is computed along
_MUTE = frozenset({torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg})
# Recorded as what they are made of, for which there are rules.
_COMPOSED = get_decompositions([torch.ops.aten.glu.default, torch.ops.aten.unsafe_split.Tensor])
_BATCH_NORM = torch.ops.aten.native_batch_norm.default
_ADDMM = torch.ops.aten.addmm.default
_COPY = torch.ops.aten.copy_.default
_READ = torch.ops.aten._local_scalar_dense.default
_aten = torch.ops.aten
# Views that change a tensor in place, below functionalisation -> what they are recorded as.
_IN_PLACE = {
    _aten.squeeze_.default: _aten.squeeze.default,
    _aten.squeeze_.dim: _aten.squeeze.dim,
    _aten.squeeze_.dims: _aten.squeeze.dims,
    _aten.unsqueeze_.default: _aten.unsqueeze.default,
    _aten.transpose_.default: _aten.transpose.int,
    _aten.t_.default: _aten.t.default,
    _aten.as_strided_.default: _aten.as_strided.default,
}
_EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"})


class _ReadsValuesError(RuntimeError):
    """Forward asks for a value that shapes do not tell."""


# Functionalisation runs an in-place operator once more on meta, in Python for these. Instead they compute what they
# would write, and write it. -> position of the argument ``inplace``.
_ACTIVATIONS = {
    function: list(inspect.signature(function).parameters).index("inplace")
    for function in (F.celu, F.elu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu6, F.selu)
}


def _write_activation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Run an activation with ``inplace=True``; None if that is not what it is called with."""
    position = _ACTIVATIONS[func]
    target = args[0] if args else None
    given = len(args) > position
    if not (args[position] if given else kwargs.get("inplace")) or not isinstance(target, Tensor):
        return None
    if not torch._is_functional_tensor(target) or not target.is_floating_point():
        return None
    if given:
        args = (*args[:position], False, *args[position + 1 :])
    else:
        kwargs = {**kwargs, "inplace": False}
    result = torch._from_functional_tensor(func(*args, **kwargs))
    torch._functionalize_replace(target, result)
    torch._functionalize_commit_update(target)
    torch._functionalize_sync(target)
    return target


class _PlainOperators(TorchFunctionMode):
    """Operators in a form that can be recorded.

    Linear layers are one matrix product for all strides of their input. Fake quantisation runs without its state. Lists
    and arrays of a tensor's values are read entry by entry.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func in _ACTIVATIONS and (written := _write_activation(func, args, kwargs or {})) is not None:
            return written
        if func is torch.fused_moving_avg_obs_fake_quant:
            # It updates its observers behind the back of functionalisation; for channels, rounding is what counts.
            return torch.fake_quantize_per_tensor_affine(args[0], 1.0, 0, -128, 127)
        if func is torch.Tensor.requires_grad_:  # functionalisation refuses it, and nothing is differentiated here
            return args[0]
        if func is torch.Tensor.tolist:
            return _to_list(args[0])
        if func is torch.Tensor.__getitem__ and (part := _sliced(*args)) is not None:
            return part
        if func in _TO_NUMPY and args[0].dtype != torch.bfloat16:
            return np.array(_to_list(args[0]), dtype=str(args[0].dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


# They read the memory of a tensor, which no mode sees; entry by entry, each read is recorded.
_TO_NUMPY = (torch.Tensor.numpy, torch.Tensor.__array__)


def _to_list(tensor: Tensor) -> Any:
    return [_to_list(part) for part in tensor.unbind()] if tensor.ndim else tensor.item()


def _sliced(tensor: Tensor, index: Any) -> Tensor | None:
    """``tensor[:, :height, :width]``, one call per bound; None for other indices.

    Indexing leaves out a bound that is the size itself, which another image exceeds.
    """
    items = index if isinstance(index, tuple) else (index,)
    first = 0
    if items and items[0] is Ellipsis:
        items = items[1:]
        first = tensor.ndim - len(items)
    bounds = [item for item in items if isinstance(item, slice)]
    if len(bounds) < len(items) or not any(type(item.stop) is int for item in bounds):
        return None
    if any(type(n) is not int and n is not None for b in bounds for n in (b.start, b.stop, b.step)):
        return None
    for dim, item in enumerate(bounds, first):
        if item != slice(None):
            tensor = _aten.slice.Tensor(tensor, dim, item.start, item.stop, 1 if item.step is None else item.step)
    return tensor


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim <= 2 or weight.ndim != 2:
        return F.linear(input, weight, bias)
    flat = input.reshape(-1, input.shape[-1])
    result = flat.mm(weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
    return result.reshape(*input.shape[:-1], weight.shape[0])


class _Recorder(TorchDispatchMode):
    """Turns every ATen call into a :class:`Node`. Tensors on meta, unless ``real``.

    Args:
        modules: ``id(module)`` -> canonical path, from the traced submodule on.
        known: ``id(tensor)`` -> name of parameters, buffers and attributes that forward may meet as they are.
        real: compute on values.
    """

    def __init__(self, modules: Mapping[int, str], known: Mapping[int, str], real: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.reads: set[Node] = set()
        self.visits: list[Visit] = []
        self.written: list[tuple[Node, str]] = []
        self.tensors: dict[Node, str] = {}
        self.words: dict[Node, str] = {}
        self.outputs: list[Node] = []
        self.stack: list[tuple[nn.Module, str, int, bool]] = []
        self.asked_for_values = False
        self._modules, self._known, self.real = modules, known, real
        self._by_id: dict[int, tuple[Tensor, Node, Tensor]] = {}  # tensors that came from outside
        self._where: tuple[str, int, bool] = ("", -1, False)
        self._handles: list[Any] = []
        self._results = meta_results()

    # -- modules -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> _Recorder:
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, with_kwargs=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self._modules.get(id(module))
        if path is not None:
            outer, parent, in_map = self._where
            visit = Visit(outer if in_map else path, parent)
            visit.args = self._nodes_in(args)  # brings views up to date, which belongs to the caller
            visit.start = len(self.nodes)
            self.visits.append(visit)
            self.stack.append((module, *self._where))
            self._where = (visit.path, len(self.visits) - 1, in_map or isinstance(module, ChannelMap))

    def _leave(self, module: nn.Module, _: Any, kwargs: Any, output: Any) -> Any:
        if not self.stack or self.stack[-1][0] is not module:
            return None
        visit = self.visits[self._where[1]]
        visit.kwargs, visit.output = self._nodes_in(kwargs), self._nodes_in(output)
        _, path, number, in_map = self.stack.pop()
        self._where = (path, number, in_map)
        if isinstance(output, Tensor) and any(visit.output is given for given in visit.args):
            # Dropout in eval mode, an identity: what it returns is told from what it was given.
            output = torch.ops.aten.alias.default(output)
            visit.output = self._nodes_in(output)
            return output
        return None

    def _nodes_in(self, value: Any) -> Any:
        """``value`` with nodes in the place of tensors."""
        if isinstance(value, Tensor):
            if torch._is_functional_tensor(value):
                torch._functionalize_sync(value)
                value = torch._from_functional_tensor(value)
            return self.node_of(value) or self.outside(value)
        if type(value) in (list, tuple):
            return type(value)(self._nodes_in(item) for item in value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if type(value) is dict:
            return {key: self._nodes_in(item) for key, item in value.items()}
        plain = value is None or isinstance(value, (bool, int, float, str, torch.dtype))
        return value if plain else Opaque(type(value).__name__)

    @contextmanager
    def plain_functions(self) -> Iterator[None]:
        """Run forward of custom autograd functions as it is: functionalisation refuses those that save tensors in it.

        The module that calls one notes its name, because no graph form would keep its gradient.
        """
        apply = Function.__dict__["apply"]

        def run(function: Any, *args: Any, **kwargs: Any) -> Any:
            if not torch._C._are_functorch_transforms_active():  # another thread, not this forward pass
                return apply.__get__(None, function)(*args, **kwargs)
            if self._where[1] >= 0:
                self.visits[self._where[1]].functions.append(function.__name__)
            if function.setup_context is not Function.setup_context:
                return function.forward(*args, **kwargs)
            context = FunctionCtx()
            context.needs_input_grad = (False,) * len(args)  # type: ignore[attr-defined]
            return function.forward(context, *args, **kwargs)

        Function.apply = classmethod(run)
        try:
            yield
        finally:
            Function.apply = apply

    @property
    def place(self) -> str:
        """Path of the module whose forward is running, or was when it failed."""
        return self._where[0]

    # -- tensors -----------------------------------------------------------------------------------------------------

    def add(self, op: Any, value: Any, **details: Any) -> Node:
        """A new node."""
        path, visit, in_map = self._where
        node = Node(f"n{len(self.nodes)}", op, value=value, module=path, visit=visit, in_map=in_map, **details)
        for source in node.inputs:
            source.users.append(node)
        self.nodes.append(node)
        return node

    def attach(self, tensor: Tensor, node: Node) -> None:
        """Remember what a tensor that was made for this record stands for."""
        tensor._recorded = node  # type: ignore[attr-defined]

    def node_of(self, tensor: Tensor) -> Node | None:
        """The node of a tensor that the record knows."""
        node = getattr(tensor, "_recorded", None)
        if node is None and id(tensor) in self._by_id:
            node = self._by_id[id(tensor)][1]
        return node

    def outside(self, tensor: Tensor) -> Node:
        """The node of a tensor that came in by itself: a constant, or a parameter that a module keeps in a list."""
        name = self._known.get(id(tensor))
        stand_in = tensor if self.real else meta_like(tensor)
        if name is not None:
            constant = value_of_buffer(tensor)
            node = self.add("tensor", meta_like(tensor), constant=constant, fixed=constant is not None)
            self.tensors[node] = name
        else:
            small = tensor.numel() <= _FOLDED and not tensor.is_meta
            constant = tensor.detach().cpu() if small else None
            node = self.add("constant", meta_like(tensor), constant=constant, fixed=True)
        self._by_id[id(tensor)] = (tensor, node, stand_in)
        return node

    # -- calls -------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _MUTE:
            return None
        kwargs = kwargs or {}
        if func in _COMPOSED:
            with self:
                return _COMPOSED[func](*args, **kwargs)
        if func is _ADDMM and not kwargs and self._is_computed(args[0]):  # a bias for each of several parts (BEiT)
            with self:
                return _aten.add.Tensor(_aten.mm.default(*args[1:]), args[0])
        if func is _aten.slice_scatter.default and args[0].shape == args[1].shape:
            # Written in place into a slice that is the whole tensor (GhostNet): nothing of the old one is read.
            with self:
                return _aten.alias.default(args[1])
        inputs: dict[Node, None] = {}

        def symbolic(item: Any) -> Any:
            if isinstance(item, Tensor):
                node = self.node_of(item) or self.outside(item)
                inputs[node] = None
                return node
            if isinstance(item, (list, tuple)):
                return [symbolic(part) for part in item]
            return item

        node_args = tuple([symbolic(item) for item in args])
        node_kwargs = {key: symbolic(item) for key, item in kwargs.items()}
        if func is _COPY and isinstance(node_args[0], Node) and node_args[0].op in ("input", "tensor"):
            # What forward wrote in place, handed back at the end: noted, and not done.
            if name := self.tensors.get(node_args[0]):
                self.written.append((node_args[1], name))
            return args[0]
        result = self._run(func, args, kwargs, inputs)
        value = _on_meta(result)
        node = self.add(
            "call",
            value,
            target=_IN_PLACE.get(func, func),
            args=node_args,
            kwargs=node_kwargs,
            inputs=tuple(inputs),
            fixed=_fixed(func, inputs),
        )
        constant = self._fold(func, node) if node.fixed else None
        if isinstance(value, Tensor):
            node.constant = constant
            self.attach(result, node)
        elif isinstance(value, tuple):
            for index, part in enumerate(value):
                if isinstance(part, Tensor):
                    known = constant[index] if constant is not None else None
                    item = self.add("item", part, args=(node, index), inputs=(node,), constant=known, fixed=node.fixed)
                    self.attach(result[index], item)
        if reads_values(func, self.real) and not node.fixed and not _by_numbers(func, args):
            if _if_finite(node) is None:
                self.reads.add(node)
            elif node.visit >= 0:
                self.visits[node.visit].checks = True
        return result

    def _is_computed(self, tensor: Tensor) -> bool:
        """True if a tensor is more than a parameter or buffer in another shape or type."""
        node = self.node_of(tensor)
        while node is not None and node.op == "call" and operator_name(node, raw=True) in REPEATS:
            node = node.inputs[0]
        return node is not None and node.op in ("call", "item")

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Mapping[Node, None]) -> Any:
        if self.real:
            return func(*args, **kwargs)
        if func is _BATCH_NORM and not args[5] and (given := args[0]).is_meta and is_dense(given):
            return meta_like(given), *(torch.empty(0, dtype=given.dtype, device=_META) for _ in range(2))
        if reads_values(func, real=False) and not _by_numbers(func, args):
            sources = [source.constant for source in inputs]
            if func is _READ and (known := _if_finite(next(iter(inputs)))) is not None:
                return known
            if any(source is None for source in sources):
                self.asked_for_values = True
                raise _ReadsValuesError("forward reads the values of tensors")
            args = tuple([self._constant_of(item) for item in args])
            result = func(*args, **kwargs)
            return tree_map(lambda leaf: leaf.to(_META) if isinstance(leaf, Tensor) else leaf, result)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _META}
            kwargs.pop("pin_memory", None)
        elif not inputs and any(a.name == "device" for a in func._schema.arguments):
            kwargs = {**kwargs, "device": _META}
        args = tuple([self._stand_in(item) for item in args])
        if kwargs:
            kwargs = {key: self._stand_in(item) for key, item in kwargs.items()}
        return self._results(func, args, kwargs) if inputs else func(*args, **kwargs)

    def _stand_in(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return item if item.is_meta else self._by_id[id(item)][2]
        if isinstance(item, (list, tuple)):
            return [self._stand_in(part) for part in item]
        return item

    def _constant_of(self, item: Any) -> Any:
        node = self.node_of(item) if isinstance(item, Tensor) else None
        return item if node is None else node.constant

    def _fold(self, func: Any, node: Node) -> Any:
        """The value of a call that depends on constants alone."""
        if any(source.constant is None for source in node.inputs) and not is_shape_only(func):
            return None
        if func._schema.name.rpartition("::")[2] in _EMPTY or reads_values(func, self.real):
            return None
        parts = node.value if isinstance(node.value, tuple) else (node.value,)
        if any(not isinstance(part, Tensor) or part.numel() > _FOLDED for part in parts):
            return None

        def known(item: Any) -> Any:
            if isinstance(item, Node):
                return torch.empty(item.shape, dtype=item.value.dtype) if item.constant is None else item.constant
            if isinstance(item, list):
                return [known(part) for part in item]
            return item

        kwargs = {key: known(item) for key, item in node.kwargs.items() if key != "pin_memory"}
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        try:
            return func(*known(list(node.args)), **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, IndexError):
            return None


def _on_meta(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result if result.is_meta else meta_like(result)
    if isinstance(result, (list, tuple)):
        return tuple([_on_meta(part) for part in result])
    return result


def _fixed(func: Any, inputs: Mapping[Node, None]) -> bool:
    """True if a call depends on constants alone, not on inputs, weights or random numbers."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return all(source.fixed for source in inputs) or is_shape_only(func)


def reads_values(func: Any, real: bool) -> bool:
    """True if a call returns values to Python, or if its number of results depends on values.

    Args:
        func: the operator.
        real: on real tensors, where the operators of other libraries may do so too.
    """
    known = _reading.get((func, real))
    if known is None:
        tags = getattr(func, "tags", ())
        outputs = [str(output.type) for output in func._schema.returns]
        known = (
            torch.Tag.data_dependent_output in tags
            or torch.Tag.dynamic_output_shape in tags
            or any(kind in ("number", "int", "float", "bool") for kind in outputs)
            or (real and func.namespace not in ("aten", "prims", "prim"))
        )
        _reading[func, real] = known
    return known


def _by_numbers(func: Any, args: tuple[Any, ...]) -> bool:
    """True if a call indexes by integers: the shape of the result follows from shapes, unlike with a mask."""
    return func is torch.ops.aten.index.Tensor and all(
        i is None or i.dtype not in (torch.bool, torch.uint8) for i in args[1]
    )


_reading: dict[Any, bool] = {}


def _if_finite(node: Node) -> bool | None:
    """Value of a check for infinite numbers where there are none; None if a node is no such check.

    Such a check decides nothing about channels (``if not torch.isfinite(x).all(): x = x.clamp(...)``).
    """
    if node.op != "call":
        return None
    name = operator_name(node, raw=True)
    if name in ("isinf", "isnan"):
        return False
    if name in ("eq", "ne"):  # a number that is not one differs from itself
        itself = node.args[1] is node.args[0]
        return itself == (name == "eq") if itself or node.args[1] == math.inf else None
    if name not in _CONNECTIVES or (isinstance(node.value, Tensor) and node.value.dtype != torch.bool):
        return None
    parts = [_if_finite(source) for source in node.inputs]
    if not parts or None in parts:
        return None
    if name in ("logical_not", "bitwise_not"):
        return not parts[0]
    return all(parts) if name in ("logical_and", "bitwise_and", "mul") else any(parts)


_CONNECTIVES = frozenset(
    {
        *("any", "all", "logical_or", "bitwise_or", "logical_and", "bitwise_and", "mul"),
        *("logical_not", "bitwise_not", "_local_scalar_dense", "alias", "clone"),
    }
)


def value_of_buffer(tensor: Tensor) -> Tensor | None:
    """Return a copy of a tensor of integers, or of a single untrained number, because forward may index by it or read
    it."""
    fixed = not tensor.is_floating_point() and not tensor.is_complex()
    if tensor.is_meta or tensor.numel() > _FOLDED or isinstance(tensor, nn.Parameter) or not fixed:
        return None
    return tensor.detach().cpu().clone()


# -- one forward pass --------------------------------------------------------------------------------------------------


def record(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    names: Mapping[int, str],
    prefix: str = "",
    *,
    training: bool = False,
) -> Record:
    """Record one forward pass of ``model``, and leave the model as it was.

    Runs on meta tensors: no weight is copied, nothing is computed. Where forward reads a value, it runs on the values.

    Args:
        model: the network, without compilation wrappers around it.
        call: positional and keyword arguments.
        names: ``id(tensor)`` -> name of parameters and buffers.
        prefix: path of ``model`` in the module whose names these are.
        training: record training mode (dropout stays off) instead of eval mode.

    Raises:
        ExampleInputsError: forward fails on these inputs.
        TraceError: forward reads values where there are none, or does what cannot be recorded.
    """
    tensors = [*(tensor for _, tensor in walk_tensors(model)), *find_tensors(call)]
    has_values = not any(tensor.is_meta for tensor in tensors)
    with without_compilation(model):
        recorder, error = _attempt(model, call, names, prefix, training, real=False)
        if error is not None and has_values:
            # Where this fails too, its error is the one that the user knows from calling the network.
            recorder, error = _attempt(model, call, names, prefix, training, real=True)
        if error is not None:
            raise _explain(model, recorder, error, prefix, has_values) from error
    return _record_of(recorder)


def _record_of(recorder: _Recorder) -> Record:
    roots = [*recorder.outputs, *(node for node, _ in recorder.written), *recorder.reads]
    nodes, idle = live_nodes(recorder.nodes, roots)
    return Record(
        tuple(nodes),
        tuple(recorder.outputs),
        tuple(recorder.written),
        recorder.tensors,
        recorder.words,
        frozenset(recorder.reads),
        tuple(recorder.visits),
        idle,
        recorder.real,
    )


class MetaRun(NamedTuple):
    """What came of one forward pass on meta tensors.

    Attributes:
        nodes: everything that forward called, up to where it failed.
        shapes: of the outputs; None if it failed.
        failed_in: path of the module whose forward failed; None if none did.
        record: the record of it; None if it failed.
    """

    nodes: list[Node]
    shapes: tuple[torch.Size, ...] | None
    failed_in: str | None
    record: Record | None = None


def run_on_meta(model: nn.Module, call: Any, names: Mapping[int, str], prefix: str) -> MetaRun:
    """Run forward on meta tensors, as far as it does. Arguments as those of :func:`record`."""
    with without_compilation(model):
        recorder, error = _attempt(model, call, names, prefix, False, real=False)
    if error is not None:
        return MetaRun(recorder.nodes, None, recorder.place)
    shapes = tuple(node.shape for node in recorder.outputs)
    return MetaRun(recorder.nodes, shapes, None, _record_of(recorder))


def _attempt(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    names: Mapping[int, str],
    prefix: str,
    training: bool,
    *,
    real: bool,
) -> tuple[_Recorder, Exception | None]:
    """Run forward once; returns what was recorded, and the exception that ended it."""
    paths = {id(m): _join(prefix, canonical_name(n)) for n, m in reversed(walk_modules(model))}
    # A name may stay long (``Residual.module``); the line before knows the wrappers, which these names leave out.
    paths |= {id(m): _join(prefix, n) for n, m in reversed(named_modules(model).items())}
    recorder = _Recorder(paths, names, real)
    with ExitStack() as stack:
        stack.enter_context(unchanged(model, training=training))
        stack.enter_context(quiet())
        stack.enter_context(torch.no_grad())
        tensors = dict(_outer_tensors(recorder, model, names, real))
        attributes = _attributes(recorder, model, names, paths, real)
        inputs = _inputs(recorder, model, *call, real)

        def run(given: dict[str, Tensor], kept: list[Tensor], call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
            for (module, key, _), tensor in zip(attributes, kept, strict=True):
                module.__dict__[key] = tensor
            before = dict(given)
            outputs = functional_call(model, given, *call, tie_weights=False)
            rewritten = [(key, tensor) for key, tensor in given.items() if tensor is not before[key]]
            written.extend(key for key, _ in rewritten)
            return [tensor for _, tensor in rewritten], list(find_tensors(outputs))

        written: list[str] = []
        canonical = {key: recorder.tensors[_node(tensor)] for key, tensor in tensors.items()}
        stack.enter_context(recorder)
        stack.enter_context(recorder.plain_functions())
        stack.enter_context(_PlainOperators())
        try:
            rewritten, outputs = functionalize(run)(tensors, [tensor for *_, tensor in attributes], inputs)
        except Exception as error:
            return recorder, error
        recorder.outputs = [recorder.node_of(tensor) or recorder.outside(tensor) for tensor in outputs]
        for key, tensor in zip(written, rewritten, strict=True):
            recorder.written.append((recorder.node_of(tensor) or recorder.outside(tensor), canonical[key]))
    return recorder, None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _node(tensor: Tensor) -> Node:
    return tensor._recorded  # type: ignore[attr-defined, no-any-return]


def _stand_in(tensor: Tensor, real: bool, *, copied: bool = False) -> Tensor:
    """Return the tensor that replaces a tensor of the model in forward."""
    if not real:
        return meta_like(tensor)
    return tensor.detach().clone() if copied else tensor.detach().view_as(tensor)


def _outer_tensors(
    recorder: _Recorder, model: nn.Module, names: Mapping[int, str], real: bool
) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the names that functional_call wants; a shared one is the same stand-in."""
    known: dict[int, Tensor] = {}
    for name, tensor in walk_tensors(model):
        if id(tensor) not in known:
            stand_in = known[id(tensor)] = _stand_in(tensor, real, copied=not isinstance(tensor, nn.Parameter))
            constant = value_of_buffer(tensor)
            node = recorder.add("tensor", meta_like(tensor), constant=constant, fixed=constant is not None)
            recorder.tensors[node] = names[id(tensor)]
            recorder.attach(stand_in, node)
        yield name, known[id(tensor)]


def _attributes(
    recorder: _Recorder, model: nn.Module, names: Mapping[int, str], paths: Mapping[int, str], real: bool
) -> list[tuple[nn.Module, str, Tensor]]:
    """Tensors that modules keep as plain attributes: constants, unless they are parameters or a hook computes them."""
    attributes = []
    for module in all_modules(model):
        for key, tensor in list(vars(module).items()):
            if isinstance(tensor, Tensor) and key != "example_input_array":
                stand_in = _stand_in(tensor, real, copied=True)
                if id(tensor) in names:
                    node = recorder.add("tensor", meta_like(tensor))
                    recorder.tensors[node] = names[id(tensor)]
                else:
                    small = tensor.numel() <= _FOLDED and not tensor.is_meta
                    constant = tensor.detach().cpu().clone() if small else None
                    node = recorder.add("constant", meta_like(tensor), constant=constant, fixed=True)
                    recorder.words[node] = f"tensor attribute {_join(paths[id(module)], key)}"
                recorder.attach(stand_in, node)
                attributes.append((module, key, stand_in))
    return attributes


def _inputs(
    recorder: _Recorder, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], real: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of forward, each tensor with a node of its own."""
    try:
        words = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        words = []

    def enter(name: str, value: Any) -> Any:
        def one(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            stand_in = _stand_in(leaf, real, copied=True)
            node = recorder.add("input", meta_like(leaf))
            recorder.words[node] = f"network input {name!r}"
            recorder.attach(stand_in, node)
            return stand_in

        return tree_map(one, value)

    named = [words[i] if i < len(words) else f"args_{i}" for i in range(len(args))]
    return tuple(enter(n, a) for n, a in zip(named, args, strict=True)), {k: enter(k, v) for k, v in kwargs.items()}


def _explain(model: nn.Module, recorder: _Recorder, error: Exception, prefix: str, has_values: bool) -> Exception:
    """Our error for an exception in forward: which part failed, and what to do."""
    path = recorder.place
    local = path.removeprefix(prefix).removeprefix(".")
    inner = recorder.stack[-1][0] if recorder.stack else model
    part = f"submodule {path!r} ({type(inner).__name__})" if local else f"{type(model).__name__}.forward"
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    first_line = first_line.removesuffix(", but expected one of:")  # the lines after it
    if recorder.asked_for_values and not has_values:
        return TraceError(
            f"{part} cannot be traced on meta: its control flow or its shapes depend on the values of tensors. Trace "
            f"the network on a device with values, or a submodule without it, for instance "
            f"network={_other_part(model, local)!r}"
        )
    if isinstance(error, StopIteration):
        return TraceError(
            f"{part} cannot be traced: it ran out of items (StopIteration). Give every next() in it a default, or "
            f"trace a submodule without it, for instance network={_other_part(model, local)!r}"
        )
    if isinstance(error, (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError)):
        return ExampleInputsError(f"{part} does not accept the example inputs: {first_line}")
    return TraceError(
        f"{part} cannot be traced: {type(error).__name__}: {first_line}. Trace a submodule that can, for instance "
        f"network={_other_part(model, local)!r}"
    )


def _other_part(model: nn.Module, local: str) -> str:
    """A child with convolutions that is not the part at ``local``."""
    for name, child in model.named_children():
        name = canonical_name(name)
        if any(isinstance(m, CONVOLUTIONS) for m in child.modules()) and f"{local}.".partition(".")[0] != name:
            return name
    return "backbone"
