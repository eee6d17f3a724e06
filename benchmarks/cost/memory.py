"""Memory that a callback's rule keeps between steps and needs at its peak, in copies of the weights; at two commits.

    python -m benchmarks.cost.memory
    python -m benchmarks.cost.memory --against 26da89e

A ResNet-50 has gradients and SGD's momentum. Then the rule is built and makes steps. *Kept* is the memory of the
process after them minus that before. *Peak* is its high-water mark (Linux; on a GPU the allocator's). One copy of the
weights is 97.5 MiB.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks.common.device import default_device, description, result_path
from benchmarks.cost import against
from benchmarks.cost.measure import measured
from benchmarks.cost.overhead import METHODS

RESULT = result_path("memory.json", "cpu")
LEFT_OUT = ("A/A", "naive", "official", "per-layer")  # rules of other implementations


def _held(device: torch.device) -> float:
    """Bytes that this process holds now."""
    gc.collect()
    if device.type == "cuda":
        return float(torch.cuda.memory_allocated(device))
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def measure(method: str, device: torch.device, steps: int = 2) -> dict[str, float]:
    """Copies of the weights that a rule keeps and needs at its peak."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet50().to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, foreach=False)
    optimizer.step()
    copy = sum(p.numel() * p.element_size() for p in model.parameters())
    # Memory needed to build the rule (a trace of the network) belongs to an event, not to a step.
    before_it = _held(device)
    before, after = METHODS[method](model, optimizer)
    before(0)
    after()
    built = _held(device)
    with measured(device) as cost:
        for step in range(1, steps + 1):
            before(step)
            after()
    kept = _held(device)
    return {
        "kept": (kept - before_it) / copy,
        "peak": (built - before_it + 2**20 * cost.extra_mib) / copy,
    }


def prepare(method: str) -> Callable[[], Mapping[str, float]]:
    """Memory of one rule on the CPU."""
    return lambda: measure(method, torch.device("cpu"))


def worker() -> None:
    """Run in a process of :func:`benchmarks.cost.against.compare`."""
    torch.set_num_threads(1)
    against.serve(prepare)


def table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    versions = list(next(iter(record["rules"].values())))
    names = [f"{what}, {name}" for what in ("kept between steps", "at the peak of a step") for name in versions]
    lines = [f"| {' | '.join(['rule', *names])} |", "|---" * (1 + len(names)) + "|"]
    for rule, of in record["rules"].items():
        cells = [f"{max(0, of[name][what]):.2f}" for what in ("kept", "peak") for name in versions]
        lines.append(f"| {' | '.join([rule, *cells])} |")
    line = f"{record['device']}, torch {record['torch']}; ResNet-50, in copies of its weights (97.5 MiB)."
    return "\n".join([*lines, "", line])


def main() -> None:
    """Command line."""
    ours = [name for name in METHODS if not name.startswith(LEFT_OUT)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=ours, default=ours)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--against", metavar="REV", help="a commit to compare with, on a CPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.against and options.device != "cpu":
        parser.error("--against compares on a CPU; leave out --device")
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as in the processes that measure
        found = against.compare("benchmarks.cost.memory", options.methods, 1, options.against)
        rules = {method: {name: one for name, (one,) in of.items()} for method, of in found.items()}
    else:
        rules = {method: {against.HERE: measure(method, device)} for method in options.methods}
    record = {"device": description(device), "torch": version("torch"), "rules": rules}
    path: Path = options.out or result_path("memory.json", device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
