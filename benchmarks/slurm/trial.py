"""Show on a real Slurm that a requeued job ends with the weights of one that was left alone.

    eval "$(benchmarks/slurm/one_node.sh start /tmp/slurm)"     # or any cluster: SLURM_CONF as usual
    python -m benchmarks.slurm.trial --out runs/slurm-trial

Submits ``benchmarks/slurm/train.sbatch`` three times with two tasks (DDP, gloo) and the same arguments: left alone;
requeued by ``scontrol requeue`` in the middle; and signalled (SIGUSR1), so that it saves after a step and requeues
itself. Prints what happened, and compares weights and optimizer state bit by bit. Status 1 if they differ.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.paths import ROOT

CONFIGS = "benchmarks/configs"
_DEAD = ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")


def _shell(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def _state(job: str) -> dict[str, str]:
    """Return the state of the job, as named by ``scontrol show job``."""
    return dict(re.findall(r"(\w+)=(\S*)", _shell("scontrol", "show", "job", job)))


def _wait(what: str, reached: Callable[[], bool], job: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not reached():
        said = _state(job)
        state = said["JobState"]
        if state in _DEAD:
            raise RuntimeError(f"job {job} is {state} while waiting for {what}; see {said['StdOut']}")
        if time.monotonic() > end:
            raise TimeoutError(
                f"{what} of job {job} not within {seconds:.0f} s; it is {state}, reason {said['Reason']} (two tasks "
                f"need two free CPUs); see {said['StdOut']}"
            )
        time.sleep(0.5)


def _submit(folder: Path, method: str, epochs: int) -> str:
    files = [f"{CONFIGS}/{name}.yaml" for name in
             ("data/digits", "model/c3", "recipe/quick", f"method/{method}", "trainer/ddp_cpu")]  # fmt: skip
    output = _shell(
        "sbatch", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={folder}/output.txt",
        "--export=ALL", "benchmarks/slurm/train.sbatch", *(part for file in files for part in ("-c", file)),
        "--seed_everything", "1", "--trainer.max_epochs", str(epochs), "--checkpoint.every_n_train_steps", "25",
        "--trainer.default_root_dir", str(folder), "--label", method,
    )  # fmt: skip
    return output.split()[-1]


def _training(folder: Path) -> bool:
    """Past the first checkpoint."""
    return (folder / "checkpoints" / "last.ckpt").exists()


def _leave_alone(job: str) -> str:
    return "left alone"


def _requeue(job: str) -> str:
    _shell("scontrol", "requeue", job)
    return f"scontrol requeue {job}"


def _signal(job: str) -> str:
    _shell("scancel", "--signal=USR1", job)
    return f"scancel --signal=USR1 {job}"


WAYS = {"alone": _leave_alone, "requeued": _requeue, "signalled": _signal}


def _differences(one: Any, other: Any, name: str) -> list[str]:
    """Names of tensors that are not equal bit by bit, in two nested states."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [name]
    if isinstance(one, dict):
        keys = [f"{name}: keys"] if one.keys() != other.keys() else []
        return keys + [n for key in one for n in _differences(one[key], other.get(key), f"{name}.{key}")]
    if isinstance(one, list):
        return [n for i, (a, b) in enumerate(zip(one, other, strict=True)) for n in _differences(a, b, f"{name}[{i}]")]
    return [] if one == other else [name]


def trial(out: Path, method: str = "wau", epochs: int = 150, seconds: float = 600) -> list[str]:
    """Run the three jobs, print what happens.

    Args:
        out: folder of the runs; must not hold an earlier trial.
        method: name of a configuration.
        epochs: epochs of 11 steps each (digits, two processes of 64 images).
        seconds: to wait for a job.

    Returns:
        Differences from the run that was left alone; empty if there are none.

    Raises:
        RuntimeError: a job failed.
        TimeoutError: a job did not come to its end.
    """
    os.environ.setdefault("PYTHON", sys.executable)
    finals: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        folder = (out / name).resolve()
        folder.mkdir(parents=True)
        job = _submit(folder, method, epochs)
        print(f"{name}: job {job} submitted, two tasks", flush=True)
        _wait("the first checkpoint", lambda folder=folder: _training(folder), job, seconds)  # type: ignore[misc]
        print(f"{name}: past its first checkpoint: {way(job)}", flush=True)
        done = folder / "result.json"
        _wait("the end", lambda job=job: _state(job)["JobState"] == "COMPLETED", job, seconds)  # type: ignore[misc]
        state = _state(job)
        print(f"{name}: {state['JobState']}, restarts {state['Restarts']}, result {done.exists()}", flush=True)
        if not done.exists():
            raise RuntimeError(f"job {job} left no result, see {folder}/output.txt")
        if (name == "alone") != (state["Restarts"] == "0"):
            raise RuntimeError(f"job {job} was restarted {state['Restarts']} times: the trial shows nothing")
        finals[name] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    wrong = []
    for name in ("requeued", "signalled"):
        found = [
            f"{name}: {n}"
            for part in ("state_dict", "optimizer_states", "global_step")
            for n in _differences(finals["alone"][part], finals[name][part], part)
        ]
        step = finals[name]["global_step"]
        print(f"{name}: after {step} steps {'different from' if found else 'equal to'} the run left alone")
        wrong += found
    return wrong


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="wau")
    parser.add_argument("--epochs", type=int, default=150)
    options = parser.parse_args()
    wrong = trial(options.out, options.method, options.epochs)
    print("\n".join(wrong) or "weights, optimizer state and step count are equal bit by bit")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
