"""Make channels equal (tie), and make the network narrower (narrow)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..filters import named_modules, named_tensors
from ..tensors.arguments import check_choice
from .answers import ChannelAnswers, ChannelGroup, rows_back, rows_first
from .channel_map import ChannelMap
from .counted import CountedGroupNorm, CountedNorm, CountedReduction, counted
from .errors import NarrowingError
from .forms import Form, FormChoice, Masks, fixing_bodies, graph_bodies, refusal, take_graph_form
from .graph_form import BodyGraph
from .history import narrowing_step, remember
from .modules import copy_network, device_of, replace_tensors, set_norm_width, update_attributes
from .record import Node, arguments, operator_name
from .widths import Layout, layout_for, record_again, stuck_sets, widths_of

__all__ = [
    "Cut",
    "Narrowing",
    "check_blocks",
    "count_in_bodies",
    "cut_in_place",
    "leave_out",
    "masks_of",
    "merging",
    "narrow",
    "representatives",
    "tie",
    "weigh",
]

Clusters = Mapping[str, Tensor]


def representatives(group: ChannelGroup, clusters: Tensor) -> Tensor:
    """(size,) index of the first member of each channel's cluster.

    Raises:
        NarrowingError: ``clusters`` is not one integer per channel of the group.
    """
    if not isinstance(clusters, Tensor):
        raise NarrowingError(
            f"group {group.name!r} has {group.size} channels: expected a tensor of that many cluster numbers, got "
            f"{type(clusters).__name__}; torch.tensor([...]) makes one of a list"
        )
    if clusters.shape != (group.size,) or clusters.is_floating_point() or bool((clusters < 0).any()):
        raise NarrowingError(
            f"group {group.name!r} has {group.size} channels: expected that many integers, the number of each one's "
            f"cluster from 0, got {clusters.dtype} of shape {tuple(clusters.shape)}"
            + (f" with the entry {int(clusters.min())}" if clusters.shape == (group.size,) else "")
        )
    clusters = clusters.detach().cpu().long()
    _, index = torch.unique(clusters, return_inverse=True)
    first = torch.full((int(index.max()) + 1,), group.size, dtype=torch.long)
    first.scatter_reduce_(0, index, torch.arange(group.size), "amin")
    if group.blocks is not None:
        if bool((group.blocks[first[index]] != group.blocks).any()):
            i = int((group.blocks[first[index]] != group.blocks).nonzero()[0])
            raise NarrowingError(
                f"group {group.name!r} has {group.block_count} blocks, and cluster {int(clusters[i])} joins channels "
                f"{int(first[index][i])} and {i} of different blocks: a grouped layer reads or writes its channels "
                f"block by block. Cluster inside ChannelGroup.blocks, as cluster_channels does"
            )
        check_blocks(group, first, "clusters")
    return first[index]


def check_blocks(group: ChannelGroup, kept: Tensor, what: str) -> None:
    """Raise unless every block of ``group`` keeps equally many channels.

    Raises:
        NarrowingError: some do not.
    """
    if group.blocks is None:
        return
    counts = torch.bincount(group.blocks[kept], minlength=group.block_count)
    if len(counts.unique()) > 1:
        raise NarrowingError(
            f"{what} of group {group.name!r} leave {counts.tolist()} channels in its {group.block_count} blocks: a "
            f"grouped layer needs equally many in every block (see ChannelGroup.blocks)"
        )


def _by_name(graph: ChannelAnswers, wanted: Mapping[str, object]) -> dict[str, ChannelGroup]:
    """The groups that are named.

    Raises:
        NarrowingError: a group is unknown; the message says why a layer is pinned.
    """
    known = {group.name: group for group in graph.groups}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        reasons = [f"{name!r} ({graph.pinned[name]})" if name in graph.pinned else repr(name) for name in unknown]
        raise NarrowingError(f"no such channel group: {', '.join(reasons)}; the groups are {', '.join(known)}")
    return {name: known[name] for name in wanted}


def merging(graph: ChannelAnswers, clusters: Clusters) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``keep`` and ``sums`` for :func:`narrow` that merge every cluster into its first member.

    Args:
        graph: channel graph of the network.
        clusters: group name -> (size,) cluster index of each channel.

    Raises:
        NarrowingError: unknown group, or clusters of a wrong shape.
    """
    groups = _by_name(graph, clusters)
    sums = {name: representatives(groups[name], index) for name, index in clusters.items()}
    return {name: first.unique() for name, first in sums.items()}, sums


