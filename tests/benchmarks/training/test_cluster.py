"""The same run on two processes, however they are started and whatever happens to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.slurm import trial as slurm_trial
from benchmarks.training import requeue
from benchmarks.training.sweep import CONFIGS, ROOT

pytestmark = pytest.mark.soak


def slurm_answers() -> bool:
    return shutil.which("sbatch") is not None and subprocess.run(["sinfo"], capture_output=True).returncode == 0


def command(folder: Path, launcher: list[str], *more: str) -> list[str]:
    names = ("data/digits", "model/c3", "recipe/quick", "method/wau", "trainer/ddp_cpu")
    files = [part for name in names for part in ("-c", str(CONFIGS / f"{name}.yaml"))]
    return [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "benchmarks.training.train", "fit", *files,
            "--seed_everything", "1", "--trainer.max_epochs", "60", "--checkpoint.every_n_train_steps", "25",
            "--trainer.default_root_dir", str(folder), *more]  # fmt: skip


def start(line: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def final(folder: Path) -> dict[str, torch.Tensor]:
    result = json.loads((folder / "result.json").read_text())
    assert result["processes"] == 2
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_torchrun_on_one_and_on_two_nodes_killed_or_not_ends_with_the_same_weights(tmp_path: Path) -> None:
    one_node = ["--standalone", "--nproc-per-node=2"]
    assert start(command(tmp_path / "whole", one_node)).wait() == 0
    whole = final(tmp_path / "whole")

    cut = start(command(tmp_path / "cut", one_node))
    while not (tmp_path / "cut" / "checkpoints" / "last.ckpt").exists():
        assert cut.poll() is None
        time.sleep(0.05)
    os.killpg(cut.pid, signal.SIGKILL)
    cut.wait()
    assert not (tmp_path / "cut" / "result.json").exists()
    assert start(command(tmp_path / "cut", one_node)).wait() == 0
    assert equal(final(tmp_path / "cut"), whole)

    # Two agents on this machine, as on two nodes of one process each.
    agents = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=two",
              f"--rdzv-endpoint=127.0.0.1:{free_port()}"]  # fmt: skip
    nodes = ("--trainer.num_nodes", "2", "--trainer.devices", "1")
    both = [start(command(tmp_path / "nodes", agents, *nodes)) for _ in range(2)]
    assert [agent.wait() for agent in both] == [0, 0]
    assert equal(final(tmp_path / "nodes"), whole)


@pytest.mark.skipif(not slurm_answers(), reason="no Slurm answers here: benchmarks/slurm/one_node.sh starts one")
def test_a_requeued_slurm_job_ends_with_the_weights_of_one_left_alone(tmp_path: Path) -> None:
    assert slurm_trial.trial(tmp_path / "trial", epochs=60) == []


def test_outside_slurm_nothing_is_listened_to() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    callback = requeue.RequeueAtStep()
    callback.listen()
    assert callback.job is None
    assert signal.getsignal(signal.SIGUSR1) == before
