"""Time and memory of a piece of work in this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "measured"]


@dataclass
class Cost:
    """What a piece of work took; filled when it ends."""

    seconds: float = float("nan")
    cpu_seconds: float = float("nan")
    #: Resident memory at its peak above what was resident at the start.
    extra_mib: float = float("nan")


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the body. The peak is the kernel's high-water mark, reset at the start (Linux)."""
    cost = Cost()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    memory, wall, processor = _resident("VmRSS"), time.perf_counter(), time.process_time()
    yield cost
    cost.seconds, cost.cpu_seconds = time.perf_counter() - wall, time.process_time() - processor
    cost.extra_mib = _resident("VmHWM") - memory


def _resident(field: str) -> float:
    """MiB of this process: ``VmRSS`` (now) or ``VmHWM`` (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024
