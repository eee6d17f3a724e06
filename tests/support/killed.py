"""A fit in a process of its own that SIGKILL ends at a chosen moment. A fork server imports it: fits start at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import fsspec.implementations.local
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.registry import CASES
from tests.support.training import STEPS_PER_EPOCH, Classifier, batches, fit

Phase = Literal["batch start", "after backward", "before step", "inside step", "batch end", "writing a checkpoint"]
PHASES: tuple[Phase, ...] = get_args(Phase)
EPOCHS, SAVE_EVERY = 3, 2
STEPS = EPOCHS * STEPS_PER_EPOCH


@dataclass(frozen=True)
class Moment:
    """Where a process dies: in a phase of the step with this number, counted from the start of the run."""

    step: int
    phase: Phase
    rank: int = 0


def moments(seed: int, count: int, ranks: int) -> list[Moment]:
    """Random ones; at least one writes a checkpoint, at least one is inside an optimizer's step."""
    drawn = random.Random(seed)

    def draw(phase: Phase) -> Moment:
        if phase == "writing a checkpoint":  # rank 0 writes, and the last one is due after the last step
            return Moment(drawn.randrange(STEPS - SAVE_EVERY + 1), phase)
        return Moment(drawn.randrange(STEPS), phase, drawn.randrange(ranks))

    phases = [drawn.choice(PHASES) for _ in range(count - 2)]
    return [draw(phase) for phase in [*phases, "writing a checkpoint", "inside step"]]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Trap(Callback):
    """Kills this process at a moment; first in the list, so that it comes before the work of the others."""

    def __init__(self, moment: Moment) -> None:
        self.moment = moment

    def _spring(self, trainer: pl.Trainer, phase: Phase) -> None:
        if (trainer.global_step, phase) == (self.moment.step, self.moment.phase):
            _die()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._spring(trainer, "inside step"))

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._spring(trainer, "batch start")
        if self.moment.phase == "writing a checkpoint" and trainer.global_step >= self.moment.step:
            _break_writes()

    def on_after_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._spring(trainer, "after backward")

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._spring(trainer, "before step")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if (trainer.global_step - 1, "batch end") == (self.moment.step, self.moment.phase):
            _die()


def _break_writes() -> None:
    """The next file is written by half."""

    def write(self: Any, data: Any) -> int:
        self.f.write(bytes(data)[: len(data) // 2])
        self.f.flush()
        _die()
        return 0

    fsspec.implementations.local.LocalFileOpener.write = write


def newest(folder: Path) -> Path | None:
    """The last checkpoint, every one of which must be whole."""
    found = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
    for path in found:
        torch.load(path, weights_only=True)
    return found[-1] if found else None


def _train(
    names: tuple[str, ...], folder: Path, moment: Moment | None, rank: int, ranks: int, port: int, same_data: bool
) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_PORT": str(port),
                       "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    cases = {case.name: case for case in CASES}
    callbacks: list[Callback] = [cases[name].make() for name in names]
    trap = [Trap(moment)] if moment is not None and moment.rank == rank else []
    checkpoint = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=SAVE_EVERY,
                                 enable_version_counter=False)  # fmt: skip
    saved = newest(folder)
    # Another initialisation after a kill: everything that matters must come from the file.
    model = Classifier(
        "adamw", seed=0 if saved is None else 1, lr_scale=min([1.0, *(cases[name].lr_scale for name in names)])
    )
    loader = batches() if same_data else batches(rank=rank, world_size=ranks)
    run = fit(
        [*trap, *callbacks, checkpoint], model=model, loader=loader, max_epochs=EPOCHS,
        ckpt_path=None if saved is None else str(saved), strategy="ddp" if ranks > 1 else "auto", devices=ranks,
    )  # fmt: skip
    torch.save(run.tensors(), folder / f"final{rank}.pt")


def run(
    names: tuple[str, ...], folder: Path, moment: Moment | None = None, ranks: int = 1, same_data: bool = False
) -> list[int]:
    """Fit in processes of their own, in ``folder``, going on from its newest checkpoint.

    Args:
        names: of cases of the registry, in the order of the trainer's list.
        folder: of checkpoints and final states.
        moment: when to die.
        ranks: processes.
        same_data: every rank sees the images of the only one of a single-process run, so that the mean gradient is
            exactly its gradient (twice a half) and runs of any number of ranks are one run.

    Returns:
        Exit codes; -9 for a killed process. When one is killed the others are, after a moment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_train, args=(names, folder, moment, rank, ranks, port, same_data))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            time.sleep(0.3)
            for process in processes:
                process.kill()
        time.sleep(0.02)
    for process in processes:
        process.join()
    return [int(process.exitcode or 0) for process in processes]
