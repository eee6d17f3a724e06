"""The ``RePr`` callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Optimizer

from lightning_filterdiv.filters import Conv, NoLayersError, filter_count, filter_matrix, select_filters
from lightning_filterdiv.optimizer_state import RowHold
from lightning_filterdiv.repr_.functional import Criterion, Scope, overdrawn_layers, rank_filters, select_dropped
from lightning_filterdiv.repr_.network import DroppedFilters, NextLayer, default_layers, rankable
from lightning_filterdiv.repr_.schedule import (
    CompletedEvent,
    RePrEvent,
    events_missed,
    plan_events,
    plan_table,
    remaining_rate_share,
)
from lightning_filterdiv.similarity import orthogonality_score
from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer, check_number
from lightning_filterdiv.training.callback import FilterCallback
from lightning_filterdiv.training.example_inputs import ExampleInputs
from lightning_filterdiv.training.learning_rates import fit_epochs, forecast_learning_rates
from lightning_filterdiv.training.submodule import check_network, layers_inside

__all__ = ["RePr"]

# Below this share of the summed learning rate, filters regrown last were seen to stay untrained.
_ENOUGH_RATE = 0.15


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
    lost_in_child_processes = "the history and the old values of dropped filters"

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
        self._history: list[CompletedEvent] = []
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
        """Return the schedule as rows: cycle, kind, epoch."""
        return [event._asdict() for event in self.schedule()]

    @property
    def history(self) -> list[dict[str, Any]]:
        """Events carried out so far: kind, cycle, epoch, step, and which filters of which layer."""
        return [event._asdict() for event in self._history]

    def filterdiv_events(self) -> list[dict[str, Any]]:
        """Return the history, for the monitor: see :mod:`lightning_filterdiv.monitor.events`."""
        return self.history

    @property
    def dropped(self) -> dict[str, Tensor]:
        """Filters that are out at the moment: layer name -> ``(n,)`` indices."""
        return dict(self._dropped.filters) if self._dropped is not None else {}

    # ------------------------------------------------------------------ choosing layers

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Ungrouped convolutions but the first one and 1x1 shortcuts, or what ``include`` names."""
        chosen = layers_inside(self.network, select_filters(pl_module, self.include, self.exclude))
        if self.include is None:
            chosen = default_layers(chosen, layers_inside(self.network, select_filters(pl_module)))
        if not chosen:
            raise NoLayersError(
                "RePr has no layer to rank: by default it leaves out the network's first convolution, grouped ones and "
                "1x1 shortcuts; name layers with include (and check exclude and network)"
            )
        return chosen

    # ------------------------------------------------------------------ start

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check and print the plan; take up a phase that a checkpoint was saved in."""
        _check_optimizers(trainer.optimizers)
        for index in range(len(trainer.optimizers)):
            self.follow_steps(index)
        self._events = self.schedule()
        self._check_plan(trainer)
        self._inputs = ExampleInputs(pl_module, self.network, self._saved_inputs)
        if self._saved_drop is not None:
            self._dropped = DroppedFilters.from_state(pl_module, self._saved_drop)
            self._saved_drop = None
        if self._dropped is not None:
            self._start_holding(trainer)
        self._waited = False
        self._skip_missed(trainer)

    def _check_plan(self, trainer: pl.Trainer) -> None:
        """Print the plan with the learning rate that remains after its last event; refuse one that the fit cuts off."""
        if not self._events:
            raise MisconfigurationException("RePr.schedule() returned no event: nothing would happen")
        text = plan_table(self._events)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            rank_zero_info(f"{text}\n  fast_dev_run stops before them")
            return
        epochs = fit_epochs(trainer)
        if epochs is None:
            rank_zero_info(
                f"{text}\n  the length of the fit is unknown (max_time?), events it does not reach are skipped"
            )
            return
        last = self._events[-1].epoch
        if last >= epochs:
            raise MisconfigurationException(
                f"RePr does not fit into this fit of {epochs} epochs: its last regrowth is due after epoch {last} and "
                f"needs epochs after it. Use fewer cycles, shorter phases or more epochs. {text}"
            )
        rates = forecast_learning_rates(trainer, epochs)
        if not isinstance(rates, str) and sum(rates) <= 0:
            rates = "it is 0 at the start and nothing that can be simulated raises it"
        if isinstance(rates, str):
            rank_zero_info(f"{text}\n  no forecast of the learning rate: {rates}")
            return
        share = remaining_rate_share(rates, last)
        rank_zero_info(f"{text}\n  {100 * share:.0f} % of the summed learning rate remains after the last regrowth")
        if share < _ENOUGH_RATE:
            rank_zero_warn(
                f"only {100 * share:.0f} % of the summed learning rate remains after RePr's last regrowth at epoch "
                f"{last} of {epochs}: the new filters can hardly be trained. Use fewer cycles or shorter phases, or "
                f"keep the learning rate up for longer"
            )

    def _skip_missed(self, trainer: pl.Trainer) -> None:
        """Added to a run that is past some events, RePr starts with the next whole cycle."""
        if self._applied > 0 or trainer.current_epoch == 0:
            return
        self._applied = events_missed(self._events, trainer.current_epoch)
        if self._applied:
            rank_zero_warn(
                f"RePr joins the run at epoch {trainer.current_epoch} without a saved state: the first {self._applied} "
                f"of {len(self._events)} events are past and skipped"
            )

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
        if not any(rows.numel() for rows in chosen.values()):
            raise NoLayersError(
                f"RePr would drop no filter: prune_fraction={self.prune_fraction:g} of the "
                f"{sum(map(len, scores.values()))} filters of {', '.join(map(repr, list(scores)[:6]))} comes to none, "
                f"as every layer keeps at least one. Raise prune_fraction or max_layer_fraction, or include wider "
                f"layers"
            )
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
        before = _mean_score(self.layers)
        self._dropped = DroppedFilters.drop(pl_module, self._inputs.trace(), chosen)
        self._start_holding(trainer)
        self._note(trainer, event, {"score_before_drop": before})

    def _regrow(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: RePrEvent) -> None:
        if self._dropped is None:
            raise RuntimeError(f"RePr has nothing to regrow in cycle {event.cycle}: schedule() must alternate")
        dropped = self._dropped
        values, spaces = dropped.new_filters(self.gain, (self.seed, "regrow", event.cycle))
        values = trainer.strategy.broadcast(values)
        self._holds = {}
        dropped.regrow(
            values, trainer.optimizers, next_layer=self.next_layer, key=(self.seed, "next_layer", event.cycle)
        )
        numbers = {f"null_space/{layer}": float(space) for layer, space in spaces.items()}
        self._note(trainer, event, numbers | {"score_after_regrowth": _mean_score(self.layers)})
        self._dropped = None

    def _note(self, trainer: pl.Trainer, event: RePrEvent, numbers: Mapping[str, float]) -> None:
        assert self._dropped is not None
        filters = {layer: rows.tolist() for layer, rows in self._dropped.filters.items()}
        self._history.append(CompletedEvent(event.kind, event.cycle, event.epoch, trainer.global_step, filters))
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
            "history": [list(event) for event in self._history],
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
        self._history = [CompletedEvent(*event) for event in history]

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
        saved_extras = [
            state["extra"]
            for state in (checkpoint.get("callbacks") or {}).values()
            if isinstance(state, dict) and isinstance(state.get("extra"), dict)
        ]
        saved_drops = [extra["dropped"] for extra in saved_extras if "dropped" in extra]
        if not saved_drops:
            raise KeyError(
                "the checkpoint holds no state of RePr: there is nothing to bring back; load one of a fit with RePr"
            )
        count = 0
        for saved in saved_drops:
            if saved is not None:
                dropped = DroppedFilters.from_state(model, saved)
                dropped.restore()
                count += dropped.count
        return count


def _check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose state cannot be told apart filter by filter."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS | Adafactor):
            raise MisconfigurationException(
                f"RePr needs optimizer state per filter, and {type(optimizer).__name__} keeps a history of the "
                f"whole network or factors of whole matrices; use SGD, Adam or another element-wise optimizer"
            )


def _mean_score(layers: Mapping[str, Conv]) -> float:
    """Mean over layers of their filters' mean overlap."""
    return fmean(float(orthogonality_score(filter_matrix(conv)).mean()) for conv in layers.values())
