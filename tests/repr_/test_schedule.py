"""The schedule: the paper's, what is printed, what does not fit, a schedule of one's own."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_filterdiv import RePr
from lightning_filterdiv.repr_ import RePrEvent
from lightning_filterdiv.repr_.schedule import plan_events, remaining_rate_share
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


@pytest.mark.parametrize("name", ["full_epochs", "sub_epochs", "cycles"])
def test_wrong_schedules(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
        plan_events(**{name: 0})


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


@pytest.mark.parametrize("epochs", [1, 2])
def test_cycles_that_do_not_fit(epochs: int) -> None:
    with pytest.raises(MisconfigurationException, match="does not fit into this fit of") as caught:
        fit([RePr(**SHORT)], max_epochs=epochs)
    assert "last regrowth is due after epoch 2" in str(caught.value)
    assert "Use fewer cycles" in str(caught.value)
    assert re.search(r"1 +regrow +2", str(caught.value))


def test_the_defaults_do_not_fit_a_short_fit_and_say_so() -> None:
    with pytest.raises(MisconfigurationException, match="RePr does not fit into this fit of 3 epochs"):
        fit([RePr()])


def test_fast_dev_run_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit([RePr()], fast_dev_run=True)
    assert "fast_dev_run stops before them" in caplog.text


def test_a_schedule_of_ones_own() -> None:
    class Late(RePr):
        def schedule(self) -> list[RePrEvent]:
            return [RePrEvent(1, "drop", 3), RePrEvent(1, "regrow", 4)]

    callback = Late()
    fit([callback], max_epochs=5)
    assert [event["epoch"] for event in callback.history] == [3, 4]
