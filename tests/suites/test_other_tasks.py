"""Every callback in detection, segmentation, a GAN, an autoencoder and audio: trained, or refused with a reason."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_filterdiv import (
    CentripetalSGD,
    ChannelImportance,
    EntropyDepthBound,
    FilterCallback,
    FilterSimilarityMonitor,
    RePr,
)
from tests.registry import ONE_EACH, Case
from tests.support.tasks import TASKS, Task
from tests.support.training import differing, make_trainer, same

CALLBACKS = {case.name: case for case in ONE_EACH}
# Each task and each callback once or twice by default; all pairs under soak.
DIAGONAL = {
    ("detection", "wau"), ("detection", "importance"),
    ("segmentation", "repr"), ("segmentation", "basis"),
    ("gan", "csgd"), ("gan", "basis"),
    ("autoencoder", "expand"), ("autoencoder", "entropy"), ("autoencoder", "wau"),
    ("audio", "monitor"), ("audio", "expand"),
}  # fmt: skip
PAIRS = [
    pytest.param(
        task,
        case,
        marks=() if (task.name, case.name) in DIAGONAL else pytest.mark.soak,
        id=f"{task.name}-{case.name}",
    )
    for task in TASKS
    for case in ONE_EACH
]
# Callback of each task whose state is interrupted in the middle of a phase, or of an epoch.
RESUMED = {"detection": "wau", "segmentation": "repr", "gan": "csgd", "autoencoder": "expand", "audio": "csgd"}


def _make(task: Task, case: Case) -> FilterCallback:
    extra: dict[str, Any] = {"figures": False} if case.name == "monitor" else {}
    return case.make(**extra, **task.arguments.get(case.name, {}))


def _fit(task: Task, callbacks: list[Any], seed: int = 0, ckpt_path: str | None = None) -> dict[str, Tensor]:
    """Weights and optimizer state after three epochs."""
    module = task.module(seed)
    trainer = make_trainer(callbacks, max_epochs=3)
    trainer.fit(module, module.loader(), ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    found = {f"model.{key}": value for key, value in module.state_dict().items()}
    for index, optimizer in enumerate(trainer.optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer{index}.{number}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    return found


@cache
def _plain(name: str) -> dict[str, Tensor]:
    return _fit(next(task for task in TASKS if task.name == name), [])


def _weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith("model.")}


def _did_something(callback: FilterCallback) -> None:
    """What only shows in the callback itself."""
    if isinstance(callback, RePr):
        assert [event["kind"] for event in callback.history] == ["drop", "regrow"]
        assert any(callback.history[0]["filters"].values())
    elif isinstance(callback, CentripetalSGD):
        assert callback.clusters
        assert 0 < (callback.largest_deviation or 0.0) < 1
    elif isinstance(callback, ChannelImportance):
        assert all(bool(((gates > 0) & (gates < 1)).all()) for gates in callback.importance.values())
        assert callback.importance
    elif isinstance(callback, EntropyDepthBound):
        assert callback.bound is not None
        assert callback.depth is not None
        assert callback.depth.total >= 2
    elif isinstance(callback, FilterSimilarityMonitor):
        assert len(callback.extra_state()["snapshots"]) == 4


@pytest.mark.parametrize(("task", "case"), PAIRS)
def test_task(task: Task, case: Case) -> None:
    callback = _make(task, case)
    if case.name in task.refusals:
        error, message = task.refusals[case.name]
        with pytest.raises(error, match=re.escape(message)):
            _fit(task, [callback])
        return
    found = _fit(task, [callback])
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    _did_something(callback)
    # A gate is a weight more; what plain training has too must differ, or be equal, on its own.
    plain, trained = _weights(_plain(task.name)), _weights(found)
    assert bool(differing({name: trained[name] for name in plain}, plain)) is case.trains_differently


@pytest.mark.soak
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_resume(task: Task, tmp_path: Path) -> None:
    """Interrupted in the middle of an epoch, a resumed run ends bit-identical, the callback's state too."""
    case = CALLBACKS[RESUMED[task.name]]
    whole = _make(task, case)
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)
    expected = _fit(task, [whole, saving])
    path = tmp_path / "step=6.ckpt"
    assert path.exists(), sorted(tmp_path.iterdir())
    resumed = _make(task, case)
    # Another initialisation: everything that matters must come from the file.
    assert not differing(expected, _fit(task, [resumed], seed=1, ckpt_path=str(path)))
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("name", ["repr", "csgd"])
def test_two_networks_must_be_told_apart(name: str) -> None:
    """A GAN has no forward of its own: which network is meant is asked for, with the argument to give it by."""
    task = next(task for task in TASKS if task.name == "gan")
    with pytest.raises(ValueError, match=r"name the submodule that training_step calls with network="):
        _fit(task, [CALLBACKS[name].make(include=None)])


def test_layers_behind_a_group_norm_are_squeezed(caplog: pytest.LogCaptureFixture) -> None:
    """The depthwise layer and the norm over groups belong to the channels of net.3."""
    task = next(task for task in TASKS if task.name == "audio")
    with caplog.at_level("INFO"):
        _fit(task, [_make(task, CALLBACKS["csgd"])])
    assert "net.3 and 1 coupled" in caplog.text
