"""The schedule: the paper's, what is printed, what does not fit, a schedule of one's own."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_filterdiv import RePr
from lightning_filterdiv.repr_ import RePrEvent
from lightning_filterdiv.repr_.schedule import plan_events, remaining_rate_share, ways_to_fit
from tests.repr_.fits import SHORT
from tests.support.training import Classifier, fit


def test_the_paper_s_schedule() -> None:
    """Sub-network phases are epochs 20-30, 50-60 and 80-90."""
    assert [tuple(event) for event in plan_events(20, 10, 3)] == [
        (1, "drop", 20),
        (1, "regrow", 30),
        (2, "drop", 50),
        (2, "regrow", 60),
        (3, "drop", 80),
        (3, "regrow", 90),
    ]


@pytest.mark.parametrize("name", ["full_epochs", "sub_epochs"])
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (1.0, ValueError),
        (20.0, ValueError),
        (float("nan"), ValueError),
        ("2", TypeError),
        (True, TypeError),
    ],
)
def test_wrong_lengths(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{name} must be an integer >= 1 \(epochs\) or a fraction of max_epochs with 0 <"):
        plan_events(**{name: value}, epochs=100)
    with pytest.raises(error, match=f"{name} must be"):
        RePr(**{name: value})


def test_wrong_cycles() -> None:
    with pytest.raises(ValueError, match="cycles must be an integer >= 1, got 0"):
        plan_events(20, 10, 0)


def test_fractions_fit_any_fit() -> None:
    """The defaults are the paper's schedule of 100 epochs; from 3 epochs on at least one cycle ends before the fit."""
    assert plan_events(epochs=100) == plan_events(20, 10, 3)
    assert [event.epoch for event in plan_events(epochs=3)] == [1, 2]
    assert [event.epoch for event in plan_events(epochs=15)] == [3, 5, 8, 10]
    assert [event.epoch for event in plan_events(5, 0.1, 2, epochs=30)] == [5, 8, 13, 16]
    for epochs in range(3, 400):
        events = plan_events(epochs=epochs)
        assert events
        assert events[-1].epoch < epochs
    assert plan_events(epochs=2) == plan_events(epochs=1) == []
    with pytest.raises(
        ValueError, match=r"full_epochs=0\.2 is a fraction of the fit's epochs, and their number is unknown"
    ):
        plan_events()


@pytest.mark.parametrize("cycles", [1, 2, 3, 9])
@pytest.mark.parametrize("lengths", [(20, 10), (1, 1), (2, 9), (0.9, 0.3), (0.2, 0.1), (7, 0.5)])
def test_what_a_refusal_proposes_fits(lengths: tuple[Any, Any], cycles: int) -> None:
    for epochs in range(1, 100):
        ways = ways_to_fit(*lengths, cycles, epochs)
        assert ways or epochs < 3, "whatever the lengths, something is proposed"
        for way in filter(None, ways.split(" or ")):
            asked = dict(zip(("full_epochs", "sub_epochs"), lengths, strict=True)) | {"cycles": cycles}
            asked |= {name: int(value) for name, value in (part.split("=") for part in way.split(", "))}
            length = asked.pop("max_epochs", epochs)
            events = plan_events(**asked, epochs=length)
            assert events, (way, epochs)
            assert events[-1].epoch < length, (way, epochs)


def test_the_share_of_the_learning_rate_that_is_left() -> None:
    """FM5k: 60 epochs at 0.02, a tenth from epoch 48, a hundredth from 55; the last regrowth is at 36."""
    rates = [0.02] * 48 + [0.002] * 7 + [0.0002] * 5
    assert remaining_rate_share(rates, 36) == pytest.approx((12 + 0.7 + 0.05) / (48 + 0.7 + 0.05))
    assert remaining_rate_share(rates, 0) == 1.0
    assert remaining_rate_share(rates, 60) == remaining_rate_share(rates, 99) == 0.0
    with pytest.raises(ValueError, match="sum to more than 0"):
        remaining_rate_share([0.0, 0.0], 1)
    with pytest.raises(ValueError, match="rates must be a finite number"):
        remaining_rate_share([0.1, -0.1], 1)


# --------------------------------------------------------------------------- in a fit


def test_the_plan_is_printed_with_the_learning_rate_that_remains(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit([RePr(**SHORT)], max_epochs=4)
    assert re.search(r"RePr plan\n +cycle +event +after epoch\n +1 +drop +1\n +1 +regrow +2\n", caplog.text)
    assert "50 % of the summed learning rate remains" in caplog.text
    assert "RePr dropped 7 of 24 filters (cycle 1, epoch 1)" in caplog.text


class _Decays(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.01)]


def test_too_little_learning_rate_left_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="only 1 % of the summed learning rate remains after RePr's last regrowth"):
        fit([RePr(**SHORT)], model=_Decays(), max_epochs=4)


