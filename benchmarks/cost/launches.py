"""Number of operations that the hooks of a step start, for a shallow and a deep network.

    python -m benchmarks.cost.launches

Counts are those of torch.profiler, with inner operations and without views. Copying gradients, weights and optimizer
state to a buffer or back is one operation per tensor on a CPU, and one kernel per chunk of tensors on a GPU (``--device
cuda``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.common.device import default_device, description, result_path
from benchmarks.cost.fake_device import profiled_operations
from benchmarks.cost.overhead import METHODS, trained_hooks
from benchmarks.models import CifarResNet

RESULT = result_path("launches.json", "cpu")


def count(method: str, depth: int, device: str) -> int:
    """Operations (on CUDA: kernels and copies) of one step's hooks on ResNet-``depth``."""
    model = CifarResNet(depth).to(device)
    optimizer, (before, after) = trained_hooks(method, model)  # what is held through a step includes momentum
    found = _operations(lambda: before(1), device)
    optimizer.step()
    return found + _operations(after, device)


def _operations(action: Callable[[], object], device: str) -> int:
    if device != "cuda":
        return profiled_operations(action).total()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        action()
    return len([event for event in recorded.events() or [] if "CUDA" in str(event.device_type)])


def table(counts: dict[str, dict[str, int]], gpu: dict[str, dict[str, int]] | None = None, gpu_name: str = "") -> str:
    """Markdown.

    Args:
        counts: method -> depth -> operations.
        gpu: kernels and copies on a GPU likewise, two more columns.
        gpu_name: name of that GPU.
    """
    depths = ("20", "110")
    names = ["method", *(f"ResNet-{depth}" for depth in depths)]
    names += [f"ResNet-{depth}, {gpu_name}" for depth in depths] if gpu else []
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for method, of in counts.items():
        found = [of, gpu.get(method, {})] if gpu else [of]
        cells = [method, *(str(one.get(depth, "")) for one in found for depth in depths)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS)[1:], default=list(METHODS)[1:])
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, help="counts of other methods on the same device stay in the file")
    options = parser.parse_args()
    path: Path = options.out or result_path("launches.json", options.device)
    device = description(options.device).split(",")[0]  # threads change no count
    found = json.loads(path.read_text()) if path.exists() else {}
    known = found["counts"] if found.get("device") == device else {}
    known |= {
        method: {str(depth): count(method, depth, options.device) for depth in (20, 110)} for method in options.methods
    }
    counts = {method: known[method] for method in METHODS if method in known}
    print(table(counts))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "counts": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
