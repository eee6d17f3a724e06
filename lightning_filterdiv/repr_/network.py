"""Drop filters of a network: choose layers, silence filters exactly, hold them still, and bring them back. No Lightning
here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import (
    FAKE_QUANTISED,
    Conv,
    check_rows,
    filter_matrix,
    named_modules,
    named_tensors,
    write_filters,
)
from lightning_filterdiv.optimizer_state import HeldRows, RowHold, initial_state, row_state
from lightning_filterdiv.repr_.functional import regrow_filters
from lightning_filterdiv.tensors.randomness import keyed_generator
from lightning_filterdiv.tensors.sharing import share

__all__ = ["DroppedFilters", "NextLayer", "Slice", "default_layers", "rankable"]

NextLayer = Literal["keep", "zero", "small_random"]
# Share of the spread of the consumer's other columns.
_SMALL = 0.1
_SHORTCUT = re.compile(r"downsample|shortcut|skip|identity", re.IGNORECASE)


# --- layers that can lose filters --------------------------------------------------------------------------------


def default_layers(layers: Mapping[str, Conv], all_layers: Mapping[str, Conv]) -> dict[str, Conv]:
    """Return the ungrouped convolutions of ``layers`` without the network's first trainable one and 1x1 shortcuts.

    Args:
        layers: convolutions that ``exclude`` leaves.
        all_layers: every convolution of the network in the order of its modules. A frozen network beside the one that
            is trained (a teacher, a loss network) may be registered first: the first *trainable* one counts.
    """
    first = next((name for name, conv in all_layers.items() if conv.weight.requires_grad), "")
    return {
        name: conv
        for name, conv in layers.items()
        if name != first and conv.groups == 1 and not (conv.weight[0, 0].numel() == 1 and _SHORTCUT.search(name))
    }


def rankable(graph: ChannelGraph, layers: Mapping[str, Conv]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the filter matrices of layers whose filters can be silenced exactly, and reasons for the others.

    Args:
        graph: channel graph of the network that ``layers`` belong to.
        layers: canonical name -> convolution.

    Returns:
        Layer -> ``(J, d)``, and layer -> reason.
    """
    matrices: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, conv in layers.items():
        region = graph.private(name) if name in graph.layers else graph.why_absent(name)
        if hasattr(conv, "weight_fake_quant"):
            region = FAKE_QUANTISED
        if isinstance(region, str):
            reasons[name] = region
        else:
            matrices[name] = filter_matrix(conv)
    return matrices, reasons


