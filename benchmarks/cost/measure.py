"""Time and memory of a piece of work in this process; two pieces of work side by side."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

from benchmarks.common.device import clock

__all__ = ["Cost", "interleaved", "measured", "median_interval"]

T = TypeVar("T")


@dataclass
class Cost:
    """Cost of a piece of work, filled when it ends."""

    seconds: float = float("nan")
    cpu_seconds: float = float("nan")
    #: Resident memory (on a GPU, allocated memory) at its peak above that at the start.
    extra_mib: float = float("nan")


@contextmanager
def measured(device: torch.device | str = "cpu") -> Iterator[Cost]:
    """Measure the body. The peak is the kernel's high-water mark, reset at the start (Linux), or the allocator's.

    What was freed before goes back to the system first (glibc), or it would hide a need of the body.

    Args:
        device: where the body works; a GPU is waited for, and its memory is what counts.
    """
    cost = Cost()
    gc.collect()
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        memory = torch.cuda.memory_allocated(device) / 2**20
    else:
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        memory = _resident("VmRSS")
    wall, processor = clock(device), time.process_time()
    yield cost
    cost.seconds, cost.cpu_seconds = clock(device) - wall, time.process_time() - processor
    cost.extra_mib = (torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else _resident("VmHWM")) - memory


def _resident(field: str) -> float:
    """MiB of this process: ``VmRSS`` (now) or ``VmHWM`` (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def interleaved(run: Callable[[int, int], T], pairs: int) -> list[tuple[T, T]]:
    """Run two pieces of work in turn, the order drawn anew for every pair.

    Args:
        run: (0 or 1, number of the pair) -> a measurement.
        pairs: that count; three more come before them, because the first ones allocate.

    Returns:
        (measurement of 0, measurement of 1) of every pair.
    """
    order = random.Random(0)
    found = []
    for number in range(pairs + 3):
        of = {which: run(which, number) for which in order.sample([0, 1], 2)}
        found.append((of[0], of[1]))
    return found[3:]


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and its bootstrap 95 % interval."""
    draws = random.Random(0)
    resampled = sorted(median(draws.choices(values, k=len(values))) for _ in range(1000))
    return median(values), resampled[25], resampled[974]
