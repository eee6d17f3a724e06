"""Resuming, and joining a run, before, at and after every event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_filterdiv import RePr
from tests.repr_.fits import SHORT, NeverCallsForward, Stops
from tests.suites.test_resume import KINDS
from tests.support.training import Classifier, batches, differing, fit

# --------------------------------------------------------------------------- resume


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_before_at_and_after_every_event(kind: str, optimizer: str, tmp_path: Path) -> None:
    """Two cycles of one epoch each; every checkpoint of the run is resumed from, all end in the same bits."""
    arguments, _ = KINDS[kind]

    def run(callbacks: list[Callback], seed: int = 0, **options: Any) -> Any:
        model = Classifier(optimizer, seed=seed)
        return fit(callbacks, model=model, max_epochs=6, validation=batches(steps=1), **options)

    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **arguments)
    first = RePr(full_epochs=1, sub_epochs=1, cycles=2, next_layer="small_random")
    whole = run([first, saving])
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(files) >= 6
    # Before, at and after each of the four events (steps 6 to 24), whatever the kind.
    for file in files[:7]:
        again = RePr(full_epochs=1, sub_epochs=1, cycles=2, next_layer="small_random")
        resumed = run([again], seed=1, ckpt_path=str(file))
        assert not differing(whole.tensors(), resumed.tensors()), file.stem
        assert again.history == first.history


def test_joining_a_run_at_a_drop(tmp_path: Path) -> None:
    """Saved before the epoch's end, without our state and example inputs: ranked at the first batch that can."""
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_on_train_epoch_end=False)
    fit([saving], max_epochs=1, validation=batches(steps=1))
    callback = RePr(**SHORT)
    path = str(tmp_path / "step=6.ckpt")
    fit([callback], model=NeverCallsForward(), ckpt_path=path, validation=batches(steps=1))
    assert [event["kind"] for event in callback.history] == ["drop", "regrow"]


def test_a_ranking_does_not_survive_a_resume(tmp_path: Path) -> None:
    """Stopped between ranking and drop, then resumed from another file: the new weights are ranked."""
    fit([RePr(**SHORT), ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)])
    used, fresh = RePr(**SHORT), RePr(**SHORT)
    fit([used, Stops(6)], model=Classifier(seed=5))
    assert used._ranked is not None
    for callback in (used, fresh):
        fit([callback], ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert used.history == fresh.history


def test_joining_a_run_skips_what_is_past(tmp_path: Path) -> None:
    """Not a drop and a regrowth in one go: it starts with the next whole cycle."""
    fit([ModelCheckpoint(dirpath=tmp_path, filename="end")], max_epochs=2)
    callback = RePr(full_epochs=1, sub_epochs=1, cycles=2)
    with pytest.warns(UserWarning, match="joins the run at epoch 2 without a saved state: the first 2 of 4 events"):
        fit([callback], max_epochs=6, ckpt_path=str(tmp_path / "end.ckpt"))
    assert [(event["kind"], event["epoch"]) for event in callback.history] == [("drop", 3), ("regrow", 4)]
