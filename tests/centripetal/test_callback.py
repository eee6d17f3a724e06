"""CentripetalSGD in real fits: forecast against what happens, budget warnings, merging, refusals."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_filterdiv import CentripetalSGD, FilterSimilarityMonitor
from lightning_filterdiv.centripetal import (
    NotTiedError,
    centripetal_gradient,
    deviation_factors,
    load_merged,
    merge_channels,
    squeeze_in_stages,
)
from lightning_filterdiv.centripetal.functional import CentripetalUpdate
from lightning_filterdiv.channel_graph import ExampleInputsError
from lightning_filterdiv.cli import main
from lightning_filterdiv.demo import Digits, SmallConvNet
from lightning_filterdiv.filters import NoLayersError
from lightning_filterdiv.learning_rates import StepSettings, forecast_settings
from tests.support.training import STEPS_PER_EPOCH, Classifier, batches, differing, fit, small_net

IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))


class Scheduled(Classifier):
    """Two parameter groups and a schedule by name."""

    def __init__(self, schedule: str = "one_cycle", net: nn.Module | None = None) -> None:
        super().__init__(net=net)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        vectors = [p for p in self.parameters() if p.dim() == 1]
        kernels = [p for p in self.parameters() if p.dim() > 1]
        groups = [{"params": kernels, "weight_decay": 1e-2}, {"params": vectors, "weight_decay": 0.0, "lr": 0.1}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
        lr = torch.optim.lr_scheduler
        total = int(self.trainer.estimated_stepping_batches)
        config: dict[str, Any] = {
            "one_cycle": lambda: {"scheduler": lr.OneCycleLR(optimizer, 0.1, total), "interval": "step"},
            "every_other_batch": lambda: {
                "scheduler": lr.ExponentialLR(optimizer, 0.9),
                "interval": "step",
                "frequency": 2,
            },
            "epochs": lambda: {"scheduler": lr.MultiStepLR(optimizer, [1, 2], gamma=0.2), "interval": "epoch"},
            "every_other_epoch": lambda: {
                "scheduler": lr.ExponentialLR(optimizer, 0.3),
                "interval": "epoch",
                "frequency": 2,
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": config[self.schedule]()}


class Recorder(Callback):
    """Settings of all groups at every step, and what was forecast at the first one."""

    def __init__(self) -> None:
        self.seen: list[list[StepSettings]] = []
        self.forecast: Any = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.forecast is None:
            self.forecast = forecast_settings(trainer)
        self.seen.append([StepSettings.of(group) for group in optimizer.param_groups])


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
    assert "30 channels in 4 groups to become 19" in caplog.text
    assert "the largest deviation from a cluster's mean is" in caplog.text
    deviations = callback.deviations()
    assert {"net.0.weight", "net.1.weight", "net.1.bias", "net.4.0.bias", "net.7.bias"} < deviations.keys()
    assert max(deviations.values()) < 1e-6
    model = run.model.eval()
    merged, report = callback.merge_with_report(run.model)
    assert report.projection < 1e-5
    assert torch.equal(merged(IMAGES).argmax(1), model(IMAGES).argmax(1))
    assert [m.out_channels for m in merged.modules() if isinstance(m, nn.Conv2d)] == [4, 5, 5, 5]
    # The network inside the LightningModule has shorter names.
    inner = callback.merge(model.net, IMAGES[:2])
    torch.testing.assert_close(inner(IMAGES), merged(IMAGES))


def test_adamw_reaches_its_forecast() -> None:
    callback = CentripetalSGD()
    run = fit([callback], model=Classifier("adamw", net=_jittered()), max_epochs=40)
    assert callback.forecast_k == pytest.approx(18, abs=1)
    assert callback.largest_deviation is not None
    assert callback.largest_deviation < 1e-6
    assert callback.merge_with_report(run.model)[1].projection < 1e-5


# --------------------------------------------------------------------------- the budget


def test_a_budget_that_is_too_short_is_told_before_the_first_step() -> None:
    seen: list[int] = []

    def at_step(model: Classifier, step: int) -> None:
        seen.append(step)

    model = Classifier()
    model.hook = at_step
    callback = CentripetalSGD(strength=1e-3)
    message = r"budget of CentripetalSGD is too short.*strength=\S+ would reach K = 18"
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
    merged, report = callback.merge_with_report(run.model, tolerance=float("inf"))
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
    coefficient = callback._clip.mean
    assert coefficient is not None
    assert 0.05 < coefficient < 0.95
    assert callback.forecast_k is not None
    corrected = callback._budget.corrected(coefficient)
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


# --------------------------------------------------------------------------- which channels


def test_the_monitor_sees_measured_and_forecast(tmp_path: Path) -> None:
    """Relative to the start and in absolute distance, so that the two agree to rounding until float32 ends it."""
    callback, monitor = CentripetalSGD(), FilterSimilarityMonitor(max_figures=1)
    fit([callback, monitor], max_epochs=4, default_root_dir=tmp_path, precision="64-true")
    found = callback.filterdiv_deviation()
    assert set(found) == {"net.0", "net.3", "net.5", "net.7"}
    for points in found.values():
        assert [step for step, _, _ in points] == [0, 6, 12, 18, 24]
        assert points[0][1:] == (1.0, 1.0)
        for _, measured, forecast in points[1:]:
            assert measured == pytest.approx(forecast, rel=1e-6, abs=1e-12)
    assert [event["kind"] for event in callback.filterdiv_events()] == ["cluster"]
    figures = {path.name.split("-step")[0] for path in tmp_path.rglob("*.png")}
    assert {"deviation", "timeline"} <= figures


def test_what_the_monitor_sees_survives_a_resume(tmp_path: Path) -> None:
    whole, again = CentripetalSGD(), CentripetalSGD()
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    fit([whole, saving], max_epochs=4)
    fit([again], max_epochs=4, ckpt_path=str(tmp_path / "step=12.ckpt"))
    assert again.filterdiv_deviation() == whole.filterdiv_deviation()
    assert again.filterdiv_events() == whole.filterdiv_events()


def test_pinned_layers_are_reported_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    net = small_net()
    net[6] = nn.GroupNorm(2, 8)
    callback = CentripetalSGD(strength=0.1)
    with caplog.at_level(logging.INFO):
        fit([callback], model=Classifier(net=net), max_epochs=1)
    assert "net.5" in callback.left_alone
    assert "group_norm" in callback.left_alone["net.5"]
    assert f"net.5: {callback.left_alone['net.5']}" in caplog.text
    assert set(callback.clusters) == {"net.0", "net.3", "net.7"}
    assert not any(name.startswith("net.5.") for name in callback.deviations())
    with pytest.raises(NoLayersError, match=r"would leave every channel as it is.*group_norm"):
        fit([CentripetalSGD(include=["net.5"])], model=Classifier(net=net), max_epochs=1)


def test_a_dict_of_fractions() -> None:
    callback = CentripetalSGD(keep_fraction={"net.[35]": 0.5, "net.7": 1.0}, strength=0.1, clustering="even")
    fit([callback], max_epochs=1)
    assert {name: int(index.max()) + 1 for name, index in callback.clusters.items()} == {"net.3": 4, "net.5": 4}
    with pytest.raises(ValueError, match=r"keep_fraction pattern 'layer9' matches no layer that can be squeezed"):
        fit([CentripetalSGD(keep_fraction={"layer9": 0.5})], max_epochs=1)


def test_a_frozen_member_keeps_its_channels_out() -> None:
    model = Classifier()
    model.net[1].requires_grad_(False)
    callback = CentripetalSGD(strength=0.1)
    fit([callback], model=model, max_epochs=1)
    assert "net.0" not in callback.clusters
    assert callback.left_alone["net.0"] == "it shares channels and 'net.1.weight' is frozen or in no optimizer"


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS mixes"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize=False"),
    ],
    ids=["lbfgs", "maximize"],
)
def test_refused_optimizers(optimizer: Any, message: str) -> None:
    model = Classifier()
    model.configure_optimizers = lambda: optimizer(model.parameters())  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=message):
        fit([CentripetalSGD()], model=model, max_epochs=1)


def test_gradients_that_are_still_scaled_get_a_scaled_pull() -> None:
    """Fused optimizers divide by the loss scale inside their step."""
    from lightning_filterdiv.centripetal import ClusteredTensor

    p = nn.Parameter(torch.randn(6, 5))
    clusters = (0, 0, 1, 1, 1, 2)
    gradient = torch.randn(6, 5)
    p.grad = 1024 * gradient
    update = CentripetalUpdate([ClusteredTensor("p", p, 0, clusters)], torch.optim.SGD([p], lr=0.1), strength=0.3)
    update.before_step(torch.tensor(1024.0))
    expected = centripetal_gradient(gradient, p.detach(), torch.tensor(clusters), 0.3)
    torch.testing.assert_close(p.grad / 1024, expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------- resume, checkpoints, command


def test_resume_with_auto_keeps_the_strength(tmp_path: Path) -> None:
    every = STEPS_PER_EPOCH + 2
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=every)
    first, second = CentripetalSGD(), CentripetalSGD()
    whole = fit([first, saving], max_epochs=4)
    resumed = fit(
        [second], model=Classifier(seed=1), max_epochs=4, ckpt_path=str(tmp_path / f"step={STEPS_PER_EPOCH + 2}.ckpt")
    )
    assert second.resolved_strength == first.resolved_strength
    assert second.forecast == first.forecast
    assert not differing(whole.tensors(), resumed.tensors())


def test_merge_before_training_and_checkpoints_without_clusters() -> None:
    with pytest.raises(RuntimeError, match="no clusters to merge: they are made at the first step"):
        CentripetalSGD().merge(Classifier())
    for checkpoint in ({"state_dict": {}}, {"callbacks": {}}, {"callbacks": {"RePr{}": {}}}):
        with pytest.raises(KeyError, match="holds no clusters of CentripetalSGD"):
            CentripetalSGD.clusters_from(checkpoint)


def test_the_wrong_example_input_is_refused() -> None:
    callback = CentripetalSGD(strength=0.1)
    run = fit([callback], max_epochs=1)
    with pytest.raises(ExampleInputsError, match="does not accept the example inputs"):
        callback.merge(run.model, torch.zeros(2, 3, 8, 8))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LightningModule trained until its clusters are one, and saved."""
    folder = tmp_path_factory.mktemp("merge")
    torch.manual_seed(0)
    saving = ModelCheckpoint(dirpath=folder, filename="end")
    data = Digits()
    data.setup()
    loader = data.train_dataloader()
    fit([CentripetalSGD(), saving], model=SmallConvNet(width=8), loader=loader, max_epochs=14)  # type: ignore[arg-type]
    return folder / "end.ckpt"


