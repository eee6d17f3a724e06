"""State of RePr in a fit: completed events, dropped filters, and the time of their regrowth. No Lightning here.

A :class:`Progress` is immutable. The callback replaces it in one assignment, so that an exception or Ctrl-C never
leaves a partial change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_filterdiv.repr_.network import DroppedFilters
from lightning_filterdiv.repr_.schedule import CompletedEvent, RePrEvent, events_missed

__all__ = ["Progress", "check_state"]


class Progress(NamedTuple):
    """Events so far, and the phase in progress.

    Attributes:
        history: events that were carried out, in order.
        dropped: dropped filters; ``None`` outside a sub-network phase.
        regrowth: event that ends the phase; ``None`` outside one, or if the plan never ends it.
    """

    history: tuple[CompletedEvent, ...] = ()
    dropped: DroppedFilters | None = None
    regrowth: RePrEvent | None = None

    def entering(self, done: CompletedEvent, dropped: DroppedFilters, regrowth: RePrEvent | None) -> Progress:
        """Return the progress after a drop."""
        return Progress((*self.history, done), dropped, regrowth)

    def leaving(self, *done: CompletedEvent) -> Progress:
        """Return the progress after a regrowth, or after the filters were restored in another way."""
        return Progress((*self.history, *done))

    def remaining(self, events: Sequence[RePrEvent], epoch: int) -> tuple[Progress, list[RePrEvent]]:
        """Combine the progress with the schedule of a fit that continues in ``epoch``.

        A phase in progress ends as it was planned, even if ``events`` differ by now. Whole cycles follow, from the
        first that lies neither in the past nor before the last event.

        Args:
            events: alternating drops and regrowths.
            epoch: epochs completed.

        Returns:
            This progress with its regrowth, and the remaining events.

        Raises:
            LookupError: filters are dropped, and no regrowth is known.
        """
        if self.dropped is not None:
            # States of release 0.1 lack it. It is then the schedule's next regrowth.
            due = self.regrowth or next((e for e in events if e.kind == "regrow" and e.epoch >= epoch), None)
            if due is None and events[-1].kind == "regrow":
                raise LookupError("no regrowth is due")
            later = events[events_missed(events, max(epoch, due.epoch)) :] if due is not None else ()
            return self._replace(regrowth=due), [*([due] if due is not None else ()), *later]
        start = epoch
        if self.history:
            last = self.history[-1]
            start = max(epoch, last.epoch + (last.kind == "drop"))
        return self, list(events[events_missed(events, start) :])

    def state(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {
            "applied": len(self.history),
            "dropped": self.dropped.state() if self.dropped is not None else None,
            "history": [list(event) for event in self.history],
            "regrowth": list(self.regrowth) if self.regrowth is not None else None,
        }

    @classmethod
    def from_state(cls, model: nn.Module, state: dict[str, Any]) -> Progress:
        """Return the progress of a :meth:`state`. Dropped filters are zero in ``model`` afterwards.

        Raises:
            ValueError: the model is not the network that was saved.
        """
        history = tuple(CompletedEvent(*event) for event in state["history"])
        saved, regrowth = state["dropped"], state.get("regrowth")
        if saved is not None and len(history) > state["applied"] and history[-1].kind == "regrow":
            saved = None  # release 0.1, stopped by a logger between the regrowth and counting it
        if saved is None:
            return cls(history)
        dropped = DroppedFilters.from_state(model, saved)
        dropped.silence()
        return cls(history, dropped, RePrEvent(*regrowth) if regrowth is not None else None)


def check_state(state: dict[str, Any]) -> None:
    """Refuse a damaged state.

    Raises:
        KeyError, TypeError: an entry is missing or is of another kind.
    """
    applied, dropped, history, _ = (state[entry] for entry in ("applied", "dropped", "history", "inputs"))
    if not isinstance(applied, int) or not isinstance(history, list):
        raise TypeError("applied must be a count and history must be a list")
    if dropped is not None and not (
        isinstance(dropped, dict) and {"filters", "private", "old", "statistics"} <= dropped.keys()
    ):
        raise TypeError("dropped must be a dict of filters, their tensors and old values")
    for values in history:
        event = CompletedEvent(*values)
        _check_event(event.kind, event.cycle, event.epoch, event.step)
        if not isinstance(event.filters, dict):
            raise TypeError(f"filters of an event must be a dict, got {event.filters!r}")
    if (regrowth := state.get("regrowth")) is not None:
        due = RePrEvent(*regrowth)
        _check_event(due.kind, due.cycle, due.epoch)
    for entry in ("epochs", "plan_start"):
        if not isinstance(state.get(entry), int | None):
            raise TypeError(f"{entry} must be a number of epochs or None, got {state[entry]!r}")


def _check_event(kind: object, *numbers: object) -> None:
    if kind not in ("drop", "regrow") or not all(isinstance(number, int) for number in numbers):
        raise TypeError(f"an event must be a drop or a regrowth with its cycle and epoch, got {(kind, *numbers)!r}")
