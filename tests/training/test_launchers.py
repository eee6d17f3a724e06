"""Launchers that train in child processes bring only weights home."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher as TheirLauncher
from torch.multiprocessing.spawn import ProcessRaisedException

from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, batches, make_trainer

LOSES = {"repr", "csgd", "importance", "entropy"}
each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)


def _set_up(case: Case, launcher: type | None) -> None:
    class Trainer:
        """Just what ``setup`` looks at."""

        is_global_zero, global_step = False, 0

    callback, trainer = case.make(), Trainer()
    trainer.strategy = object.__new__(DDPStrategy)  # type: ignore[attr-defined]
    trainer.strategy._launcher = None if launcher is None else object.__new__(launcher)  # type: ignore[attr-defined]
    trainer.callbacks = [callback]  # type: ignore[attr-defined]
    callback.setup(trainer, Classifier(), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("launcher", [_MultiProcessingLauncher, TheirLauncher], ids=["lightning", "pytorch_lightning"])
@each
def test_what_would_stay_in_the_child_is_named(case: Case, launcher: type) -> None:
    if case.name not in LOSES:
        _set_up(case, launcher)
        return
    with pytest.raises(
        MisconfigurationException, match=r"only weights come back .* would be lost\. Use strategy='ddp'"
    ):
        _set_up(case, launcher)


@pytest.mark.parametrize("launcher", [None, _SubprocessScriptLauncher], ids=["torchrun", "scripts"])
@each
def test_other_launchers_are_allowed(case: Case, launcher: Any) -> None:
    _set_up(case, launcher)


class _Probe(Callback):
    """Notes which of its methods and properties are asked for."""

    asked: list[str]

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "asked":
            self.asked.append(name)
        return super().__getattribute__(name)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_callback_runs_before_the_processes(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails, a refusal could come before the children start: then use the hook that is asked for."""
    probe = _Probe()
    probe.asked = []

    def launch(self: Any, function: Any, *_: Any, **__: Any) -> None:
        launched.append(list(probe.asked))
        if fails:
            raise RuntimeError("in a child process")

    launched: list[list[str]] = []
    monkeypatch.setattr(_MultiProcessingLauncher, "launch", launch)
    trainer = make_trainer([probe], strategy="ddp_fork", devices=2)
    assert set(probe.asked) <= {"state_dict", "state_key"}  # whether it has a state, and under which key
    probe.asked.clear()
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        trainer.fit(Classifier(), batches())
    assert launched == [[]]
    assert ("on_exception" in probe.asked) is fails


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
def test_the_error_of_the_processes_ends_in_the_refusal() -> None:
    """Its text would be the traceback of a child. Started in a process of its own: a fork of threads may hang."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "importance"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("REFUSED ChannelImportance cannot be used with a launcher"), done.stderr
    assert done.stdout.count("\n") == 1


@each
def test_other_errors_of_the_processes_stay(case: Case) -> None:
    error = ProcessRaisedException("Traceback ...\nKeyError: 3", 0, 1)
    launcher = object.__new__(_MultiProcessingLauncher)
    trainer = make_trainer([callback := case.make()])
    trainer.strategy._launcher = launcher
    callback.on_exception(trainer, Classifier(), error)
    assert str(error) == "Traceback ...\nKeyError: 3"


SCRIPT = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from tests.registry import ONE_EACH
from tests.support.training import Classifier, batches, differing, make_trainer
case = next(case for case in ONE_EACH if case.name == sys.argv[1])

def trained(**options):
    model = Classifier()
    make_trainer([case.make()], **options).fit(model, batches())
    return model.state_dict()

try:
    forked = trained(strategy="ddp_fork")
except Exception as error:
    print("REFUSED", error)
else:
    print("DIFFERING", differing(forked, trained()))
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot fork")
@each
def test_a_forked_fit_hands_back_the_network_of_a_plain_one(case: Case) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, case.name],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip
    if case.name in LOSES:
        assert "REFUSED" in done.stdout, done.stderr
        assert "would be lost" in done.stdout
    else:
        assert "DIFFERING []" in done.stdout, done.stdout + done.stderr
