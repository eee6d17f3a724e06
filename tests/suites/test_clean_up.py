"""After any end of a fit, nothing of the callback stays in the model, and its state is complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from lightning_filterdiv import WeightAsynchronousUpdate
from tests.registry import ONE_EACH, SLOW_CASES, Case
from tests.support.training import Classifier, Run, batches, differing, fit, make_trainer, same


class _BoomError(Exception):
    pass


def _explode(model: Classifier, step: int) -> None:
    if step == 8:
        raise _BoomError


def check_clean_up(make: Callable[[], Any], interrupt: bool, folder: Path) -> None:
    """After an exception or a normal end: no hooks, the network's own weights in storages of their own, a state that
    resumes."""
    model, callback = Classifier(), make()
    trainer = make_trainer([callback])
    if interrupt:
        model.hook = _explode
        with pytest.raises(_BoomError):
            trainer.fit(model, batches())
    else:
        trainer.fit(model, batches())
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    # An expanded layer has factors in place of its weight; gates stay, beside the weights.
    assert dict(Classifier().named_parameters()).keys() <= dict(model.named_parameters()).keys()
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
        assert parameter.data_ptr() == parameter.untyped_storage().data_ptr()
    if interrupt:
        model.hook = None
        trainer.save_checkpoint(folder / "after.ckpt")
        state = torch.load(folder / "after.ckpt", weights_only=True)["callbacks"][callback.state_key]
        reference, states = make(), []
        watched = Classifier()
        watched.hook = lambda model, step: states.append(reference.extra_state())
        fit([reference], model=watched)
        assert same(state["extra"], states[8])


@pytest.mark.parametrize("interrupt", [False, True], ids=["normal end", "exception"])
@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_clean_up(case: Case, interrupt: bool, tmp_path: Path) -> None:
    check_clean_up(case.make, interrupt, tmp_path)


class _LeavesHooks(WeightAsynchronousUpdate):
    """Mutant: relies on teardown, which Lightning does not call after an exception."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pass


def test_left_hooks_are_caught(tmp_path: Path) -> None:
    check_clean_up(_LeavesHooks, False, tmp_path)
    with pytest.raises(AssertionError):
        check_clean_up(_LeavesHooks, True, tmp_path)


@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_reused_instance_starts_afresh(case: Case) -> None:
    """The same callback object in a second, new fit gives the run that a new object gives."""
    callback = case.make()
    first, second = fit([callback]), fit([callback])
    assert not differing(first.tensors(), second.tensors())


class _FailsAt(Callback):
    def __init__(self, hook: str) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise _BoomError

        setattr(self, hook, fail)


@pytest.mark.parametrize("by_hand", [False, True], ids=["by the trainer", "by hand"])
@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_failed_resume_is_forgotten(case: Case, by_hand: bool, tmp_path: Path) -> None:
    """State that was restored and never used is not taken up by the next fit of the same object."""
    path = tmp_path / "step=6.ckpt"
    fit([case.make(), ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)])
    callback = case.make()
    if by_hand:
        callback.load_state_dict(torch.load(path, weights_only=True)["callbacks"][callback.state_key])
    with pytest.raises(_BoomError):
        fit([callback, _FailsAt("on_fit_start")], ckpt_path=None if by_hand else str(path))
    again, new = fit([callback], model=Classifier(seed=1)), fit([case.make()], model=Classifier(seed=1))
    assert not differing(again.tensors(), new.tensors())
    assert same(again.callbacks[0].state_dict(), new.callbacks[0].state_dict())


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_used_object_resumes_without_a_state_like_a_new_one(case: Case, tmp_path: Path) -> None:
    fit([ModelCheckpoint(dirpath=tmp_path, filename="end")])
    if case.refuses_without_state is None:
        used = fit([case.make()]).callbacks
        runs = [fit(c, ckpt_path=str(tmp_path / "end.ckpt"), max_epochs=6) for c in (used, [case.make()])]
        assert not differing(runs[0].tensors(), runs[1].tensors())
        assert same(used[0].state_dict(), runs[1].callbacks[0].state_dict())


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_checkpoint_of_a_fit_that_never_began_holds_no_earlier_state(case: Case, tmp_path: Path) -> None:
    """A callback before ours fails in its setup: what ours still has is that of the fit before."""
    callback = case.make()
    fit([callback])
    with pytest.raises(_BoomError):
        fit([_FailsAt("setup"), callback, OnExceptionCheckpoint(tmp_path, "failed")])
    assert callback.state_key not in torch.load(tmp_path / "failed.ckpt", weights_only=True)["callbacks"]


@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_fit_twice_continues(case: Case) -> None:
    """Five epochs at once, or three and then two more with the same trainer."""
    whole = fit([case.make()], max_epochs=5)
    model, callback = Classifier(), case.make()
    trainer = make_trainer([callback], max_epochs=3)
    loader = batches()
    trainer.fit(model, loader)
    trainer.fit_loop.max_epochs = 5
    optimizer_state = trainer.optimizers[0].state_dict()
    model.configure_optimizers = lambda: _restored(model, optimizer_state)  # type: ignore[method-assign]
    trainer.fit(model, loader)
    assert trainer.global_step == whole.trainer.global_step
    assert not differing(whole.model.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "before", ["test", *(pytest.param(stage, marks=pytest.mark.soak) for stage in ("validate", "predict"))]
)
@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_looking_first_changes_no_fit(case: Case, before: str) -> None:
    """A fit after ``trainer.test`` (or its sisters) is the fit without it, and ``trainer.test`` works after the fit."""
    whole = fit([case.make()], max_epochs=3, limit_val_batches=1.0)
    model, callback = Classifier(), case.make()
    trainer = make_trainer([callback], max_epochs=3, limit_val_batches=1.0)
    held_out = batches(steps=1)
    assert getattr(trainer, before)(model, held_out, **({"verbose": False} if before != "predict" else {}))
    assert not differing(model.state_dict(), Classifier().state_dict())
    trainer.fit(model, batches())
    assert not differing(whole.tensors(), Run(model, trainer).tensors())
    assert trainer.test(model, held_out, verbose=False)[0]["test_loss"] > 0
    assert not differing(whole.model.state_dict(), model.state_dict())


def _restored(model: Classifier, state: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer = Classifier.configure_optimizers(model)
    optimizer.load_state_dict(state)
    return optimizer
