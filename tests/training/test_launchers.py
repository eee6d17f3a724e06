"""Launchers that train in child processes bring only weights home."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher as TheirLauncher

from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier

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
