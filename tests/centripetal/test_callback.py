"""Choice of channels, refusals, resume and checkpoints of C-SGD."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_filterdiv import CentripetalSGD, FilterSimilarityMonitor
from lightning_filterdiv.centripetal import (
    centripetal_gradient,
)
from lightning_filterdiv.centripetal.functional import CentripetalUpdate
from lightning_filterdiv.channel_graph import ExampleInputsError
from lightning_filterdiv.filters import NoLayersError
from tests.support.training import STEPS_PER_EPOCH, Classifier, differing, fit, small_net

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
    assert {"deviation", "all_layers"} <= figures


def test_what_the_monitor_sees_survives_a_resume(tmp_path: Path) -> None:
    whole, again = CentripetalSGD(), CentripetalSGD()
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)
    fit([whole, saving], max_epochs=4)
    fit([again], max_epochs=4, ckpt_path=str(tmp_path / "step=12.ckpt"))
    assert again.filterdiv_deviation() == whole.filterdiv_deviation()
    assert again.filterdiv_events() == whole.filterdiv_events()


def test_pinned_layers_are_reported_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    net = small_net()
    net[6] = nn.Softmax(1)
    callback = CentripetalSGD(strength=0.1)
    with caplog.at_level(logging.INFO):
        fit([callback], model=Classifier(net=net), max_epochs=1)
    assert "net.5" in callback.left_alone
    assert "softmax" in callback.left_alone["net.5"]
    assert f"net.5: {callback.left_alone['net.5']}" in caplog.text
    assert set(callback.clusters) == {"net.0", "net.3", "net.7"}
    assert not any(name.startswith("net.5.") for name in callback.deviations())
    with pytest.raises(NoLayersError, match=r"would leave every channel as it is.*softmax"):
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
