"""When filters are dropped and regrown: the events of algorithm 1, and how they meet a fit. No Lightning here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_filterdiv.tensors.arguments import check_integer, check_number

__all__ = ["CompletedEvent", "RePrEvent", "events_missed", "plan_events", "plan_table", "remaining_rate_share"]


class RePrEvent(NamedTuple):
    """Drop or regrowth that is due when ``epoch`` epochs have been completed; ``cycle`` counts from 1."""

    cycle: int
    kind: Literal["drop", "regrow"]
    epoch: int


class CompletedEvent(NamedTuple):
    """Event that was carried out, as checkpoints and the monitor keep it.

    Attributes:
        kind: ``"drop"`` or ``"regrow"``.
        cycle: counts from 1.
        epoch: epochs that had to be completed.
        step: global step of the fit.
        filters: layer name -> filter indices.
    """

    kind: str
    cycle: int
    epoch: int
    step: int
    filters: dict[str, list[int]]


def plan_events(full_epochs: int = 20, sub_epochs: int = 10, cycles: int = 3) -> list[RePrEvent]:
    """Events of Algorithm 1 in order: ``S1 = full_epochs`` with all filters, ``S2 = sub_epochs`` without the dropped.

    Raises:
        TypeError, ValueError: an argument is not an integer of at least 1, by name.
    """
    full_epochs = check_integer("full_epochs", full_epochs, low=1)
    period = full_epochs + check_integer("sub_epochs", sub_epochs, low=1)
    events: list[RePrEvent] = []
    for cycle in range(check_integer("cycles", cycles, low=1)):
        events.append(RePrEvent(cycle + 1, "drop", cycle * period + full_epochs))
        events.append(RePrEvent(cycle + 1, "regrow", (cycle + 1) * period))
    return events


def plan_table(events: Sequence[RePrEvent]) -> str:
    """Table of ``events`` for people, one line each under a heading."""
    rows = [f"  {event.cycle:>5}  {event.kind:<6}  {event.epoch:>11}" for event in events]
    return "\n".join(["RePr plan", "  cycle  event   after epoch", *rows])


def events_missed(events: Sequence[RePrEvent], epoch: int) -> int:
    """Number of ``events`` to skip when training without a saved state goes on at ``epoch``.

    The rest begins with the first drop that is not past: half a cycle is never begun.
    """
    return next((i for i, e in enumerate(events) if e.kind == "drop" and e.epoch >= epoch), len(events))


def remaining_rate_share(rates: Sequence[float], epoch: int) -> float:
    """Share of the summed learning rate that is left after ``epoch`` epochs: what a filter regrown then can learn by.

    ``rates`` holds the rate of every epoch of the fit; from its end on the share is 0.

    Raises:
        TypeError, ValueError: a negative epoch; rates that are negative or not finite, or that sum to 0.
    """
    epoch = check_integer("epoch", epoch, low=0)
    checked = [check_number("rates", rate, low=0.0) for rate in rates]
    total = math.fsum(checked)
    if total <= 0:
        raise ValueError(f"rates must sum to more than 0, got {checked}")
    return math.fsum(checked[epoch:]) / total
