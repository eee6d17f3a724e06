"""Squeezing in stages, and a wider network into the original width."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.squeezing import Squeezed, squeeze_in_stages
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

    def train(model: nn.Module, callbacks: list[Callback], checkpoint: str | None) -> None:
        fit(callbacks, model=model, max_epochs=40)  # type: ignore[arg-type]
        widths.append(model.net[0].out_channels)  # type: ignore[union-attr, operator, index]

    model, report = squeeze_in_stages(Classifier(net=_wide(16)), train, IMAGES[:2])
    assert widths == [16, 13, 11]
    assert [row.channels for row in report.rows] == [26, 22, 20]
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [10, 10]
    with pytest.raises(ValueError, match="must be shares of the original widths that shrink"):
        squeeze_in_stages(model, train, IMAGES[:2], stages=(0.5, 0.75))


class _BrokenOffError(RuntimeError):
    """What stops a run in these tests."""


class _Stop(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise _BrokenOffError


def _run(method: str, folder: Path | None, stop: tuple[int, int] = (0, 0)) -> Squeezed:
    """Two stages; ``stop`` is the fit and the step at which the run breaks off, step 0: when the fit is over."""
    fits = 0
    torch.manual_seed(0)

    def train(model: nn.Module, callbacks: list[Callback], checkpoint: str | None) -> None:
        nonlocal fits
        fits += 1
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=folder is not None, callbacks=[*callbacks, _Stop(stop[1] if fits == stop[0] else -1)],
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(*batches_of_images()), 8), ckpt_path=checkpoint)  # type: ignore[arg-type]
        if stop == (fits, 0):
            raise _BrokenOffError

    more = {"tolerance": float("inf")} if method == "csgd" else {"importance": "l1"}
    return squeeze_in_stages(
        Classifier(net=_wide(12)), train, IMAGES[:2], method=method, stages=(0.75, 0.5), target="target_macs",
        folder=folder, loader=[batches_of_images()], **more,
    )  # fmt: skip


def batches_of_images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(32, *IMAGES.shape[1:], generator=generator), torch.randint(4, (32,), generator=generator)


@pytest.mark.parametrize("stop", [(1, 2), (1, 8), (1, 0), (2, 6), (2, 0)])
@pytest.mark.parametrize("method", ["csgd", "prune"])
def test_a_broken_off_run_goes_on_where_it_stopped(method: str, stop: tuple[int, int], tmp_path: Path) -> None:
    whole, table = _run(method, tmp_path / "whole")
    with pytest.raises(_BrokenOffError):
        _run(method, tmp_path / "broken", stop)
    resumed, again = _run(method, tmp_path / "broken")
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert again == table
    assert [row.macs / table.rows[0].macs for row in table.rows][1] == pytest.approx(2 / 3, rel=0.03)
    finished, last = _run(method, tmp_path / "broken", (1, 1))  # nothing is left to fit
    assert last == table
    assert all(torch.equal(a, b) for a, b in zip(finished.parameters(), whole.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds a run with"):
        squeeze_in_stages(Classifier(net=_wide(12)), _run, IMAGES[:2], stages=(0.5,), folder=tmp_path / "broken")


def test_stages_decide_the_target() -> None:
    with pytest.raises(ValueError, match="target_macs is what stages and target decide"):
        squeeze_in_stages(Classifier(net=_wide(12)), _run, IMAGES[:2], target_macs=0.5)


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
