"""The forecast of a fit agrees with the fit; warnings about fits that are too short."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.centripetal import deviation_factors
from lightning_filterdiv.narrowing import NotTiedError
from tests.centripetal.fits import IMAGES, Recorder, Scheduled
from tests.support.training import Classifier, fit, small_net


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("schedule", ["one_cycle", "every_other_batch", "epochs", "every_other_epoch"])
def test_forecast_settings_are_those_of_the_fit(schedule: str, accumulate: int) -> None:
    recorder = Recorder()
    run = fit([recorder], model=Scheduled(schedule), accumulate_grad_batches=accumulate, max_epochs=4)
    assert len(recorder.seen) == run.trainer.global_step > 4
    assert recorder.forecast == recorder.seen
    assert len({step[0].lr for step in recorder.seen}) > 1, "the schedule must move"
    if schedule == "one_cycle":
        assert len({step[0].momentum for step in recorder.seen}) > 1, "OneCycle moves momentum too"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_epochs": -1, "max_time": {"seconds": 1}}, "length of the fit is unknown"),
        ({"model": "plateau"}, "depends on a metric"),
        ({"model": "overridden"}, "lr_scheduler_step is overridden"),
    ],
    ids=["max_time", "plateau", "overridden"],
)
def test_no_forecast_says_why(options: dict[str, Any], reason: str) -> None:
    class Plateau(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "x", "strict": False}}

    class Overridden(Classifier):
        def lr_scheduler_step(self, *_: Any) -> None:
            pass

    model = {"plateau": Plateau, "overridden": Overridden}.get(options.pop("model", ""), Classifier)()
    callback = CentripetalSGD()
    with pytest.warns(UserWarning, match=f"needs a forecast, which is unavailable: .*{reason}"):
        fit([callback], model=model, **({"limit_train_batches": 2} | options))
    assert callback.forecast_k is None
    assert callback.largest_deviation is not None


# --------------------------------------------------------------------------- the forecast holds


class Spread(Callback):
    """Deviations from the cluster means before the first and after the last step."""

    def __init__(self, callback: CentripetalSGD) -> None:
        self.callback = callback
        self.first: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def measure(self) -> dict[str, Tensor]:
        found = {}
        for tensor in self.callback._tensors:
            rows = tensor.parameter.detach().movedim(tensor.dim, 0)
            index = torch.tensor(tensor.clusters)
            means = torch.stack([rows[index == c].mean(0) for c in range(int(index.max()) + 1)])
            found[tensor.name] = rows - means[index]
        return found

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.first:
            self.first = self.measure()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.last = self.measure()


def _jittered() -> nn.Module:
    """Norms as if trained: fresh ones (all 1 and 0) have nothing to pull together."""
    torch.manual_seed(4)
    net = small_net()
    for p in net.parameters():
        if p.dim() == 1:
            p.data.add_(0.1 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("schedule", ["one_cycle", "epochs"])
def test_deviation_in_a_fit_follows_the_forecast(schedule: str) -> None:
    callback = CentripetalSGD(strength=0.15, vector_strength=0.05)
    spread, recorder = Spread(callback), Recorder()
    fit(
        [callback, spread, recorder],
        model=Scheduled(schedule, _jittered()),
        precision="64-true",
        max_epochs=5,
    )
    assert len(spread.first) == 11, "four kernels, and biases and norms"
    for name, first in spread.first.items():
        vector = first.dim() == 1
        group = 1 if vector else 0
        factor = deviation_factors([step[group] for step in recorder.seen], 0.05 if vector else 0.15)[-1]
        assert float(first.abs().max()) > 1e-3
        assert float((spread.last[name] - factor * first).abs().max()) <= 1e-9, name
        assert callback.forecast[name] == pytest.approx(-math.log(abs(factor)), rel=1e-9)


def test_auto_brings_every_tensor_together_and_merges_without_loss(caplog: pytest.LogCaptureFixture) -> None:
    callback = CentripetalSGD()
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CentripetalSGD.*")
        run = fit([callback], model=Classifier(net=_jittered()), max_epochs=60)
    assert callback.forecast_k is not None
    assert 18 <= callback.forecast_k < 20
    assert "merging 30 channels to 19 (4 groups), strength" in caplog.text
    assert "the largest deviation from a cluster's mean is" in caplog.text
    deviations = callback.deviations()
    assert {"net.0.weight", "net.1.weight", "net.1.bias", "net.4.0.bias", "net.7.bias"} < deviations.keys()
    assert max(deviations.values()) < 1e-6
    model = run.model.eval()
    merged, report = callback.merge(run.model)
    assert report.projection < 1e-5
    assert torch.equal(merged(IMAGES).argmax(1), model(IMAGES).argmax(1))
    assert [m.out_channels for m in merged.modules() if isinstance(m, nn.Conv2d)] == [4, 5, 5, 5]
    # The network inside the LightningModule has shorter names.
    inner = callback.merge(model.net, IMAGES[:2]).network
    torch.testing.assert_close(inner(IMAGES), merged(IMAGES))


def test_adamw_reaches_its_forecast() -> None:
    callback = CentripetalSGD()
    run = fit([callback], model=Classifier("adamw", net=_jittered()), max_epochs=40)
    assert callback.forecast_k == pytest.approx(18, abs=1)
    assert callback.largest_deviation is not None
    assert callback.largest_deviation < 1e-6
    assert callback.merge(run.model).report.projection < 1e-5


# --------------------------------------------------------------------------- the budget


def test_a_budget_that_is_too_short_is_told_before_the_first_step() -> None:
    seen: list[int] = []

    def at_step(model: Classifier, step: int) -> None:
        seen.append(step)

    model = Classifier()
    model.hook = at_step
    callback = CentripetalSGD(strength=1e-3)
    message = r"this fit is too short for CentripetalSGD.*strength=\S+ would reach K = 18"
    with pytest.warns(UserWarning, match=message) as w:
        run = fit([callback], model=model, max_epochs=60)
    text = next(str(item.message) for item in w if "too short" in str(item.message))
    advised = float(text.split("strength=")[1].split(" ")[0])
    # Followed, the advice reaches what it promises.
    follower = CentripetalSGD(strength=advised)
    fit([follower], max_epochs=60)
    assert follower.forecast_k is not None
    assert follower.forecast_k > 17.8
    with pytest.raises(NotTiedError, match="changes the outputs by"):
        callback.merge(run.model)
    merged, report = callback.merge(run.model, tolerance=float("inf"))
    assert report.projection > 1e-3
    assert merged(IMAGES).shape == (64, 4)


def test_a_fit_that_no_strength_can_save_is_told_so() -> None:
    model = Classifier()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.05, 0.9)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"no strength reaches it in 12 steps.*train longer"):
        fit([CentripetalSGD()], model=model, max_epochs=2)


def test_norm_clipping_is_measured_and_the_forecast_corrected(tmp_path: Path) -> None:
    callback = CentripetalSGD(strength=0.1)
    spread = Spread(callback)
    logger = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="clipping by norm also shrinks the pull"):
        fit(
            [callback, spread],
            model=Classifier(net=_jittered()),
            precision="64-true",
            max_epochs=10,
            gradient_clip_val=0.3,
            logger=logger,
        )
    coefficient = callback._forecast.clipping.mean
    assert coefficient is not None
    assert 0.05 < coefficient < 0.95
    assert callback.forecast_k is not None
    corrected = callback._forecast.corrected_k()
    assert corrected is not None
    first, last = spread.first["net.5.weight"], spread.last["net.5.weight"]
    measured = -math.log(float(last.norm() / first.norm()))
    assert measured < 0.95 * callback.forecast_k, "clipping must matter here"
    assert abs(corrected - measured) < 0.5 * abs(callback.forecast_k - measured)
    assert "filterdiv/centripetal/clip_coefficient" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_value_clipping_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="gradient_clip_algorithm='value' clips the members of a cluster differently"):
        fit([CentripetalSGD(strength=0.1)], max_epochs=1, gradient_clip_val=0.1, gradient_clip_algorithm="value")


def test_every_deviation_is_logged(tmp_path: Path) -> None:
    callback, logger = CentripetalSGD(strength=0.1), CSVLogger(tmp_path)
    fit([callback], max_epochs=2, logger=logger)
    logged = (Path(logger.log_dir) / "metrics.csv").read_text()
    for name in callback.deviations():
        assert f"filterdiv/centripetal/deviation/{name}" in logged
    for name in ("largest_deviation/kernels", "largest_deviation/vectors", "forecast_k"):
        assert f"filterdiv/centripetal/{name}" in logged
