"""Resumes with other steps left, weights from the middle of a fit, and strengths that tie clusters at once."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.centripetal.recursion import reached_k, solve_strength, steps_until
from lightning_filterdiv.narrowing import NotTiedError, tie_channels
from lightning_filterdiv.training.learning_rates import StepSettings, forecast_settings
from tests.support.training import Classifier, batches, fit


def saving(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **options)


# --------------------------------------------------------------------------- steps that are left


class Counts(Callback):
    """Steps forecast before the first one, and those taken."""

    def __init__(self) -> None:
        self.forecast = self.taken = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        settings = forecast_settings(trainer)
        assert not isinstance(settings, str)
        self.forecast, self.taken = len(settings), 0

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.taken += 1


KINDS: dict[str, dict[str, Any]] = {
    "middle of an epoch": {"every_n_train_steps": 4},
    "last batch of an epoch": {"every_n_train_steps": 6},
    "end of an epoch": {"save_on_train_epoch_end": True},
    "validation": {"save_on_train_epoch_end": False},
}


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}, {"max_steps": 14}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_left_after_a_resume(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Also where an epoch has another number of batches than before."""
    step = 8 if kind.startswith("middle") else 6
    fit([saving(tmp_path, **KINDS[kind])], max_epochs=3, validation=batches(steps=1))
    counts = Counts()
    fit(
        [counts],
        max_epochs=4,
        ckpt_path=str(tmp_path / f"step={step}.ckpt"),
        validation=batches(steps=1) if kind == "validation" else None,
        **options,
    )
    assert counts.forecast == counts.taken > 0


def test_accumulation_counts_as_in_the_fit() -> None:
    counts = Counts()
    fit([counts], max_epochs=3, accumulate_grad_batches=4)
    assert counts.forecast == counts.taken == 6


# --------------------------------------------------------------------------- forecast again


def _saved(folder: Path, **arguments: Any) -> str:
    fit([CentripetalSGD(**arguments), saving(folder)], max_epochs=60)
    return str(folder / "step=180.ckpt")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Half of a fit of 60 epochs with a strength that suits it."""
    return _saved(tmp_path_factory.mktemp("half"), strength=0.055)


@pytest.mark.parametrize(
    ("options", "end"), [({"max_epochs": 40}, 240), ({"max_epochs": 60, "limit_train_batches": 2}, 240)]
)
def test_a_resume_with_other_steps_left_is_forecast_again(
    half: str, options: dict[str, Any], end: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Fewer epochs, or larger batches."""
    callback = CentripetalSGD(strength=0.055)
    with (
        caplog.at_level("INFO"),
        pytest.warns(
            UserWarning, match="this fit is too short for CentripetalSGD: K = .* would reach K = 18"
        ) as caught,
    ):
        run = fit([callback], model=Classifier(seed=1), ckpt_path=half, **options)
    assert run.trainer.global_step == end
    assert f"Forecast for step {end}, the end of the fit" in caplog.text
    last = [points[-1] for points in callback.filterdiv_deviation().values()]
    assert {step for step, _, _ in last} == {end}
    measured = -math.log(max(ratio for _, ratio, _ in last))
    assert callback.forecast_k is not None
    # It does not know the momentum of the steps before, worth some steps more.
    assert measured - 1.5 < callback.forecast_k < measured + 0.1
    assert callback.forecast["net.1.weight"] > 100, "fresh norms have nothing to pull together"
    # The strength that is advised for the steps left reaches what it promises.
    text = next(str(warning.message) for warning in caught if "too short" in str(warning.message))
    advised = float(re.findall(r"strength=(\S+) would", text)[0])
    follower = CentripetalSGD(strength=advised)
    fit([follower], model=Classifier(seed=1), ckpt_path=half, **options)
    assert follower.forecast_k == pytest.approx(18, abs=0.3)
    assert max(p[-1][1] for p in follower.filterdiv_deviation().values()) < 1e-6


def test_the_same_length_is_not_forecast_again(half: str, caplog: pytest.LogCaptureFixture) -> None:
    callback = CentripetalSGD(strength=0.055)
    with caplog.at_level("INFO"):
        fit([callback], model=Classifier(seed=1), ckpt_path=half, max_epochs=60)
    assert "Forecast for step" not in caplog.text
    saved = torch.load(half, weights_only=True)["callbacks"][callback.state_key]["extra"]
    assert callback.forecast == saved["forecast"]


def test_auto_aims_at_what_is_missing(tmp_path: Path) -> None:
    path = _saved(tmp_path, strength="auto")
    callback = CentripetalSGD()
    fit([callback], model=Classifier(seed=1), ckpt_path=path, max_epochs=45)
    before = torch.load(path, weights_only=True)["callbacks"][callback.state_key]["extra"]["strength"]
    assert callback.resolved_strength is not None
    assert callback.resolved_strength > 1.3 * before
    assert callback.forecast_k == pytest.approx(18, abs=0.3)
    assert max(p[-1][1] for p in callback.filterdiv_deviation().values()) < 1e-6


