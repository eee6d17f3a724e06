"""The device of a measurement: its name, its clock, and the path of its results."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.paths import RESULTS

__all__ = ["clock", "default_device", "description", "read_result", "result_path"]


def default_device() -> str:
    """Return ``"cuda"`` if there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def description(device: torch.device | str) -> str:
    """Return the name of the GPU, or the CPU's number of threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def clock(device: torch.device | str) -> float:
    """Return the time on the host in seconds, after ``device`` has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def result_path(name: str, device: torch.device | str) -> Path:
    """Return the path of a result file. Results of a GPU have their own folder beside those of the CPU."""
    return (RESULTS / "gpu" if torch.device(device).type == "cuda" else RESULTS) / name


def read_result(name: str) -> Any:
    """Return the content of a result file, by its path below ``benchmarks/results``."""
    return json.loads((RESULTS / name).read_text())
