"""Starts the one pair of processes in which all DDP tests run (an import costs more than a fit)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def check(*options: str, limit: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "pytest", str(ROOT / "tests" / "ddp"), "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count(" passed") == 2, done.stdout[-2000:]
    assert " skipped" not in done.stdout


def test_ddp_suite() -> None:
    check(limit=3600)


#: Every configuration of every callback in every mode of training, a part for each precision, and what else is long.
IN_FULL = {
    "32": "after_every_step and 32",
    "bf16": "after_every_step and bf16-mixed",
    "fp16": "after_every_step and 16-mixed and not bf16-mixed",
    "other": "not after_every_step",
}


@pytest.mark.soak
@pytest.mark.parametrize("part", IN_FULL)
def test_ddp_suite_in_full(part: str) -> None:
    check("-m", "soak", "-k", IN_FULL[part], limit=2 * 3600)
