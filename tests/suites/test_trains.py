"""Every callback trains, says what it touches, and changes weights exactly when it should."""

from __future__ import annotations

import logging
from itertools import cycle

import pytest

from tests.registry import CASES, Case
from tests.support.training import OPTIMIZERS, Classifier, differing, fit

#: One optimizer for each case, in turn: ``test_resume`` trains every callback with SGD and with AdamW.
WITH_OPTIMIZERS = list(zip(CASES, cycle(OPTIMIZERS), strict=False))


@pytest.mark.parametrize(("case", "optimizer"), WITH_OPTIMIZERS, ids=lambda value: getattr(value, "name", value))
def test_trains(case: Case, optimizer: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = fit([case.make()], model=Classifier(optimizer, lr_scale=case.lr_scale), max_epochs=6)
    losses = list(run.model.losses.values())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert f"{case.cls.__name__}: 4 layers, 30 filters" in caplog.text
    plain = fit(model=Classifier(optimizer, lr_scale=case.lr_scale), max_epochs=6)
    assert bool(differing(run.tensors(), plain.tensors())) is case.trains_differently


def test_two_plain_runs_are_equal() -> None:
    """Without this, every bitwise comparison of the suites would be meaningless."""
    assert not differing(fit().tensors(), fit().tensors())
    assert differing(fit().tensors(), fit(model=Classifier(seed=1)).tensors())
