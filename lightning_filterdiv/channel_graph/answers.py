"""Results of a trace, and answers to questions about channels. Nothing here traces, narrows or computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..filters import find_submodule
from .counted import CountedNorm
from .errors import ChannelGraphError, StaleGraphError
from .labels import Ints, mix
from .modules import structure

__all__ = [
    "KINDS",
    "ChannelAnswers",
    "ChannelGroup",
    "ConsumerColumns",
    "FilterRegion",
    "MapSite",
    "NormSite",
    "Operation",
    "Table",
    "TensorRows",
    "layer_of",
    "ranges",
    "rows_back",
    "rows_first",
]

Kind = Literal["filter", "member", "consumer", "counted"]


KINDS: tuple[Kind, ...] = ("filter", "member", "consumer", "counted")


def layer_of(tensor: str) -> str:
    """Return the layer that a tensor belongs to: ``conv`` for ``conv.parametrizations.weight.original1``."""
    return tensor.partition(".parametrizations.")[0] if ".parametrizations." in tensor else tensor.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class TensorRows:
    """The part of one tensor that belongs to the channels of a group.

    Attributes:
        tensor: canonical name.
        kind: ``filter`` (produces the channel), ``member`` (acts on it alone) or ``consumer`` (columns that read it).
        dim: the dimension that ``rows`` index.
        rows: (size, k) indices; row ``i`` belongs to channel ``i``, and the k-th entries of all channels correspond.
        groups: above 1 where ``dim`` is 1 and the tensor is the kernel of a grouped convolution. Dimension 1 then holds
            the channels of one block, and ``rows`` count through all blocks: with n entries along dimension 1, row r is
            entry ``r % n`` in the ``r // n``-th of ``groups`` equal parts of dimension 0.
    """

    tensor: str
    kind: Kind
    dim: int
    rows: Tensor
    groups: int = 1

    def entries(self, tensor: Tensor) -> Tensor:
        """Return the ``(size, k, ...)`` rows of ``tensor`` as a copy."""
        first = rows_first(tensor, self.dim, self.groups)
        return first[self.rows.to(tensor.device)]


def rows_first(tensor: Tensor, dim: int, groups: int = 1) -> Tensor:
    """Return ``tensor`` with the dimension of rows in front: a view, or with ``groups`` above 1 a copy."""
    return tensor.movedim(dim, 0) if groups == 1 else tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def rows_back(first: Tensor, dim: int, groups: int = 1) -> Tensor:
    """Inverse of :func:`rows_first`."""
    return first.movedim(0, dim) if groups == 1 else first.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that may be clustered together: same producers, same members, same consumers, same operators between.

    Attributes:
        name: the first layer of the group, numbered where a layer is split into several groups.
        layers: layers with filters in each channel, coupled layers together, in order of execution.
        size: number of channels.
        parts: every part of every tensor that belongs to these channels and is removed with them.
        channels: (size,) number of each channel in the trace.
        counted: positions of the channels in norms over channels. If clusters of unequal sizes are merged, such a norm
            gets a tensor ``counts``, which has an entry at each of them.
        blocks: None, or (size,) int64: the block of each channel, 0, 1, ..., all blocks equally large. A grouped
            convolution, or a group norm, reads or writes the channels block by block. Only channels of one block may be
            clustered together, and every block must keep equally many: the number kept is a multiple of
            :attr:`block_count`.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    parts: tuple[TensorRows, ...]
    channels: Tensor
    blocks: Tensor | None = None
    counted: tuple[TensorRows, ...] = ()

    @property
    def block_count(self) -> int:
        """Number of blocks; 1 if there are none."""
        return 1 if self.blocks is None else int(self.blocks.max()) + 1

    def members(self) -> list[Tensor]:
        """Return the channels of each block, ascending."""
        if self.blocks is None:
            return [torch.arange(self.size)]
        return list(self.blocks.argsort(stable=True).split(self.size // self.block_count))

    def rounded(self, count: int) -> int:
        """Return the number nearest to ``count`` that keeps equally many channels, at least one, in every block."""
        blocks = self.block_count
        return min(self.size, max(1, (2 * count + blocks) // (2 * blocks)) * blocks)

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers that write the channel. The others act on it depthwise."""
        writers = {layer_of(part.tensor) for part in self.parts if part.kind == "filter"}
        return tuple(layer for layer in self.layers if layer in writers)

    def rows(self, layer: str) -> Tensor:
        """(size,) index of the filter of ``layer`` in each channel; (size, k) where each channel has k of its filters.

        Raises:
            KeyError: ``layer`` is not one of ``layers``.
        """
        if layer in self.layers:
            own = [part for part in self.parts if part.kind != "consumer" and layer_of(part.tensor) == layer]
            for part in sorted(own, key=lambda part: (part.tensor != f"{layer}.weight", part.kind != "filter")):
                return part.rows[:, 0] if part.rows.shape[1] == 1 else part.rows
        raise KeyError(f"{layer!r} has no filters in group {self.name!r}; its layers are {', '.join(self.layers)}")


