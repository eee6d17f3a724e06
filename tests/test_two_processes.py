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
    check(limit=900)


@pytest.mark.soak
def test_ddp_suite_in_full() -> None:
    """Every configuration of every callback, and every mode of training."""
    check("-m", "soak", limit=4 * 3600)