@torch.no_grad()
def tie(model: nn.Module, graph: ChannelAnswers, clusters: Clusters) -> None:
    """Set every filter and per-channel entry to the mean of its cluster, in place.

    Args:
        model: the traced network or a copy of it.
        graph: its channel graph.
        clusters: group name -> (size,) cluster index of each channel.
    """
    tensors = named_tensors(model)
    for name, group in _by_name(graph, clusters).items():
        first = representatives(group, clusters[name])
        members = (first != torch.arange(group.size)).nonzero().squeeze(1)
        if not len(members):
            continue  # every channel is its own mean
        heads = first[members].unique()
        sums = _Sums.of(heads, members, first[members], group.size)
        counts = torch.bincount(first, minlength=group.size)[sums.start]
        tied = torch.isin(first, heads).nonzero().squeeze(1)
        source = sums.back[torch.searchsorted(heads, first[tied])]
        for part in group.parts:
            if part.kind == "consumer":
                continue
            tensor = tensors[part.tensor]
            wide = torch.float64 if tensor.device.type == "cpu" else torch.float32
            laid = rows_first(tensor, part.dim, part.groups)
            for rows in part.rows.T:
                total = sums.add(laid, 0, wide, rows)
                mean = total / counts.to(total).reshape(-1, *[1] * (total.ndim - 1))
                means = mean.to(tensor.dtype).index_select(0, source.to(tensor.device))
                laid.index_copy_(0, rows[tied].to(tensor.device), means)
            if part.groups > 1:
                tensor.copy_(rows_back(laid, part.dim, part.groups))


@dataclass(frozen=True)
class _Sums:
    """Sums of rows by few additions of many rows each; ``index_add_`` adds row by row, and takes several times as long.

    Attributes:
        start: (n,) rows that others are added to, those with most additions first, then rows without any.
        ranks: the first, second, ... row that is added to each of the first entries of ``start``.
        back: where the rows of ``index`` are in ``start``.
    """

    start: Tensor
    ranks: tuple[Tensor, ...]
    back: Tensor

    @classmethod
    def of(cls, index: Tensor, rows: Tensor, into: Tensor, size: int) -> _Sums:
        """Plan the sums of each of ``index`` with the ``rows`` that go ``into`` it, in order; ``size`` rows in all."""
        order = into.argsort(stable=True)
        rows, (targets, counts) = rows[order], into[order].unique_consecutive(return_counts=True)
        begin, most_first = counts.cumsum(0) - counts, counts.argsort(descending=True, stable=True)
        ranks = [
            rows[begin[most_first[: int((counts > rank).sum())]] + rank]
            for rank in range(int(counts.max()) if len(counts) else 0)
        ]
        start = torch.cat([targets[most_first], index[~torch.isin(index, targets)]])
        place = torch.zeros(size, dtype=torch.int64).index_copy_(0, start, torch.arange(len(start)))
        return cls(start, tuple(ranks), place[index])

    def add(self, value: Tensor, dim: int, dtype: torch.dtype, numbers: Tensor | None = None) -> Tensor:
        """Sums along ``dim`` in the order of ``start``; ``numbers``: the place in ``value`` of each row."""

        def pick(rows: Tensor) -> Tensor:
            return value.index_select(dim, (rows if numbers is None else numbers[rows]).to(value.device))

        total = pick(self.start).to(dtype)
        for rows in self.ranks:
            total.narrow(dim, 0, len(rows)).add_(pick(rows))
        return total


@dataclass
class Cut:
    """Change of one dimension of one tensor.

    Attributes:
        removed: removed rows.
        added: consumer columns among these that are added to others first, and the columns they are added to.
        index: what is kept, in this order; by default all that is not removed.
        groups: rows count through that many equal parts of dimension 0, see :class:`TensorRows`.
    """

    removed: list[Tensor] = field(default_factory=list)
    added: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    index: Tensor | None = None
    groups: int = 1
    _sums: _Sums | None = None

    def kept(self, size: int) -> Tensor:
        """What is kept of ``size`` rows, in order."""
        if self.index is None:
            mask = torch.ones(size, dtype=torch.bool)
            for rows in self.removed:
                mask[rows] = False
            self.index = mask.nonzero().squeeze(1)
        return self.index

    def sums(self, size: int) -> _Sums:
        """The additions to what is kept of ``size`` rows."""
        if self._sums is None:
            columns, into = (torch.cat(part) for part in zip(*self.added, strict=True))
            self._sums = _Sums.of(self.kept(size), columns, into, size)
        return self._sums