def test_the_forecast_does_not_touch_the_schedule() -> None:
    with pytest.warns(UserWarning, match="of the summed"):
        run = fit([RePr(**SHORT)], model=_Decays(), max_epochs=4)
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.01)


@pytest.mark.parametrize(("epochs", "way"), [(1, "max_epochs=3"), (2, "max_epochs=3")])
def test_cycles_that_do_not_fit(epochs: int, way: str) -> None:
    with pytest.raises(MisconfigurationException, match="does not fit into this fit of") as caught:
        fit([RePr(**SHORT)], max_epochs=epochs)
    assert "last event is due after epoch 2" in str(caught.value)
    assert f"Use {way}" in str(caught.value)
    assert re.search(r"1 +regrow +2", str(caught.value))


def test_lengths_that_fit_are_proposed() -> None:
    with pytest.raises(
        MisconfigurationException, match="fit of 60 epochs: its last event is due after epoch 90"
    ) as caught:
        fit([RePr(full_epochs=20, sub_epochs=10, cycles=3)], max_epochs=60)
    assert "Use cycles=1 or full_epochs=13, sub_epochs=6, cycles=3 or max_epochs=91." in str(caught.value)


def test_the_defaults_fit_a_short_fit(caplog: pytest.LogCaptureFixture) -> None:
    callback = RePr()
    with pytest.raises(ValueError, match="their number is unknown"):
        callback.plan()
    assert [row["epoch"] for row in callback.plan(max_epochs=100)] == [20, 30, 50, 60, 80, 90]
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.filterwarnings("error", "only .* of the summed learning rate")
        fit([callback], max_epochs=5)
    assert [(event["kind"], event["epoch"]) for event in callback.history] == [
        ("drop", 1),
        ("regrow", 2),
        ("drop", 3),
        ("regrow", 4),
    ]
    assert [row["epoch"] for row in callback.plan()] == [1, 2, 3, 4]
    assert "lengths: 1 and 1 epochs, as fractions of 5; 1 of 3 cycles left out" in caplog.text


def test_a_fit_without_room_for_a_cycle() -> None:
    with pytest.raises(MisconfigurationException, match="no room for a cycle in this fit of 2 epochs") as caught:
        fit([RePr()], max_epochs=2)
    assert "full_epochs=0.2 comes to 1" in str(caught.value)
    assert "Use max_epochs=3" in str(caught.value)


def test_fractions_of_an_unknown_length() -> None:
    with pytest.raises(ValueError, match="Set max_epochs in the Trainer, or give full_epochs as an integer"):
        fit([RePr()], max_epochs=-1, max_time="00:00:00:05")
    callback = RePr()
    fit([callback], max_epochs=-1, max_steps=18)
    assert [event["epoch"] for event in callback.history] == [1, 2]


def test_fast_dev_run_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit([RePr()], fast_dev_run=True)
        fit([RePr(**SHORT)], fast_dev_run=True)
    assert "fast_dev_run stops before the first event" in caplog.text


@pytest.mark.parametrize(
    "events",
    [
        [("regrow", 1)],
        [("drop", 1), ("drop", 2)],
        [("drop", 2), ("regrow", 1)],
    ],
)
def test_a_schedule_out_of_order_is_refused_at_the_start(events: list[Any]) -> None:
    class Odd(RePr):
        def schedule(self) -> list[RePrEvent]:
            return [RePrEvent(1, kind, epoch) for kind, epoch in events]

    with pytest.raises(MisconfigurationException, match="must alternate drops and regrowths"):
        fit([Odd()])


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (
            [("drop", 1, 1), ("regrow", 1, 2)],
            r"must return a list of RePrEvent\(cycle, kind, epoch\), got \('drop', 1, 1\)",
        ),
        ([], "returned no event"),
        (None, "returned no event"),
    ],
)
def test_a_schedule_of_something_else_is_refused_at_the_start(events: Any, message: str) -> None:
    class Odd(RePr):
        def schedule(self) -> list[RePrEvent]:
            return events  # type: ignore[no-any-return]

    with pytest.raises(MisconfigurationException, match=message):
        fit([Odd()])


def test_a_schedule_that_never_regrows() -> None:
    class Once(RePr):
        def schedule(self) -> list[RePrEvent]:
            return [RePrEvent(1, "drop", 1)]

    callback = Once()
    with pytest.warns(UserWarning, match="7 filters stay dropped"):
        fit([callback])
    assert [event["kind"] for event in callback.history] == ["drop"]


def test_a_schedule_of_ones_own() -> None:
    class Late(RePr):
        def schedule(self) -> list[RePrEvent]:
            return [RePrEvent(1, "drop", 3), RePrEvent(1, "regrow", 4)]

    callback = Late()
    fit([callback], max_epochs=5)
    assert [event["epoch"] for event in callback.history] == [3, 4]
