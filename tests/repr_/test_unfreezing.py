"""All ranked layers frozen at the start: the plan begins when one is unfrozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_filterdiv import RePr
from lightning_filterdiv.repr_.schedule import RePrEvent
from tests.support.training import Classifier, differing, fit, same

INCLUDE = ["backbone.*"]


class Backbone(Classifier):
    """All convolutions before the classifier."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.backbone, self.head = self.net[:-1], self.net[-1]
        del self.net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


def unfreezes(epoch: int) -> BackboneFinetuning:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=epoch, backbone_initial_lr=0.01)


class Unfreezes(Callback):
    """Freezes the backbone until epoch 2, also in a fit that is resumed (BackboneFinetuning leaves it frozen there)."""

    def _set(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.backbone.requires_grad_(trainer.current_epoch >= 2)

    on_train_start = on_train_batch_start = _set


class InOptimizer(Backbone):
    """Frozen parameters too."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def events(callback: RePr) -> list[tuple[str, int]]:
    return [(event["kind"], event["epoch"]) for event in callback.history]


def test_lengths_count_from_the_unfreezing() -> None:
    callback = RePr(full_epochs=1, sub_epochs=2, cycles=1, include=INCLUDE)
    run = fit([unfreezes(3), callback], model=Backbone(), max_epochs=7)
    assert events(callback) == [("drop", 4), ("regrow", 6)]
    assert callback.plan() == [{"cycle": 1, "kind": "drop", "epoch": 4}, {"cycle": 1, "kind": "regrow", "epoch": 6}]
    assert differing(run.tensors(), fit([unfreezes(3)], model=Backbone(), max_epochs=7).tensors())


def test_fractions_are_of_the_epochs_left(caplog: pytest.LogCaptureFixture) -> None:
    callback = RePr(include=INCLUDE)
    with caplog.at_level("INFO"):
        fit([unfreezes(2), callback], model=Backbone(), max_epochs=12)
    assert events(callback) == [(k, 2 + e) for c in range(3) for k, e in (("drop", 3 * c + 2), ("regrow", 3 * c + 3))]
    assert "lengths: 2 and 1 epochs, as fractions of 10, those left when layers were unfrozen" in caplog.text


def test_a_plan_of_ones_own_is_not_moved() -> None:
    class Own(RePr):
        def schedule(self) -> Any:
            return [RePrEvent(1, "drop", 3), RePrEvent(1, "regrow", 4)]

    callback = Own(include=INCLUDE)
    fit([unfreezes(2), callback], model=Backbone(), max_epochs=6)
    assert events(callback) == [("drop", 3), ("regrow", 4)]


@pytest.mark.parametrize(
    ("arguments", "unfrozen", "epochs", "words"),
    [
        (
            {"full_epochs": 2, "sub_epochs": 2, "cycles": 1},
            3,
            6,
            "full_epochs=1, sub_epochs=1, cycles=1 or max_epochs=8",
        ),
        ({}, 3, 5, "max_epochs=6"),
    ],
    ids=["epochs", "fractions"],
)
def test_lengths_that_fit_are_proposed_and_fit(
    arguments: dict[str, Any], unfrozen: int, epochs: int, words: str
) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"epochs that are left since its layers .* at epoch {unfrozen}"
    ) as caught:
        fit([unfreezes(unfrozen), RePr(**arguments, include=INCLUDE)], model=Backbone(), max_epochs=epochs)
    assert words in str(caught.value)
    callback = RePr(**arguments, include=INCLUDE)
    fit([unfreezes(unfrozen), callback], model=Backbone(), max_epochs=int(words[-1]))
    assert [kind for kind, _ in events(callback)] == ["drop", "regrow"]


@pytest.mark.parametrize("step", [6, 12, 15, 18, 24, 30])
def test_a_resume_keeps_the_plan(step: int, tmp_path: Path) -> None:
    """Saved while it waits, between the unfreezing and the first event, and later."""

    def callbacks(*more: Callback) -> list[Any]:
        return [Unfreezes(), RePr(full_epochs=1, sub_epochs=2, cycles=1, include=INCLUDE), *more]

    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    whole = fit(callbacks(saving), model=InOptimizer(), max_epochs=6)
    resumed = fit(callbacks(), model=InOptimizer(seed=1), max_epochs=6, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert events(whole.callbacks[1]) == [("drop", 3), ("regrow", 5)]  # type: ignore[arg-type]
    assert same(whole.callbacks[1].state_dict(), resumed.callbacks[1].state_dict())
    assert not differing(whole.tensors(), resumed.tensors())


def test_frozen_in_a_phase_is_refused(tmp_path: Path) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
    arguments: dict[str, Any] = {"full_epochs": 1, "sub_epochs": 2, "cycles": 1, "include": ["net.*"]}
    fit([RePr(**arguments), saving], max_epochs=5)
    model = Classifier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("net.10" in name)
    with pytest.raises(MisconfigurationException, match=r"dropped are out .*could not be held and ended. Unfreeze one"):
        fit([RePr(**arguments)], model=model, max_epochs=5, ckpt_path=str(tmp_path / "step=12.ckpt"))
