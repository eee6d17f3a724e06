"""The committed figures of the page "Reliability" are those of the suites."""

from __future__ import annotations

import json

from tests.suites import reliability


def test_the_figures_are_counted() -> None:
    assert json.loads(reliability.RESULT.read_text()) == reliability.counted()