@dataclass(frozen=True)
class Table:
    """All rows of tensors that channels own, as parallel arrays sorted by channel, then by key."""

    tensors: tuple[str, ...]
    root: Ints
    kind: Ints  # index into KINDS
    tensor: Ints
    dim: Ints
    row: Ints
    key: Ints

    @property
    def starts(self) -> Ints:
        """Position of the first entry of each channel."""
        return np.flatnonzero(np.r_[True, np.diff(self.root) != 0][: len(self.root)])

    def signatures(self) -> Ints:
        """Return a hash per channel of its tensors, without row numbers. It is equal for channels that may be
        clustered."""
        if not len(self.root):
            return self.root
        starts = self.starts
        position = np.arange(len(self.root)) - np.repeat(starts, np.diff(np.r_[starts, len(self.root)]))
        with np.errstate(over="ignore"):
            return np.add.reduceat(mix(self.kind, self.tensor, self.dim, self.key, position), starts)

    def kinds(self) -> dict[int, int]:
        """Return channel -> hash of its tensors, equal for interchangeable channels and in a narrowed network."""
        if not len(self.root):
            return {}
        with np.errstate(over="ignore"):
            hashes = np.add.reduceat(mix(self.key, 1), self.starts)
        return dict(zip(self.root[self.starts].tolist(), hashes.tolist(), strict=True))

    def filters(self) -> dict[str, list[int]]:
        """Producing tensor -> the channel of each of its filters."""
        here = np.flatnonzero(self.kind == 0)
        order = here[np.lexsort((self.row[here], self.tensor[here]))]
        bounds = np.flatnonzero(np.diff(self.tensor[order])) + 1
        parts = np.split(order, bounds) if len(order) else []
        return {self.tensors[self.tensor[part[0]]]: self.root[part].tolist() for part in parts}

    def rows_by_channel(self) -> dict[tuple[str, int], dict[int, list[int]]]:
        """(tensor, dim) -> channel -> its rows, corresponding ones in the same order."""
        rows: dict[tuple[str, int], dict[int, list[int]]] = {}
        for root, tensor, dim, row in zip(
            self.root.tolist(), self.tensor.tolist(), self.dim.tolist(), self.row.tolist(), strict=True
        ):
            rows.setdefault((self.tensors[tensor], dim), {}).setdefault(root, []).append(row)
        return rows


@dataclass(frozen=True)
class MapSite:
    """A parameter-free submodule that moves channels, called once, with one tensor in and one out.

    ``reads`` and ``writes`` name the channel at each position of dimension 1 (-1: no channel).
    """

    module: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class NormSite(NamedTuple):
    """A norm over channels, whose module must weigh its channels if clusters are unequal."""

    form: tuple[type[CountedNorm], dict[str, Any]]  # class and options, see :func:`counted.counted_form`
    size: int


class ConsumerColumns(NamedTuple):
    """Columns of one tensor that read the filters of a layer.

    ``columns[i]`` along ``dim`` of ``tensor`` reads filter ``filters[i]``. ``block`` is None, or for a grouped
    convolution the range of dim 0 that these columns belong to.
    """

    tensor: str
    dim: int
    columns: Tensor
    filters: Tensor
    block: tuple[int, int] | None


class Operation(NamedTuple):
    """One call of the traced network: enough to measure depth, resolution and cost without the network.

    ``inputs`` are names of operations, and of parameters and buffers. ``macs`` counts multiply-accumulate operations of
    the call on the example inputs, which grow with the entries of the parameter ``weight`` (empty: with none), or with
    ``channels``: the channel at each position of the one dimension of a product of activations that holds them.
    """

    name: str
    operator: str
    module: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None
    macs: int = 0
    weight: str = ""
    channels: tuple[int, ...] = ()


@dataclass(frozen=True)
class FilterRegion:
    """Facts about the filters of one layer, recorded before channels were joined."""

    count: int
    silence: tuple[tuple[str, Ints, Ints], ...]  # tensor, rows, filters
    columns: tuple[ConsumerColumns, ...]
    exposed: Mapping[int, str]  # filter -> reason