# --- filters that are out ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """Rows of one tensor of the network, by canonical name; ``block`` as in :class:`HeldRows`."""

    tensor: str
    dim: int
    rows: Tensor
    block: tuple[int, int] | None = None

    def packed(self) -> list[Any]:
        """Return plain values for a checkpoint."""
        return [self.tensor, self.dim, self.rows.cpu(), list(self.block) if self.block else None]

    @classmethod
    def unpacked(cls, packed: list[Any]) -> Slice:
        """Inverse of :meth:`packed`."""
        tensor, dim, rows, block = packed
        return cls(tensor, dim, rows, (block[0], block[1]) if block else None)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a copy of the rows."""
        tensor = tensors[self.tensor].detach()
        return tensor.index_select(self.dim, self.rows.to(tensor.device)).clone()

    def held(self, tensors: Mapping[str, Tensor]) -> HeldRows:
        """Return the rows for :class:`RowHold`."""
        parameter = tensors[self.tensor]
        assert isinstance(parameter, nn.Parameter)
        return HeldRows(parameter, self.rows.to(parameter.device), self.dim, self.block)


def _few(items: Sequence[Any], separator: str = ", ") -> str:
    """Return the first six names for a message."""
    more = [f"{len(items) - 6} more"] if len(items) > 6 else []
    return separator.join([*map(str, items[:6]), *more])


def _norm_statistics(private: Mapping[str, list[Slice]], modules: Mapping[str, nn.Module]) -> list[Slice]:
    """Return the running statistics of the norms among the private tensors, for the same channels."""
    channels: dict[str, list[Tensor]] = {}  # by name of the norm
    for part in (part for parts in private.values() for part in parts):
        owner, _, leaf = part.tensor.rpartition(".")
        module = modules[owner]
        if isinstance(module, _NormBase) and module.running_mean is not None and leaf in ("weight", "running_mean"):
            channels.setdefault(owner, []).append(part.rows)
    names = ("running_mean", "running_var")
    return [Slice(f"{owner}.{name}", 0, torch.cat(rows).unique()) for owner, rows in channels.items() for name in names]


class DroppedFilters:
    """Filters that are exactly removed from the function of the network, and the values to bring them back.

    Their private region is zero, so they contribute nothing in training and evaluation. The region, from
    :meth:`ChannelGraph.private`, has weight rows, bias entries, and every per-channel tensor up to the first join or
    dense consumer. :meth:`hold` freezes it, and if asked the columns of consumers. Construct with :meth:`drop`, or with
    :meth:`from_state` after a resume. :meth:`collect` and :meth:`silence` are the two halves of a drop.
    """

    def __init__(
        self,
        model: nn.Module,
        filters: Mapping[str, Tensor],
        private: Mapping[str, list[Slice]],
        consumers: Mapping[str, list[Slice]],
        old: Mapping[str, list[Tensor]],
        statistics: Sequence[tuple[Slice, Tensor]] = (),
    ) -> None:
        self.model = model
        self.filters = dict(filters)
        self._private, self._consumers, self._old = dict(private), dict(consumers), dict(old)
        self._statistics = list(statistics)

    @classmethod
    def drop(cls, model: nn.Module, graph: ChannelGraph, filters: Mapping[str, Tensor]) -> DroppedFilters:
        """Silence ``filters`` in place: :meth:`collect`, then :meth:`silence`."""
        dropped = cls.collect(model, graph, filters)
        dropped.silence()
        return dropped

    @classmethod
    @torch.no_grad()
    def collect(cls, model: nn.Module, graph: ChannelGraph, filters: Mapping[str, Tensor]) -> DroppedFilters:
        """Copy the values that silencing ``filters`` would overwrite. The model is not changed.

        Args:
            model: the network that ``graph`` was traced from.
            graph: channel graph, which knows the tensors of each filter.
            filters: layer name -> ``(n,)`` int64 filter indices.

        Raises:
            ValueError: a layer's filters cannot be silenced exactly; with the graph's reason.
        """
        private: dict[str, list[Slice]] = {}
        consumers: dict[str, list[Slice]] = {}
        chosen = {layer: rows.cpu() for layer, rows in filters.items() if rows.numel()}
        for layer, rows in chosen.items():
            region = graph.private(layer, rows)
            if isinstance(region, str):
                raise ValueError(f"filters of {layer!r} cannot be silenced exactly: {region}")
            private[layer] = [Slice(name, graph.row_dim(name), entries) for name, entries in region]
            consumers[layer] = []
            for reader in graph.consumer_columns(layer):
                columns = reader.columns[torch.isin(reader.filters, rows)]
                if columns.numel():
                    consumers[layer].append(Slice(reader.tensor, reader.dim, columns, reader.block))
        tensors = named_tensors(model)
        old = {layer: [part.of(tensors) for part in parts] for layer, parts in private.items()}
        # They are not changed here, but silent channels pull them to mean 0 and variance 0 in training.
        statistics = [(part, part.of(tensors)) for part in _norm_statistics(private, named_modules(model))]
        return cls(model, chosen, private, consumers, old, statistics)

    @torch.no_grad()
    def silence(self) -> None:
        """Set the private regions to zero in place. Repeating it has no effect."""
        tensors = named_tensors(self.model)
        for part in (part for parts in self._private.values() for part in parts):
            tensors[part.tensor].detach().index_fill_(part.dim, part.rows.to(tensors[part.tensor].device), 0)

    @property
    def silent(self) -> bool:
        """True if the present model has the private regions and all their parameters are zero."""
        tensors = named_tensors(self.model)
        parts = [part for parts in self._private.values() for part in parts]
        try:
            return not any(
                isinstance(tensors[part.tensor], nn.Parameter) and bool(part.of(tensors).any()) for part in parts
            )
        except (IndexError, KeyError, RuntimeError):  # narrowed or rebuilt since
            return False

    @property
    def count(self) -> int:
        """Return the number of dropped filters."""
        return sum(rows.numel() for rows in self.filters.values())

    def regions(self) -> tuple[list[Slice], list[Slice]]:
        """Return the rows that are zero while the filters are dropped, and the columns that read only zeros then."""
        return [p for parts in self._private.values() for p in parts], [p for c in self._consumers.values() for p in c]

    def __str__(self) -> str:
        layers = [f"{layer}: {_few(rows.tolist())}" for layer, rows in self.filters.items()]
        return _few(layers, "; ")

    def found_in(self, model: nn.Module) -> DroppedFilters | None:
        """The same filters of ``model``, perhaps a copy of the one they were dropped in; ``None``: not out there."""
        try:
            here = self if model is self.model else self.moved_to(model)
        except ValueError:
            return None
        return here if here.silent else None

    def moved_to(self, model: nn.Module) -> DroppedFilters:
        """Return the same filters of ``model``.

        Raises:
            ValueError: it is another network.
        """
        return DroppedFilters.from_state(model, self.state())

    def old_filters(self, layer: str) -> Tensor:
        """Return the weights of the dropped filters of ``layer`` before the drop, ``(n, d)`` in the order of
        ``filters``."""
        parts = {part.tensor: (part, old) for part, old in zip(self._private[layer], self._old[layer], strict=True)}
        part, values = parts[f"{layer}.weight"]
        return values.movedim(part.dim, 0).flatten(1)

    def hold(self, consumers: bool) -> RowHold:
        """Return a hold on the dropped filters, and with ``consumers`` also on the columns that read them."""
        tensors = named_tensors(self.model)
        parts = [part for layer in self.filters for part in self._private[layer]]
        if consumers:
            parts += [part for layer in self.filters for part in self._consumers[layer]]
        return RowHold(part.held(tensors) for part in parts if isinstance(tensors[part.tensor], nn.Parameter))

    @torch.no_grad()
    def new_filters(
        self, gain: float, key: tuple[int | str, ...], *, among_ranks: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Draw replacements for the dropped filters, orthogonal to their old values and to the present survivors.

        Args:
            gain: length relative to the mean norm of the layer's survivors, see :func:`regrow_filters`.
            key: key of the random draws, together with the layer's name.
            among_ranks: divide the layers among the ranks of the default process group, all of which must call this.

        Returns:
            Layer -> ``(n, d)`` float64 on the CPU, in the order of ``filters``, and layer -> dimension of the null
            space that they were drawn from.

        Raises:
            ValueError: NaN or inf in a layer, by name.
        """
        layers = {name: cast(Conv, named_modules(self.model)[name]) for name in self.filters}

        def regrown(layer: str) -> tuple[Tensor, int]:
            matrix = filter_matrix(layers[layer]).cpu()
            surviving = torch.ones(matrix.shape[0], dtype=torch.bool, device="cpu")
            surviving[self.filters[layer]] = False
            old, generator = self.old_filters(layer).cpu(), keyed_generator(*key, layer)
            try:
                return regrow_filters(old, matrix[surviving], gain, generator)
            except ValueError as error:
                raise ValueError(
                    f"RePr cannot regrow filters of {layer!r} ({error}): resume from a checkpoint before the training "
                    f"diverged, with a smaller learning rate or gain"
                ) from error

        shapes = {name: filter_matrix(conv).shape for name, conv in layers.items()}
        costs = {name: count * fan_in * min(count, fan_in) for name, (count, fan_in) in shapes.items()}
        drawn = share(costs, regrown, among_ranks=among_ranks)
        return {name: values for name, (values, _) in drawn.items()}, {
            name: space for name, (_, space) in drawn.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the drop: write the old values back, norm statistics included."""
        tensors = named_tensors(self.model)
        for part, values in [*self._kept(), *self._statistics]:
            tensor = tensors[part.tensor].detach()
            tensor.index_copy_(part.dim, part.rows.to(tensor.device), values.to(tensor))

    @torch.no_grad()
    def regrow(
        self,
        values: Mapping[str, Tensor],
        optimizers: Iterable[Optimizer],
        next_layer: NextLayer = "keep",
        key: tuple[int | str, ...] = (),
    ) -> None:
        """Bring the filters back with new weights, as fresh as after construction.

        Norms start at weight 1, bias 0, mean 0, variance 1. Biases start at 0. Depthwise kernels, other per-channel
        values that follow, and frozen values get their old values back. The optimizer state of all these rows is reset.

        Args:
            values: layer -> ``(n, d)`` new filters, in the order of ``filters``; :meth:`new_filters` draws them.
            optimizers: all optimizers of the network.
            next_layer: change of the columns that read the filters: keep them, set them to zero, or draw small random
                numbers (a tenth of the spread of the tensor). The last two reset their optimizer state. Regrown filters
                of the reading layer are written as given in any case.
            key: key of the random draw of ``"small_random"``.
        """
        optimizers = list(optimizers)
        self.restore()
        tensors, modules = named_tensors(self.model), named_modules(self.model)
        # Consumers come first: a reader may have regrown filters itself, whose directions must stay as drawn.
        for part in (p for layer in self.filters for p in self._consumers[layer] if next_layer != "keep"):
            self._rewrite_consumer(part, tensors, next_layer, key)
            self._reset_state(part, tensors, optimizers)
        for layer, rows in self.filters.items():
            write_filters(modules[layer], rows, values[layer])  # type: ignore[arg-type]
            for part in self._private[layer]:
                self._freshen(part, layer, tensors, modules)
                self._reset_state(part, tensors, optimizers)

    @staticmethod
    def _freshen(part: Slice, layer: str, tensors: Mapping[str, Tensor], modules: Mapping[str, nn.Module]) -> None:
        owner, _, leaf = part.tensor.rpartition(".")
        tensor = tensors[part.tensor]
        rows = part.rows.to(tensor.device)
        trainable = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        if owner == layer and leaf == "bias" and trainable:
            tensor.detach().index_fill_(0, rows, 0)
        module = modules[owner]
        if isinstance(module, _NormBase):
            if leaf in ("weight", "bias") and trainable:
                tensor.detach().index_fill_(0, rows, 1 if leaf == "weight" else 0)
            if (leaf == "weight" and trainable) or leaf == "running_mean":
                for statistic, value in ((module.running_mean, 0), (module.running_var, 1)):
                    if statistic is not None:
                        statistic.index_fill_(0, rows, value)

    @staticmethod
    def _rewrite_consumer(
        part: Slice, tensors: Mapping[str, Tensor], next_layer: NextLayer, key: tuple[int | str, ...]
    ) -> None:
        tensor = tensors[part.tensor].detach()
        target = tensor if part.block is None else tensor[part.block[0] : part.block[1]]
        rows = part.rows.to(tensor.device)
        if next_layer == "zero":
            target.index_fill_(part.dim, rows, 0)
            return
        shape = list(target.shape)
        shape[part.dim] = rows.numel()
        drawn = torch.randn(shape, generator=keyed_generator(*key, part.tensor), dtype=torch.float64)
        spread = tensor.double().std(correction=0).cpu()
        target.index_copy_(part.dim, rows, (_SMALL * spread * drawn).to(target))

    @staticmethod
    def _reset_state(part: Slice, tensors: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
        parameter = tensors[part.tensor]
        if isinstance(parameter, nn.Parameter):
            held = part.held(tensors)
            for optimizer in optimizers:
                for key, state in row_state(optimizer, parameter).items():
                    held.fill(state, initial_state(optimizer, parameter, key))

    def state(self) -> dict[str, Any]:
        """Return plain values and tensors for a checkpoint."""
        return {
            "filters": dict(self.filters),
            "private": {layer: [part.packed() for part in parts] for layer, parts in self._private.items()},
            "consumers": {layer: [part.packed() for part in parts] for layer, parts in self._consumers.items()},
            "old": {layer: list(values) for layer, values in self._old.items()},
            "statistics": [[part.packed(), values] for part, values in self._statistics],
        }

    @classmethod
    def from_state(cls, model: nn.Module, state: Mapping[str, Any]) -> DroppedFilters:
        """Return the object of a :meth:`state`, for a model whose weights were restored too.

        Raises:
            ValueError: the model lacks a tensor, so it is not the network that was saved.
            AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError: the state is damaged.
        """
        private, consumers = (
            {layer: [Slice.unpacked(part) for part in parts] for layer, parts in state[entry].items()}
            for entry in ("private", "consumers")
        )
        tensors = named_tensors(model)
        for part in (part for regions in (private, consumers) for parts in regions.values() for part in parts):
            if part.tensor not in tensors:
                raise ValueError(
                    f"the network has no tensor {part.tensor!r}, which holds dropped filters in the state of RePr: "
                    f"name the network that the state was saved with"
                )
        statistics = [(Slice.unpacked(part), values) for part, values in state["statistics"]]
        dropped = cls(model, state["filters"], private, consumers, state["old"], statistics)
        dropped._check_shapes(tensors)
        return dropped

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise an error, of any kind, unless all tensors fit the network."""
        if not self.filters.keys() == self._private.keys() == self._consumers.keys() == self._old.keys():
            raise ValueError("its filters, old values and consumers are of different layers")
        for part, values in [*self._kept(), *self._statistics]:
            if part.of(tensors).shape != values.shape:
                raise ValueError(f"old values of {part.tensor!r} have the shape {tuple(values.shape)}")
        for part in (part for parts in self._consumers.values() for part in parts):
            part.of(tensors)
        modules = named_modules(self.model)
        for layer, rows in self.filters.items():
            check_rows(modules[layer], rows)  # type: ignore[arg-type]
            if len(self.old_filters(layer)) != len(rows):
                raise ValueError(f"{layer!r} has other filters out than its old values are of")

    def _kept(self) -> list[tuple[Slice, Tensor]]:
        """Return the parts of the private regions that get their old values back."""
        return [pair for layer in self.filters for pair in zip(self._private[layer], self._old[layer], strict=True)]
