"""Targets of C-SGD: the merged network costs what was asked for, and a resume keeps the clusters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.narrowing import TargetError
from tests.centripetal.fits import IMAGES
from tests.support.training import Classifier, fit


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 48, 3, padding=1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 4),
    )  # fmt: skip


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("measure", ["macs", "parameters"])
def test_the_merged_network_meets_the_target(measure: str, scope: str) -> None:
    torch.manual_seed(0)
    callback = CentripetalSGD(**{f"target_{measure}": 0.5}, scope=scope)
    assert callback.keep_fraction is None
    run = fit([callback], model=Classifier(net=_net()), max_epochs=2)
    report = callback.merge(run.model, IMAGES[:2], tolerance=float("inf")).report
    after, before = getattr(report, f"{measure}_after"), getattr(report, f"{measure}_before")
    assert after / before == pytest.approx(0.5, rel=0.01)


def test_multiples_and_limits() -> None:
    callback = CentripetalSGD(target_macs=0.6, channels_multiple=8, max_layer_fraction=0.5)
    run = fit([callback], model=Classifier(net=_net()), max_epochs=1)
    network = callback.merge(run.model, IMAGES[:2], tolerance=float("inf")).network
    widths = [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 8 == 0 for width in widths)
    assert widths[0] >= 16
    assert widths[1] >= 24


def test_what_is_out_of_reach_is_said_before_a_step() -> None:
    callback = CentripetalSGD(target_macs=0.2, max_layer_fraction=0.3)
    model = Classifier(net=_net())
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(TargetError, match=r"target_macs=0\.2 is out of reach"):
        fit([callback], model=model, max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="got keep_fraction and target_macs"):
        CentripetalSGD(keep_fraction=0.5, target_macs=0.5)
