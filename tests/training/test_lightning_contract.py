"""Behaviour of Lightning that this package relies on. A failure means that the framework changed, not this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from tests.suites.test_resume import KINDS
from tests.support.training import STEPS_PER_EPOCH, Classifier, batches, fit

STEP_HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
)
START_HOOKS = (
    "setup",
    "on_fit_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_load_checkpoint",
    "load_state_dict",
)


class Recorder(Callback):
    """Names of hooks in the order in which they fire."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.calls: list[str] = []
        self.epochs: list[int] = []
        for name in names:
            setattr(self, name, self._recording(name))

    def _recording(self, name: str) -> Any:
        def hook(*args: Any, **kwargs: Any) -> None:
            self.calls.append(name)
            if name.startswith("on_train_"):
                self.epochs.append(args[0].current_epoch)

        return hook

    def state_dict(self) -> dict[str, Any]:
        return {"something": 1}


class _Logged(Classifier):
    """Adds the moments of the step that are no callback hooks."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append("training_step")
        return super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("clip")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(lambda *_: self.calls.append("step"))
        return optimizer


def _one_step(**options: Any) -> list[str]:
    recorder = Recorder(STEP_HOOKS)
    fit([recorder], model=_Logged(recorder.calls), max_epochs=1, validation=batches(steps=1), **options)
    return recorder.calls


def test_order_of_a_step_and_an_epoch() -> None:
    assert _one_step(limit_train_batches=1) == [
        "on_train_epoch_start",
        "on_train_batch_start",
        "training_step",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "clip",
        "step",
        "on_train_batch_end",
        "on_validation_epoch_end",
        "on_validation_end",
        "on_train_epoch_end",
    ]


def test_accumulation_fires_the_step_hook_once() -> None:
    calls = _one_step(limit_train_batches=4, accumulate_grad_batches=4)
    assert calls.count("on_after_backward") == 4
    assert calls.count("on_before_optimizer_step") == calls.count("step") == calls.count("on_before_zero_grad") == 1


def test_an_overflow_fires_before_but_not_after() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    calls = _one_step(limit_train_batches=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert "on_before_optimizer_step" in calls
    assert "step" not in calls


def test_order_of_the_start(tmp_path: Path) -> None:
    fit([Recorder(()), ModelCheckpoint(dirpath=tmp_path, filename="end")], max_epochs=1)
    recorder = Recorder(START_HOOKS)
    fit(
        [recorder],
        max_epochs=2,
        validation=batches(steps=1),
        num_sanity_val_steps=1,
        ckpt_path=str(tmp_path / "end.ckpt"),
    )
    assert recorder.calls == [
        "setup",
        "on_load_checkpoint",
        "load_state_dict",
        "on_fit_start",
        "on_sanity_check_end",
        "on_train_start",
    ]


FIRST_HOOKS = {
    "epoch_end": ["on_train_epoch_start", "on_train_batch_start"],
    "mid_epoch": ["on_train_batch_start", "on_before_zero_grad"],
    "last_batch": ["on_train_batch_start", "on_before_zero_grad"],
    "validation_end": ["on_train_epoch_end", "on_train_epoch_start"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_first_hooks_after_a_resume(kind: str, tmp_path: Path) -> None:
    arguments, step = KINDS[kind]
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **arguments)
    fit([checkpoint], max_epochs=3, validation=batches(steps=1))
    recorder = Recorder(STEP_HOOKS)
    path = str(tmp_path / f"step={step}.ckpt")
    fit([recorder], max_epochs=3, validation=batches(steps=1), ckpt_path=path)
    assert recorder.calls[:2] == FIRST_HOOKS[kind]
    assert recorder.epochs[0] == (0 if kind == "validation_end" else 1)


def test_a_checkpoint_is_saved_after_user_callbacks(tmp_path: Path) -> None:
    """Weights rewritten in on_train_epoch_end are in the file, with the metric of the old ones."""

    class Rewrites(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.net[0].weight.fill_(7.0)

    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="end", save_on_train_epoch_end=True)
    fit([checkpoint, Rewrites()], max_epochs=1)
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert bool((saved["net.0.weight"] == 7.0).all())


def test_teardown_is_not_called_after_an_exception() -> None:
    recorder = Recorder(("teardown", "on_exception"))
    model = Classifier()

    def fail(model: Classifier, step: int) -> None:
        raise OSError("disk")

    model.hook = fail
    with pytest.raises(OSError, match="disk"):
        fit([recorder], model=model)
    assert recorder.calls == ["on_exception"]


def test_a_sized_loader_is_not_exhausted() -> None:
    """Its generator is dropped after the last batch: whatever follows the last ``yield`` never runs."""

    class Loader:
        finished = 0

        def __len__(self) -> int:
            return STEPS_PER_EPOCH

        def __iter__(self) -> Any:
            yield from batches()
            Loader.finished += 1

    fit(loader=Loader(), max_epochs=2)
    assert Loader.finished == 0
