"""Times at which filters are dropped and regrown: the events of algorithm 1 in a fit. No Lightning here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning_filterdiv.tensors.arguments import check_integer, check_number

__all__ = [
    "CompletedEvent",
    "RePrEvent",
    "check_length",
    "events_missed",
    "plan_events",
    "plan_table",
    "remaining_rate_share",
    "resolve_lengths",
    "ways_to_fit",
]


class RePrEvent(NamedTuple):
    """Drop or regrowth that is due after ``epoch`` epochs; ``cycle`` counts from 1."""

    cycle: int
    kind: Literal["drop", "regrow"]
    epoch: int


class CompletedEvent(NamedTuple):
    """Completed drop or regrowth, as checkpoints and the monitor store it.

    Attributes:
        kind: ``"drop"`` or ``"regrow"``.
        cycle: counts from 1.
        epoch: epochs completed before it.
        step: global step of the fit.
        filters: layer name -> filter indices.
    """

    kind: Literal["drop", "regrow"]
    cycle: int
    epoch: int
    step: int
    filters: dict[str, list[int]]


def check_length(name: str, value: object) -> int | float:
    """Return ``value`` if it is a number of epochs or a fraction of the fit's.

    Raises:
        TypeError, ValueError: it is neither an integer of at least 1 nor a float between 0 and 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        error: type[Exception] = TypeError
    elif value >= 1 if isinstance(value, int) else 0 < value < 1:
        return value
    else:
        error = ValueError
    raise error(
        f"{name} must be an integer >= 1 (epochs) or a fraction of max_epochs with 0 < {name} < 1, got {value!r}"
    )


def resolve_lengths(full_epochs: int | float, sub_epochs: int | float, epochs: int | None) -> tuple[int, int]:
    """Return both lengths in epochs. A fraction of ``epochs`` is rounded, and is at least 1.

    Raises:
        TypeError, ValueError: a length is neither epochs nor a fraction; a fraction of an unknown number of epochs.
    """
    lengths = {"full_epochs": full_epochs, "sub_epochs": sub_epochs}
    resolved: list[int] = []
    for name, value in lengths.items():
        length = check_length(name, value)
        if isinstance(length, float):
            if epochs is None:
                raise ValueError(
                    f"{name}={length:g} is a fraction of the fit's epochs, and their number is unknown. Set max_epochs "
                    f"in the Trainer, or give {name} as an integer, in epochs"
                )
            length = max(1, round(length * epochs))
        resolved.append(length)
    return resolved[0], resolved[1]


def plan_events(
    full_epochs: int | float = 0.2,
    sub_epochs: int | float = 0.1,
    cycles: int = 3,
    epochs: int | None = None,
    start: int = 0,
) -> list[RePrEvent]:
    """Return the events of Algorithm 1 in order: ``S1 = full_epochs`` with all filters, ``S2 = sub_epochs`` with some
    dropped.

    Args:
        full_epochs: epochs, or a fraction of ``epochs``.
        sub_epochs: epochs, or a fraction of ``epochs``.
        cycles: number of drops and regrowths.
        epochs: length of the fit. If a length is a fraction, cycles that do not end in the fit are left out.
        start: epochs that are complete when the plan begins. Fractions refer to the remaining epochs.

    Raises:
        TypeError, ValueError: a bad argument, by name; a fraction of an unknown number of epochs.
    """
    left = None if epochs is None else epochs - start
    full, sub = resolve_lengths(full_epochs, sub_epochs, left)
    period, cycles = full + sub, check_integer("cycles", cycles, low=1)
    if left is not None and (isinstance(full_epochs, float) or isinstance(sub_epochs, float)):
        cycles = min(cycles, max(0, left - 1) // period)
    events: list[RePrEvent] = []
    for cycle in range(cycles):
        events.append(RePrEvent(cycle + 1, "drop", start + cycle * period + full))
        events.append(RePrEvent(cycle + 1, "regrow", start + (cycle + 1) * period))
    return events


def ways_to_fit(full_epochs: int | float, sub_epochs: int | float, cycles: int, epochs: int, start: int = 0) -> str:
    """Return, as text, similar arguments whose last regrowth comes before ``epochs``, and a longer fit.

    The plan begins when ``start`` epochs are complete.
    """
    left = epochs - start
    full, sub = resolve_lengths(full_epochs, sub_epochs, left)
    ways: list[str] = []
    if 1 <= (fewer := (left - 1) // (full + sub)) < cycles:
        ways.append(f"cycles={fewer}")
    if (most := min(cycles, (left - 1) // 2)) >= 1:
        period = (left - 1) // most
        shorter = min(period - 1, max(1, round(period * sub / (full + sub))))
        ways.append(f"full_epochs={period - shorter}, sub_epochs={shorter}, cycles={most}")
    for longer in range(epochs + 1, start + max(11, cycles * (full + sub) + 2)):
        events = plan_events(full_epochs, sub_epochs, cycles, longer, start)
        if events and events[-1].epoch < longer:
            ways.append(f"max_epochs={longer}")
            break
    return " or ".join(ways)


def plan_table(done: Sequence[CompletedEvent], upcoming: Sequence[RePrEvent]) -> str:
    """Return a text table of the events of a fit."""
    rows = [f"  {event.cycle:>5}  {event.kind:<6}  {event.epoch:>11}  done at step {event.step}" for event in done]
    rows += [f"  {event.cycle:>5}  {event.kind:<6}  {event.epoch:>11}" for event in upcoming]
    return "\n".join(["RePr plan", "  cycle  event   after epoch", *rows])


def events_missed(events: Sequence[RePrEvent], epoch: int) -> int:
    """Return the number of ``events`` to skip when training without a saved state continues at ``epoch``.

    The rest begins with the first drop that is not past, so no cycle begins in its middle.
    """
    return next((i for i, e in enumerate(events) if e.kind == "drop" and e.epoch >= epoch), len(events))


def remaining_rate_share(rates: Sequence[float], epoch: int) -> float:
    """Return the share of the summed learning rate that remains after ``epoch`` epochs for filters regrown then.

    ``rates`` holds the rate of every epoch of the fit. After the end of the fit the share is 0.

    Raises:
        TypeError, ValueError: a negative epoch; rates that are negative or not finite, or that sum to 0.
    """
    epoch = check_integer("epoch", epoch, low=0)
    checked = [check_number("rates", rate, low=0.0) for rate in rates]
    total = math.fsum(checked)
    if total <= 0:
        raise ValueError(f"rates must sum to more than 0, got {checked}")
    return math.fsum(checked[epoch:]) / total