Cuts = dict[str, dict[int, Cut]]


@dataclass(frozen=True)
class _Selection:
    """Remaining channels of one group."""

    group: ChannelGroup
    kept: Tensor  # (n,) ascending
    sums: Tensor  # (size,) kept channel that takes over the columns of each, -1 for none

    @property
    def removed(self) -> Tensor:
        """(size - n,) the other channels."""
        mask = torch.ones(self.group.size, dtype=torch.bool)
        mask[self.kept] = False
        return mask.nonzero().squeeze(1)


def _selections(graph: ChannelAnswers, keep: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> list[_Selection]:
    _by_name(graph, sums)
    selections = []
    for name, group in _by_name(graph, keep).items():
        kept = torch.as_tensor(keep[name]).detach().cpu()
        whole = kept.ndim == 1 and not kept.is_floating_point() and kept.dtype != torch.bool and len(kept) > 0
        if not whole or int(kept.min()) < 0 or int(kept.max()) >= group.size or len(kept.unique()) < len(kept):
            raise NarrowingError(
                f"keep[{name!r}] must list at least one of the channels 0..{group.size - 1}, each once, as integers; "
                f"got {keep[name]!r}"
            )
        kept = kept.long().sort().values
        into = torch.full((group.size,), -1)
        if name in sums:
            into = sums[name].detach().cpu().long()
            if into.shape != (group.size,) or not bool(
                torch.isin(into, torch.cat([kept, kept.new_tensor([-1])])).all()
            ):
                raise NarrowingError(
                    f"sums[{name!r}] must hold, for each of {group.size} channels, a channel of keep or -1; got "
                    f"{sums[name]!r}"
                )
            if not torch.equal(into[kept], kept):
                raise NarrowingError(f"sums[{name!r}] must hold each kept channel at its own place")
            if group.blocks is not None and bool((group.blocks[into] != group.blocks)[into >= 0].any()):
                raise NarrowingError(f"sums[{name!r}] adds channels of one block to another (see ChannelGroup.blocks)")
        check_blocks(group, kept, f"keep[{name!r}]")
        if len(kept) < group.size:
            selections.append(_Selection(group, kept, into))
    if unkept := [name for name in sums if name not in keep]:
        raise NarrowingError(f"sums names {unkept[0]!r}, which keep does not")
    return selections


def _cuts(selections: list[_Selection]) -> Cuts:
    cuts: Cuts = {}
    for selection in selections:
        removed = selection.removed
        summed = removed[selection.sums[removed] >= 0]
        for part in (*selection.group.parts, *selection.group.counted):
            cut = cuts.setdefault(part.tensor, {}).setdefault(part.dim, Cut(groups=part.groups))
            cut.removed.append(part.rows[removed].reshape(-1))
            if part.kind in ("consumer", "counted") and len(summed):
                cut.added.append((part.rows[summed].reshape(-1), part.rows[selection.sums[summed]].reshape(-1)))
    return cuts


def narrow(
    model: nn.Module,
    graph: ChannelAnswers,
    keep: Mapping[str, Tensor],
    sums: Mapping[str, Tensor] | None = None,
    *,
    form: Form = "auto",
) -> nn.Module:
    """A copy of ``model`` with fewer channels.

    The rows of kept channels stay as they are, in order. With ``sums`` the columns of removed channels are added to
    those of kept ones: exact if the two channels are equal (see :func:`tie`). Without, they are dropped: exact if the
    channels are silent. Modules are narrowed, ``forward`` is not rewritten; submodules that move channels become a
    :class:`ChannelMap`. Where a forward fixes widths that differ from the new ones, its module, and no other, takes
    graph form.

    Args:
        model: the traced network or a copy of it (for instance in another dtype).
        graph: its channel graph.
        keep: group name -> (n,) indices of the channels that remain; other groups stay as they are.
        sums: group name -> (size,) index of the kept channel whose columns take up those of each channel, -1 for none;
            :func:`merging` makes both of clusters.
        form: see :class:`Narrowing`.

    Returns:
        A module of the same class (a ``GraphBody`` where the forward of ``model`` itself takes graph form); dtype,
        device, ``requires_grad``, mode and memory format are kept.

    Raises:
        NarrowingError: unknown group, indices that do not fit, or a width that ``form`` cannot express.
    """
    return Narrowing(graph, keep, sums, form=form)(model)


class Narrowing:
    """Plan of :func:`narrow`, made once for any number of copies of the network.

    Args:
        graph: channel graph of the network.
        keep: see :func:`narrow`.
        sums: likewise.
        form: ``"module"`` keeps every class and takes only widths that forward follows by itself. ``"graph"`` makes a
            ``torch.fx.GraphModule`` of every submodule whose forward decides where the chosen channels go. ``"auto"``
            does so only where module form cannot express the widths.

    Attributes:
        forms: the form of each submodule whose forward decides where the chosen channels go, and why.

    Raises:
        ValueError: an unknown form.
        NarrowingError: see :func:`narrow`.
    """

    def __init__(
        self,
        graph: ChannelAnswers,
        keep: Mapping[str, Tensor],
        sums: Mapping[str, Tensor] | None = None,
        *,
        form: Form = "auto",
    ) -> None:
        check_choice("form", form, Form)
        record_again(graph)
        self._graph = graph
        self._selections = selections = _selections(graph, keep, sums or {})
        self._kept = {name: torch.as_tensor(kept) for name, kept in keep.items()}
        self._sums, self._form = dict(sums or {}), form
        self._cuts = _cuts(selections)
        self._fixing = fixing_bodies(graph, graph_channels(selections))
        bound = frozenset().union(*graph.constrained)
        tied = [s for s in selections if int(s.group.channels[0]) in bound]
        self._tied, self._layout, self._bodies = self._choose(selections, tied)
        by_module = {c for s in self._tied for c in s.group.channels.tolist()}
        followed = fixing_bodies(graph, by_module)
        written = {body.path for body in self._bodies}
        self.forms = tuple(
            FormChoice(path, "graph" if path in written else "module", f"{operator} fixes widths")
            for path, operator in self._fixing.items()
            if path in written or path in followed
        ) + tuple(
            FormChoice(path, "graph", f"{operator} counts channels")
            for path, operator in self._counting.items()
            if path not in self._fixing
        )

    def _choose(
        self, selections: list[_Selection], tied: list[_Selection]
    ) -> tuple[list[_Selection], Layout | None, list[BodyGraph]]:
        """(selections in module form that forward ties together, the network at their widths, bodies in graph form)."""
        graph, fixing = self._graph, self._fixing
        self._counting = _bodies_of(counted_reductions(graph, _counts(graph, self._cuts)))
        if self._form != "graph" and not graph.recording.literal.keys() & fixing.keys() and not self._counting:
            layout = _layout_of(graph, tied) if tied else None
            if not tied or layout is not None:
                return tied, layout, []
        if self._form == "module":
            raise _inexpressible(graph, tied, fixing, self._counting)
        stuck = frozenset().union(*stuck_sets(graph))
        first = [s for s in tied if int(s.group.channels[0]) in stuck]
        layout = _layout_of(graph, first) if first else None
        if first and layout is None:
            raise _inexpressible(graph, first, {}, {})
        done = {s.group.name for s in first}
        second = [s for s in selections if s.group.name not in done]
        narrower = graph if layout is None else layout.graph
        if layout is not None:
            narrower.recording.literal.update(graph.recording.literal)
            second = self._remaining(narrower, second)
        paths = fixing_bodies(narrower, {int(c) for s in second for c in s.group.channels})
        counted = counted_reductions(narrower, _counts(narrower, _cuts(second)))
        return first, layout, graph_bodies(narrower, paths | _bodies_of(counted), masks_of(narrower, second), counted)

    def _remaining(self, graph: ChannelAnswers, selections: list[_Selection]) -> list[_Selection]:
        """Selections by the graph of a network that is narrower in other groups."""
        names = {s.group.name for s in selections}
        sums = {n: t for n, t in self._sums.items() if n in names}
        return _selections(graph, {n: self._kept[n] for n in self._kept if n in names}, sums)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        """The narrow copy of ``model``."""
        graph, selections = self._graph, self._selections
        tied = {s.group.name for s in self._tied}
        if self._layout is None:
            cuts = self._cuts
            result = _copy_and_cut(model, cuts)
            _install_counts(result, graph, cuts)
            _install_maps(result, graph, selections, device_of(result))
        else:
            result = _narrow_tied(model, graph, self._tied, self._layout)
            rest = [s for s in selections if s.group.name not in tied]
            if rest:
                cut_in_place(result, self._layout.graph, self._remaining(self._layout.graph, rest))
        _set_bare_widths(result, graph, selections)
        result = take_graph_form(result, self._bodies)
        return remember(result, self.step(), of=model)

    def step(self) -> dict[str, Any]:
        """Return the record that a file needs to repeat this on a fresh network, as plain values and integer
        tensors."""
        return narrowing_step(self._graph, self._kept, self._sums, "graph" if self._bodies else "module")


def masks_of(graph: ChannelAnswers, selections: list[_Selection]) -> Masks:
    """Return masks of the positions of each recorded tensor that ``selections`` keep."""
    cuts = [(t, d, cut) for t, dims in _cuts(selections).items() for d, cut in dims.items() if cut.groups == 1]
    removed = {(tensor, dim): _rows(cut.removed) for tensor, dim, cut in cuts}
    return Masks(graph, _targets(selections), removed)


def _rows(parts: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    return torch.cat([rows.reshape(-1) for rows in parts]).numpy()


def _inexpressible(
    graph: ChannelAnswers, tied: list[_Selection], fixing: Mapping[str, str], counting: Mapping[str, str]
) -> NarrowingError:
    """The error about widths that no form can express."""
    if counting and not tied:
        path, operator = next(iter(counting.items()))
        return NarrowingError(
            f"{operator} in {path or 'forward'} must count channels that stand for unequally many, which module form "
            f'cannot; form="auto" writes such a forward as a graph. Or make all clusters equally large'
        )
    wanted = {s.group.name: len(s.kept) for s in tied}
    reasons = [reason for path in fixing_bodies(graph, graph_channels(tied)) if (reason := refusal(graph, path))]
    advice = f": {reasons[0]}" if reasons else '; form="auto" writes such a forward as a graph' if fixing else ""
    return NarrowingError(
        f"forward splits, shuffles or pads channels itself and cannot express the counts {wanted}{advice}. "
        "Ask expressible_counts for counts that fit"
    )


def graph_channels(selections: Sequence[_Selection]) -> set[int]:
    """Channels of the groups of ``selections``."""
    return {channel for s in selections for channel in s.group.channels.tolist()}


def cut_in_place(
    model: nn.Module, graph: ChannelAnswers, selections: list[_Selection], device: torch.device | None = None
) -> None:
    """Narrow the groups of ``selections``, whose counts no forward body ties together, in ``model`` itself.

    Args:
        model: the network.
        graph: its channel graph.
        selections: what remains of which groups.
        device: device of the indices of channel maps, by default that of the network.
    """
    cuts = _cuts(selections)
    _cut(model, cuts)
    _install_counts(model, graph, cuts)
    _install_maps(model, graph, selections, device or device_of(model))


def leave_out(groups: Sequence[ChannelGroup], share: int = 3, *, unlike: bool = False) -> list[_Selection]:
    """Selections that leave out about one in ``share`` channels of every group (of each block).

    They are the last ones, or if ``unlike`` at other places in each group than in those before it.
    """
    selections = []
    for number, group in enumerate(groups):
        size = group.size // group.block_count
        if size > 1:
            left = size - max(1, size // share)
            members = [block.roll(number * unlike) for block in group.members()]
            kept = torch.cat([block[:left] for block in members]).sort().values
            selections.append(_Selection(group, kept, torch.full((group.size,), -1)))
    return selections


def _layout_of(graph: ChannelAnswers, tied: list[_Selection]) -> Layout | None:
    """Return the network at the widths of ``tied`` if forward itself follows them."""
    wanted = {s.group.name: len(s.kept) for s in tied}
    layout = layout_for(graph, widths_of(graph, wanted))
    if layout is None or any(layout.counts[name] != count for name, count in wanted.items()):
        return None
    return layout if _keeps_blocks(graph, tied, layout) else None


def _keeps_blocks(graph: ChannelAnswers, tied: list[_Selection], layout: Layout) -> bool:
    """True if kept channels reach the blocks of grouped layers in the order in which forward brings them there."""
    kept = {s.group.name: s.kept for s in tied}
    blocks = {
        group.name: group.blocks[kept.get(group.name, slice(None))].tolist()
        for group in graph.groups
        if group.blocks is not None
    }
    pairs: set[tuple[tuple[str, int], tuple[str, int]]] = set()
    for group in layout.graph.groups:
        there = [0] * group.size if group.blocks is None else group.blocks.tolist()
        for channel, block in zip(group.channels.tolist(), there, strict=True):
            name, i = layout.channels.get(channel, ("", 0))
            if name in blocks:
                pairs.add(((group.name, block), (name, blocks[name][i])))
    return len(pairs) == len({new for new, _ in pairs}) == len({old for _, old in pairs})


def _narrow_tied(model: nn.Module, graph: ChannelAnswers, tied: list[_Selection], layout: Layout) -> nn.Module:
    """Narrow groups whose counts a forward body ties together, in module form."""
    cuts = _cuts(tied)
    kept = {s.group.name: s.group.channels[s.kept].tolist() for s in tied}
    places = {group.name: kept.get(group.name, group.channels.tolist()) for group in graph.groups}
    # Channel of the narrow network -> channel of the original.
    source = {new: places[name][i] if name else i for new, (name, i) in layout.channels.items()}
    layout.graph.rebind(layout.model)
    _follow_layout(graph, layout.graph, source, cuts)
    result = _copy_and_cut(model, cuts)
    _install_counts(result, graph, cuts)
    layout.graph.rebind(result)
    return result


def _follow_layout(graph: ChannelAnswers, narrower: ChannelAnswers, source: Mapping[int, int], cuts: Cuts) -> None:
    """Order kept channels as the network's forward expects them."""
    filters = {channel for row in graph.table.filters().values() for channel in row}
    grouped = graph.recording.state.grouped
    old_rows, new_rows = graph.table.rows_by_channel(), narrower.table.rows_by_channel()
    lengths = {
        g: {name: tuple(t.shape) for name, t in named_tensors(g.model).items()}
        | {f"{name}.counts": (size,) for name, size in g.counted_sizes.items()}
        for g in (graph, narrower)
    }
    for (tensor, dim), by_channel in new_rows.items():
        parts = grouped[tensor].groups if dim == 1 and tensor in grouped else 1
        places = {
            row: old
            for new, rows in by_channel.items()
            if new in source
            for row, old in zip(rows, old_rows[tensor, dim][source[new]], strict=True)
        }
        # What no filter owns (columns that read the network input, or padding) stays in order.
        owned = {row for channel, rows in old_rows[tensor, dim].items() if channel in filters for row in rows}
        rest = [row for row in range(lengths[graph][tensor][dim] * parts) if row not in owned]
        free = [row for row in range(lengths[narrower][tensor][dim] * parts) if row not in places]
        if len(rest) != len(free):
            raise NarrowingError(
                f"{tensor} cannot be narrowed: forward adds or drops entries that no channel owns. Leave its layer out "
                f"with exclude"
            )
        places.update(zip(free, rest, strict=True))
        index = torch.tensor([places[i] for i in range(len(places))])
        cuts.setdefault(tensor, {}).setdefault(dim, Cut(groups=parts)).index = index


def _copy_and_cut(model: nn.Module, cuts: Cuts) -> nn.Module:
    """Return a copy with narrower tensors. Removed parts are not copied first."""
    tensors = named_tensors(model)
    narrower: dict[int, Tensor] = {}
    for name, dims in cuts.items():
        if name not in tensors:  # counts of a norm that has none yet
            continue
        old = tensors[name]
        new = _cut_tensor(old, dims)
        narrower[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    result = copy_network(model, narrower)
    for module in replace_tensors(result, {id(new): new for new in narrower.values()}):
        update_attributes(module)
    return result


def _cut(model: nn.Module, cuts: Cuts) -> None:
    """Replace the tensors in ``cuts`` by narrower ones, in place."""
    tensors = named_tensors(model)
    replaced = {id(tensors[name]): _cut_tensor(tensors[name], dims) for name, dims in cuts.items() if name in tensors}
    for module in replace_tensors(model, replaced):
        update_attributes(module)


def _cut_tensor(tensor: Tensor, dims: Mapping[int, Cut]) -> Tensor:
    value = tensor.detach()
    wide = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    for dim, cut in sorted(dims.items()):
        parts = cut.groups
        if parts > 1:  # the blocks of dimension 0 move beside those of dimension 1, and back
            value, dim = rows_first(value, dim, parts), 0
        index = cut.kept(value.shape[dim])
        if value.is_meta:
            value = value.new_empty([len(index) if d == dim else n for d, n in enumerate(value.shape)])
        elif cut.added:
            sums = cut.sums(value.shape[dim])
            value = sums.add(value, dim, wide).to(value.dtype).index_select(dim, sums.back.to(value.device))
        else:
            value = value.index_select(dim, index.to(value.device))
        if parts > 1:
            value = rows_back(value, dim, parts)
    for memory_format, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=memory_format):
            return value.contiguous(memory_format=memory_format)
    return value.contiguous()


def _install_counts(model: nn.Module, graph: ChannelAnswers, cuts: Cuts) -> None:
    """Have norms over channels weigh those that stand for unequally many, and know blocks of unequally many."""
    counts = {name: numbers for name, numbers in _counts(graph, cuts).items() if name in graph.norms}
    weigh(model, graph, counts, {name: _block_sizes(graph, name, cuts) for name in counts})


def _block_sizes(graph: ChannelAnswers, name: str, cuts: Cuts) -> list[int]:
    """Channels that are left in each block of a norm."""
    site = graph.norms[name]
    groups, sizes = site.form[1].get("groups", 1), site.form[1].get("sizes")
    blocks = torch.arange(groups).repeat_interleave(torch.tensor(sizes or [site.size // groups] * groups))
    left = {dim: dataclasses.replace(cut, added=[]) for dim, cut in cuts[f"{name}.counts"].items()}
    return _cut_tensor(blocks, left).bincount().tolist()


def _set_bare_widths(model: nn.Module, graph: ChannelAnswers, selections: Sequence[_Selection]) -> None:
    """Tell norms without tensors how many channels they see: an instance norm warns where the number is another."""
    modules, state = named_modules(model), graph.recording.state
    removed = [s.group.channels[s.removed].numpy() for s in selections]
    for path, owners in state.bare_norms.items():
        gone = int(np.isin(state.table.roots(owners), np.concatenate([*removed, [0][:0]])).sum())
        module = modules.get(path)
        if gone and isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features -= gone


def _counts(graph: ChannelAnswers, cuts: Cuts) -> dict[str, Tensor]:
    """Return norm or reduction over channels -> number of original channels for each remaining one."""
    return {
        name: _cut_tensor(torch.ones(size, dtype=torch.int64), cuts[f"{name}.counts"])
        for name, size in graph.counted_sizes.items()
        if f"{name}.counts" in cuts
    }


def counted_reductions(graph: ChannelAnswers, counts: Mapping[str, Tensor]) -> dict[Node, CountedReduction]:
    """Reductions over channels that must count them -> what takes their place in a graph form.

    Args:
        graph: channel graph of the network.
        counts: name of the reduction, and of norms -> how often it counts each channel that is left.
    """
    found = {}
    for name, site in graph.recording.state.reductions.items():
        if name in counts and not CountedReduction.plain(site.kind, counts[name]):
            call, rank = arguments(site.node), len(site.node.inputs[0].shape)
            dims = site.dim if site.kind == "product" else call.get("dim")
            dims = [dims] if isinstance(dims, int) else dims or range(rank)
            found[site.node] = CountedReduction(
                counts[name],
                kind=site.kind,
                dim=site.dim,
                dims=[d % rank for d in dims],
                keepdim=bool(call.get("keepdim", False)),
            )
    return found


def _bodies_of(counted: Mapping[Node, CountedReduction]) -> dict[str, str]:
    """Path of each body -> a reduction in its forward."""
    return {node.module: operator_name(node) for node in counted}


def count_in_bodies(model: nn.Module, graph: ChannelAnswers, counts: Mapping[str, Tensor]) -> nn.Module:
    """Put reductions that count channels into ``model``, which keeps its widths; returns it, or what takes its place.

    Args:
        model: a network like that of ``graph``.
        graph: its channel graph.
        counts: reduction over channels -> (C,) how often it counts each.
    """
    record_again(graph)
    counted = counted_reductions(graph, counts)
    return take_graph_form(model, graph_bodies(graph, _bodies_of(counted), masks_of(graph, []), counted))


def weigh(
    model: nn.Module,
    graph: ChannelAnswers,
    counts: Mapping[str, Tensor],
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Give norms over channels their counts, in place. Norms whose counts and blocks are all equal stay plain.

    Args:
        model: a network like that of ``graph``, at any widths.
        graph: its channel graph.
        counts: norm -> (C,) how often it counts each channel. Norms that have counts already keep theirs.
        sizes: norm -> channels of each of its blocks, by default equally many.
    """
    modules = named_modules(model)
    for name, numbers in counts.items():
        module, blocks = modules[name], (sizes or {}).get(name, ())
        uneven = len(set(blocks)) > 1
        if isinstance(module, CountedNorm):
            if isinstance(module, CountedGroupNorm) and (uneven or module.sizes is not None):
                module.sizes = tuple(blocks) or module.sizes
            continue
        if bool((numbers == numbers[0]).all()) and not uneven:
            set_norm_width(module, len(numbers))
        else:
            kind, options = graph.norms[name].form
            form = kind, options | ({"sizes": tuple(blocks)} if uneven else {})
            _replace_module(model, module, counted(module, form, numbers.to(device_of(model))))


def _replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def _install_maps(model: nn.Module, graph: ChannelAnswers, selections: list[_Selection], device: torch.device) -> None:
    if not graph.map_sites:
        return
    target = _targets(selections)
    modules = named_modules(model)
    for site in graph.map_sites:
        expand, keep = _expand(site.reads, target), _keep(site.writes, target)
        if expand is None and keep is None:
            continue
        inner = modules[site.module]
        expand, keep = (None if t is None else t.to(device) for t in (expand, keep))
        new = inner.narrowed(expand, keep) if isinstance(inner, ChannelMap) else ChannelMap(inner, expand, keep)
        new.train(inner.training)
        _replace_module(model, inner, new)


def _targets(selections: Sequence[_Selection]) -> dict[int, int]:
    """Return channel -> channel that replaces it, -1 for none."""
    target: dict[int, int] = {}
    for selection in selections:
        channels, sums = selection.group.channels, selection.sums.clone()
        sums[selection.kept] = selection.kept
        into = torch.where(sums >= 0, channels[sums], -1)
        target.update(zip(channels.tolist(), into.tolist(), strict=True))
    return target


def _kept_positions(channels: tuple[int, ...], target: Mapping[int, int]) -> list[int]:
    """Positions of a tensor that remain: unowned ones and kept channels."""
    return [i for i, c in enumerate(channels) if target.get(c, c) == c]


def _keep(channels: tuple[int, ...], target: Mapping[int, int]) -> Tensor | None:
    kept = _kept_positions(channels, target)
    return None if len(kept) == len(channels) else torch.tensor(kept)


def _expand(channels: tuple[int, ...], target: Mapping[int, int]) -> Tensor | None:
    """For each original position, where its channel is found in the narrow tensor."""
    kept = _kept_positions(channels, target)
    if len(kept) == len(channels):
        return None
    where: dict[tuple[int, int], int] = {}
    seen: dict[int, int] = {}
    for position, i in enumerate(kept):
        c = channels[i]
        where[c, seen.get(c, 0)] = position
        seen[c] = seen.get(c, 0) + 1
    index, seen = [], {}
    unowned = {i: position for position, i in enumerate(kept)}
    for i, c in enumerate(channels):
        rank = seen.get(c, 0)
        seen[c] = rank + 1
        if i in unowned:
            index.append(unowned[i])
        elif target[c] < 0 and kept:
            index.append(0)  # this entry is dropped behind the map
        elif (target[c], rank) in where:
            index.append(where[target[c], rank])
        else:
            raise NarrowingError(
                "merged channels do not appear equally often in the input of a submodule that moves channels"
            )
    return torch.tensor(index)
