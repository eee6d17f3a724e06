"""The device that a measurement runs on: its name, its clock, and where results measured on it are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.paths import RESULTS

__all__ = ["clock", "default_device", "description", "read_result", "result_path"]


def default_device() -> str:
    """``"cuda"`` where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def description(device: torch.device | str) -> str:
    """Name of the GPU, or the CPU's number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def clock(device: torch.device | str) -> float:
    """Seconds on the host, after everything that was started on ``device``."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def result_path(name: str, device: torch.device | str) -> Path:
    """Results of a GPU lie beside those of the CPU, in a folder of their own."""
    return (RESULTS / "gpu" if torch.device(device).type == "cuda" else RESULTS) / name


def read_result(name: str) -> Any:
    """What a file of results holds, by its path below ``benchmarks/results``."""
    return json.loads((RESULTS / name).read_text())
