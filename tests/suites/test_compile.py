"""A compiled network is compiled once: no callback causes another graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch._dynamo.utils import counters

from lightning_filterdiv import WeightAsynchronousUpdate
from tests.registry import SLOW_CASES, Case
from tests.support.training import Classifier, fit

Make = Callable[[], list[Callback]]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def check_compile(make: Make, backend: str = "aot_eager") -> None:
    """Raise AssertionError if a graph is compiled after the first step, or training is not that of the callback."""
    graphs: list[int] = []

    def count(model: Classifier, step: int) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    compiled = Classifier(net=None)
    compiled.net = torch.compile(compiled.net, backend=backend)  # type: ignore[assignment]
    compiled.hook = count
    callbacks = make()
    run = fit(callbacks, model=compiled, max_epochs=3)
    assert graphs[1] >= 1, "the network was not compiled at all"
    assert graphs[-1] == graphs[1]
    eager = fit(make(), max_epochs=3)
    for name, value in eager.model.state_dict().items():
        got = run.model.state_dict()[name.replace("net.", "net._orig_mod.", 1)]
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_compile(case: Case) -> None:
    check_compile(lambda: [case.make(include=["net.*"])])


@pytest.mark.soak
def test_compile_with_inductor() -> None:
    check_compile(lambda: [WeightAsynchronousUpdate()], backend="inductor")


class _Freezes(WeightAsynchronousUpdate):
    """Mutant: at every other step a norm keeps its statistics, and the mode of a module is part of every guard."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.net.get_submodule("1").train(batch_idx % 2 == 0)


def test_recompilation_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_compile(lambda: [_Freezes()])
