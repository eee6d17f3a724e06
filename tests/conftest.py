from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests import soak

# Two processes of these tests share a machine of two cores.
torch.set_num_threads(1)

if os.environ.get("FILTERDIV_ACCELERATOR") == "gpu":
    # Runs are compared bit by bit. Average pooling has no implementation that says it is deterministic: it only warns.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False

# The tests of tests/ddp run inside one torchrun that test_two_processes.py starts.
collect_ignore = [] if "LOCAL_RANK" in os.environ else ["ddp"]


def pytest_configure(config: pytest.Config) -> None:
    for name in soak.PARTS:
        config.addinivalue_line("markers", f"{name}: a part of the soak tests, see tests/soak.py")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Tests on two ranks are parts of the test that starts the ranks.
        if item.get_closest_marker("soak") and not item.nodeid.startswith("tests/ddp/"):
            item.add_marker(soak.part(item.nodeid))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes logs and checkpoints to the working directory."""
    monkeypatch.chdir(tmp_path)