class ChannelAnswers:
    """Answers about the channels of a traced network; see :class:`ChannelGraph`.

    Attributes:
        network: canonical name of the traced submodule, empty for the whole model.
        map_sites: submodules that move channels, which narrowing wraps.
        norms: norms over channels, by the name of their module.
        counted_sizes: norm or reduction over channels -> number of channels that it counts.
        constrained: sets of channels whose counts a forward body ties together.
        table: every row of every tensor that some channel owns.
        read_values: place at which forward read the values of tensors; empty if it did not.
        output_shapes: shapes of the traced outputs.
        stacked: some channels lie along stacked branches, in an order that numbers in forward decide.
        recording: the record and its labels, which graph forms are written from.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        groups: list[ChannelGroup],
        pinned: dict[str, str],
        regions: Mapping[str, FilterRegion],
        consumers: Mapping[str, tuple[str, ...]],
        coupled: Mapping[str, tuple[str, ...]],
        row_dims: Mapping[str, int],
        operations: tuple[Operation, ...],
        map_sites: tuple[MapSite, ...],
        norms: Mapping[str, NormSite],
        counted_sizes: Mapping[str, int],
        constrained: list[frozenset[int]],
        table: Table,
        body_moves: Mapping[int, str],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        network: str,
        output_shapes: tuple[torch.Size, ...],
        read_values: str,
        stacked: bool,
        recording: Any = None,
    ) -> None:
        self._model = model
        self._structure = structure(model)
        self._unquestioned = False
        self._groups, self._pinned, self._regions = groups, pinned, regions
        self._consumers, self._coupled, self._row_dims = consumers, coupled, row_dims
        self._operations, self.norms, self.recording = operations, norms, recording
        self._body_moves, self.network = body_moves, network
        self.counted_sizes = counted_sizes
        self.output_shapes, self.read_values, self.stacked = output_shapes, read_values, stacked
        self.map_sites, self.constrained, self.table, self._arguments = map_sites, constrained, table, arguments

    def exclude(self, groups: Mapping[str, str]) -> None:
        """Pin the filters of groups.

        Args:
            groups: name of a group -> reason why it cannot be narrowed.
        """
        rows: dict[tuple[str, str], list[int]] = {}
        for group in self._groups:
            if group.name in groups:
                for layer in group.layers:
                    rows.setdefault((layer, groups[group.name]), []).extend(group.rows(layer).reshape(-1).tolist())
        self._groups = [group for group in self._groups if group.name not in groups]
        for (layer, reason), chosen in rows.items():
            some = "" if len(chosen) == self.filter_count(layer) else f"filters {ranges(sorted(chosen))}: "
            before = f"{self._pinned[layer]}; " if layer in self._pinned else ""
            self._pinned[layer] = f"{before}{some}{reason}"

    def moved_by(self, group: ChannelGroup) -> str:
        """Return the last data movement in forward that depends on the number of channels of the group."""
        return self._body_moves.get(int(group.channels[0]), "a number in forward")

    def rebind(self, model: nn.Module) -> None:
        """Make this the graph of ``model``, another network with the same tensor names and shapes."""
        self._model, self._structure = model, structure(model)

    # -- questions ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The traced network.

        Raises:
            StaleGraphError: its structure changed since the trace.
        """
        self._check()
        return self._model

    @property
    def current(self) -> bool:
        """True if the traced network still has its structure."""
        return structure(self._model) == self._structure

    @contextmanager
    def unquestioned(self) -> Iterator[None]:
        """Skip the check of the structure of the model, which a trace that is still running need not repeat."""
        self._unquestioned = True
        try:
            yield
        finally:
            self._unquestioned = False

    def _check(self) -> None:
        """Raise an error if the structure of the model has changed."""
        if self._unquestioned:
            return
        now = structure(self._model)
        if now != self._structure:
            names = [n for n in {**self._structure, **now} if self._structure.get(n) != now.get(n)]
            raise StaleGraphError(
                f"the model changed after it was traced ({', '.join(repr(n.strip()) for n in names[:3])}"
                f"{', ...' if len(names) > 3 else ''}): trace it again with ChannelGraph.trace"
            )

    @property
    def groups(self) -> list[ChannelGroup]:
        """Groups of channels that may be clustered together, in order of execution."""
        self._check()
        return list(self._groups)

    @property
    def pinned(self) -> dict[str, str]:
        """Layer -> reason why (some of) its filters must stay as they are."""
        self._check()
        return dict(self._pinned)

    @property
    def layers(self) -> list[str]:
        """Convolutions and linear layers reached by the trace, in order of execution."""
        self._check()
        return list(self._regions)

    def why_absent(self, layer: str) -> str:
        """Return why a convolution is not among :attr:`layers`."""
        if layer in self._pinned:
            return self._pinned[layer]
        if layer in self._regions:
            return "nothing keeps it out, it is among the layers"
        if self.network and not layer.startswith(f"{self.network}."):
            return f"it is outside of the traced network {self.network!r}"
        return (
            "the trace follows none of its channels: forward does not call it, or it is a grouped convolution behind "
            "a layer that mixes channels"
        )

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Every call of the traced network in order, with the shape of its (first) result."""
        return self._operations

    def group(self, name: str) -> ChannelGroup:
        """The group called ``name``.

        Raises:
            KeyError: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no channel group {name!r}; the groups are {', '.join(g.name for g in self._groups)}")

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the trace as given, (args, kwargs)."""
        return self._arguments

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the trace, (args, kwargs), with floating tensors on ``meta`` (shape only)."""

        def shape_only(leaf: Any) -> Any:
            return leaf.to("meta") if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return cast(tuple[tuple[Any, ...], dict[str, Any]], tree_map(shape_only, self._arguments))

    def consumers_of(self, layer: str) -> tuple[str, ...]:
        """Return the layers that read a channel of ``layer``, also through sums."""
        self._region(layer)
        return self._consumers[layer]

    def coupled(self, layer: str) -> tuple[str, ...]:
        """Return other layers that share a channel with ``layer``: they write into the same sum, or act on it
        depthwise."""
        self._region(layer)
        return self._coupled[layer]

    def filter_count(self, layer: str) -> int:
        """Number of filters of ``layer`` (output features of a linear layer)."""
        return self._region(layer).count

    def row_dim(self, tensor: str) -> int:
        """Return the dimension of ``tensor`` that filters index: 0, or 1 for the weight of a transposed convolution."""
        return self._row_dims.get(tensor, 0)

    def private(self, layer: str, filters: Tensor | None = None) -> list[tuple[str, Tensor]] | str:
        """Return the tensor rows to set to zero (and hold) so that filters of ``layer`` contribute exactly nothing.

        Args:
            layer: canonical name of a convolution or linear layer.
            filters: (n,) filter indices, all by default.

        Returns:
            List of (tensor name, rows): the weight, the bias, and every per-channel tensor up to the first join or
            dense consumer. Rows are in the order of ``filters``; they index :meth:`row_dim` of the tensor. Or a string
            with the reason why this is impossible.
        """
        region = self._region(layer)
        if region.count == 0:
            if not self._coupled[layer]:
                return (
                    f"forward computes the kernel of {layer} from its weight, or the trace follows none of its channels"
                )
            whose = f"filters belong to the channels of {', '.join(self._coupled[layer])}"
            grouped = getattr(find_submodule(self.model, layer), "groups", 1) > 1
            return (
                f"{layer} is depthwise: its {whose}" if grouped else f"{layer} has no channel of its own: its {whose}"
            )
        wanted = np.arange(region.count) if filters is None else filters.detach().cpu().numpy().astype(np.int64)
        for j in wanted.tolist():
            if not 0 <= j < region.count:
                raise IndexError(f"{layer} has {region.count} filters, there is no filter {j}")
            if j in region.exposed:
                return region.exposed[j]
        entries: list[tuple[str, Tensor]] = []
        for tensor, rows, owners in region.silence:
            for chosen in _by_occurrence(owners):
                row_of = dict(zip(owners[chosen].tolist(), rows[chosen].tolist(), strict=True))
                found = [row_of[j] for j in wanted.tolist() if j in row_of]
                if found:
                    entries.append((tensor, torch.tensor(found)))
        return entries

    def consumer_columns(self, layer: str) -> tuple[ConsumerColumns, ...]:
        """Return the columns of later layers that read only filters of ``layer`` (not behind a sum)."""
        return self._region(layer).columns

    def _region(self, layer: str) -> FilterRegion:
        self._check()
        if layer not in self._regions:
            raise ChannelGraphError(f"{layer!r} is not a layer of the traced network: {', '.join(self._regions)}")
        return self._regions[layer]


def ranges(rows: Iterable[int]) -> str:
    """Return ranges as text: ``0-3, 7`` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and row == parts[-1][1] + 1:
            parts[-1][1] = int(row)
        else:
            parts.append([int(row), int(row)])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _by_occurrence(owners: Ints) -> list[Ints]:
    """Return the positions of the first, second, ... appearance of each owner."""
    seen: dict[int, int] = {}
    ranks: list[list[int]] = []
    for position, owner in enumerate(owners.tolist()):
        rank = seen.get(owner, 0)
        seen[owner] = rank + 1
        if rank == len(ranks):
            ranks.append([])
        ranks[rank].append(position)
    return [np.asarray(part, dtype=np.int64) for part in ranks]
