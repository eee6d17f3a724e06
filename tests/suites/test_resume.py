"""A resumed run ends bit-identical to the uninterrupted one, from each kind of checkpoint that Lightning writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_filterdiv import WeightAsynchronousUpdate
from tests.registry import SLOW_CASES, Case
from tests.support.training import STEPS_PER_EPOCH, Classifier, batches, differing, fit

Make = Callable[[], list[Callback]]
# kind -> (arguments of ModelCheckpoint, the step at which to interrupt)
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "epoch_end": ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, STEPS_PER_EPOCH),
    "mid_epoch": ({"every_n_train_steps": 4}, STEPS_PER_EPOCH + 2),
    "last_batch": ({"every_n_train_steps": STEPS_PER_EPOCH}, STEPS_PER_EPOCH),
    "validation_end": ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, STEPS_PER_EPOCH),
}


def _fit(make: Make, optimizer: str, seed: int = 0, **options: Any) -> Any:
    model = Classifier(optimizer, seed=seed)
    return fit(make(), model=model, max_epochs=3, validation=batches(steps=1), **options)


def check_resume(make: Make, kind: str, optimizer: str, folder: Path) -> None:
    """Raise AssertionError unless resuming ``make()`` equals not having stopped."""
    arguments, step = KINDS[kind]

    def saving() -> list[Callback]:
        checkpoint = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **arguments)
        return [*make(), checkpoint]

    whole = _fit(saving, optimizer)
    path = folder / f"step={step}.ckpt"
    assert path.exists(), sorted(folder.iterdir())
    # Another initialisation: everything that matters must come from the file.
    resumed = _fit(make, optimizer, seed=1, ckpt_path=str(path))
    first = min(resumed.model.losses)
    assert first == step
    assert resumed.model.losses == {at: loss for at, loss in whole.model.losses.items() if at >= first}
    assert resumed.model.seen.items() <= whole.model.seen.items()
    assert not differing(whole.tensors(), resumed.tensors())


def test_the_harness_itself(tmp_path: Path) -> None:
    """Without a callback every kind resumes exactly, and consecutive batches differ: what fails below is ours."""
    for optimizer in ("sgd", "adamw"):
        for kind in KINDS:
            check_resume(list, kind, optimizer, tmp_path / f"{optimizer}-{kind}")
    seen = list(fit(max_epochs=3).model.seen.values())
    assert len(set(seen)) == len(seen) == 3 * STEPS_PER_EPOCH


#: Kinds differ in what Lightning saves and repeats, optimizers in their state: every kind with one, one kind with both.
WAYS = [
    pytest.param(optimizer, kind, marks=() if optimizer == "adamw" or kind == "mid_epoch" else pytest.mark.soak)
    for optimizer in ("adamw", "sgd")
    for kind in KINDS
]


@pytest.mark.parametrize(("optimizer", "kind"), WAYS)
@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_resume(case: Case, optimizer: str, kind: str, tmp_path: Path) -> None:
    check_resume(lambda: [case.make()], kind, optimizer, tmp_path)


class _ForgetsItsSteps(WeightAsynchronousUpdate):
    """Mutant: its state says nothing."""

    def extra_state(self) -> dict[str, Any]:
        return {"steps": []}


@pytest.mark.parametrize("kind", KINDS)
def test_a_forgetful_callback_is_caught(kind: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_resume(lambda: [_ForgetsItsSteps()], kind, "sgd", tmp_path)
