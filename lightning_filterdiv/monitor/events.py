"""Interface by which other callbacks report to the monitor: methods of given names, without import or base class.

A callback that changes filters at certain moments implements :meth:`ReportsEvents.filterdiv_events`. One that makes
filters equal implements :meth:`ReportsDeviation.filterdiv_deviation`. The monitor asks every callback of the trainer at
each snapshot. The answers are complete histories, so nothing is lost on a resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lightning_filterdiv.filters import Conv
from lightning_filterdiv.monitor.functional import Dropped

__all__ = [
    "Deviations",
    "FilterEvent",
    "ReportsDeviation",
    "ReportsDropped",
    "ReportsEvents",
    "collect_deviations",
    "collect_dropped",
    "collect_events",
]

#: Layer -> (global step, measured deviation, forecast deviation), steps ascending; both relative to the start.
Deviations = dict[str, list[tuple[int, float, float]]]


class FilterEvent(NamedTuple):
    """Something that happened to filters.

    Attributes:
        source: class of the callback, for example ``"RePr"``.
        kind: name of the event in a word or two, such as ``"drop"`` or ``"regrow"``.
        cycle: number of the repetition, from 1; 0 if the method has none.
        epoch: epochs completed before it.
        step: global step.
        filters: layer name -> filter indices concerned; may be empty.
    """

    source: str
    kind: str
    cycle: int
    epoch: int
    step: int
    filters: dict[str, list[int]]


@runtime_checkable
class ReportsEvents(Protocol):
    """A callback with a history of events."""

    def filterdiv_events(self) -> list[dict[str, Any]]:
        """Return all events so far in order, as dicts with ``kind``, ``cycle``, ``epoch``, ``step`` and ``filters``."""
        ...


@runtime_checkable
class ReportsDeviation(Protocol):
    """A callback that makes filters of a cluster equal."""

    def filterdiv_deviation(self) -> Deviations:
        """Return distances of filters from their cluster's mean so far, and the forecast for the same steps."""
        ...


@runtime_checkable
class ReportsDropped(Protocol):
    """A callback that drops filters for a while. Every rank of a fit gives the same answer."""

    def filterdiv_dropped(self) -> dict[str, list[tuple[str, int, list[int]]]]:
        """Return what is dropped at the moment, as (tensor, dim, indices): under ``silent`` rows of tensors that are
        zero, under ``unread`` columns of tensors whose inputs are zero. Both lists are empty if nothing is dropped."""
        ...


def collect_events(callbacks: Iterable[object]) -> list[FilterEvent]:
    """Return the events of all callbacks, ordered by step.

    Raises:
        ValueError: a callback, which is named, reports an event that lacks an entry.
    """
    events: list[FilterEvent] = []
    for callback in callbacks:
        if not isinstance(callback, ReportsEvents):
            continue
        source = type(callback).__name__
        for event in callback.filterdiv_events():
            missing = [field for field in FilterEvent._fields if field not in event and field != "source"]
            if missing:
                raise ValueError(f"{source}.filterdiv_events() reports an event without {missing[0]!r}: {event!r}")
            events.append(FilterEvent(source, *(event[field] for field in FilterEvent._fields[1:])))
    return sorted(events, key=lambda event: event.step)


def collect_deviations(callbacks: Iterable[object]) -> Deviations:
    """Return the deviations of all callbacks by layer, without layers that have no measurement."""
    deviations: Deviations = {}
    for callback in callbacks:
        if isinstance(callback, ReportsDeviation):
            deviations |= {layer: list(points) for layer, points in callback.filterdiv_deviation().items() if points}
    return deviations


def collect_dropped(callbacks: Iterable[object], layers: Mapping[str, Conv]) -> dict[str, Dropped]:
    """Return the filters and input channels that callbacks have dropped from ``layers``, without layers that lost
    nothing."""
    filters: dict[str, set[int]] = {}
    inputs: dict[str, set[int]] = {}
    for callback in callbacks:
        if isinstance(callback, ReportsDropped):
            report = callback.filterdiv_dropped()
            for part, gone in (("silent", filters), ("unread", inputs)):
                for tensor, _, indices in report.get(part, ()):
                    gone.setdefault(tensor.removesuffix(".weight"), set()).update(indices)
    dropped = {
        name: Dropped(sorted(filters.get(name, ())), sorted(inputs.get(name, ())))
        for name in layers
        if name in filters or name in inputs
    }
    return {name: gone for name, gone in dropped.items() if gone.filters or gone.inputs}
