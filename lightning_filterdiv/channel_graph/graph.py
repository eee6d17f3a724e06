"""The channel graph: which tensors belong to channel ``j`` of a layer, and who consumes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..filters import canonical_name
from .classes import ChannelGroup, Table
from .errors import ChannelGraphError, StaleGraphError
from .export import bare_module
from .labels import Ints
from .sites import MapSite

__all__ = ["ChannelGraph", "ConsumerColumns", "FilterRegion", "Operation", "ranges", "structure"]


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
    """One call of the traced network: enough to measure depth and resolution without the network."""

    name: str
    operator: str
    module: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class FilterRegion:
    """What the trace recorded about the filters of one layer before channels were joined."""

    count: int
    silence: tuple[tuple[str, Ints, Ints], ...]  # tensor, rows, filters
    columns: tuple[ConsumerColumns, ...]
    exposed: Mapping[int, str]  # filter -> reason


def structure(model: nn.Module) -> dict[str, object]:
    """Module types, tensor shapes: what must not change between a trace and its use. Wrappers do not count."""
    found: dict[str, object] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if bare_module(module) is module:
            found[canonical_name(name)] = type(module)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        found[f"{canonical_name(name)} "] = tuple(tensor.shape)
    return found


class ChannelGraph:
    """Exact, fail-closed answers about the channels of a network. Made by :meth:`trace`.

    All names are canonical (without ``_orig_mod.``, ``module.``). The model is held, nothing of it is copied; every
    question raises :class:`StaleGraphError` once its structure has changed.
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
        constrained: list[frozenset[int]],
        table: Table,
        body_moves: Mapping[int, str],
        inputs: Any,
        network: str,
    ) -> None:
        self._model = model
        self._structure = structure(model)
        self._groups, self._pinned, self._regions = groups, pinned, regions
        self._consumers, self._coupled, self._row_dims = consumers, coupled, row_dims
        self._operations = operations
        self._body_moves, self.network = body_moves, network
        self.map_sites, self.constrained, self.table, self._inputs = map_sites, constrained, table, inputs

    @classmethod
    def trace(cls, model: nn.Module, example_inputs: Any = None, *, network: str | None = None) -> ChannelGraph:
        """Trace ``model`` on example inputs.

        Args:
            model: nn.Module or LightningModule, on any device (``meta`` too), compiled or not. It is left as it was.
            example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of ``forward``. Default: the
                model's ``example_input_array``. Also what :func:`capture_inputs` recorded.
            network: trace only this submodule (``"backbone"``), which ``example_inputs`` then belong to. Names stay
                those of ``model``; whatever reads the submodule's outputs counts as network output.

        Raises:
            ExampleInputsError: no example inputs, or forward fails on them.
            TraceError: the network cannot be exported (the message says which part).
            ChannelGraphError: the network has no convolution, or there is no such submodule.
        """
        from .trace import trace

        return trace(model, example_inputs, network)

    def pin_rigid(self) -> None:
        """Pin the groups that no other width of theirs would fit into forward."""
        from .trial import groups_that_do_not_run
        from .widths import rigid_groups

        rigid = rigid_groups(self) if self.constrained else []
        self._groups = [g for g in self._groups if g not in rigid]
        stuck = groups_that_do_not_run(self)
        self._groups = [g for g in self._groups if g not in stuck]
        rows: dict[tuple[str, str], list[int]] = {}
        for group in [*rigid, *stuck]:
            reason = f"their number is fixed by {self._body_moves.get(int(group.channels[0]), 'a number in forward')}"
            for layer in group.layers:
                rows.setdefault((layer, reason), []).extend(group.rows(layer).tolist())
        for (layer, reason), chosen in rows.items():
            some = "" if len(chosen) == self.filter_count(layer) else f"filters {ranges(sorted(chosen))}: "
            before = f"{self._pinned[layer]}; " if layer in self._pinned else ""
            self._pinned[layer] = f"{before}{some}{reason}"

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
        """Whether the traced network still has the structure that was traced."""
        return structure(self._model) == self._structure

    def _check(self) -> None:
        """Raise if the model is not what was traced."""
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
        """Layer -> why (some of) its filters must stay as they are."""
        self._check()
        return dict(self._pinned)

    @property
    def layers(self) -> list[str]:
        """Convolutions and linear layers reached by the trace, in order of execution."""
        self._check()
        return list(self._regions)

    def why_absent(self, layer: str) -> str:
        """Why ``layer``, a convolution that is not among :attr:`layers`, is not."""
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
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the trace; floating tensors are on ``meta`` (shape only)."""
        return cast(tuple[tuple[Any, ...], dict[str, Any]], self._inputs)

    def expressible_counts(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Channels to keep per group, as close to ``wanted`` as forward allows.

        Where a forward body itself splits or pads channels, only some widths fit it. Everything else is returned as
        wanted; groups not mentioned keep all channels.
        """
        counts = {group.name: wanted.get(group.name, group.size) for group in self.groups}
        if not self.constrained:
            return counts
        from .widths import nearest_counts

        return nearest_counts(self, counts)

    def consumers_of(self, layer: str) -> tuple[str, ...]:
        """Layers that read a channel ``layer`` writes into (also through sums)."""
        self._region(layer)
        return self._consumers[layer]

    def coupled(self, layer: str) -> tuple[str, ...]:
        """Other layers that share a channel with ``layer``: they write into the same sum, or act on it depthwise."""
        self._region(layer)
        return self._coupled[layer]

    def filter_count(self, layer: str) -> int:
        """Number of filters of ``layer`` (output features of a linear layer)."""
        return self._region(layer).count

    def row_dim(self, tensor: str) -> int:
        """The dimension of ``tensor`` that filters index: 0, but 1 for the weight of a transposed convolution."""
        return self._row_dims.get(tensor, 0)

    def private(self, layer: str, filters: Tensor | None = None) -> list[tuple[str, Tensor]] | str:
        """What to set to zero (and hold) so that filters of ``layer`` contribute exactly nothing.

        Args:
            layer: canonical name of a convolution or linear layer.
            filters: (n,) filter indices, all by default.

        Returns:
            List of (tensor name, rows): the weight, the bias, and every per-channel tensor up to the first join or
            dense consumer. Rows are in the order of ``filters``; they index :meth:`row_dim` of the tensor. A string
            instead says why this is not possible.
        """
        region = self._region(layer)
        if region.count == 0:
            if not self._coupled[layer]:
                return (
                    f"forward computes the kernel of {layer} from its weight, or no channel of the network reaches it"
                )
            return f"{layer} is depthwise: its filters belong to the channels of {', '.join(self._coupled[layer])}"
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
        """Columns of later layers that read filters of ``layer`` and nothing else (not behind a sum)."""
        return self._region(layer).columns

    def _region(self, layer: str) -> FilterRegion:
        self._check()
        if layer not in self._regions:
            raise ChannelGraphError(f"{layer!r} is not a layer of the traced network: {', '.join(self._regions)}")
        return self._regions[layer]

    def describe(self) -> str:
        """A table of all groups and pinned layers for people."""
        from .describe import describe

        return describe(self)

    def verify(self, example_inputs: Any = None, *, seed: int = 0) -> float:
        """Tie random channels of every group in a float64 copy, narrow it, and compare the outputs.

        Returns:
            Largest relative difference of an output (1e-15 to 1e-12 is rounding).

        Raises:
            NarrowingError: the narrowed network does not run or differs by more than 1e-9.
        """
        from .verify import verify

        return verify(self, example_inputs, seed=seed)


def ranges(rows: Iterable[int]) -> str:
    """``0-3, 7`` for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for row in rows:
        if parts and row == parts[-1][1] + 1:
            parts[-1][1] = int(row)
        else:
            parts.append([int(row), int(row)])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _by_occurrence(owners: Ints) -> list[Ints]:
    """Positions of the first, second, ... appearance of each owner."""
    seen: dict[int, int] = {}
    ranks: list[list[int]] = []
    for position, owner in enumerate(owners.tolist()):
        rank = seen.get(owner, 0)
        seen[owner] = rank + 1
        if rank == len(ranks):
            ranks.append([])
        ranks[rank].append(position)
    return [np.asarray(part, dtype=np.int64) for part in ranks]
