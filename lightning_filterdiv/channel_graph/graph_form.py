"""Write a forward body that fixes widths as a graph for fewer channels.

A position of a tensor remains if its channel does, which its labels tell. Most operators work at any width. Operators
with positions or sizes (slices, splits, shapes, padding) get new ones. A data movement whose intermediate results are
not rectangular at the new widths (an uneven channel shuffle) becomes one index.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..filters import named_modules, named_tensors
from .counted import CountedReduction
from .errors import GraphFormError
from .graph_body import CONSTANT, GraphBody
from .labels import Ints
from .record import Node, Opaque, Visit, arguments, operator_name
from .samples import Alignment, nodes_in

__all__ = ["BodyGraph", "Kept", "Mask", "RaggedError", "is_movement", "kept_positions", "move", "write_body"]

aten = torch.ops.aten
#: For each dimension of a tensor the positions that remain, None for all.
Kept = list[Ints | None]
Mask = npt.NDArray[np.bool_]

_SHAPED = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"})
_ALONG = frozenset(
    {"slice", "select", "narrow", "index_select", "roll", "flip", "index", "channel_shuffle", "native_channel_shuffle"}
)
_PARTS = frozenset({"split", "split_with_sizes", "chunk", "tensor_split", "unbind"})
_JOINS = frozenset({"cat", "stack"})
_TURNS = frozenset({"transpose", "permute", "t", "movedim", "unsqueeze", "squeeze", "clone", "alias", "detach"})
_MOVES = _SHAPED | _ALONG | _PARTS | _JOINS | _TURNS
_SIZED = frozenset({"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "expand"})
_FOLLOWS = frozenset(
    {
        *("_to_copy", "to", "contiguous", "lift_fresh", "lift_fresh_copy", "native_dropout", "mean", "sum"),
        *("amax", "amin", "max", "min", "var", "std", "var_mean", "softmax", "_softmax", "log_softmax", "mm", "addmm"),
        *("_log_softmax", "logsumexp", "cumsum", "linalg_vector_norm", "norm", "bmm", "native_batch_norm", "prelu"),
        *("_prelu_kernel", "zeros_like", "ones_like", "full_like", "pad", "unfold", "im2col", "col2im"),
    }
)
_SPATIAL = ("avg_pool", "max_pool", "adaptive_", "_adaptive_", "upsample_", "_upsample_", "reflection_", "replication_")


class RaggedError(Exception):
    """The remaining positions of a tensor are not rectangular."""


Written = tuple[fx.Graph, dict[str, Tensor | nn.Module]]


@dataclass
class BodyGraph:
    """A body in graph form.

    Attributes:
        path: path of the module that it replaces.
        write: makes the graph anew, and what it reads and calls besides its own, by name.
        first: the graph that showed that it can be written, for the first network that takes it.
    """

    path: str
    write: Callable[[], Written]
    first: Written | None = None

    def install(self, model: nn.Module) -> nn.Module:
        """Put it into ``model``; returns ``model``, or what takes its place if the path is its own."""
        modules = named_modules(model)
        old = modules[self.path]
        (graph, constants), self.first = self.first or self.write(), None
        tensors = [*old.parameters(), *old.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        new = GraphBody(old, graph, {name: copy.deepcopy(value).to(device) for name, value in constants.items()})
        if old is model:
            return new
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is old and parent is not new:
                    parent._modules[name] = new
        return model


class Writer:
    """Writes one body.

    Args:
        path: path of the body.
        model: the original network.
        aligned: its calls.
        mask: node of the first sample -> which of its positions remain, constant dimensions of size one.
        counted: reductions over channels -> what takes their place.
    """

    def __init__(
        self,
        path: str,
        model: nn.Module,
        aligned: Alignment,
        mask: Callable[[Node], Mask],
        counted: Mapping[Node, CountedReduction],
    ) -> None:
        self._path, self._aligned, self._mask, self._counted = path, aligned, mask, counted
        body = named_modules(model)[path]
        self._signature = inspect.signature(body.forward)
        self._tensors = {id(t): n for n, t in reversed([*body.named_parameters(remove_duplicate=False),
                                                        *body.named_buffers(remove_duplicate=False)])}  # fmt: skip
        self._children = {id(m): n for n, m in reversed(list(body.named_modules(remove_duplicate=False)))}
        self._named_tensors, self._modules = named_tensors(model), named_modules(model)
        self._kept: dict[Node, Kept] = {}
        self._ragged: set[Node] = set()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor | nn.Module] = {}
        self._env: dict[Node, fx.Node] = {}
        self._numbers: list[tuple[tuple[int, ...], Callable[[], fx.Node]]] = []
        self._made: dict[int, fx.Node] = {}
        self._first: fx.Node | None = None

    def write(self, names: dict[Node, str]) -> tuple[fx.Graph, dict[str, Tensor | nn.Module]]:
        """The graph, and its constants and new modules by name.

        Args:
            names: node of a parameter or buffer -> its name.
        """
        self._names = names
        self._inputs()
        for step in self._aligned.first.steps:
            if isinstance(step, Visit):
                self._child(step)
            else:
                self._own(step)
        result = self._value(self._aligned.first.visit.output, self._twins(lambda s: s.visit.output))
        if self._aligned.copies_result:
            result = fx.map_arg(result, lambda part: self.graph.call_method("contiguous", (part,)))
        self.graph.output(result)
        self.graph.eliminate_dead_code(_is_impure)
        self.graph.lint()
        return self.graph, self.constants

    # -- what is around it -------------------------------------------------------------------------------------------

    def _twins(self, of: Callable[[Any], Any]) -> list[Any]:
        return [of(other) for other in self._aligned.others]

    def _inputs(self) -> None:
        visit = self._aligned.first.visit
        try:
            bound = self._signature.bind(*visit.args, **visit.kwargs).arguments
        except TypeError as error:
            raise GraphFormError(f"forward is called in a way that its signature does not show ({error})") from error
        others = [self._signature.bind(*o.visit.args, **o.visit.kwargs).arguments for o in self._aligned.others]
        for name, parameter in self._signature.parameters.items():
            if parameter.kind == parameter.VAR_POSITIONAL and bound.get(name):
                raise GraphFormError(f"forward takes any number of arguments (*{name})")
            if parameter.kind == parameter.VAR_KEYWORD:
                for key, value in bound.get(name, {}).items():  # the graph takes those that it is called with
                    placeholder = self.graph.placeholder(key, default_value=None)
                    self._given(placeholder, value, [other.get(name, {}).get(key) for other in others], None, key)
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            default = parameter.default
            placeholder = self.graph.placeholder(name, default_value=default)
            if name in bound:
                self._given(placeholder, bound[name], [other.get(name) for other in others], default, name)

    def _given(self, at: fx.Node, value: Any, others: Sequence[Any], default: Any, name: str) -> None:
        """Name the tensors and integers in an argument, or in the result of a submodule."""
        if isinstance(value, Node):
            self._define(value, at)
        elif isinstance(value, (list, tuple, dict)):
            for key in value if isinstance(value, dict) else range(len(value)):
                if any(isinstance(part, Node) or type(part) is int for part in _leaves(value[key])):
                    part = self.graph.call_function(operator.getitem, (at, key))
                    self._given(part, value[key], [other[key] for other in others], None, name)
        elif type(value) is int:
            self._numbers.append(((value, *others), lambda: at))
        elif value is not None and value is not default and value != default:
            raise GraphFormError(f"forward is called with {name}={value!r}")

    def _define(self, node: Node, at: fx.Node) -> None:
        if self._first is None:
            self._first = at
        self._env[node] = at
        kept = self.kept(node)
        for dim in range(len(kept)):
            if kept[dim] is None:
                self._numbers.append((self._aligned.sizes(node, dim), lambda d=dim: self._size(at, d)))  # type: ignore[misc]

    def _size(self, at: fx.Node, dim: int) -> fx.Node:
        return self.graph.call_method("size", (at, dim))

    def _child(self, visit: Visit) -> None:
        module = self._modules.get(visit.path)
        name = self._children.get(id(module))
        if not name:
            raise GraphFormError(f"forward calls {visit.path!r}, which is no submodule of it")
        if any(isinstance(part, Opaque) for part in _leaves([visit.args, visit.kwargs, visit.output])):
            raise GraphFormError(f"forward hands an object to {visit.path!r}, or gets one from it")
        others = list(zip(*(o.steps for o in self._aligned.others), strict=True))
        twins = next((t for f, t in zip(self._aligned.first.steps, others, strict=True) if f is visit), ())
        args = self._value(visit.args, [t.args for t in twins])
        kwargs = self._value(visit.kwargs, [t.kwargs for t in twins])
        call = self.graph.call_module(name, tuple(args), kwargs)
        self._given(call, visit.output, [t.output for t in twins], None, visit.path)

    # -- values ------------------------------------------------------------------------------------------------------

    def kept(self, node: Node) -> Kept:
        """Return the remaining positions of a tensor.

        Raises:
            RaggedError: not a rectangle.
        """
        if node not in self._kept:
            self._kept[node] = kept_positions(self._mask(node), node.shape)
        return self._kept[node]

    def _narrowed(self, node: Node) -> bool:
        return not bool(self._mask(node).all())

    def _value(self, value: Any, others: Sequence[Any]) -> Any:
        """Return an argument for the graph. Integers that differ between samples become formulas."""
        if isinstance(value, Node):
            return self._tensor(value)
        if isinstance(value, (list, tuple)):
            parts = [self._value(item, [other[i] for other in others]) for i, item in enumerate(value)]
            return tuple(parts) if isinstance(value, tuple) else parts
        if isinstance(value, dict):
            return {key: self._value(item, [other[key] for other in others]) for key, item in value.items()}
        if type(value) is int:
            return self._number(value, others)
        return value

    def _number(self, value: int, others: Sequence[int]) -> Any:
        if all(other == value for other in others):
            return value
        wanted = (value, *others)
        for sizes, make in self._numbers:
            if sizes == wanted:
                return make()
        for sizes, make in self._numbers:
            if 0 in sizes:
                continue
            factor, divisor = value // sizes[0], sizes[0] // value if value > 0 else 0
            if factor > 1 and all(v == factor * s for v, s in zip(wanted, sizes, strict=True)):
                return self.graph.call_function(operator.mul, (make(), factor))
            if divisor > 1 and all(v == s // divisor for v, s in zip(wanted, sizes, strict=True)):
                return self.graph.call_function(operator.floordiv, (make(), divisor))
            if all(v == -s for v, s in zip(wanted, sizes, strict=True)):
                return self.graph.call_function(operator.neg, (make(),))
            for offset in (-1, 1):  # the last position, a border
                if all(v == s + offset for v, s in zip(wanted, sizes, strict=True)):
                    return self.graph.call_function(operator.add, (make(), offset))
        for i, (sizes, make) in enumerate(self._numbers):
            for more, other in self._numbers[i:]:
                if all(v == a * b for v, a, b in zip(wanted, sizes, more, strict=True)):
                    return self.graph.call_function(operator.mul, (make(), other()))
        for many, make in self._numbers:
            for few, other in self._numbers:  # items of the batch, where each was cut into windows
                if 0 not in few and all(v * b == a for v, a, b in zip(wanted, many, few, strict=True)):
                    return self.graph.call_function(operator.floordiv, (make(), other()))
        if min(wanted) >= 0:
            literals = self._literals()
            for sizes, make in self._numbers:  # padding up to whole windows
                fits = {
                    m for m in literals if all(v < m and not (s + v) % m for v, s in zip(wanted, sizes, strict=True))
                }
                if len(fits) == 1:
                    return self.graph.call_function(
                        operator.mod, (self.graph.call_function(operator.neg, (make(),)), *fits)
                    )
        elsewhere = ", ".join(map(str, others))
        raise GraphFormError(
            f"forward computes a number ({value}, at other sizes {elsewhere}) that follows from no shape of its tensors"
        )

    def _literals(self) -> set[int]:
        """Numbers that forward itself writes into shapes, the same in every sample: sizes of windows are among them."""
        found: set[int] = set()
        for step in self._aligned.first.steps:
            if isinstance(step, Node) and step.op == "call" and operator_name(step, raw=True) in _SHAPED:
                twins = [twin[step].args[1] for twin in self._aligned.twins if step in twin]
                found |= {n for n, *others in zip(step.args[1], *twins, strict=False) if n > 1 and set(others) == {n}}
        return found

    def _tensor(self, node: Node) -> fx.Node:
        while node in self._aligned.first.copies:
            node = self._aligned.first.copies[node]
        node = self._aligned.first.same.get(node, node)
        if node in self._env:
            return self._env[node]
        if node in self._ragged or node.op in ("call", "item"):
            raise GraphFormError(f"{_name(node)} has no rectangular shape at these widths")
        if node.op == "tensor":
            tensor = self._named_tensors.get(self._names.get(node, ""))
            name = self._tensors.get(id(tensor))
            if name is None:
                raise GraphFormError(f"forward reads {self._names.get(node, 'a tensor')}, which is no tensor of it")
            made = self._attribute(name)
        elif node.op == "constant" and node.constant is not None:
            made = self._constant(node.constant)
        else:
            raise GraphFormError("forward reads a tensor from outside, or a large constant")
        self._env[node] = made
        return made

    def _constant(self, value: Tensor) -> fx.Node:
        return self._attribute(self._named(value.detach().cpu().clone()))

    def _named(self, value: Tensor | nn.Module) -> str:
        """A new name for ``value``."""
        taken = {*self._tensors.values(), *self._children.values(), *self.constants}
        name = next(name for i in itertools.count() if (name := f"{CONSTANT}{i}") not in taken)
        self.constants[name] = value
        return name

    def _attribute(self, name: str) -> fx.Node:
        return self.graph.create_node("get_attr", name)  # get_attr() would ask a module that owns the graph

    # -- operators ---------------------------------------------------------------------------------------------------

    def _own(self, node: Node) -> None:
        if node.op == "call" and isinstance(node.value, tuple) and operator_name(node, raw=True) in _PARTS:
            return  # each part by itself
        if node.op == "call" and operator_name(node, raw=True) == "alias" and node.inputs[0] not in self._ragged:
            self._env[node] = self._tensor(node.inputs[0])
            return
        if not isinstance(node.value, Tensor) and node.op == "item":
            return
        parent = node.args[0] if node.op == "item" else node
        try:
            if isinstance(node.value, Tensor):
                self.kept(node)
        except RaggedError:
            if operator_name(parent, raw=True) not in _MOVES:
                raise GraphFormError(
                    f"{operator_name(parent)} would act on parts of unequal width; keep equally many channels in each"
                ) from None
            self._ragged.add(node)
            return
        if node in self._counted:
            factors = node.args[:2] if self._counted[node].kind == "product" else node.args[:1]
            made = self.graph.call_module(self._named(self._counted[node]), tuple(map(self._tensor, factors)))
        elif node.op == "item":
            made = self._item(node, parent)
        elif any(source in self._ragged for source in node.inputs):
            made = self._indexed(node)
        else:
            made = self._call(node)
        if isinstance(node.value, Tensor):
            self._define(node, made)
        else:
            self._env[node] = made

    def _item(self, node: Node, parent: Node) -> fx.Node:
        if parent in self._counted:  # of values and indices, the former
            return self._env[parent]
        if operator_name(parent, raw=True) not in _PARTS:
            return self.graph.call_function(operator.getitem, (self._env[parent], node.args[1]))
        if parent.args[0] in self._ragged:
            return self._indexed(node)
        dim = self._moved_dim(parent)
        if dim is not None:
            return self._along(node, parent.args[0], dim)
        if operator_name(parent, raw=True) == "unbind":
            axis = arguments(parent)["dim"] % len(parent.args[0].shape)
            return self.graph.call_function(aten.select.int, (self._tensor(parent.args[0]), axis, node.args[1]))
        if parent not in self._env:
            self._env[parent] = self._same(parent)
        return self.graph.call_function(operator.getitem, (self._env[parent], node.args[1]))

    def _moved_dim(self, node: Node) -> int | None:
        """The dimension along which a movement picks positions, if channels of it are gone."""
        call, source = arguments(node), node.args[0]
        name = operator_name(node, raw=True)
        if name in ("channel_shuffle", "native_channel_shuffle"):
            dims = [1]
        elif name == "index":
            dims = [d for d, i in enumerate(call["indices"]) if i is not None]
        else:
            given = call.get("dim", call.get("dims", 0))
            dims = [given] if isinstance(given, int) else list(given or range(len(source.shape)))
        kept = self.kept(source)
        hit = [d % len(kept) for d in dims if kept[d % len(kept)] is not None]
        if len(hit) > 1:
            raise GraphFormError(f"{operator_name(node)} moves channels along several dimensions")
        return hit[0] if hit else None

    def _call(self, node: Node) -> fx.Node:
        name = operator_name(node, raw=True)
        if name in _SHAPED:
            return self._reshape(node)
        if name == "expand" or not (self._narrowed(node) or any(map(self._narrowed, _tensors_of(node)))):
            return self._sized(node) if name in _SIZED else self._same(node)
        if name in _ALONG:
            dim = self._moved_dim(node)
            return self._same(node) if dim is None else self._along(node, node.args[0], dim)
        if name in _SIZED:
            return self._sized(node)
        if name == "squeeze":
            dims = [d for d, n in enumerate(node.args[0].shape) if n == 1] if len(node.args) == 1 else node.args[1]
            dims = [dims] if isinstance(dims, int) else dims
            return self.graph.call_function(aten.squeeze.dims, (self._tensor(node.args[0]), dims))
        if name == "constant_pad_nd":
            return self._pad(node)
        if name == "copy":
            return self._copy(node)
        if name == "as_strided" and node.shape == node.args[0].shape:
            return self._tensor(node.args[0])  # memory of channels-last pooling
        if name == "pixel_shuffle" and self._whole_mosaics(node):
            return self._same(node)
        if name == "select_scatter" and self.kept(node)[node.args[2] % len(node.shape)] is None:
            return self._same(node)
        if name == "slice_scatter":
            return self._scatter(node)
        if name == "convolution":
            return self._convolution(node)
        if name == "repeat":
            dims = [d for d, k in enumerate(self.kept(node)) if k is not None]
            if len(node.args[1]) == len(node.args[0].shape) and all(node.args[1][d] == 1 for d in dims):
                return self._same(node)
            if len(dims) == 1 and all(n == 1 for d, n in enumerate(node.args[1]) if d != dims[0]):
                return self._along(node, node.args[0], dims[0])
        follows = name in _FOLLOWS or name in _JOINS or name in _TURNS or name.startswith(_SPATIAL)
        if follows or torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self._same(node)
        raise GraphFormError(f"{operator_name(node)} may depend on how many channels there are")

    def _whole_mosaics(self, node: Node) -> bool:
        """True if every output channel of a pixel shuffle keeps all its input channels, or none."""
        before, after = self.kept(node.args[0])[-3], self.kept(node)[-3]
        each = node.args[1] ** 2
        if before is None or after is None:
            return before is after
        return np.array_equal(before, (after[:, None] * each + np.arange(each)).reshape(-1))

    def _other_calls(self, node: Node) -> list[Node]:
        return [twin[node] for twin in self._aligned.twins]

    def _same(self, node: Node) -> fx.Node:
        """The call as it was."""
        others = self._other_calls(node)
        args = self._value(node.args, [other.args for other in others])
        kwargs = self._value(node.kwargs, [other.kwargs for other in others])
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            args = tuple(self._fitting(a, given, node) for a, given in zip(args, node.args, strict=True))
        if kwargs.get("device") is not None and self._first is not None:
            kwargs["device"] = self.graph.call_function(getattr, (self._first, "device"))
            if operator_name(node, raw=True) != "_to_copy" and kwargs.get("dtype") == self._float_type():
                kwargs["dtype"] = self.graph.call_function(getattr, (self._first, "dtype"))
            kwargs.pop("pin_memory", None)
        return self.graph.call_function(node.target, args, kwargs)

    def _float_type(self) -> Any:
        first = next(iter(nodes_in([self._aligned.first.visit.args, self._aligned.first.visit.kwargs])), None)
        return first.value.dtype if first is not None and first.value.dtype.is_floating_point else None

    def _fitting(self, made: Any, node: Any, result: Node) -> Any:
        """Return an operand without the positions that its partner lost, because constants for every channel have no
        owner."""
        if not isinstance(node, Node) or not isinstance(node.value, Tensor):
            return made
        kept = self.kept(result)
        narrowed = {dim for dim in range(-len(kept), 0) if kept[dim] is not None}
        while node.op == "call" and operator_name(node, raw=True) == "expand" and narrowed:
            source = node.args[0]
            if self._narrowed(source) or any(d >= -len(source.shape) and source.shape[d] != 1 for d in narrowed):
                break
            node, made = source, self._tensor(source)  # it broadcasts, whatever the width
        own = self.kept(node)
        for dim in range(1, len(own) + 1):
            lost = kept[-dim]
            if lost is not None and own[-dim] is None and node.shape[-dim] == result.shape[-dim]:
                made = self._select(made, len(own) - dim, lost, node.shape[-dim])
        return made

    def _select(self, source: fx.Node, dim: int, index: Ints, size: int) -> fx.Node:
        """``index`` of ``source`` along ``dim``: a slice where it is one."""
        if len(index) == size and (index == np.arange(size)).all():
            return source
        if len(index) and (np.diff(index) == 1).all():
            bounds = int(index[0]), int(index[-1]) + 1
            return self.graph.call_function(aten.slice.Tensor, (source, dim, *bounds))
        if not len(index):
            return self.graph.call_function(aten.slice.Tensor, (source, dim, 0, 0))
        constant = self._constant(torch.from_numpy(np.ascontiguousarray(index)))
        return self.graph.call_function(aten.index_select.default, (source, dim, constant))

    def _along(self, node: Node, source: Node, dim: int) -> fx.Node:
        """Write a movement along a dimension that lost positions as a selection of the remaining ones."""
        picked, position = _picked(node, source, dim)
        kept = self.kept(source)[dim]
        assert kept is not None
        place = np.full(source.shape[dim], -1, dtype=np.int64)
        place[kept] = np.arange(len(kept))
        if position is None:  # the dimension is gone: one position of it
            if place[picked[0]] < 0:
                raise GraphFormError(f"{_name(node)} picks a channel that goes")
            return self.graph.call_function(aten.select.int, (self._tensor(source), dim, int(place[picked[0]])))
        own = self.kept(node)[position]
        index = place[picked if own is None else picked[own]]
        if (index < 0).any():
            raise GraphFormError(f"{_name(node)} picks channels that go")
        return self._select(self._tensor(source), dim, index, len(kept))

    def _reshape(self, node: Node) -> fx.Node:
        shape = self._shape(node)
        return self.graph.call_function(aten.reshape.default, (self._tensor(node.args[0]), shape))

    def _shape(self, node: Node) -> list[Any]:
        """Sizes of the result at the new widths."""
        kept, shape, unknown = self.kept(node), list[Any](), 0
        for dim in range(len(node.shape)):
            sizes = self._aligned.sizes(node, dim)
            if kept[dim] is None:
                try:
                    shape.append(self._number(sizes[0], sizes[1:]))
                    continue
                except GraphFormError:
                    pass
            elif len(set(sizes)) == 1:
                shape.append(len(kept[dim]))  # type: ignore[arg-type]
                continue
            if unknown:
                raise GraphFormError(f"{_name(node)} has a shape that does not follow from those of other tensors")
            shape.append(-1)
            unknown += 1
        return shape

    def _sized(self, node: Node) -> fx.Node:
        name = operator_name(node, raw=True)
        shape = self._shape(node)  # first: its sizes come before the call
        call = self._same(node)
        place = 1 if name == "expand" or name.startswith("new_") else 0
        call.args = tuple(shape if i == place else a for i, a in enumerate(call.args))
        return call

    def _pad(self, node: Node) -> fx.Node:
        call = self._same(node)
        widths = list(call.args[1])  # type: ignore[arg-type]
        kept, inner = self.kept(node), self.kept(node.args[0])
        for k in range(0, len(widths), 2):
            dim = len(kept) - 1 - k // 2
            remaining = kept[dim]
            if remaining is None:
                continue
            before = int(node.args[1][k])
            length = node.args[0].shape[dim]
            if before < 0 or node.args[1][k + 1] < 0:
                raise GraphFormError("pad cuts channels off")
            middle = (remaining >= before) & (remaining < before + length)
            if middle.sum() != (length if inner[dim] is None else len(inner[dim])):  # type: ignore[arg-type]
                raise GraphFormError("pad would not keep what it pads")
            widths[k], widths[k + 1] = int((remaining < before).sum()), int((remaining >= before + length).sum())
        call.args = (call.args[0], widths, *call.args[2:])
        return call

    def _scatter(self, node: Node) -> fx.Node:
        """Write the values between the remaining parts of the tensor around them."""
        call = arguments(node)
        base, source, dim = call["self"], call["src"], call["dim"] % len(node.shape)
        size, kept = node.shape[dim], self.kept(base)[dim]
        if kept is None and self.kept(source)[dim] is None:
            return self._same(node)
        start, end, step = slice(call["start"], call["end"], call["step"]).indices(size)
        if step != 1:
            raise GraphFormError("forward writes to every other channel")
        place = np.arange(size) if kept is None else kept
        first, last = int((place < start).sum()), int((place < end).sum())
        whole, parts = self._tensor(base), [self._tensor(source)]
        if first > 0:
            parts.insert(0, self.graph.call_function(aten.slice.Tensor, (whole, dim, 0, first)))
        if last < len(place):
            parts.append(self.graph.call_function(aten.slice.Tensor, (whole, dim, last, len(place))))
        return self.graph.call_function(aten.cat.default, (parts, dim))

    def _copy(self, node: Node) -> fx.Node:
        """Return the written values in the shape of the tensor that they overwrite."""
        over, source = node.args[:2]
        made = self._tensor(source)
        if source.value.dtype != over.value.dtype:
            made = self.graph.call_function(aten._to_copy.default, (made,), {"dtype": over.value.dtype})
        if source.shape != node.shape:
            made = self.graph.call_function(aten.expand.default, (made, self._shape(node)))
        return made

    def _convolution(self, node: Node) -> fx.Node:
        call, made = arguments(node), self._same(node)
        axis = -(len(call["weight"].shape) - 1)
        reads, channels = self.kept(call["input"])[axis], call["input"].shape[axis]
        if call["groups"] > 1 and reads is not None:
            if call["groups"] != channels:
                raise GraphFormError("forward runs a grouped convolution by its function")
            made.args = (*made.args[:8], len(reads))
        return made

    # -- uneven movements --------------------------------------------------------------------------------------------

    def _indexed(self, node: Node) -> fx.Node:
        """Write a chain of movements as one selection of its source."""
        chain: list[Node] = []
        sources: list[Node] = []
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current is node or current in self._ragged:
                if current not in chain:
                    chain.append(current)
                waiting += [n.args[0] if n.op == "item" and n is not current else n for n in current.inputs]
            elif current.op == "call" and isinstance(current.value, tuple):
                if current not in chain:
                    chain.append(current)
                waiting += current.inputs
            elif current not in sources:
                sources.append(current)
        refused = GraphFormError(f"{_name(node)} has no rectangular shape at these widths, and is no selection")
        if any(operator_name(n, raw=True) not in _MOVES for n in chain if n.op == "call"):
            raise refused
        sources.sort(key=lambda n: int(n.name[1:]))
        dims = [[d for d, k in enumerate(self.kept(s)) if k is not None] for s in sources]
        own = [d for d, k in enumerate(self.kept(node)) if k is not None]
        axis = next((d[0] for d in dims if d), own[0] if own else 1)
        if any(d not in ([], [axis]) for d in dims):
            raise refused
        picked = _selection(node, chain, sources, axis) if own in ([], [axis]) else None
        if picked is None:
            split = self._split_selection(node, chain, sources[0], axis) if len(sources) == 1 else None
            if split is None:
                raise refused
            return split
        place, offset = [], 0
        for source in sources:
            kept = self.kept(source)[axis]
            here = np.full(source.shape[axis], -1, dtype=np.int64)
            rows = np.arange(source.shape[axis]) if kept is None else kept
            here[rows] = np.arange(len(rows)) + offset
            offset += len(rows)
            place.append(here)
        remaining = self.kept(node)[axis]
        index = np.concatenate(place)[picked if remaining is None else picked[remaining]]
        if (index < 0).any():
            raise refused
        made = [self._tensor(source) for source in sources]
        whole = made[0] if len(made) == 1 else self.graph.call_function(aten.cat.default, (made, axis))
        return self._select(whole, axis, index, offset)

    def _split_selection(self, node: Node, chain: list[Node], source: Node, axis: int) -> fx.Node | None:
        """Positions of ``source`` along ``axis`` that a chain picks and lays out along several dimensions.

        For example the values of ``(b, 3 * heads * size, h, w) -> (b, heads, h * w, size)``. None if the other
        dimensions of ``source`` are taken apart.
        """
        kept, shape, remaining = self.kept(node), source.shape, self.kept(source)[axis]
        place = _moved_positions(node, chain, source).numpy()
        coordinates = np.unravel_index(place, tuple(shape))
        layout = self._layout(node, source, axis, coordinates)
        if layout is None:
            return None
        runs, channel_dims = layout
        rows = [np.arange(place.shape[k]) if (own := kept[k]) is None else own for k in channel_dims]
        at = [np.zeros(1, dtype=np.int64)] * place.ndim
        for k, row in zip(channel_dims, rows, strict=True):
            at[k] = row
        wanted = coordinates[axis][np.ix_(*at)].reshape([len(row) for row in rows])
        where = np.full(shape[axis], -1, dtype=np.int64)
        rest = np.arange(shape[axis]) if remaining is None else remaining
        where[rest] = np.arange(len(rest))
        index = where[wanted.reshape(-1)]
        if (index < 0).any():
            return None
        made = self._tensor(source)
        selected = self._select(made, axis, index, len(rest))
        sizes: list[Any] = []
        dims: dict[int, int] = {}  # of the result -> of what is reshaped
        for d in range(len(shape)):
            if d == axis:
                dims |= {k: len(sizes) + i for i, k in enumerate(channel_dims)}
                sizes += wanted.shape
            for k in (k for k, run in runs.items() if run[0] == d):
                dims[k] = len(sizes)
                sizes.append(self._number(node.shape[k], self._aligned.sizes(node, k)[1:]))
        split = self.graph.call_function(aten.reshape.default, (selected, sizes))
        turned = self.graph.call_function(aten.permute.default, (split, [dims[k] for k in sorted(dims)]))
        return self.graph.call_function(aten.reshape.default, (turned, self._shape(node)))

    def _layout(
        self, node: Node, source: Node, axis: int, coordinates: Sequence[Ints]
    ) -> tuple[dict[int, tuple[int, ...]], list[int]] | None:
        """(dimension of ``node`` -> the ones of ``source`` that it runs through, dimensions that hold ``axis``)."""
        ndim, shape = len(node.shape), source.shape
        moving = [[d for d, c in enumerate(coordinates) if (np.diff(c, axis=k) != 0).any()] for k in range(ndim)]
        channel_dims = [k for k in range(ndim) if axis in moving[k]]
        runs: dict[int, tuple[int, ...]] = {}
        for k, run in enumerate(moving):
            if axis in run:
                if run != [axis]:
                    return None
            elif run:
                index = np.ravel_multi_index([coordinates[d] for d in run], [shape[d] for d in run])
                view = [-1 if d == k else 1 for d in range(ndim)]
                if run != list(range(run[0], run[-1] + 1)) or (index != np.arange(node.shape[k]).reshape(view)).any():
                    return None
                runs[k] = tuple(run)
        taken = {axis, *(d for run in runs.values() for d in run)}
        for d in range(len(shape)):
            if d not in taken:  # of size one in this sample, as a batch may be
                alike = [k for k in range(ndim) if not moving[k] and k not in runs]
                alike = [k for k in alike if self._aligned.sizes(node, k) == self._aligned.sizes(source, d)]
                if not alike:
                    return None
                runs[alike[0]] = (d,)
        for k, through in runs.items():
            sizes = [math.prod(parts) for parts in zip(*(self._aligned.sizes(source, d) for d in through), strict=True)]
            if tuple(sizes) != tuple(self._aligned.sizes(node, k)):
                return None
        return (runs, channel_dims) if channel_dims else None


def write_body(
    path: str,
    model: nn.Module,
    aligned: Alignment,
    mask: Callable[[Node], Mask],
    names: dict[Node, str],
    counted: Mapping[Node, CountedReduction],
) -> BodyGraph:
    """The body at ``path`` as a graph.

    Args:
        path: path of the module.
        model: the original network.
        aligned: calls of it.
        mask: node of the first call -> which positions remain.
        names: node of a parameter or buffer -> its name.
        counted: reductions over channels -> what takes their place.

    Raises:
        GraphFormError: it cannot be written as one; the message says why.
    """

    def write() -> Written:
        with _disable_current_modes():
            return Writer(path, model, aligned, mask, counted).write(names)

    try:
        return BodyGraph(path, write, write())
    except (RuntimeError, LookupError, TypeError, AttributeError, AssertionError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise GraphFormError(f"it cannot be written down ({first})") from error


def _name(node: Node) -> str:
    return operator_name(node.args[0] if node.op == "item" else node)


def _tensors_of(node: Node) -> list[Node]:
    return [source for source in node.inputs if isinstance(source.value, Tensor)]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return _leaves(list(value.values())) if isinstance(value, dict) else [value]


def kept_positions(mask: Mask, shape: Sequence[int]) -> Kept:
    """Positions that remain along each dimension.

    Raises:
        RaggedError: they are no rectangle.
    """
    kept: Kept = [None] * len(shape)
    if mask.all():
        return kept
    whole = np.ones_like(mask)
    for dim in range(mask.ndim):
        if mask.shape[dim] > 1:
            along = mask.any(axis=tuple(d for d in range(mask.ndim) if d != dim))
            if not along.all():
                kept[dim] = np.flatnonzero(along)
            whole = whole & along.reshape([-1 if d == dim else 1 for d in range(mask.ndim)])
    if not mask.any() and all(k is None for k in kept):
        raise RaggedError  # one channel, everywhere the same, that goes
    if not np.array_equal(whole, mask):
        raise RaggedError
    return kept


def is_movement(node: Node) -> bool:
    """True if a call moves entries and does no more."""
    return operator_name(node, raw=True) in _MOVES


def move(node: Node, of: Callable[[Node], Tensor]) -> Any:
    """A movement applied to other tensors of the same shapes."""

    def put(item: Any) -> Any:
        if isinstance(item, Node):
            return item.constant if item.constant is not None and item.fixed else of(item)
        return [put(part) for part in item] if isinstance(item, (list, tuple)) else item

    if operator_name(node, raw=True) in _SHAPED:
        return of(node.args[0]).reshape(node.shape)
    return node.target(*put(list(node.args)), **{k: put(v) for k, v in node.kwargs.items()})


def _picked(node: Node, source: Node, dim: int) -> tuple[Ints, int | None]:
    """Return the positions of ``source`` along ``dim`` that a movement takes, and their dimension in its result."""
    shape = [size if d == dim else 1 for d, size in enumerate(source.shape)]
    positions = torch.arange(source.shape[dim]).reshape(shape).expand(source.shape)
    call = node.args[0] if node.op == "item" else node
    result = move(call, lambda _: positions)
    result = result[node.args[1]] if node.op == "item" else result
    if result.ndim < len(shape):
        return result.reshape(-1)[:1].numpy(), None
    first = [slice(None) if d == dim else slice(0, 1) for d in range(result.ndim)]
    return result[tuple(first)].reshape(-1).numpy(), dim


def _moved_positions(node: Node, chain: list[Node], source: Node) -> Tensor:
    """Where each entry of ``node`` lies in the flattened ``source``."""
    values: dict[Node, Any] = {source: torch.arange(source.shape.numel()).reshape(source.shape)}
    for step in sorted(chain, key=lambda n: int(n.name[1:])):
        values[step] = values[step.args[0]][step.args[1]] if step.op == "item" else move(step, values.__getitem__)
    result: Tensor = values[node]
    return result


def _selection(node: Node, chain: list[Node], sources: Sequence[Node], axis: int) -> Ints | None:
    """Return the positions along ``axis`` of the joined sources that make up ``node``; None if it is no selection."""
    values: dict[Node, Any] = {}
    offset = 0
    for source in sources:
        values[source] = (torch.arange(source.shape.numel()) + offset).reshape(source.shape)
        offset += source.shape.numel()
    joined = torch.cat([values[source] for source in sources], axis) if _joinable(sources, axis) else None
    if joined is None or joined.ndim != len(node.shape):
        return None
    for step in sorted(chain, key=lambda n: int(n.name[1:])):
        values[step] = values[step.args[0]][step.args[1]] if step.op == "item" else move(step, values.__getitem__)
    result = values[node]
    first = [slice(None) if d == axis else slice(0, 1) for d in range(result.ndim)]
    order = {int(v): i for i, v in enumerate(joined[tuple(first)].reshape(-1).tolist())}
    picked = [order.get(int(v), -1) for v in result[tuple(first)].reshape(-1).tolist()]
    if -1 in picked or not torch.equal(result, joined.index_select(axis, torch.tensor(picked))):
        return None
    return np.asarray(picked, dtype=np.int64)


def _joinable(sources: Sequence[Node], axis: int) -> bool:
    rest = {tuple(n for d, n in enumerate(s.shape) if d != axis) for s in sources}
    return len(rest) == 1 and all(len(s.shape) > axis for s in sources)


def _is_impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output", "call_module")
