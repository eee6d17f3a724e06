"""The ``RePr`` callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_filterdiv.filters import (
    Conv,
    NoLayersError,
    filter_count,
    filter_matrix,
    named_convolutions,
    select_filters,
)
from lightning_filterdiv.optimizer_state import RowHold
from lightning_filterdiv.repr_.functional import (
    Criterion,
    RePrEvent,
    Scope,
    overdrawn_layers,
    plan_events,
    rank_filters,
    select_dropped,
)
from lightning_filterdiv.repr_.network import DroppedFilters, NextLayer
from lightning_filterdiv.repr_.plan import Happened, check_plan, events_missed
from lightning_filterdiv.repr_.selection import (
    check_dropped,
    check_optimizers,
    default_layers,
    mean_score,
    rankable,
    regrown,
    restore_dropped,
)
from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer, check_number
from lightning_filterdiv.tensors.randomness import keyed_generator
from lightning_filterdiv.training.callback import FilterCallback
from lightning_filterdiv.training.example_inputs import ExampleInputs
from lightning_filterdiv.training.submodule import check_network, layers_inside

__all__ = ["RePr"]


class RePr(FilterCallback):
    """Drop the most redundant filters for a while, then bring them back orthogonal to everything else.

    Prakash, Storer, Florencio, Zhang: "RePr: Improved Training of Convolutional Filters", CVPR 2019, algorithm 1.
    Filters are ranked in ``on_train_epoch_end`` and dropped or regrown at the first batch after it, so that every
    checkpoint holds the network whose metric it names.

    Args:
        full_epochs: S1, epochs with all filters before each drop.
        sub_epochs: S2, epochs of the sub-network.
        cycles: N, how often.
        prune_fraction: p, share of the ranked filters that is dropped, in (0, 1).
        criterion: ``"orthogonality"`` (the paper), ``"norm"`` (smallest first) or ``"random"`` (control).
        scope: rank over all layers together (the paper) or within each layer.
        dim_correct: divide the score by what random filters of that fan-in have.
        max_layer_fraction: at most this share of one layer is dropped; ``None``: all but one filter.
        gain: scale of regrown filters relative to the mean norm of the layer's survivors. Values well above 1 with a
            large ``prune_fraction`` destabilise training.
        next_layer: columns that read regrown filters: ``"keep"``, ``"zero"`` or ``"small_random"``.
        hold_consumers: keep those columns still while the filters are out; ``False`` lets weight decay shrink them, as
            in the official code.
        network: trace only this submodule, for example ``"backbone"`` of a detector.
        include: patterns of layers to rank; ``None`` for every ungrouped convolution but the network's first and 1x1
            shortcuts.
        exclude: patterns of layers to leave out.
        seed: of random ranking and new directions.
        check_ranks_every_n_steps: see :class:`~lightning_filterdiv.training.callback.FilterCallback`.

    Raises:
        TypeError, ValueError: a bad argument, by name; a layer with NaN or inf when filters are ranked or regrown.
        NoLayersError: nothing to rank, or a drop of no filter.
    """

    gradient_stage = 30
    log_prefix = "repr"

    def __init__(
        self,
        *,
        full_epochs: int = 20,
        sub_epochs: int = 10,
        cycles: int = 3,
        prune_fraction: float = 0.3,
        criterion: Criterion = "orthogonality",
        scope: Scope = "global",
        dim_correct: bool = False,
        max_layer_fraction: float | None = None,
        gain: float = 1.0,
        next_layer: NextLayer = "keep",
        hold_consumers: bool = True,
        network: str | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        check_ranks_every_n_steps: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude, check_ranks_every_n_steps=check_ranks_every_n_steps)
        self.full_epochs = check_integer("full_epochs", full_epochs, low=1)
        self.sub_epochs = check_integer("sub_epochs", sub_epochs, low=1)
        self.cycles = check_integer("cycles", cycles, low=1)
        self.prune_fraction = check_number("prune_fraction", prune_fraction, above=0.0, below=1.0)
        self.criterion = check_choice("criterion", criterion, Criterion)
        self.scope = check_choice("scope", scope, Scope)
        self.dim_correct = check_flag("dim_correct", dim_correct)
        self.max_layer_fraction = (
            None
            if max_layer_fraction is None
            else check_number("max_layer_fraction", max_layer_fraction, above=0.0, high=1.0)
        )
        self.gain = check_number("gain", gain, above=0.0)
        self.next_layer = check_choice("next_layer", next_layer, NextLayer)
        self.hold_consumers = check_flag("hold_consumers", hold_consumers)
        self.network = check_network(network)
        self.seed = check_integer("seed", seed, low=0)
        self._events: list[RePrEvent] = []
        self._applied = 0
        self._ranked: tuple[int, dict[str, Tensor]] | None = None
        self._dropped: DroppedFilters | None = None
        self._saved_drop: dict[str, Any] | None = None
        self._history: list[Happened] = []
        self._inputs: ExampleInputs | None = None
        self._saved_inputs: dict[str, Any] | None = None
        self._unsilenceable: set[str] = set()
        self._holds: dict[int, RowHold] = {}
        self._waited = False

    # ------------------------------------------------------------------ decisions, to be overridden

    def schedule(self) -> list[RePrEvent]:
        """Events of the fit in order; ``event.epoch`` epochs are complete when it happens. Override for another plan.

        Returns:
            Drops and regrowths, alternating.
        """
        return plan_events(self.full_epochs, self.sub_epochs, self.cycles)

    def plan(self) -> list[dict[str, Any]]:
        """The schedule as rows: cycle, kind, epoch."""
        return [event._asdict() for event in self.schedule()]

    @property
    def history(self) -> list[dict[str, Any]]:
        """Events carried out so far: kind, cycle, epoch, step, and which filters of which layer."""
        return [happened._asdict() for happened in self._history]

    def filterdiv_events(self) -> list[dict[str, Any]]:
        """The history, for the monitor: see :mod:`lightning_filterdiv.monitor.events`."""
        return self.history

    @property
    def dropped(self) -> dict[str, Tensor]:
        """Filters that are out at the moment: layer name -> ``(n,)`` indices."""
        return dict(self._dropped.filters) if self._dropped is not None else {}

    # ------------------------------------------------------------------ choosing layers

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Ungrouped convolutions but the first one and 1x1 shortcuts, or what ``include`` names."""
        found = layers_inside(self.network, select_filters(pl_module, self.include, self.exclude))
        if self.include is None:
            found = default_layers(found, layers_inside(self.network, select_filters(pl_module)))
        if not found:
            raise NoLayersError(
                "RePr has no layer to rank: by default it leaves out the network's first convolution, grouped ones and "
                "1x1 shortcuts; name layers with include (and check exclude and network)"
            )
        return found

    # ------------------------------------------------------------------ start

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check and print the plan; take up a phase that a checkpoint was saved in."""
        check_optimizers(trainer.optimizers)
        for index in range(len(trainer.optimizers)):
            self.follow_steps(index)
        self._events = self.schedule()
        check_plan(trainer, self._events)
        self._inputs = ExampleInputs(pl_module, self.network, self._saved_inputs)
        if self._saved_drop is not None:
            self._dropped = DroppedFilters.from_state(pl_module, self._saved_drop)
            self._saved_drop = None
        if self._dropped is not None:
            self._start_holding(trainer)
        self._waited = False
        self._skip_missed(trainer)

    def _skip_missed(self, trainer: pl.Trainer) -> None:
        """Added to a run that is past some events, RePr starts with the next whole cycle."""
        if self._applied == 0 and trainer.current_epoch > 0:
            self._applied = events_missed(self._events, trainer.current_epoch)

    # ------------------------------------------------------------------ events

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rank, if the next event is a drop. Nothing changes here: the checkpoint that follows holds these weights."""
        assert self._inputs is not None
        if self._inputs.known:  # else this run was joined before its first forward call: ranked at the next batch
            self._rank_if_due(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Carry out what is due and not yet done: the first batch after an epoch, wherever a resume came in."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert self._inputs is not None
        if not self._inputs.known and not self._waited:
            # Only in a run that RePr joins: its first forward call is about to come.
            self._waited = True
            return
        while self._applied < len(self._events) and self._events[self._applied].epoch <= trainer.current_epoch:
            event = self._events[self._applied]
            if event.kind == "drop":
                self._rank_if_due(trainer, pl_module, trainer.current_epoch)
                self._drop(trainer, pl_module, event)
            else:
                self._regrow(trainer, pl_module, event)
            self._applied += 1

    def _rank_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, completed: int) -> None:
        if self._applied >= len(self._events) or (self._ranked is not None and self._ranked[0] == self._applied):
            return
        event = self._events[self._applied]
        if event.kind != "drop" or event.epoch > completed:
            return
        assert self._inputs is not None
        graph = self._inputs.trace()
        matrices, reasons = rankable(graph, self.layers)
        for name in [name for name in reasons if name not in self._unsilenceable]:
            rank_zero_warn(f"RePr leaves {name!r} out: its filters cannot be silenced exactly ({reasons[name]})")
        self._unsilenceable |= reasons.keys()
        if not matrices:
            raise NoLayersError(
                f"RePr has no layer to rank: none of the chosen layers can be silenced exactly "
                f"({', '.join(f'{name}: {reason}' for name, reason in list(reasons.items())[:2])}); choose others with "
                f"include"
            )
        key = (self.seed, "rank", event.cycle)
        scores = rank_filters(matrices, self.criterion, dim_correct=self.dim_correct, generator_key=key)
        chosen = select_dropped(
            scores, self.prune_fraction, scope=self.scope, max_layer_fraction=self.max_layer_fraction
        )
        chosen = trainer.strategy.broadcast(chosen)
        check_dropped(chosen, scores, self.prune_fraction)
        if crowded := overdrawn_layers(chosen, scores):
            rank_zero_warn(
                f"RePr drops more than half of {', '.join(map(repr, crowded))} in cycle {event.cycle}; "
                f"max_layer_fraction limits what one layer may lose, dim_correct=True ranks small layers fairly"
            )
        self._ranked = (self._applied, chosen)

    def _drop(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: RePrEvent) -> None:
        assert self._ranked is not None
        assert self._inputs is not None
        chosen, self._ranked = self._ranked[1], None
        before = mean_score(self.layers)
        self._dropped = DroppedFilters.drop(pl_module, self._inputs.trace(), chosen)
        self._start_holding(trainer)
        self._note(trainer, event, {"score_before_drop": before})

    def _regrow(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: RePrEvent) -> None:
        if self._dropped is None:
            raise RuntimeError(f"RePr has nothing to regrow in cycle {event.cycle}: schedule() must alternate")
        dropped = self._dropped
        values: dict[str, Tensor] = {}
        spaces: dict[str, int] = {}
        convolutions = dict(named_convolutions(pl_module))  # a layer may have been frozen since the drop
        for layer, rows in dropped.filters.items():
            matrix = filter_matrix(convolutions[layer])
            surviving = torch.ones(matrix.shape[0], dtype=torch.bool)
            surviving[rows] = False
            generator = keyed_generator(self.seed, "regrow", event.cycle, layer)
            old, survivors = dropped.old_filters(layer).cpu(), matrix.cpu()[surviving]
            values[layer], spaces[layer] = regrown(layer, old, survivors, self.gain, generator)
        values = trainer.strategy.broadcast(values)
        self._holds = {}
        dropped.regrow(
            values, trainer.optimizers, next_layer=self.next_layer, key=(self.seed, "next_layer", event.cycle)
        )
        numbers = {f"null_space/{layer}": float(space) for layer, space in spaces.items()}
        self._note(trainer, event, numbers | {"score_after_regrowth": mean_score(self.layers)})
        self._dropped = None

    def _note(self, trainer: pl.Trainer, event: RePrEvent, numbers: Mapping[str, float]) -> None:
        assert self._dropped is not None
        filters = {layer: rows.tolist() for layer, rows in self._dropped.filters.items()}
        self._history.append(Happened(event.kind, event.cycle, event.epoch, trainer.global_step, filters))
        count = self._dropped.count
        verb = "dropped" if event.kind == "drop" else "regrew"
        total = sum(filter_count(conv) for conv in self.layers.values())
        rank_zero_info(f"RePr {verb} {count} of {total} filters (cycle {event.cycle}, epoch {event.epoch})")
        counts = {f"{verb}/{layer}": float(len(rows)) for layer, rows in filters.items()}
        self.log_metrics({**numbers, **counts, f"{verb}/network": float(count)})

    # ------------------------------------------------------------------ holding

    def _start_holding(self, trainer: pl.Trainer) -> None:
        assert self._dropped is not None
        self._holds = {index: self._dropped.hold(self.hold_consumers) for index in range(len(trainer.optimizers))}

    def before_step(self, index: int) -> None:
        """In a sub-network phase: remember what must not move in this step."""
        if self._holds:
            self._holds[index].before_step(self.trainer.optimizers[index])

    def after_step(self, index: int) -> None:
        """Put back what the step moved of it."""
        if self._holds:
            self._holds[index].after_step(self.trainer.optimizers[index])

    # ------------------------------------------------------------------ end, state

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say it, if the fit ends with filters out."""
        if self._dropped is not None:
            rank_zero_warn(
                f"the fit ends inside a sub-network phase of RePr: {self._dropped.count} filters stay dropped, because "
                f"that network was validated. RePr.restore(model, checkpoint) brings their old values back; trained "
                f"further without the callback they would stay exactly zero"
            )

    def release(self) -> None:
        """Stop holding and capturing; the dropped filters stay in the state."""
        self._holds = {}
        if self._inputs is not None:
            self._saved_inputs = self._inputs.state() or self._saved_inputs
            self._inputs.close()
            self._inputs = None

    def reset(self) -> None:
        """Forget events and dropped filters of an earlier fit."""
        self._applied, self._ranked, self._dropped, self._saved_drop = 0, None, None, None
        self._history, self._unsilenceable, self._saved_inputs = [], set(), None

    def extra_state(self) -> dict[str, Any]:
        """Events done, filters that are out with their old values, history."""
        dropped = self._dropped.state() if self._dropped is not None else self._saved_drop
        return {
            "applied": self._applied,
            "dropped": dropped,
            "inputs": (self._inputs.state() if self._inputs is not None else None) or self._saved_inputs,
            "history": [list(happened) for happened in self._history],
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`."""
        applied, dropped, history = state["applied"], state["dropped"], state["history"]
        if not isinstance(applied, int) or not isinstance(history, list):
            raise TypeError("applied must be a count and history must be a list")
        if dropped is not None and not (
            isinstance(dropped, dict) and {"filters", "private", "old", "statistics"} <= dropped.keys()
        ):
            raise TypeError("dropped must be a dict of filters, their tensors and old values")
        self._applied, self._saved_drop, self._dropped, self._ranked = applied, dropped, None, None
        self._saved_inputs = state["inputs"]
        self._history = [Happened(*happened) for happened in history]

    @staticmethod
    def restore(model: nn.Module, checkpoint: Mapping[str, Any]) -> int:
        """Bring filters back that were out when ``checkpoint`` was saved, with their values before the drop.

        Norm statistics of those channels come back too. States of subclasses count.

        Args:
            model: the network, already holding the checkpoint's weights.
            checkpoint: a loaded Lightning checkpoint.

        Returns:
            The number of filters brought back; 0 if none was out.

        Raises:
            KeyError: the checkpoint holds no state of RePr.
        """
        return restore_dropped(model, checkpoint)
