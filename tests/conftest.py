from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Two processes of these tests share a machine of two cores.
torch.set_num_threads(1)

# The tests of tests/ddp run inside one torchrun that test_two_processes.py starts.
collect_ignore = [] if "LOCAL_RANK" in os.environ else ["ddp"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes logs and checkpoints to the working directory."""
    monkeypatch.chdir(tmp_path)
