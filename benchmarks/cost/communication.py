"""Communication of a step between ranks, with and without each callback: collectives and bytes, counted by torch's
profiler.

    python -m benchmarks.cost.communication              # two processes on this machine, gloo
    python -m benchmarks.cost.communication --weak 1 2   # images per second and efficiency on 1 and 2 processes

On a cluster start it with ``torchrun`` and add ``--here``. It then measures the existing processes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.paths import RESULTS
from benchmarks.cost.processes import run_processes
from benchmarks.models import CifarResNet
from benchmarks.training.classification import Classifier
from benchmarks.training.loader import SeededBatches
from lightning_filterdiv import (
    BasisOrthonormality,
    CentripetalSGD,
    FilterSimilarityMonitor,
    RePr,
    WeightAsynchronousUpdate,
)

RESULT = RESULTS / "communication.json"
_MODULE = "benchmarks.cost.communication"
STEPS, LOOK = 12, range(6, 10)

METHODS: dict[str, list[Callback]] = {
    "none": [],
    "WeightAsynchronousUpdate": [WeightAsynchronousUpdate()],
    "RePr, inside a phase": [RePr(full_epochs=1, sub_epochs=1, cycles=1)],
    "CentripetalSGD": [CentripetalSGD(strength=0.05)],
    "BasisOrthonormality": [BasisOrthonormality(form="basis", decoupled=False)],
    "FilterSimilarityMonitor": [FilterSimilarityMonitor(figures=False)],
}


class Count(Callback):
    """Count collectives of some steps in the middle of the second epoch, each from the end of the previous step to its
    own end.

    It is the last callback, so that it sees what others do at the start and the end of a step.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self._recorded: profile | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Count, and begin to record the next step."""
        if self._recorded is not None:
            self._recorded.__exit__(None, None, None)
            calls, size = 0, 0
            for event in self._recorded.events() or []:
                if event.name.startswith(("gloo:", "nccl:")):
                    calls += 1
                    size += _bytes(event.input_shapes)
            self.steps.append((calls, size))
            self._recorded = None
        if trainer.current_epoch == 1 and trainer.fit_loop.batch_idx + 1 in LOOK:
            self._recorded = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self._recorded.__enter__()


def _bytes(shapes: Any) -> int:
    """Of a collective's tensors, as float32 (a norm's step counter is an integer, and counted as 4 bytes too)."""
    total = 0
    for shape in shapes or []:
        if shape and all(isinstance(side, int) for side in shape):
            count = 1
            for side in shape:
                count *= side
            total += 4 * count
        elif shape:
            total += _bytes(shape)
    return total


def _fit(callbacks: list[Callback], ranks: int, rank: int, batch: int, steps: int, epochs: int) -> pl.Trainer:
    torch.manual_seed(0)
    count = batch * ranks * steps
    images = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(count) % 10
    loader = SeededBatches((images, labels), batch, 0, rank, ranks)
    trainer = pl.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        strategy="ddp" if ranks > 1 else "auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
        num_nodes=ranks // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(CifarResNet(20, channels=1), (1, 16, 16), lr=0.05), loader)
    return trainer


def count_collectives() -> dict[str, dict[str, int]]:
    """Method -> collectives and bytes per step; a fit of three epochs each."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found: dict[str, dict[str, int]] = {}
    for name, callbacks in METHODS.items():
        count = Count()
        _fit([*callbacks, count], ranks, rank, 8, STEPS, 3)
        per_step = Counter(count.steps)
        if len(per_step) != 1:
            raise RuntimeError(f"{name}: steps differ in what they send: {dict(per_step)}")
        ((calls, size),) = per_step
        found[name] = {"collectives": calls, "bytes": size}
    return found


class Clock(Callback):
    """Record the times at which steps end, after the device has finished."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Note the time."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def images_per_second(batch: int = 32, steps: int = 40) -> float:
    """Of all ranks together, from the median step of a fit with WeightAsynchronousUpdate."""
    ranks, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    clock = Clock()
    _fit([WeightAsynchronousUpdate(), clock], ranks, rank, batch, steps, 1)
    gaps = [b - a for a, b in zip(clock.ends[5:], clock.ends[6:], strict=False)]
    return batch * ranks / median(gaps)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| callback | collectives per step | bytes per step |", "|---|---|---|"]
    rows += [f"| {name} | {of['collectives']} | {of['bytes']:,} |" for name, of in result["methods"].items()]
    return "\n".join(rows)


def weak_table(weak: dict[str, float]) -> str:
    """Markdown: images per second; efficiency is the share of ideal scaling from the smallest number of processes."""
    first = min(weak, key=int)
    rows = ["| processes | images per second | efficiency |", "|---|---|---|"]
    for count in sorted(weak, key=int):
        efficiency = weak[count] / (weak[first] * int(count) / int(first))
        rows.append(f"| {count} | {weak[count]:.0f} | {100 * efficiency:.0f} % |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="measure in the processes that torchrun started")
    parser.add_argument("--weak", nargs="*", type=int, help="numbers of processes for a table of weak scaling")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.here:
        found: dict[str, Any] = (
            count_collectives() if options.weak is None else {"images_per_second": images_per_second()}
        )
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(found), flush=True)
        return
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.weak:
        speeds = {str(n): json.loads(run_processes(_MODULE, n, "--weak"))["images_per_second"] for n in options.weak}
        result["weak"] = speeds
        print(weak_table(speeds))
    else:
        result |= {"processes": 2, "network": "ResNet-20", "methods": json.loads(run_processes(_MODULE, 2))}
        print(table(result))
    result["torch"] = version("torch")
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
