"""Time of whole callbacks per step in a real fit, also between their events: time inside all of their hooks.

    python -m benchmarks.cost.callback_time --steps 60

``benchmarks.cost.overhead`` times the rules. Here a Trainer trains ResNet-20 (batch 64, 32x32), and every hook that
Lightning or the optimizer calls on a callback is timed, with its bookkeeping. RePr is before its first drop and
FilterSimilarityMonitor between two snapshots, where no hook may start an operation on tensors. Operations are counted
in a separate fit, as a GPU would run them. The device is synchronised for the clock in this module only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from benchmarks.common.device import clock, default_device, description, result_path
from benchmarks.cost.fake_device import KernelCounter
from benchmarks.cost.launches import copies_as_on_a_gpu
from benchmarks.models import CifarResNet
from benchmarks.training.classification import Classifier
from benchmarks.training.loader import SeededBatches
from lightning_filterdiv import (
    BasisOrthonormality,
    CentripetalSGD,
    EntropyDepthBound,
    FilterSimilarityMonitor,
    RePr,
    WeightAsynchronousUpdate,
)

BATCH, WARM_UP = 64, 5

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "RePr, before its first drop": lambda: RePr(full_epochs=1, sub_epochs=1, cycles=1),
    "FilterSimilarityMonitor, between looks": lambda: FilterSimilarityMonitor(every_n_epochs=2, figures=False),
    "EntropyDepthBound": EntropyDepthBound,
    "WeightAsynchronousUpdate": WeightAsynchronousUpdate,
    "CentripetalSGD": lambda: CentripetalSGD(strength=0.05),
    "BasisOrthonormality": BasisOrthonormality,
}
OPTIMIZER_HOOKS = ("register_step_pre_hook", "register_step_post_hook")
_HOOKS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end",
)  # fmt: skip


class Cost(NamedTuple):
    """Medians over the steps of an epoch after the first few."""

    callback: str
    microseconds: float  # inside all hooks of a step
    share: float  # time inside hooks / time of the rest of the step
    operations: float  # on tensors, started inside hooks of a step; views and allocations are none
    steps: int


class _Steps(Callback):
    """Companion of the callback that marks the beginning and end of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[float] = []
        self.inside: list[float] = [0.0]  # seconds in hooks, step by step
        self.counter: KernelCounter | None = None
        self.counts: list[int] = []

    @contextmanager
    def hook(self) -> Iterator[None]:
        """Account for the body."""
        started = clock(self.device)
        if self.counter is None:
            yield
        else:
            with self.counter:
                yield
        self.inside[-1] += clock(self.device) - started

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Store the numbers of a step. The callback comes before this one. One epoch is enough."""
        trainer.should_stop = trainer.is_last_batch
        self.ends.append(clock(self.device))
        self.inside.append(0.0)
        if self.counter is not None:
            self.counts.append(self.counter.kernels.total())
            self.counter.kernels.clear()


@contextmanager
def _accounted(callback: Callback, steps: _Steps) -> Iterator[None]:
    """Wrap every hook of ``callback`` for ``steps``: Lightning's, and those it registers with optimizers."""

    def seen(function: Callable[..., Any]) -> Callable[..., Any]:
        def hook(*arguments: Any, **options: Any) -> Any:
            with steps.hook():
                return function(*arguments, **options)

        return hook

    def registering(original: Callable[..., Any]) -> Callable[..., Any]:
        def register(optimizer: Optimizer, hook: Callable[..., Any]) -> Any:
            ours = (getattr(hook, "__module__", "") or "").startswith("lightning_filterdiv")
            return original(optimizer, seen(hook) if ours else hook)

        return register

    with ExitStack() as stack:
        for name in _HOOKS:
            stack.enter_context(mock.patch.object(callback, name, seen(getattr(callback, name))))
        for name in OPTIMIZER_HOOKS:
            stack.enter_context(mock.patch.object(Optimizer, name, registering(getattr(Optimizer, name))))
        yield


def _fit(make: Callable[[], Callback], steps: int, device: torch.device, count: bool) -> _Steps:
    torch.manual_seed(0)
    images = torch.rand(BATCH * steps, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loader = SeededBatches((images, torch.arange(len(images)) % 10), BATCH, 0)
    books, callback = _Steps(device), make()
    if count:
        books.counter = KernelCounter(device.type)
    trainer = pl.Trainer(
        accelerator=device.type, devices=1, max_epochs=3, callbacks=[callback, books], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with _accounted(callback, books), copies_as_on_a_gpu() if count else nullcontext():
        trainer.fit(Classifier(CifarResNet(20), (3, 32, 32), lr=0.05), loader)
    return books


def measure(name: str, steps: int, device: torch.device) -> Cost:
    """Run two fits of one epoch: one is timed, in the other operations are counted.

    Args:
        name: in :data:`CALLBACKS`.
        steps: number of timed steps; some more come before them.
        device: device to train on.

    Raises:
        ValueError: too few steps.
    """
    if steps < 3:
        raise ValueError(f"--steps={steps}: a median needs at least 3")
    books = _fit(CALLBACKS[name], WARM_UP + steps, device, count=False)
    whole = [b - a for a, b in zip(books.ends[WARM_UP - 1 :], books.ends[WARM_UP:], strict=False)]
    inside = books.inside[WARM_UP : WARM_UP + len(whole)]
    counts = _fit(CALLBACKS[name], WARM_UP + 3, device, count=True).counts[WARM_UP:]
    return Cost(
        name,
        1e6 * median(inside),
        median(i / (w - i) for i, w in zip(inside, whole, strict=True)),
        median(counts),
        len(whole),
    )


def table(record: dict[str, Any]) -> str:
    """Markdown, with a line on the machine."""
    costs = [Cost(**cost) for cost in record["costs"]]
    lines = [
        "| callback | us per step in its hooks | / rest of the step | operations on tensors |",
        "|---|---|---|---|",
    ]
    lines += [f"| {c.callback} | {c.microseconds:.0f} | {100 * c.share:.3f} % | {c.operations:g} |" for c in costs]
    versions = f"torch {record['torch']}, Lightning {record['lightning']}"
    return "\n".join(
        [
            *lines,
            "",
            f"{record['device']}, {versions}; medians of {costs[0].steps} steps, batch {record['batch']}, 32x32.",
        ]
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", nargs="+", choices=list(CALLBACKS), default=list(CALLBACKS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    costs = [measure(name, options.steps, device) for name in options.callbacks]
    result: dict[str, Any] = {
        "device": description(device), "torch": version("torch"), "lightning": version("lightning"), "batch": BATCH,
        "costs": [cost._asdict() for cost in costs],
    }  # fmt: skip
    path: Path = options.out or result_path("callback_time.json", device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
