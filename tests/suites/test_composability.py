"""The committed tables of what works together are what happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.registry import ONE_EACH
from tests.suites import composability

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


@pytest.mark.soak
def test_the_tables_are_what_happens(tmp_path: Path) -> None:
    assert composability.everything(tmp_path) == KNOWN
