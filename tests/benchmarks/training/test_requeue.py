"""Moments at which a job is requeued. ``test_cluster`` does it on a real Slurm."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.slurm import trial as slurm_trial
from benchmarks.training import requeue


class Trainer(SimpleNamespace):
    """Two ranks of which another one was signalled, if ``other``."""

    def save_checkpoint(self, path: Path) -> None:
        self.done.append(("saved", path.name))


def trainer(done: list[Any], other: bool = False) -> Trainer:
    strategy = SimpleNamespace(
        reduce_boolean_decision=lambda asked, all: done.append("asked") or asked or other,
        barrier=lambda name: done.append("barrier"),
    )
    return Trainer(strategy=strategy, default_root_dir="runs", is_global_zero=True, global_step=7, done=done)


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> requeue.RequeueAtStep:
    monkeypatch.setattr(requeue, "slurm_job", lambda: "41")
    monkeypatch.setattr(requeue.time, "sleep", lambda seconds: None)
    return requeue.RequeueAtStep(every_n_steps=5)


def test_short_epochs_are_no_reason_never_to_ask(
    callback: requeue.RequeueAtStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(requeue.subprocess, "run", lambda command, check: done.append(command))
    made = trainer(done)
    for batch in range(9):  # three epochs of three batches
        callback.on_train_batch_end(made, None, None, None, batch % 3)
    assert done == ["asked"]
    callback.asked = True
    with pytest.raises(SystemExit, match="Slurm did not requeue job 41"):
        callback.on_train_batch_end(made, None, None, None, 0)
    assert done == ["asked", "asked", ("saved", "last.ckpt"), "barrier", ["scontrol", "requeue", "41"]]


def test_a_rank_that_was_not_signalled_saves_with_the_others(
    callback: requeue.RequeueAtStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(requeue.subprocess, "run", lambda command, check: done.append(command))
    made = trainer(done, other=True)
    made.is_global_zero = False
    for _ in range(4):
        callback.on_train_batch_end(made, None, None, None, 0)
    with pytest.raises(SystemExit):
        callback.on_train_batch_end(made, None, None, None, 0)
    assert done == ["asked", ("saved", "last.ckpt"), "barrier"]  # rank 0 alone speaks to Slurm


def test_the_signal_only_leaves_a_mark(callback: requeue.RequeueAtStep) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        callback.listen()
        signal.raise_signal(signal.SIGUSR1)
        assert callback.asked
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "train"}, "5"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "6", "SLURM_JOB_NAME": "train", "SLURM_ARRAY_JOB_ID": "4",
          "SLURM_ARRAY_TASK_ID": "2"}, "4_2"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "bash"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_jobs_have_the_name_that_scontrol_wants(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], job: str | None
) -> None:
    for name in ("SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert requeue.slurm_job() == job


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ("PENDING", TimeoutError, r"the end of job 7 not within -?0 s; it is PENDING, reason Resources .*see out.txt"),
        ("NODE_FAIL", RuntimeError, "job 7 is NODE_FAIL while waiting for the end; see out.txt"),
    ],
)
def test_a_job_that_does_not_come_to_its_end_says_why(
    monkeypatch: pytest.MonkeyPatch, state: str, error: type[Exception], message: str
) -> None:
    said = {"JobState": state, "Reason": "Resources", "StdOut": "out.txt"}
    monkeypatch.setattr(slurm_trial, "_state", lambda job: said)
    with pytest.raises(error, match=message):
        slurm_trial._wait("the end", lambda: False, "7", -1e-9)