def test_layers_that_join_later_have_a_budget_of_their_own() -> None:
    class Unfreezes(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[5].requires_grad_(trainer.current_epoch >= 2)

    callback = CentripetalSGD(strength=0.1)
    run = fit([Unfreezes(), callback], max_epochs=30)
    assert run.trainer.global_step == 180
    assert callback.forecast["net.0.weight"] > callback.forecast["net.5.weight"] + 0.3
    for layer, points in callback.filterdiv_deviation().items():
        assert points[0][1] == 1.0
        assert points[0][0] == (12 if layer == "net.5" else 0)
    assert callback.filterdiv_events()[0]["step"] == 0


# --------------------------------------------------------------------------- the middle of a fit


def test_weights_from_the_middle_of_a_fit_say_so(half: str) -> None:
    callback, model = CentripetalSGD(strength=0.055), Classifier(seed=1)

    class Stops(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 120

    fit([callback, Stops()], model=model, max_epochs=60)
    with pytest.raises(NotTiedError) as caught:
        callback.merge(model)
    text = str(caught.value)
    found = re.search(r"step 120 of a planned 360: .* are (\S+) of what they were at first, and (\S+) at the end", text)
    assert found is not None
    measured = max(points[-1][1] for points in callback.filterdiv_deviation().values())
    assert float(found[1]) == pytest.approx(measured, rel=0.1)
    assert float(found[2]) < 1e-4 * measured
    assert "Train longer" not in text
    assert "Merge the checkpoint of the end of the fit" in text


def test_lagging_statistics_are_averaged_and_reported() -> None:
    """The weights are tied; running statistics follow some steps later."""
    callback = CentripetalSGD(strength=0.1)
    model = fit([callback], max_epochs=2).model
    tie_channels(model, callback.clusters, torch.rand(2, 1, 8, 8))
    whole = callback.merge(model).report
    assert whole.lag < 1e-4
    model.net[1].running_mean.add_(0.3 * torch.randn(6, generator=torch.Generator().manual_seed(0)))
    with pytest.warns(
        UserWarning, match=r"running statistics lag .*net.1.running_mean differs .* some batches through"
    ):
        merged, report = callback.merge(model)
    assert report.lag > 1e-2
    assert report.lagging == "net.1.running_mean"
    assert report.averaging > 1e-3 > 1e-5 > report.projection
    assert report.deviation < 1e-5
    assert f"statistics    {report.lag:.1e} of the norm (net.1.running_mean)" in str(report)
    clusters = callback.clusters["net.0"]
    means = torch.stack([model.net[1].running_mean[clusters == c].mean() for c in range(int(clusters.max()) + 1)])
    torch.testing.assert_close(merged.net[1].running_mean, means)


# --------------------------------------------------------------------------- a strength that ties at once


class AdamW(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def test_a_strength_that_ties_at_once_is_said_with_the_epochs_that_avoid_it() -> None:
    """Sixteen steps of AdamW at 2e-3."""
    callback = CentripetalSGD()
    with pytest.warns(UserWarning, match="above a tenth of 1 / learning rate") as caught:
        fit([callback], model=AdamW(), max_epochs=4, limit_train_batches=4)
    assert callback.resolved_strength is not None
    assert callback.resolved_strength > 0.1 / 2e-3
    text = next(str(warning.message) for warning in caught if "a tenth of" in str(warning.message))
    assert "accuracy may suffer" in text
    epochs = int(re.findall(r"About (\d+) epochs", text)[0])
    advised = CentripetalSGD()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CentripetalSGD.*")
        fit([advised], model=AdamW(), max_epochs=epochs, limit_train_batches=4)
    assert advised.resolved_strength is not None
    assert 0.8 * 50 < advised.resolved_strength <= 50


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decoupled", [False, True])
def test_steps_until_is_enough_and_not_much_more(momentum: float, decoupled: bool) -> None:
    future = [StepSettings(0.1 * (1 - i / 10), 0.0, momentum) for i in range(10)]
    needed = steps_until([future], 0.5, decoupled=decoupled)

    def stretched(steps: int) -> list[StepSettings]:
        return [future[i * 10 // steps] for i in range(steps)]

    assert reached_k(stretched(needed), 0.5, decoupled=decoupled) >= 17.9
    assert reached_k(stretched(int(0.9 * needed)), 0.5, decoupled=decoupled) < 18
    assert solve_strength([stretched(needed)], decoupled=decoupled).strength <= 0.5


def test_no_learning_rate_reaches_nothing() -> None:
    with pytest.raises(ValueError, match="no learning rate is left"):
        steps_until([[StepSettings(0.0, 0.0)]], 1.0)
