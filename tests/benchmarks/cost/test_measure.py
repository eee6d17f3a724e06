"""Time and peak memory of a piece of work."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.cost.measure import interleaved, measured, median_interval

MEGABYTE = 2**18  # float32 values
peaks = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from Linux's /proc")


@peaks
def test_a_peak_that_is_over_at_the_end_counts() -> None:
    with measured() as cost:
        torch.ones(100 * MEGABYTE)
    assert 90 < cost.extra_mib < 130
    assert cost.cpu_seconds > 0
    assert cost.seconds > 0


@peaks
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


@peaks
def test_work_that_needs_nothing_is_seen_to_need_nothing() -> None:
    with measured() as cost:
        torch.ones(8).sum()
    assert cost.extra_mib < 5


def test_both_sides_come_first_and_the_first_pairs_do_not_count() -> None:
    calls: list[tuple[int, int]] = []

    def run(which: int, number: int) -> float:
        calls.append((number, which))
        return 10.0 * which + number

    assert interleaved(run, 20) == [(float(number), 10.0 + number) for number in range(3, 23)]
    assert [number for number, _ in calls] == [number for number in range(23) for _ in range(2)]
    assert {which for _, which in calls[::2]} == {0, 1}


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(200, 41, generator=generator)
    covered = 0
    for values in draws.tolist():
        middle, low, high = median_interval(values)
        assert low <= middle <= high
        covered += low <= 0.0 <= high
    assert 0.90 < covered / 200 <= 0.99
