"""Does RePr's plan fit into the fit, and is there enough learning rate left to train what it regrows?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_filterdiv.repr_.functional import RePrEvent, remaining_rate_share
from lightning_filterdiv.training.learning_rates import forecast_learning_rates

__all__ = ["Happened", "check_plan", "events_missed", "fit_epochs"]

# Below this share of the summed learning rate, filters regrown last were seen to stay untrained.
_ENOUGH_RATE = 0.15


class Happened(NamedTuple):
    """An event that was carried out, as it is kept for the monitor."""

    kind: str
    cycle: int
    epoch: int
    step: int
    filters: dict[str, list[int]]


def fit_epochs(trainer: pl.Trainer) -> int | None:
    """Epochs that the fit will have begun when it ends; ``None`` if nobody knows."""
    limits: list[int] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs)
    steps = trainer.num_training_batches
    if trainer.max_steps >= 0 and steps != float("inf") and trainer.lightning_module.automatic_optimization:
        per_epoch = max(1, -(-int(steps) // trainer.accumulate_grad_batches))
        limits.append(-(-trainer.max_steps // per_epoch))
    return min(limits) if limits else None


def check_plan(trainer: pl.Trainer, events: Sequence[RePrEvent]) -> None:
    """Print the plan with the learning rate that remains after its last event; with ``fast_dev_run`` only print.

    Raises:
        MisconfigurationException: there is no event, or one that the fit does not reach with epochs to spare.
    """
    if not events:
        raise MisconfigurationException("RePr.schedule() returned no event: nothing would happen")
    text = "RePr plan\n  cycle  event   after epoch\n" + "\n".join(
        f"  {event.cycle:>5}  {event.kind:<6}  {event.epoch:>11}" for event in events
    )
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
        rank_zero_info(f"{text}\n  fast_dev_run stops before them")
        return
    epochs = fit_epochs(trainer)
    if epochs is None:
        rank_zero_info(f"{text}\n  the length of the fit is unknown (max_time?), events it does not reach are skipped")
        return
    last = events[-1].epoch
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
            f"only {100 * share:.0f} % of the summed learning rate remains after RePr's last regrowth at epoch {last} "
            f"of {epochs}: the new filters can hardly be trained. Use fewer cycles or shorter phases, or keep the "
            f"learning rate up for longer"
        )


def events_missed(events: Sequence[RePrEvent], epoch: int) -> int:
    """How many events a run that RePr joins at ``epoch``, without a saved state, has to skip; said in a warning.

    Args:
        events: of the whole plan, in order.
        epoch: of the run.

    Returns:
        The position of the first drop that is not past: half a cycle is never begun.
    """
    ahead = [i for i, event in enumerate(events) if event.kind == "drop" and event.epoch >= epoch]
    missed = ahead[0] if ahead else len(events)
    if missed:
        rank_zero_warn(
            f"RePr joins the run at epoch {epoch} without a saved state: the first {missed} of {len(events)} events "
            f"are past and skipped"
        )
    return missed
