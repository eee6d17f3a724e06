"""Squeezing in stages, and a wider network into the original width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.squeezing import squeeze_in_stages
from tests.centripetal.fits import IMAGES
from tests.support.training import STEPS_PER_EPOCH, Classifier, batches, fit

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
    merged = callback.merge(run.model).network.net.eval()
    original = _wide(8).eval()
    original.load_state_dict(merged.state_dict())
    torch.testing.assert_close(original(IMAGES), merged(IMAGES))
    assert torch.equal(original(IMAGES).argmax(1), run.model.eval()(IMAGES).argmax(1))


def test_batches_are_what_the_budget_counts() -> None:
    assert len(batches()) == STEPS_PER_EPOCH
