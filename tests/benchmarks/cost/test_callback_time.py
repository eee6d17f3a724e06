"""Time inside whole callbacks: what counts as inside, and that nothing happens between events."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.cost import callback_time

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback_time, "BATCH", 4)


@pytest.mark.parametrize("name", ["RePr, before its first drop", "FilterSimilarityMonitor, between looks"])
def test_no_operation_is_started_between_events(name: str) -> None:
    cost = callback_time.measure(name, 3, CPU)
    assert (cost.operations, cost.steps) == (0, 3)
    assert 0 < cost.microseconds < 1e6
    assert 0 < cost.share < 0.5


def test_what_the_optimizer_calls_counts_as_inside() -> None:
    """WAU puts held filters back in a hook of the optimizer: there are operations after the step too."""
    steps = callback_time._fit(callback_time.CALLBACKS["WeightAsynchronousUpdate"], 5, CPU, count=True)
    assert len(set(steps.counts[2:])) == 1  # the second step draws for many at once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback_time, "OPTIMIZER_HOOKS", ())
        without = callback_time._fit(callback_time.CALLBACKS["WeightAsynchronousUpdate"], 4, CPU, count=True)
    assert 0 < without.counts[-1] < steps.counts[-1]

    class Half(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            torch.ones(2) + 1

    half = callback_time._fit(Half, 3, CPU, count=True)
    assert half.counts == [2, 2, 2]


def test_hooks_of_optimizers_are_seen() -> None:
    class Hooked(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            def hook(*_: Any) -> None:
                torch.ones(2)

            hook.__module__ = "lightning_filterdiv.made_up"
            trainer.optimizers[0].register_step_post_hook(hook)

    assert callback_time._fit(Hooked, 3, CPU, count=True).counts == [1, 1, 1]


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="--steps=2: a median needs at least 3"):
        callback_time.measure("EntropyDepthBound", 2, CPU)