def test_the_command_merges_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = checkpoint.with_name("narrow.pt")
    source = ["--model", "lightning_filterdiv.demo:SmallConvNet"]
    assert main(["merge", str(checkpoint), "--out", str(out), *source]) == 0
    text = capsys.readouterr().out
    for line in ("channels      24 -> 15", "parameters  ", "MACs  ", "projection  ", "latency  "):
        assert line in text
    original = SmallConvNet.load_from_checkpoint(checkpoint, weights_only=True).eval()
    narrow = load_merged(SmallConvNet(width=8), out).eval()
    assert narrow.net.conv2.weight.shape == (5, 5, 3, 3)
    data = Digits()
    data.setup()
    images = next(iter(data.test_dataloader()))[0]
    assert torch.equal(narrow(images).argmax(1), original(images).argmax(1))
    clusters = CentripetalSGD.clusters_from(torch.load(checkpoint, weights_only=True))
    by_hand = merge_channels(original, clusters)
    assert torch.equal(by_hand.net.conv3.weight, narrow.net.conv3.weight)


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda c: c["callbacks"].clear(), [], "holds no clusters of CentripetalSGD"),
        (lambda c: None, ["--input-shape", "1,3,8,8"], "does not accept the example inputs"),
        (lambda c: c["state_dict"]["net.conv2.weight"].normal_(), [], "--tolerance inf"),
        (lambda c: c["state_dict"].pop("net.conv2.bias"), [], "1 missing ('net.conv2.bias'"),
    ],
    ids=["no clusters", "input shape", "not tied", "other weights"],
)
def test_the_command_ends_in_one_readable_line(
    change: Any,
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "wrong.ckpt")
    source = ["--model", "lightning_filterdiv.demo:SmallConvNet"]
    out = tmp_path / "narrow.pt"
    assert main(["merge", str(tmp_path / "wrong.ckpt"), "--out", str(out), *source, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("filterdiv merge: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_command_refuses_a_wrong_shape(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "x.ckpt", "--out", "y.pt", "--input-shape", "1,0"])
    assert "must be positive integers such as 1,3,224,224, got '1,0'" in capsys.readouterr().err


# --------------------------------------------------------------------------- recipes


def _wide(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 4),
    )


def test_squeezing_in_stages_follows_the_published_widths() -> None:
    widths: list[int] = []

    def train(model: nn.Module, callback: CentripetalSGD) -> None:
        fit([callback], model=model, max_epochs=40)  # type: ignore[arg-type]
        widths.append(model.net[0].out_channels)  # type: ignore[union-attr, operator, index]

    model = squeeze_in_stages(Classifier(net=_wide(16)), train, IMAGES[:2])
    assert widths == [16, 13, 11]
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [10, 10]
    with pytest.raises(ValueError, match="must be shares of the original widths that shrink"):
        squeeze_in_stages(model, train, IMAGES[:2], stages=(0.5, 0.75))


def test_a_wider_network_is_squeezed_into_the_original_width() -> None:
    """The second recipe: train 12 channels, keep 8, and load the result into the network one meant to have."""
    callback = CentripetalSGD(keep_fraction=8 / 12)
    run = fit([callback], model=Classifier(net=_wide(12)), max_epochs=50)
    merged = callback.merge(run.model).net.eval()
    original = _wide(8).eval()
    original.load_state_dict(merged.state_dict())
    torch.testing.assert_close(original(IMAGES), merged(IMAGES))
    assert torch.equal(original(IMAGES).argmax(1), run.model.eval()(IMAGES).argmax(1))


def test_batches_are_what_the_budget_counts() -> None:
    assert len(batches()) == STEPS_PER_EPOCH
