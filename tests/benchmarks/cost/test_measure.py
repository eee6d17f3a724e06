"""Time and peak memory of a piece of work."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.cost.measure import measured

MEGABYTE = 2**18  # float32 values
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from Linux's /proc")


def test_a_peak_that_is_over_at_the_end_counts() -> None:
    with measured() as cost:
        torch.ones(100 * MEGABYTE)
    assert 90 < cost.extra_mib < 130
    assert cost.cpu_seconds > 0
    assert cost.seconds > 0


def test_memory_that_was_freed_before_does_not_hide_a_need() -> None:
    """The allocator keeps small pieces below one still in use, and would hand them out again unseen."""
    piece = torch.ones(8 * MEGABYTE)
    del piece  # from now on pieces up to that size come from the heap, which shrinks only from its end
    pieces = [torch.ones(MEGABYTE) for _ in range(100)]
    last = pieces[-1]
    del pieces
    with measured() as cost:
        again = [torch.ones(MEGABYTE) for _ in range(100)]
    assert 90 < cost.extra_mib < 130
    assert len(again) == 100
    assert last[0] == 1


def test_work_that_needs_nothing_is_seen_to_need_nothing() -> None:
    with measured() as cost:
        torch.ones(8).sum()
    assert cost.extra_mib < 5
