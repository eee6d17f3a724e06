"""The protocol around an optimizer step, on optimizers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_filterdiv.training.steps import StepProtocol


class Weights:
    """A parameter with a gradient, its optimizer, and how many steps were reported."""

    def __init__(self, kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        self.parameter = nn.Parameter(torch.ones(2))
        self.parameter.grad = torch.ones(2)
        self.optimizer = kind([self.parameter], lr=0.1)  # type: ignore[call-arg]
        self.taken = 0
        self.steps = StepProtocol(self.optimizer, self._count, "Callback")

    def _count(self) -> None:
        self.taken += 1


def test_a_step_that_was_announced_and_taken_is_reported_once() -> None:
    weights = Weights()
    for number in range(3):
        assert not weights.steps.announce()
        weights.optimizer.step()
        assert weights.taken == number + 1


def test_a_step_that_a_scaler_skips_is_not_reported() -> None:
    weights = Weights()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient in (1.0, float("inf"), 1.0):
        weights.parameter.grad = scaler.scale(torch.full((2,), gradient))
        scaler.unscale_(weights.optimizer)
        assert not weights.steps.announce()
        scaler.step(weights.optimizer)
        scaler.update()
    assert weights.taken == 2


class CallsParent(torch.optim.SGD):
    """An optimizer whose step contains the step of its parent, and its hooks."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def test_inner_steps_do_not_count() -> None:
    weights = Weights(CallsParent)
    weights.steps.announce()
    weights.optimizer.step()
    assert weights.taken == 1


class Twice(torch.optim.SGD):
    """Evaluates its closure twice within a step, as SAM does."""

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


def test_a_second_evaluation_is_told_from_the_first() -> None:
    weights = Weights(Twice)
    seen: list[bool] = []
    for _ in range(2):
        weights.optimizer.step(lambda: seen.append(weights.steps.announce()))
    assert seen == [False, True, False, True]
    assert weights.taken == 2


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_was_not_announced_is_an_error(steps_before: int) -> None:
    weights = Weights()
    for _ in range(steps_before):
        weights.steps.announce()
        weights.optimizer.step()
    with pytest.raises(RuntimeError, match=r"reached Callback without on_before_optimizer_step.*use_pl_optimizer"):
        weights.optimizer.step()


def test_a_step_that_was_broken_off_is_forgotten_between_batches() -> None:
    weights = Weights()

    def closure() -> None:
        weights.steps.announce()
        raise KeyError("batch")

    with pytest.raises(KeyError):
        weights.optimizer.step(closure)
    weights.steps.forget_broken_off()
    assert not weights.steps.announce()
    weights.optimizer.step()
    assert weights.taken == 1


def test_release_removes_both_hooks() -> None:
    weights = Weights()
    weights.steps.release()
    assert not weights.optimizer._optimizer_step_pre_hooks
    assert not weights.optimizer._optimizer_step_post_hooks
    weights.optimizer.step()
    assert weights.taken == 0
