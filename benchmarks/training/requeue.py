"""Requeue a Slurm job at the end of a step.

Lightning's own handler saves inside the signal handler: between a forward and a backward pass, or in the middle of
an optimizer step, and on every rank at another moment. Here the signal only sets a flag. The ranks agree at the end of
a step, save there, and requeue the job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import SLURMEnvironment

__all__ = ["RequeueAtStep", "slurm_job"]


def slurm_job() -> str | None:
    """Id of this Slurm job as ``scontrol`` wants it (an array's tasks have their own); ``None`` outside Slurm."""
    if not SLURMEnvironment.detect():
        return None
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


class RequeueAtStep(Callback):
    """On SIGUSR1 (``#SBATCH --signal=SIGUSR1@300``) save ``checkpoints/last.ckpt`` after a step and requeue the job.

    Args:
        every_n_steps: batches between two times that the ranks ask one another; each is a collective of one number,
            under Slurm only.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.job = slurm_job()
        self.asked = False
        self._batches = 0  # the same on all ranks, and not begun anew at an epoch, which may be short

    def listen(self) -> None:
        """Install the signal handler. Call it before ``fit``, because Lightning keeps an existing handler."""
        if self.job is not None:
            signal.signal(signal.SIGUSR1, self._mark)

    def _mark(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and requeue if any rank was asked to."""
        self._batches += 1
        if self.job is None or self._batches % self.every_n_steps:
            return
        if not trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            return
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        trainer.strategy.barrier("saved before requeue")
        if trainer.is_global_zero:
            print(f"benchmarks.training.train: requeueing job {self.job} after step {trainer.global_step}", flush=True)
            subprocess.run(["scontrol", "requeue", self.job], check=True)
        time.sleep(120)  # Slurm ends the job meanwhile
        raise SystemExit(f"benchmarks.training.train: Slurm did not requeue job {self.job}; start it again to go on")
