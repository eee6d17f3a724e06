"""Run a record once on labels: the driver, and the services for operator rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .labels import Ints, LabelTensor, ValueTable, compress, core, mix, stable_hash, unique
from .record import REPEATS, TRANSPARENT, Node, Record, is_shape_only, operator_name

__all__ = ["FLAT", "Event", "Grouped", "Move", "Propagation", "Reduction", "Rule", "Value", "pattern"]

FLAT = -1  # "dimension" of an event whose rows are positions in the flattened tensor
Value = LabelTensor | list[Any] | None
Rule = Callable[["Propagation", Node], Value]


@dataclass(frozen=True)
class Event:
    """Rows of one tensor met by labelled values: ``rows[i]`` along ``dim`` belongs to ``values[i]``.

    Kinds: ``filter`` (rows that produce a channel), ``member`` (entries of a per-channel tensor), ``private`` (entries
    that silence a channel, listed a second time), ``consumer`` (columns that read a channel). ``silence``: these rows
    are set to zero to silence the channel. Rows along dim 1 of a :class:`Grouped` tensor count through its blocks.
    ``counted``: places of channels in a norm or reduction over them; the tensor is named ``counts`` and need not exist.
    """

    kind: Literal["filter", "member", "private", "consumer", "counted"]
    tensor: str
    dim: int
    rows: Ints
    values: Ints
    silence: bool = False


class Grouped(NamedTuple):
    """Blocks of a tensor that reads or writes channels block by block."""

    groups: int
    sizes: tuple[int, ...]  # rows of one block along each dimension
    unequal: tuple[int, ...] = ()  # rows of each block, where these are not equally many

    def blocks_of(self, rows: Tensor, dim: int) -> Tensor:
        """The block of each of ``rows`` along ``dim``."""
        if self.unequal:
            return torch.repeat_interleave(torch.arange(self.groups), torch.tensor(self.unequal))[rows]
        return rows // self.sizes[dim]


class Reduction(NamedTuple):
    """A reduction over channels that forward makes itself, such as ``x.mean(1)``."""

    node: Node
    kind: str  # of :class:`~.counted.CountedReduction`
    dim: int  # of channels
    size: int


@dataclass(frozen=True)
class Move:
    """A data movement whose result depends on the number of channels: a split, a shuffle, a pad over channels.

    Attributes:
        operator: its name.
        module: the module that runs it.
        owners: owners of the values that it moves.
        labels: what it moves.
        natural: labels -> true if the movement has the same meaning at every width for them.
    """

    operator: str
    module: str
    owners: Ints
    labels: Tensor
    natural: Callable[[Tensor], bool] | None = None


@dataclass
class Propagation:
    """State of one run over a record, or over several records of one network."""

    row_dims: Mapping[str, int] = field(default_factory=dict)  # tensor of a layer with a slice per filter -> its dim
    table: ValueTable = field(default_factory=ValueTable)
    values: dict[Node, Value] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    reshapes: list[Move] = field(default_factory=list)  # flattens, where forward may hold a number
    stacked: list[Move] = field(default_factory=list)  # movements of branches that lie along a dimension of their own
    weights: set[str] = field(default_factory=set)  # weights and biases of convolutions and linear layers
    read_elsewhere: dict[str, str] = field(default_factory=dict)  # tensor read other than as a layer's -> by what
    owners: dict[str, Ints] = field(default_factory=dict)  # tensor name -> owner of each filter or entry
    elements: dict[str, torch.Size] = field(default_factory=dict)  # per-channel tensors met element-wise -> shape
    unowned_rows: dict[tuple[str, int], set[int]] = field(
        default_factory=dict
    )  # (tensor, dim) -> rows met by no channel
    unowned: dict[str, str] = field(default_factory=dict)  # depthwise layer on values no channel owns -> whose they are
    computed: set[str] = field(default_factory=set)  # tensors that forward computes a kernel of, filter by filter
    depthwise: set[str] = field(default_factory=set)  # of those, the kernels that act on one channel each
    computed_layers: dict[str, str] = field(default_factory=dict)  # layer whose kernel is computed -> why it is pinned
    row_owners: dict[str, Ints] = field(default_factory=dict)  # tensor labelled by slices -> owner of each
    norms: Mapping[str, nn.Module] = field(default_factory=dict)  # modules that may turn out to be norms over channels
    counts: Container[str] = ()  # buffers of norms that weigh channels
    counted: dict[str, dict[tuple[torch.Size, int], str]] = field(
        default_factory=dict
    )  # norm -> (shape of its input, dimension of channels) -> where it mixes them
    reductions: dict[str, Reduction] = field(default_factory=dict)  # name, as that of a norm -> what counts channels
    grouped: dict[str, Grouped] = field(default_factory=dict)  # kernels of grouped convolutions, norms over blocks
    ranks: Mapping[str, Ints] = field(
        default_factory=dict
    )  # as ``owners`` -> number of each among those of its channel
    element_dims: dict[str, int] = field(default_factory=dict)  # of ``elements`` -> the dimension that follows channels
    spread: dict[int, str] = field(default_factory=dict)  # owner -> the operator that moves its channel to positions
    bare_norms: dict[str, Ints] = field(default_factory=dict)  # batch or instance norm without tensors -> its owners
    _tensors: dict[Node, str] = field(default_factory=dict)
    _keys: dict[Node, int | None] = field(default_factory=dict)
    _rules: Callable[[Node], Rule] | None = None

    def run(self, record: Record, rules: Callable[[Node], Rule], layers: Container[str]) -> None:
        """Propagate through ``record``; a second record of the same network may follow.

        Args:
            record: record of one forward pass.
            rules: the rule of a call.
            layers: operators that own weights. Behind a value that forward reads only these are followed.
        """
        self._tensors, self._rules = record.tensors, rules
        self._count_calls(record)
        read: str | None = None
        pinned: set[Node] = set()  # a detector takes thousands of pieces of one tensor
        for node in record.nodes:
            if read is not None:
                for source in node.inputs:
                    if source not in pinned:
                        self.pin(source, read)
                        if self.values.get(source) is not None:  # a parameter may get labels later
                            pinned.add(source)
            if read is not None and node.op == "call" and operator_name(node, raw=True) not in layers:
                self.values[node] = None if self._is_moved_parameter(node) else self.fixed(node)
            elif node.op == "item":
                parts = self.values[node.args[0]]
                self.values[node] = parts[node.args[1]] if isinstance(parts, list) else None
            elif node.op != "call":
                self.values[node] = self._given(node, record)
            elif self._is_moved_parameter(node):
                self.values[node] = None  # labelled when something asks, see ``labels_of``
            elif node.fixed and not _creates(node) and not any(map(self.is_owned, node.inputs)):
                self.values[node] = _constant(self, node, self._source(node))
            else:
                self.values[node] = rules(node)(self, node)
            if node in record.reads:
                for source in node.inputs:
                    self.pin(source, f"its values are read by {self.where(node)}")
                read = read or f"used after {self.where(node)} read values that decide what forward does"
        counting = {reduction.node for reduction in self.reductions.values()}
        for node in record.outputs:
            self._finish(node, "network output")
            if node.op == "item" and node.args[1] == 1 and node.args[0] in counting:
                self.pin(node.args[0].inputs[0], f"{self.where(node.args[0])} numbers them in a network output")
        for node, name in record.written:
            self._finish(node, f"written to buffer {name}")

    def _count_calls(self, record: Record) -> None:
        counts: Counter[tuple[str, str]] = Counter()
        for node in record.calls:
            name = operator_name(node, raw=True)
            counts[node.module, name] += 1
            text = f"{node.module}|{name}|{counts[node.module, name]}"
            self._keys[node] = None if node.in_map else stable_hash(text)

    def _is_moved_parameter(self, node: Node) -> bool:
        """True if a call only moves the entries of a parameter that is not labelled."""
        if len(node.inputs) != 1 or operator_name(node, raw=True) not in _LAZY:
            return False
        source = node.inputs[0]
        return self.values.get(source) is None and (source in self._tensors or source.op == "call")

    def is_owned(self, node: Node) -> bool:
        """True if some entry of a labelled node belongs to a channel."""
        value = self.values.get(node)
        return isinstance(value, LabelTensor) and bool((core(value.labels) > 0).any())

    def _source(self, node: Node) -> str:
        """Words for a constant: where its numbers come from."""
        while node.op == "call" and node.inputs and operator_name(node, raw=True) in _LAZY:
            node = node.inputs[0]
        return f"computed by {self.where(node)}" if node.op == "call" else "a tensor made in forward"

    def _finish(self, node: Node, reason: str) -> None:
        self.pin(node, reason, expose=False)
        self.expose_leaks(node)

    def _given(self, node: Node, record: Record) -> Value:
        """Return labels of an input or a constant. A parameter gets labels only when an operator other than a layer
        reads it."""
        if node.op == "tensor":
            return None
        return _constant(self, node, record.words.get(node, "a tensor made in forward"))

    # -- what rules ask ----------------------------------------------------------------------------------------------

    def parameter_name(self, node: object) -> str | None:
        """Canonical name if ``node`` is a parameter or buffer itself (through copies that change no value)."""
        while isinstance(node, Node) and node.op == "call" and operator_name(node, raw=True) in TRANSPARENT:
            node = node.args[0]
        return self._tensors.get(node) if isinstance(node, Node) else None

    def tensors_behind(self, node: Node, *, alone: bool = False) -> list[str]:
        """Parameters that ``node`` is computed from; none if ``alone`` and it also depends on an input."""
        seen, waiting, names = {node}, [node], []
        while waiting:
            current = waiting.pop()
            if alone and current.op == "input":
                return []
            if current in self._tensors:
                names.append(self._tensors[current])
            waiting += [source for source in current.inputs if source not in seen]
            seen.update(current.inputs)
        return sorted(set(names))

    def vector(self, node: object) -> tuple[str, Ints] | None:
        """(name, entries) of a one-dimensional tensor that repeats or reshapes a parameter; None if it is computed."""
        chain: list[Node] = []
        while isinstance(node, Node) and node.op == "call" and operator_name(node, raw=True) in REPEATS:
            chain.append(node)
            node = node.args[0]
        name = self._tensors.get(node) if isinstance(node, Node) else None
        if name is None or not isinstance(node, Node) or node.value.numel() > _LONGEST_VECTOR:
            return None
        entries = torch.arange(node.value.numel()).reshape(node.shape)
        for step in reversed(chain):
            if operator_name(step, raw=True) not in TRANSPARENT:
                entries = step.target(entries, *step.args[1:], **step.kwargs)
        return name, entries.reshape(-1).numpy()

    def is_move(self, node: Node) -> bool:
        """True if a call only moves entries of one tensor."""
        return node.op == "call" and len(node.inputs) == 1 and operator_name(node, raw=True) in _LAZY

    def size_of(self, tensor: str) -> int:
        """Entries of a parameter."""
        return max(int(node.value.numel()) for node, name in self._tensors.items() if name == tensor)

    def root_parameter(self, node: Node) -> str | None:
        """Name of the parameter whose entries ``node`` moves, without more."""
        while node.op == "call" and self.values.get(node) is None and self._is_moved_parameter(node):
            node = node.inputs[0]
        return self._tensors.get(node)

    def matrix(self, node: object) -> str | None:
        """Name of the parameter that ``node`` is the transpose of."""
        while isinstance(node, Node) and node.op == "call" and operator_name(node, raw=True) in TRANSPARENT:
            node = node.args[0]
        if not isinstance(node, Node) or node.op != "call" or node.value.ndim != 2:
            return None
        swaps = operator_name(node, raw=True) in ("t", "transpose") or node.args[1:] == ([1, 0],)
        return self.parameter_name(node.args[0]) if swaps else None

    def labels_of(self, node: Node) -> LabelTensor | None:
        """Return labels of a tensor node. A parameter gets one owner per entry at the first request."""
        value = self.values.get(node)
        if value is None and (name := self._tensors.get(node)) is not None:
            value = self.values[node] = self._entries(node, name)
        elif value is None and node.op == "call" and self._rules is not None and self._is_moved_parameter(node):
            value = self.values[node] = self._rules(node)(self, node)
        return value if isinstance(value, LabelTensor) else None

    def _entries(self, node: Node, name: str) -> LabelTensor:
        """Labels of a parameter or buffer that something other than a layer reads."""
        shape = node.shape
        if name in self.weights:
            self.read_elsewhere[name] = "an operator"
        if name in self.weights or node.value.numel() == 1:  # a single number is shared by all channels
            return LabelTensor(fixed_labels(shape, self.table.add_fixed(f"parameter {name}")), is_parameter=True)
        if node.constant is not None and node.value.dtype != torch.bool:
            constant = _constant(self, node, f"buffer {name}")
            assert isinstance(constant, LabelTensor)
            return constant
        if (dim := self.row_dims.get(name)) is not None:
            owners = self.row_owners[name] = self.owners_of(f"{name}|{dim}", shape[dim])
            rows = self.table.add(owner=owners, trail=self.first_trail(f"{name}|{dim}", len(owners), stable_hash(name)))
            view = [len(rows) if d == dim else 1 for d in range(len(shape))]
            return LabelTensor(torch.from_numpy(rows).reshape(view).expand(shape), is_parameter=True)
        self.elements[name] = shape
        owners = self.owners_of(name, shape.numel())
        trail = self.first_trail(name, len(owners), stable_hash(name))
        if node.constant is not None:  # a mask cannot be tied: its entries say which channels are alike
            trail = mix(trail, node.constant.reshape(-1).numpy().astype(np.int64))
        labels = torch.from_numpy(self.table.add(owner=owners, trail=trail)).reshape(shape)
        return LabelTensor(labels, is_parameter=True)

    def owners_of(self, tensor: str, count: int) -> Ints:
        """Return the owners of the filters (entries) of a tensor, which are the same in every call of a shared
        layer."""
        if tensor not in self.owners:
            self.owners[tensor] = self.table.new_owners(count)
        return self.owners[tensor]

    def first_trail(self, tensor: str, count: int, key: int) -> Ints:
        """Return the trails of the filters (entries) of a tensor. Filters of one channel differ by their number in
        it."""
        ranks = self.ranks.get(tensor)
        return np.full(count, key, dtype=np.int64) if ranks is None else mix(key, ranks)

    def count(self, node: Node, values: Ints) -> bool:
        """Note that ``values`` are averaged by a norm over channels; False if ``node`` runs in no such module."""
        if node.module not in self.norms:
            return False
        source = node
        while source.inputs and (source is node or source.module == node.module):
            labelled = (n for n in source.inputs if self.is_owned(n) and n not in self._tensors)
            if (above := next(labelled, None)) is None:
                break
            source = above
        value = self.values.get(source)
        small = core(self.rooted(value.labels)) if isinstance(value, LabelTensor) else torch.empty(0)
        dims = [d for d, n in enumerate(small.shape) if n > 1]
        if len(dims) != 1 or small.shape[dims[0]] != len(values):
            return False
        self.counted.setdefault(node.module, {}).setdefault((source.shape, dims[0]), self.where(node))
        self._note_counts(node, node.module, values)
        return True

    def reduce(self, node: Node, kind: str, dim: int, values: Ints) -> None:
        """Record that forward itself reduces ``values``, which lie along ``dim``. Its graph form can count them."""
        site = f"{node.module}.{kind}_"
        name = f"{site}{sum(known.startswith(site) for known in self.reductions)}"
        self.reductions[name] = Reduction(node, kind, dim, len(values))
        self._note_counts(node, name, values)

    def _note_counts(self, node: Node, name: str, values: Ints) -> None:
        self.record(Event("counted", f"{name}.counts", 0, np.arange(len(values), dtype=np.int64), values))
        for origin in unique(self.table.origin[values[values > 0]]).tolist():
            self.table.exposed.setdefault(origin, f"input of {self.where(node)}, which mixes channels")

    def use_as_weight(self, *tensors: str | None) -> None:
        """Note that a layer has these for its weight and bias: they must serve nothing else."""
        for tensor in tensors:
            if tensor is not None:
                self.weights.add(tensor)
                if tensor in self.elements:
                    self.read_elsewhere[tensor] = "an operator"

    def key(self, node: Node) -> int | None:
        """Hash that names this call in the original network and in a narrowed one alike.

        It is made of the module that runs the node, the operator, and the number of such calls of that module before.
        It is None inside a channel map, which is only index arithmetic.
        """
        return self._keys[node]

    def where(self, node: Node) -> str:
        """Words for a node: ``softmax in attention``."""
        return f"{operator_name(node)} in {node.module or 'forward'}"

    def record(self, event: Event) -> None:
        """Keep the rows of ``event`` that meet a value some channel owns."""
        owned = event.values > 0
        if not owned.all():
            self.unowned_rows.setdefault((event.tensor, event.dim), set()).update(event.rows[~owned].tolist())
        if owned.any():
            self.events.append(
                Event(event.kind, event.tensor, event.dim, event.rows[owned], event.values[owned], event.silence)
            )

    def pin(self, value: object, reason: str, *, expose: bool = True) -> None:
        """Pin all labels of a node (or list of nodes). Parameters without labels are not pinned."""
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
        """Return labels with ``dims`` reduced to size 1, for an operator that treats these positions as one.

        A channel must be the same along ``dims`` (zeros are neutral). Otherwise everything that meets is pinned.
        """
        dims = sorted(d % labels.ndim for d in dims)
        small = core(labels)
        varying = [d for d in dims if small.shape[d] > 1]
        if not varying:
            return small.expand([1 if d in dims else n for d, n in enumerate(labels.shape)])
        kept = [d for d in range(small.ndim) if d not in varying]
        matrix = (
            small.permute(*kept, *varying).reshape(int(np.prod([small.shape[d] for d in kept], initial=1)), -1).numpy()
        )
        rows = self.joined(matrix)
        if (rows == 0).any() and self.stay_apart(matrix):
            self.link(matrix)
            rows = self.joined(matrix)
        for i in np.flatnonzero(rows == 0).tolist():
            rows[i] = self._one_value(matrix[i], node, silent)
        shape = [1 if d in varying else small.shape[d] for d in range(small.ndim)]
        target = [1 if d in dims else labels.shape[d] for d in range(labels.ndim)]
        return torch.from_numpy(rows).reshape(shape).expand(target)

    def stay_apart(self, matrix: Ints) -> bool:
        """True if several channels remain when all that meet in a row of ``matrix`` (n, m) become one."""
        rows, columns = np.nonzero(matrix > 0)
        roots = self.table.roots(self.table.owner[matrix[rows, columns]])
        values, place = np.unique(roots, return_inverse=True)
        if len(values) == 1 and len(matrix) > 1:
            return True  # one channel to begin with
        first, meeting = np.arange(len(values)), np.full(len(matrix), len(values))
        while len(values):  # the smallest number of a channel that each is connected to
            np.minimum.at(meeting, rows, first[place])
            smaller = first.copy()
            np.minimum.at(smaller, place, meeting[rows])
            if np.array_equal(smaller, first):
                return bool((first > first.min()).any())
            first = smaller
        return False

    def link(self, matrix: Ints) -> None:
        """Join the values in each row of ``matrix`` (n, m) into one channel, if the row has no other values."""
        rows = matrix[(matrix > 0).all(axis=1)]
        if len(rows):
            owners = self.table.owner[rows]
            self.table.unite(np.repeat(owners[:, 0], rows.shape[1]), owners.reshape(-1))

    def joined(self, matrix: Ints) -> Ints:
        """Return ``(n,)`` values of rows ``(n, m)`` that hold one channel in several states; 0 for other rows.

        The states and their order become part of the trail.
        """
        table, result = self.table, np.zeros(len(matrix), dtype=np.int64)
        plain = ((matrix > 0) & (table.zero[np.maximum(matrix, 0)] == 0)).all(axis=1)
        rows = matrix[plain]
        roots = table.roots(table.owner[rows])
        alike = (roots == roots[:, :1]).all(axis=1) & (rows != rows[:, :1]).any(axis=1)
        rows = rows[alike]
        if len(rows):
            origins = table.origin[rows]
            alone = (origins == origins[:, :1]).all(axis=1)
            table.expose_leaks(rows[~alone])
            result[np.flatnonzero(plain)[alike]] = table.add(
                owner=table.owner[rows].min(axis=1),
                trail=pattern(table, rows),
                origin=np.where(alone, origins[:, 0], -1),
                leak=np.where(alone, table.leak[rows].max(axis=1), 0),
            )
        return result

    def _one_value(self, row: Ints, node: Node, silent: bool) -> int:
        table, found = self.table, unique(row)
        owned, fixed = found[found > 0], found[found < 0]
        live = owned[table.zero[owned] == 0]
        if len(owned) + len(fixed) == 1:
            return int(found[0])
        if not len(owned):
            return int(fixed[0])
        if len(fixed) or len(unique(table.roots(table.owner[live]))) > 1:
            spread = next((self.spread[o] for o in table.owner[owned].tolist() if o in self.spread), None)
            why = (
                f"input of {spread}, which moves channels to positions that {self.where(node)} reads as one channel"
                if spread
                else f"input of {self.where(node)}, which slides over channels, so that their order counts"
                if operator_name(node, raw=True) == "convolution" or "pool" in operator_name(node)
                else f"input of {self.where(node)}, which reads several channels as one"
            )
            table.pin(row, why, expose=not silent)
            table.expose_leaks(row)
            return table.add_fixed(f"computed by {self.where(node)}")
        # One channel in several states (a flatten, a mosaic, zeros beside it): their pattern becomes part of the trail.
        table.unite(table.owner[owned[:-1]], table.owner[owned[1:]])
        trail = pattern(table, row[None])
        origins = unique(table.origin[live])
        if len(origins) > 1:
            table.expose_leaks(live)
        alone = len(origins) == 1
        values = table.add(
            owner=table.owner[owned[:1]],
            trail=trail,
            origin=origins if alone else -1,
            leak=table.leak[live].max() if alone else 0,
            zero=int(not len(live)),
        )
        return int(values[0])

    def channels(self, labels: Tensor, dim: int, node: Node) -> Ints:
        """Return the value of each channel along ``dim``: one per index, with all other dimensions collapsed."""
        dim %= labels.ndim
        rest = [d for d in range(labels.ndim) if d != dim]
        return self.collapse(labels, rest, node).reshape(-1).numpy() if rest else labels.numpy()

    def settle_moves(self) -> None:
        """Mark movements of stacked branches as natural if branches have one channel. Called once all channels are
        known."""
        moves, self.moves = self.moves, []
        for move in moves:
            natural = move.natural is not None and move.natural(self.rooted(move.labels))
            (self.stacked if natural else self.moves).append(move)

    def rooted(self, labels: Tensor) -> Tensor:
        """``labels`` with the channel of every value in its place."""
        small = core(labels)
        values = small.numpy().reshape(-1)
        roots, owned = values.copy(), values > 0
        roots[owned] = self.table.roots(self.table.owner[values[owned]])
        return compress(torch.from_numpy(roots).reshape(small.shape).expand(labels.shape))

    def fixed(self, node: Node, reason: str | None = None) -> Value:
        """Output(s) of a node that no channel owns."""
        label = self.table.add_fixed(reason or f"computed by {self.where(node)}")
        if isinstance(node.value, Tensor):
            return LabelTensor(fixed_labels(node.value.shape, label))
        if isinstance(node.value, tuple):
            return [LabelTensor(fixed_labels(v.shape, label)) if isinstance(v, Tensor) else None for v in node.value]
        return None


def pattern(table: ValueTable, rows: Ints) -> Ints:
    """Return ``(n,)`` trails of rows ``(n, m)`` of values, which depend on the values and their order."""
    with np.errstate(over="ignore"):
        return np.asarray(mix(table.trail[rows], table.slot[rows], np.arange(rows.shape[1])).sum(axis=1))


_LAZY = REPEATS | {"t", "transpose", "permute"}
_LONGEST_VECTOR = 1 << 16


def _creates(node: Node) -> bool:
    """True if a call makes zeros, which count as padding, or one other number for every entry."""
    return operator_name(node, raw=True).removeprefix("new_").removesuffix("_like") in ("zeros", "ones", "full")


def _constant(state: Propagation, node: Node, reason: str) -> Value:
    """Return a value that no channel owns. ``uniform``: it is known to be the same number everywhere."""
    if not isinstance(node.value, Tensor):
        return state.fixed(node, reason)
    known = node.constant
    uniform = known is not None and known.numel() > 0 and bool((known == known.reshape(-1)[0]).all())
    return LabelTensor(fixed_labels(node.value.shape, state.table.add_fixed(reason)), uniform=uniform)


def fixed_labels(shape: Sequence[int], label: int) -> Tensor:
    """Return a label tensor of values that no channel owns. Only its size tells along which dimensions they are
    equal."""
    return torch.full((), label, dtype=torch.int64).expand(tuple(shape))


def nullified(state: Propagation, node: Node, labels: Tensor) -> Tensor:
    """Return labels of zeros in the places of ``labels`` (``x * 0``, ``zeros_like(x)``)."""
    result = state.table.derive(labels, state.key(node))
    values = unique(core(result).numpy())
    values = values[values > 0]
    state.table.zero[values], state.table.origin[values], state.table.leak[values] = 1, -1, 0
    return result


def unknown(state: Propagation, node: Node) -> Value:
    """Pin the inputs of an operator that has no rule."""
    if is_shape_only(node.target):  # randn_like and the like
        return state.fixed(node)
    name = operator_name(node)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags:
        why = "which reads its values"
    else:
        why = "which mixes channels" if name in _MIXERS else "an operator the channel graph has no rule for"
    for leaf in node.inputs:
        state.pin(leaf, f"input of {state.where(node)}, {why}")
        if (tensor := state.root_parameter(leaf)) is not None:
            state.read_elsewhere[tensor] = state.where(node)
    return state.fixed(node)


_MIXERS = frozenset({"layer_norm", "group_norm", "matmul"})


def moved(state: Propagation, node: Node, labels: Tensor, index: int = 0) -> LabelTensor:
    """Return result number ``index`` of a data movement, compressed, with the call added to its trail."""
    key = state.key(node)
    return LabelTensor(state.table.derive(compress(labels), None if key is None else int(mix(key, index))))
