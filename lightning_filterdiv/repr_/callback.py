"""The ``RePr`` callback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
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
from lightning_filterdiv.repr_.progress import Progress, check_state
from lightning_filterdiv.repr_.schedule import (
    CompletedEvent,
    RePrEvent,
    check_length,
    plan_events,
    plan_table,
    remaining_rate_share,
    resolve_lengths,
    ways_to_fit,
)
from lightning_filterdiv.similarity import orthogonality_score
from lightning_filterdiv.tensors.arguments import (
    check_checkpoint,
    check_choice,
    check_flag,
    check_integer,
    check_module,
    check_number,
)
from lightning_filterdiv.tensors.sharing import share
from lightning_filterdiv.training.callback import DAMAGED, FilterCallback, describe_damage
from lightning_filterdiv.training.example_inputs import ExampleInputs, check_inputs_state
from lightning_filterdiv.training.learning_rates import fit_epochs, forecast_learning_rates
from lightning_filterdiv.training.submodule import check_network, layers_inside

__all__ = ["RePr"]

# Below this share of the summed learning rate, the filters regrown last stayed untrained in our runs.
_ENOUGH_RATE = 0.15
# The paper's 20 and 10 of 100 epochs, three times.
_DEFAULT_LENGTHS = (0.2, 0.1, 3)
_WAY_OUT = (
    "callback.restore_now(model) brings their old values back, RePr.restore(model, checkpoint) does so from a file. "
    "Trained further without RePr they are not held: behind a ReLU no gradient reaches them, and only saved momentum "
    "may move them"
)


class RePr(FilterCallback):
    """Drop the most redundant filters for a while, then bring them back orthogonal to everything else.

    Prakash, Storer, Florencio, Zhang: "RePr: Improved Training of Convolutional Filters", CVPR 2019, algorithm 1.
    Filters are ranked in ``on_train_epoch_end`` and dropped or regrown at the first batch after it, so that a
    checkpoint at the end of an epoch holds the network that was validated.

    Model and state stay consistent after an exception or Ctrl-C. A later fit continues from there, or
    :meth:`restore_now` brings the filters back.

    Args:
        full_epochs: S1, epochs with all filters before each drop: an integer, or a fraction of the fit's epochs (a
            float below 1). A fraction is at least one epoch.
        sub_epochs: S2, epochs of the sub-network, likewise.
        cycles: N, number of drops. With fractions, cycles that do not fit into the training are left out.
        prune_fraction: p, share of the ranked filters that is dropped, in (0, 1).
        criterion: ``"orthogonality"`` (the paper), ``"norm"`` (smallest first) or ``"random"`` (control).
        scope: rank over all layers together (the paper) or within each layer.
        dim_correct: divide the score by that of random filters with the same fan-in.
        max_layer_fraction: at most this share of one layer is dropped; ``None``: all but one filter.
        gain: scale of regrown filters relative to the mean norm of the layer's survivors. Values well above 1 with a
            large ``prune_fraction`` destabilise training.
        next_layer: columns that read regrown filters: ``"keep"``, ``"zero"`` or ``"small_random"``.
        hold_consumers: freeze those columns while the filters are dropped. ``False`` lets weight decay shrink them, as
            in the official code.
        network: trace only this submodule, for example ``"backbone"`` of a detector.
        include: patterns of layers to rank; ``None`` for every ungrouped convolution but the first trainable one
            and 1x1 shortcuts.
        exclude: patterns of layers to leave out.
        seed: seed of random ranking and new directions.
        check_ranks_every_n_steps: see :class:`~lightning_filterdiv.training.callback.FilterCallback`.

    Raises:
        TypeError, ValueError: a bad argument, by name; NaN or inf in a layer when filters are ranked or regrown.
        NoLayersError: there is no layer to rank, or a drop would take no filter.
    """

    gradient_stage = 30
    waits_for_layers = True
    log_prefix = "repr"
    refused_beside = {"ModelPruning": "it computes weights from masks, and filters of such layers cannot be silenced"}
    lost_in_child_processes = "the history and the old values of dropped filters"

    def __init__(
        self,
        *,
        full_epochs: int | float = 0.2,
        sub_epochs: int | float = 0.1,
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
        self.full_epochs = check_length("full_epochs", full_epochs)
        self.sub_epochs = check_length("sub_epochs", sub_epochs)
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
        self._progress = Progress()
        self._upcoming: list[RePrEvent] = []
        self._epochs: int | None = None  # length of the fit when it started, to which fractions refer
        # Epochs that are complete when the plan begins; None while all layers are frozen.
        self._plan_start: int | None = 0
        self._loaded: dict[str, Any] | None = None  # state of a checkpoint, until the fit that loads it has started
        self._ranked: tuple[RePrEvent, dict[str, Tensor]] | None = None
        self._inputs: ExampleInputs | None = None
        self._saved_inputs: dict[str, Any] | None = None
        self._unsilenceable: set[str] = set()
        self._holds: dict[int, RowHold] = {}

    # ------------------------------------------------------------------ decisions, to be overridden

    def schedule(self) -> list[RePrEvent]:
        """Return the events of the fit in order. An event happens when ``event.epoch`` epochs are complete. Override it
        for another plan.

        If all layers are frozen at first, lengths count from the epoch in which one is unfrozen.

        Returns:
            Alternating drops and regrowths.

        Raises:
            ValueError: a length is a fraction and the number of epochs is unknown.
        """
        return plan_events(self.full_epochs, self.sub_epochs, self.cycles, self._epochs, self._plan_start or 0)

    def plan(self, max_epochs: int | None = None) -> list[dict[str, Any]]:
        """Return events as rows: cycle, kind, epoch.

        Args:
            max_epochs: length of a future fit; ``None`` for the plan of the present or last fit.

        Raises:
            ValueError: a length is a fraction, there was no fit yet, and ``max_epochs`` is not given.
        """
        if max_epochs is not None:
            epochs = check_integer("max_epochs", max_epochs, low=1)
            events = plan_events(self.full_epochs, self.sub_epochs, self.cycles, epochs)
        else:
            done = [RePrEvent(event.cycle, event.kind, event.epoch) for event in self._progress.history]
            events = [*done, *self._upcoming] or self.schedule()
        return [event._asdict() for event in events]

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the events so far: kind, cycle, epoch, step, and the filters of each layer."""
        loaded = None if self._loaded is None else [CompletedEvent(*event) for event in self._loaded["history"]]
        return [event._asdict() for event in loaded or self._progress.history]

    def filterdiv_events(self) -> list[dict[str, Any]]:
        """Return the history, for the monitor: see :mod:`lightning_filterdiv.monitor.events`."""
        return self.history

    def filterdiv_dropped(self) -> dict[str, list[tuple[str, int, list[int]]]]:
        """Return the filters that are dropped at the moment, for the monitor: see
        :mod:`lightning_filterdiv.monitor.events`."""
        silent, unread = self._progress.dropped.regions() if self._progress.dropped is not None else ([], [])
        parts = {"silent": silent, "unread": [part for part in unread if part.block is None]}
        return {key: [(p.tensor, p.dim, p.rows.tolist()) for p in slices] for key, slices in parts.items()}

    @property
    def dropped(self) -> dict[str, Tensor]:
        """Return the filters that are dropped at the moment: layer name -> ``(n,)`` indices."""
        return dict(self._progress.dropped.filters) if self._progress.dropped is not None else {}

    # ------------------------------------------------------------------ choosing layers

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Return ungrouped convolutions without the first trainable one and 1x1 shortcuts, or those that ``include``
        names."""
        chosen = layers_inside(self.network, select_filters(pl_module, self.include, self.exclude))
        if self.include is not None:
            return chosen
        everything = layers_inside(self.network, select_filters(pl_module))
        if not (ranked := default_layers(chosen, everything)):
            first = next(
                (repr(name) for name, conv in everything.items() if conv.weight.requires_grad), "there is none"
            )
            raise NoLayersError(
                f"RePr has no layer to rank: by default it leaves out the first trainable convolution ({first}), "
                f"grouped ones and 1x1 shortcuts; name layers with include (and check exclude and network)"
            )
        return ranked

    # ------------------------------------------------------------------ start

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue from a checkpoint or an earlier fit, then check and print the plan."""
        _check_optimizers(trainer.optimizers)
        for index in range(len(trainer.optimizers)):
            self.follow_steps(index)
        self._take_up(pl_module)
        if self._plan_start is None:
            self._plan_start = trainer.current_epoch
        self._plan_fit(trainer)
        self._inputs = ExampleInputs(pl_module, self.network, self._saved_inputs)
        if self._progress.dropped is not None:
            self._start_holding(trainer, self._progress.dropped)
        self._ranked = None

    def wait(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the plan when a layer is unfrozen. Refuse to wait in a sub-network phase."""
        self._take_up(pl_module)
        if self._progress.dropped is not None:
            raise MisconfigurationException(
                f"{self._are_out()}, and now all layers that RePr ranks are frozen or in no optimizer: the phase could "
                f"not be held and ended. Unfreeze one of them, or bring the filters back with callback.restore_now("
                f"model) or RePr.restore(model, checkpoint) and train without RePr"
            )
        if not self._progress.history:
            self._plan_start = None

    def _take_up(self, pl_module: pl.LightningModule) -> None:
        """Make model and state agree."""
        loaded, self._loaded = self._loaded, None
        dropped = self._progress.dropped
        if loaded is not None:
            with self.reading_state():
                self._progress = Progress.from_state(pl_module, loaded)
            self._saved_inputs, self._epochs = loaded["inputs"], loaded.get("epochs")
            self._plan_start = loaded.get("plan_start", 0)
        elif dropped is not None:
            here = dropped.found_in(pl_module)
            if here is None:
                rank_zero_warn(
                    f"RePr forgets the {dropped.count} filters that it dropped in an earlier fit ({dropped}): in this "
                    f"model they are not zero. It goes on with the next whole cycle"
                )
                self._progress = self._progress.leaving()
            elif here is not dropped:
                self._progress = self._progress._replace(dropped=here)

    def _plan_fit(self, trainer: pl.Trainer) -> None:
        """Choose the events that remain in this fit, and print them. Refuse a plan that is longer than the fit."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            self._upcoming = []
            rank_zero_info("RePr: fast_dev_run stops before the first event")
            return
        epochs = fit_epochs(trainer)
        self._epochs = epochs if self._epochs is None else self._epochs
        events = self.schedule()
        self._check_schedule(events)
        try:
            self._progress, upcoming = self._progress.remaining(events, trainer.current_epoch)
        except LookupError as error:
            raise MisconfigurationException(
                f"{self._are_out()}, and with the present arguments no regrowth comes after epoch "
                f"{trainer.current_epoch}. Resume with full_epochs, sub_epochs and cycles as they were, or bring the "
                f"filters back with RePr.restore(model, checkpoint) and start from those weights"
            ) from error
        joins = not self._progress.history and self._progress.dropped is None and trainer.current_epoch > 0
        if joins and (missed := len(events) - len(upcoming)):
            rank_zero_warn(
                f"RePr joins the run at epoch {trainer.current_epoch} without a saved state: the first {missed} "
                f"of {len(events)} events are past and skipped"
            )
        if epochs is not None:
            upcoming = self._fitted(upcoming, epochs)
        self._upcoming = upcoming
        self._announce(trainer, epochs)

    @property
    def _in_fractions(self) -> bool:
        own = type(self).schedule is not RePr.schedule
        return not own and (isinstance(self.full_epochs, float) or isinstance(self.sub_epochs, float))

    def _check_schedule(self, events: Sequence[RePrEvent]) -> None:
        """Refuse a schedule that has no events or is out of order."""
        start = self._plan_start or 0
        if not events and self._in_fractions and self._epochs is not None:
            full, sub = resolve_lengths(self.full_epochs, self.sub_epochs, self._epochs - start)
            raise MisconfigurationException(
                f"RePr has no room for a cycle in {self._span(self._epochs)}: full_epochs={self.full_epochs:g} comes "
                f"to {full}, sub_epochs={self.sub_epochs:g} to {sub}, and epochs must follow. Use "
                f"{ways_to_fit(self.full_epochs, self.sub_epochs, 1, self._epochs, start)}"
            )
        if not events:
            raise MisconfigurationException(
                "RePr.schedule() returned no event: nothing would happen. Return drops and regrowths, or train without "
                "RePr"
            )
        if strange := [event for event in events if not isinstance(event, RePrEvent)]:
            raise MisconfigurationException(
                f"RePr.schedule() must return a list of RePrEvent(cycle, kind, epoch), got {strange[0]!r} in it"
            )
        kinds = [event.kind for event in events]
        if kinds != [("drop", "regrow")[i % 2] for i in range(len(kinds))] or any(
            after.epoch < before.epoch for before, after in pairwise(events)
        ):
            raise MisconfigurationException(
                f"RePr.schedule() must alternate drops and regrowths, from a drop on and in order of epochs. "
                f"{plan_table((), events)}"
            )

    def _fitted(self, upcoming: list[RePrEvent], epochs: int) -> list[RePrEvent]:
        """Leave out cycles that do not fit if lengths are fractions; else refuse them."""
        if not upcoming or upcoming[-1].epoch < epochs:
            return upcoming
        regrowth = self._progress.regrowth
        if regrowth is not None and regrowth.epoch >= epochs:
            raise MisconfigurationException(
                f"{self._are_out()} until epoch {regrowth.epoch} is complete, and this fit ends with {epochs} epochs. "
                f"Use max_epochs={regrowth.epoch + 1} or more, or bring the filters back with RePr.restore(model, "
                f"checkpoint) and train those weights without RePr"
            )
        if self._in_fractions:
            room = [event.cycle for event in upcoming if event.kind == "regrow" and event.epoch < epochs]
            return [event for event in upcoming if event.cycle in room]
        table = plan_table(self._progress.history, upcoming)
        ways = ways_to_fit(self.full_epochs, self.sub_epochs, self.cycles, epochs, self._plan_start or 0)
        if type(self).schedule is not RePr.schedule:
            ways = f"events that come earlier in schedule(), or max_epochs={upcoming[-1].epoch + 1}"
        raise MisconfigurationException(
            f"RePr does not fit into {self._span(epochs)}: its last event is due after epoch "
            f"{upcoming[-1].epoch} and needs epochs after it. Use {ways}. {table}"
        )

    def _span(self, epochs: int) -> str:
        """Return the epochs that a plan may use, for messages."""
        if not self._plan_start:
            return f"this fit of {epochs} epochs"
        return (
            f"the {epochs - self._plan_start} of {epochs} epochs that are left since its layers were unfrozen at epoch "
            f"{self._plan_start}"
        )

    def _announce(self, trainer: pl.Trainer, epochs: int | None) -> None:
        """Print the plan, its reason, and the learning rate that remains after its last event."""
        lines = [plan_table(self._progress.history, self._upcoming)]
        events: list[RePrEvent | CompletedEvent] = [*self._progress.history, *self._upcoming]
        if self._in_fractions and self._epochs is not None:
            left = self._epochs - (self._plan_start or 0)
            full, sub = resolve_lengths(self.full_epochs, self.sub_epochs, left)
            ended = sum(event.kind == "regrow" for event in events)
            since = "" if epochs == self._epochs else ", its length when it was first started"
            since = ", those left when layers were unfrozen" if self._plan_start else since
            left_out = self.cycles - ended
            lines.append(
                f"lengths: {full} and {sub} epochs, as fractions of {left}{since}"
                + (f"; {left_out} of {self.cycles} cycles left out" if left_out > 0 else "")
            )
        if self._progress.dropped is not None:
            lines.append(f"{self._are_out()}: this phase goes on as it was planned when it began")
        last = events[-1].epoch if events else 0
        rates = "the length of the fit is unknown (max_time?), events it does not reach are skipped"
        if epochs is not None:
            forecast = forecast_learning_rates(trainer, epochs)
            if isinstance(forecast, str):
                rates = f"no forecast of the learning rate: {forecast}"
            elif sum(forecast) <= 0:
                rates = (
                    "no forecast of the learning rate: it is 0 at the start and nothing that can be simulated raises it"
                )
            else:
                remaining = remaining_rate_share(forecast, last)
                rates = f"{100 * remaining:.0f} % of the summed learning rate remains after the last regrowth"
                if remaining < _ENOUGH_RATE and (self.full_epochs, self.sub_epochs, self.cycles) != _DEFAULT_LENGTHS:
                    rank_zero_warn(
                        f"only {100 * remaining:.0f} % of the summed learning rate remains after RePr's last regrowth "
                        f"at epoch {last} of {epochs}: the new filters can hardly be trained. Use fewer cycles or "
                        f"shorter phases, or keep the learning rate up for longer"
                    )
        rank_zero_info("\n  ".join([*lines, rates]))

    def _are_out(self) -> str:
        dropped = self._progress.dropped
        assert dropped is not None
        return f"{dropped.count} filters that RePr dropped are out ({dropped})"

    # ------------------------------------------------------------------ events

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rank the filters if the next event is a drop. No weight changes, because a checkpoint of these weights may
        follow."""
        # None while all layers are frozen.
        if (
            self._inputs is not None and self._inputs.known
        ):  # else RePr joined this run before its first forward call: filters are ranked at the next batch
            self._rank_if_due(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Carry out events that are due, at the first batch after an epoch or after a resume."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._inputs is None:
            return  # all layers are frozen
        if self._inputs.awaited(self.layers.values()):
            return  # RePr joined this run, or training_step skipped the batches so far
        while self._upcoming and self._upcoming[0].epoch <= trainer.current_epoch:
            event = self._upcoming[0]
            if event.kind == "drop" and any(after.epoch <= trainer.current_epoch for after in self._upcoming[1:2]):
                rank_zero_warn(f"RePr leaves out cycle {event.cycle}: no batch trained the network in its phase")
                self._upcoming = self._upcoming[2:]
                continue
            if event.kind == "drop":
                self._rank_if_due(trainer, pl_module, trainer.current_epoch)
                numbers = self._drop(trainer, pl_module, event)
            else:
                numbers = self._regrow(trainer, event)
            # The event is recorded by now. A logger may fail (full disk, network), and the next fit continues after the
            # event.
            self._upcoming = self._upcoming[1:]
            self._report(event, numbers)
        # Once an epoch: it waits for the device.
        if batch_idx == 0 and (dropped := self._progress.dropped) is not None and not dropped.silent:
            dropped.silence()
            rank_zero_warn(
                f"the weights of {dropped.count} filters that RePr dropped ({dropped}) were changed during the phase, "
                f"perhaps by a state_dict that was loaded: they are zero again until the phase ends"
            )

    def _rank_if_due(self, trainer: pl.Trainer, pl_module: pl.LightningModule, completed: int) -> None:
        event = self._upcoming[0] if self._upcoming else None
        if event is None or event.kind != "drop" or event.epoch > completed:
            return
        if self._ranked is not None and self._ranked[0] == event:
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
        scores = rank_filters(
            matrices,
            self.criterion,
            dim_correct=self.dim_correct,
            generator_key=key,
            among_ranks=trainer.world_size > 1,
        )
        chosen = select_dropped(
            scores, self.prune_fraction, scope=self.scope, max_layer_fraction=self.max_layer_fraction
        )
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
        self._ranked = (event, chosen)

    def _drop(self, trainer: pl.Trainer, pl_module: pl.LightningModule, event: RePrEvent) -> dict[str, float]:
        assert self._ranked is not None
        assert self._inputs is not None
        numbers = {"score_before_drop": self._mean_score(trainer)}
        dropped = DroppedFilters.collect(pl_module, self._inputs.trace(), self._ranked[1])
        self._ranked = None
        # From this assignment on the filters count as dropped. If an exception comes between, on_exception or the next
        # start silences the rest.
        regrowth = self._upcoming[1] if len(self._upcoming) > 1 else None
        self._progress = self._progress.entering(self._completed(trainer, event, dropped), dropped, regrowth)
        dropped.silence()
        self._start_holding(trainer, dropped)
        return numbers

    def _regrow(self, trainer: pl.Trainer, event: RePrEvent) -> dict[str, float]:
        dropped = self._progress.dropped
        assert dropped is not None
        values, spaces = dropped.new_filters(
            self.gain, (self.seed, "regrow", event.cycle), among_ranks=trainer.world_size > 1
        )
        done = self._completed(trainer, event, dropped)
        self._holds = {}
        # Until the second assignment the filters count as dropped. After an exception they are silenced and regrown
        # anew.
        dropped.regrow(
            values, trainer.optimizers, next_layer=self.next_layer, key=(self.seed, "next_layer", event.cycle)
        )
        self._progress = self._progress.leaving(done)
        numbers = {f"null_space/{layer}": float(space) for layer, space in spaces.items()}
        return numbers | {"score_after_regrowth": self._mean_score(trainer)}

    def _mean_score(self, trainer: pl.Trainer) -> float:
        """Return the mean over layers of the mean overlap of their filters."""
        matrices = {name: filter_matrix(conv) for name, conv in self.layers.items()}
        costs = {name: count * count * fan_in for name, (count, fan_in) in ((n, m.shape) for n, m in matrices.items())}
        scores = share(
            costs,
            lambda name: float(orthogonality_score(matrices[name]).mean()),
            among_ranks=trainer.world_size > 1,
        )
        return fmean(scores.values())

    @staticmethod
    def _completed(trainer: pl.Trainer, event: RePrEvent, dropped: DroppedFilters) -> CompletedEvent:
        filters = {layer: rows.tolist() for layer, rows in dropped.filters.items()}
        return CompletedEvent(event.kind, event.cycle, event.epoch, trainer.global_step, filters)

    def _report(self, event: RePrEvent, numbers: Mapping[str, float]) -> None:
        filters = self._progress.history[-1].filters
        count = sum(map(len, filters.values()))
        verb = "dropped" if event.kind == "drop" else "regrew"
        total = sum(filter_count(conv) for conv in self.layers.values())
        rank_zero_info(f"RePr {verb} {count} of {total} filters (cycle {event.cycle}, epoch {event.epoch})")
        counts = {f"{verb}/{layer}": float(len(rows)) for layer, rows in filters.items()}
        self.log_metrics({**numbers, **counts, f"{verb}/network": float(count)})

    # ------------------------------------------------------------------ holding

    def _start_holding(self, trainer: pl.Trainer, dropped: DroppedFilters) -> None:
        self._holds = {index: dropped.hold(self.hold_consumers) for index in range(len(trainer.optimizers))}

    def before_step(self, index: int) -> None:
        """Remember the rows that must not move in this step, in a sub-network phase."""
        if self._holds:
            self._holds[index].before_step(self.trainer.optimizers[index])

    def after_step(self, index: int) -> None:
        """Restore those rows."""
        if self._holds:
            self._holds[index].after_step(self.trainer.optimizers[index])

    # ------------------------------------------------------------------ end, state

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the fit ends while filters are dropped."""
        super().on_train_end(trainer, pl_module)
        dropped = self._progress.dropped
        if dropped is None and self._inputs is not None and not self._inputs.known:
            rank_zero_warn(
                "RePr did nothing in this fit: no batch had a forward call of the network. Check training_step and "
                "network, or set example_input_array"
            )
        elif dropped is None and self._inputs is not None and self._upcoming:
            event = self._upcoming[0]
            rank_zero_warn(
                f"the fit ended before {len(self._upcoming)} events of RePr were due (first: {event.kind} of cycle "
                f"{event.cycle} after epoch {event.epoch}). Train for longer, or use smaller full_epochs and sub_epochs"
            )
        if dropped is not None:
            rank_zero_warn(
                f"the fit ends inside a sub-network phase of RePr: {dropped.count} filters stay dropped ({dropped}), "
                f"as in the network that was trained last. {_WAY_OUT}"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Make model and state agree. Warn if filters are dropped."""
        started, self._loaded = self._inputs is not None, None
        super().on_exception(trainer, pl_module, exception)
        dropped = self._progress.dropped
        if dropped is None or not started:
            return
        dropped.silence()  # the exception may interrupt a drop, a regrowth, or a step
        rank_zero_warn(
            f"the fit broke off inside a sub-network phase of RePr: {dropped.count} filters stay dropped ({dropped}). "
            f"The same trainer, or a resume from a checkpoint, goes on with the phase. {_WAY_OUT}"
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Apply the state of a checkpoint if the fit had no step left."""
        if self._loaded is not None:
            self._take_up(pl_module)
        super().teardown(trainer, pl_module, stage)

    def release(self) -> None:
        """Stop holding rows and capturing inputs. The dropped filters stay in the state."""
        self._holds = {}
        if self._inputs is not None:
            self._saved_inputs = self._inputs.state() or self._saved_inputs
            self._inputs.close()
            self._inputs = None

    def reset(self) -> None:
        """Forget an earlier fit. Filters that it left dropped in this model come back first."""
        dropped = self._progress.dropped
        model = getattr(self._trainer, "lightning_module", None)
        here = None if dropped is None or model is None else dropped.found_in(model)
        if here is not None:
            here.restore()
            rank_zero_warn(
                f"an earlier fit of this model, or of one that it is a copy of, ended inside a sub-network phase of "
                f"RePr: its {here.count} filters ({here}) start this fit with their values from before the drop"
            )
        elif dropped is not None and dropped.model is not model and dropped.silent:
            rank_zero_warn(
                f"RePr forgets the {dropped.count} filters ({dropped}) that an earlier fit left out of another model, "
                f"where they stay zero. RePr.restore(model, checkpoint) brings them back from a file; "
                f"callback.restore_now(model) does so before the next fit"
            )
        self._progress, self._epochs, self._loaded, self._ranked = Progress(), None, None, None
        self._unsilenceable, self._saved_inputs, self._plan_start = set(), None, 0

    def extra_state(self) -> dict[str, Any]:
        """Return completed events, dropped filters with their old values, and the time of their regrowth."""
        if self._loaded is not None:
            return self._loaded
        inputs = (self._inputs.state() if self._inputs is not None else None) or self._saved_inputs
        return {**self._progress.state(), "inputs": inputs, "epochs": self._epochs, "plan_start": self._plan_start}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Keep the state until the fit starts. If the fit fails before, this object is unchanged."""
        check_state(state)
        check_inputs_state(state["inputs"])
        self._loaded = state

    def restore_now(self, model: nn.Module) -> int:
        """Restore dropped filters, with their values and norm statistics from before the drop.

        This object remembers them, so no file is needed. To continue the phase instead, fit again.

        Args:
            model: the network that was trained, or one with its weights.

        Returns:
            Number of restored filters; 0 if none was dropped.

        Raises:
            TypeError: ``model`` is no module.
            RuntimeError: a fit is running.
            ValueError: it is another network.
        """
        check_module("model", model)
        if self._trainer is not None:
            raise RuntimeError("RePr.restore_now would undo a phase of the running fit; call it after the fit")
        dropped = self._progress.dropped
        if dropped is None:
            return 0
        dropped.moved_to(model).restore()
        self._progress = self._progress.leaving()
        return dropped.count

    @staticmethod
    def restore(model: nn.Module, checkpoint: Mapping[str, Any]) -> int:
        """Restore filters that were dropped when ``checkpoint`` was saved, with their values from before the drop.

        Norm statistics of those channels are restored too. States of subclasses are used as well.

        Args:
            model: the network, already holding the checkpoint's weights.
            checkpoint: a loaded Lightning checkpoint.

        Returns:
            Number of restored filters; 0 if none was dropped.

        Raises:
            TypeError: ``model`` is no module, or ``checkpoint`` was not loaded.
            KeyError: the checkpoint holds no state of RePr.
            ValueError: its state is damaged, or of another network.
        """
        check_module("model", model)
        check_checkpoint(checkpoint)
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
                with _reading_a_state():
                    dropped = DroppedFilters.from_state(model, saved)
                dropped.restore()
                count += dropped.count
        return count


@contextlib.contextmanager
def _reading_a_state() -> Iterator[None]:
    """Turn any error while a state is read from a file into a report of damage."""
    try:
        yield
    except DAMAGED as error:
        raise ValueError(
            f"the state of RePr in the checkpoint cannot be used ({describe_damage(error)}): load another checkpoint "
            f"of the fit"
        ) from error


def _check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose state cannot be separated by filters."""
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS | Adafactor):
            raise MisconfigurationException(
                f"RePr needs optimizer state per filter, and {type(optimizer).__name__} keeps a history of the "
                f"whole network or factors of whole matrices; use SGD, Adam or another element-wise optimizer"
            )
