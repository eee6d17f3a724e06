"""Resuming, and joining a run, before, at and after every event."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_filterdiv import RePr
from tests.repr_.fits import SHORT, NeverCallsForward, Stops, Watch
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


# --------------------------------------------------------------------------- resumes that ask for something else


def _happened(callback: RePr) -> list[tuple[str, int]]:
    return [(event["kind"], event["epoch"]) for event in callback.history]


def _saved(folder: Path, step: int, max_epochs: int = 10, **arguments: Any) -> str:
    """Checkpoint of the default layers at a step of a fit of ten epochs."""
    saving = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=step, save_top_k=-1)
    fit([RePr(**arguments), saving, Stops(step)], max_epochs=max_epochs, min_epochs=0)
    return str(folder / f"step={step}.ckpt")


LONG: dict[str, Any] = {"full_epochs": 1, "sub_epochs": 3, "cycles": 2}  # phases 1 to 4 and 5 to 8


@pytest.mark.parametrize(
    ("changed", "max_epochs", "expected"),
    [
        ({}, 12, [1, 4, 5, 8]),
        ({"cycles": 1}, 10, [1, 4]),
        ({"cycles": 1}, 5, [1, 4]),
        ({"sub_epochs": 1}, 10, [1, 4]),  # its cycles end at 2 and 4
        ({"sub_epochs": 1, "cycles": 3}, 10, [1, 4, 5, 6]),
        ({"full_epochs": 3, "sub_epochs": 2}, 12, [1, 4, 8, 10]),
        ({"full_epochs": 0.2, "sub_epochs": 0.1}, 10, [1, 4, 5, 6]),  # drops at 2 and 5, the third is for cycles=3
    ],
)
def test_a_phase_ends_as_it_began(
    changed: dict[str, Any],
    max_epochs: int,
    expected: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = _saved(tmp_path, 15, **LONG)
    callback = RePr(**(LONG | changed))
    with caplog.at_level(logging.INFO):
        caplog.clear()
        run = fit([callback], model=Classifier(seed=1), max_epochs=max_epochs, ckpt_path=path)
    assert _happened(callback) == [(("drop", "regrow")[i % 2], epoch) for i, epoch in enumerate(expected)]
    assert [row["epoch"] for row in callback.plan()] == expected
    assert all(bool(c.weight.flatten(1).any(dim=1).all()) for c in callback.layers.values())
    assert "7 filters that RePr dropped are out (net." in caplog.text
    assert "this phase goes on as it was planned when it began" in caplog.text
    assert re.search(r"1 +drop +1  done at step 6\n +1 +regrow +4\n", caplog.text)
    assert run.trainer.current_epoch == max_epochs


def test_a_fit_that_ends_before_the_phase_is_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, 15, **LONG)
    with pytest.raises(
        MisconfigurationException, match="until epoch 4 is complete, and this fit ends with 4"
    ) as caught:
        fit([RePr(**LONG)], max_epochs=4, ckpt_path=path)
    assert "max_epochs=5 or more" in str(caught.value)
    assert "RePr.restore(model, checkpoint)" in str(caught.value)
    with pytest.raises(MisconfigurationException, match=r"last event is due after epoch 8 .* Use cycles=1 or"):
        fit([RePr(**LONG)], max_epochs=6, ckpt_path=path)


@pytest.mark.parametrize(
    ("max_epochs", "expected"), [(20, [2, 3, 5, 6, 8, 9]), (10, [2, 3, 5, 6, 8, 9]), (8, [2, 3, 5, 6])]
)
@pytest.mark.parametrize("step", [8, 14, 20])
def test_fractions_keep_their_meaning(
    step: int, max_epochs: int, expected: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before, in and after the first phase: a resume does not stretch a plan that has begun."""
    path = _saved(tmp_path, step)
    callback = RePr()
    with caplog.at_level(logging.INFO):
        caplog.clear()
        fit([callback], model=Classifier(seed=1), max_epochs=max_epochs, ckpt_path=path)
    assert [event["epoch"] for event in callback.history] == expected
    assert "lengths: 2 and 1 epochs, as fractions of 10" in caplog.text
    assert ("its length when it was first started" in caplog.text) == (max_epochs != 10)
    assert ("1 of 3 cycles left out" in caplog.text) == (max_epochs == 8)


# --------------------------------------------------------------------------- states of release 0.1


def _as_0_1(path: str, change: Callable[[dict[str, Any]], None] = lambda extra: None) -> str:
    """It knew neither the regrowth of a phase nor what fractions refer to."""
    checkpoint = torch.load(path, weights_only=True)
    (state,) = (value for key, value in checkpoint["callbacks"].items() if key.startswith("RePr"))
    del state["extra"]["regrowth"], state["extra"]["epochs"]
    change(state["extra"])
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("step", [3, 6, 8, 24, 27])
def test_states_of_0_1_resume_exactly(step: int, tmp_path: Path) -> None:
    whole = fit([first := RePr(**LONG)], max_epochs=10)
    path = _as_0_1(_saved(tmp_path, step, **LONG))
    resumed = fit([again := RePr(**LONG)], model=Classifier(seed=1), max_epochs=10, ckpt_path=path)
    assert not differing(whole.tensors(), resumed.tensors())
    assert again.history == first.history


def test_states_of_0_1_that_were_saved_in_the_middle_of_an_event(tmp_path: Path) -> None:
    """Its logger failed after the filters were changed, before the event was counted."""

    def not_counted(extra: dict[str, Any]) -> None:
        extra["applied"] = 0

    callback = RePr(**LONG)
    fit([callback], max_epochs=10, ckpt_path=_as_0_1(_saved(tmp_path, 8, **LONG), not_counted))
    assert [event["epoch"] for event in callback.history] == [1, 4, 5, 8]

    dropped = torch.load(_saved(tmp_path, 9, **LONG), weights_only=True)["callbacks"][callback.state_key]["extra"][
        "dropped"
    ]

    def not_forgotten(extra: dict[str, Any]) -> None:
        extra |= {"applied": 1, "dropped": dropped}

    callback = RePr(**LONG)
    witness = Watch(callback)
    fit([callback, witness], max_epochs=10, ckpt_path=_as_0_1(_saved(tmp_path, 26, **LONG), not_forgotten))
    assert [event["epoch"] for event in callback.history] == [1, 4, 5, 8]
    assert witness.counts[0] == 0, "they were regrown"


def test_a_state_of_0_1_without_a_regrowth_to_come_is_refused(tmp_path: Path) -> None:
    path = _as_0_1(_saved(tmp_path, 20, **LONG))
    with pytest.raises(MisconfigurationException, match="no regrowth comes after epoch 3") as caught:
        fit([RePr(**SHORT)], max_epochs=10, ckpt_path=path)
    assert "7 filters that RePr dropped are out (net." in str(caught.value)
    assert "RePr.restore(model, checkpoint)" in str(caught.value)


def test_a_resume_that_fails_before_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    class Breaks(Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            assert callback.history, "the state is loaded by now"
            raise OSError("no space left on device")

    callback = RePr(**LONG)
    path = _saved(tmp_path, 15, **LONG)
    with pytest.raises(OSError, match="no space left"):
        fit([callback, Breaks()], max_epochs=10, ckpt_path=path)
    assert callback.history == []
    assert callback.dropped == {}
    fit([callback], max_epochs=10)
    assert [event["epoch"] for event in callback.history] == [1, 4, 5, 8]
