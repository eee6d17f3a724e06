"""Time and memory of a piece of work in this process."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common.device import clock

__all__ = ["Cost", "measured"]


@dataclass
class Cost:
    """What a piece of work took; filled when it ends."""

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
