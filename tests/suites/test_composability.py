"""The committed tables of what works together are what happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.registry import ONE_EACH, Case
from tests.suites import composability
from tests.support.training import Classifier, fit

KNOWN = json.loads(composability.RESULT.read_text())


def test_every_callback_is_in_the_tables() -> None:
    names = {case.cls.__name__ for case in ONE_EACH}
    assert set(KNOWN["pairs"]) == set(KNOWN["beside"]) == names
    assert all(set(row) == names - {first} for first, row in KNOWN["pairs"].items())
    assert all(set(row) == set(composability.BESIDE) for row in KNOWN["beside"].values())


def test_what_must_be_swapped_works_the_other_way_round() -> None:
    swaps = [(a, b) for a, row in KNOWN["pairs"].items() for b, outcome in row.items() if outcome == composability.SWAP]
    assert ("WeightAsynchronousUpdate", "CentripetalSGD") in swaps
    assert all(KNOWN["pairs"][second][first] == composability.WORKS for first, second in swaps)


@pytest.mark.parametrize("case", [c for c in ONE_EACH if c.cls.refused_beside], ids=lambda case: case.name)
def test_what_cannot_work_is_refused_before_training(case: Case) -> None:
    seen: list[int] = []
    model = Classifier()
    model.hook = lambda _, step: seen.append(step)
    pruning = ModelPruning("l1_unstructured", amount=0.2)
    with pytest.raises(MisconfigurationException, match=r"cannot be used beside ModelPruning: .* one after the other"):
        fit([pruning, case.make()], model=model)
    assert not seen


class _Moves(Callback):
    """Mutant: a companion that adds to every weight after a step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.add_(1e-3)


@pytest.mark.parametrize("name", ["wau", "repr"])
def test_a_companion_that_moves_held_filters_is_noticed(name: str) -> None:
    case = next(c for c in ONE_EACH if c.name == name)
    assert composability._outcome(lambda: [case.make()], [], case.lr_scale) == composability.WORKS
    with pytest.raises(composability.HeldFiltersMovedError, match="holds have moved"):
        composability._outcome(lambda: [case.make(), _Moves()], [], case.lr_scale)


@pytest.mark.soak
def test_the_tables_are_what_happens(tmp_path: Path) -> None:
    assert composability.everything(tmp_path) == KNOWN
