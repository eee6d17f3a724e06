"""Number of operations that the hooks of a step start, for a shallow and a deep network, here and at another commit.

    python -m benchmarks.cost.launches
    python -m benchmarks.cost.launches --against 26da89e
    python -m benchmarks.cost.launches --device cuda

*Kernels* are those that a GPU would start: calls on a CPU are counted as a GPU would run them, a ``_foreach`` operation
once and what the host draws not at all. With ``--device cuda`` torch.profiler counts kernels and copies on a GPU.
*Operations on a CPU* are those of torch.profiler, with inner operations and without views. There every copy of a tensor
to or from a buffer counts as one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.device import default_device, description, result_path
from benchmarks.cost import against
from benchmarks.cost.fake_device import KernelCounter, host_draws_apart, profiled_operations
from benchmarks.cost.overhead import METHODS, trained_hooks
from benchmarks.models import CifarResNet

RESULT = result_path("launches.json", "cpu")
DEPTHS = (20, 110)


class Count(NamedTuple):
    """Counts of the hooks of one step."""

    kernels: int
    bytes: int
    flops: int


@contextmanager
def copies_as_on_a_gpu() -> Iterator[None]:
    """Copy to buffers as on a GPU. Version 0.1 copies in one way on all devices."""
    try:
        from lightning_filterdiv.tensors.flat_buffer import FlatBuffer
    except ImportError:
        yield
    else:
        with patch.object(FlatBuffer, "cpu_shortcuts", False):
            yield


def count_hooks(method: str, model: nn.Module) -> Count:
    """Count kernels, bytes and operations of the hooks of one step as on a GPU, without draws on the host.

    Args:
        method: method of ``benchmarks.cost.overhead``.
        model: on the CPU.
    """
    optimizer, (before, after) = trained_hooks(method, model)  # what is held through a step includes momentum
    counter = KernelCounter("cpu")
    with copies_as_on_a_gpu():
        with counter, host_draws_apart(counter):
            before(1)
        optimizer.step()
        with counter:
            after()
    return Count(counter.kernels.total(), counter.bytes, counter.flops)


def count(method: str, depth: int, device: str) -> int:
    """Operations (on CUDA: kernels and copies) of one step's hooks on ResNet-``depth``."""
    model = CifarResNet(depth).to(device)
    optimizer, (before, after) = trained_hooks(method, model)
    found = _operations(lambda: before(1), device)
    optimizer.step()
    return found + _operations(after, device)


def _operations(action: Callable[[], object], device: str) -> int:
    if device != "cuda":
        return profiled_operations(action).total()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        action()
    return len([event for event in recorded.events() or [] if "CUDA" in str(event.device_type)])


def prepare(case: str) -> Callable[[], Mapping[str, float]]:
    """Counts of ``"DEPTH METHOD"``: kernels as on a GPU, and operations on the CPU."""
    depth, _, method = case.partition(" ")
    return lambda: {
        "kernels": count_hooks(method, CifarResNet(int(depth))).kernels,
        "operations": count(method, int(depth), "cpu"),
    }


def worker() -> None:
    """Run in a process of :func:`benchmarks.cost.against.compare`."""
    against.serve(prepare)


def measure(methods: list[str], revision: str | None) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Method -> version -> depth -> ``kernels`` and ``operations``."""
    cases = [f"{depth} {method}" for method in methods for depth in DEPTHS]
    found = against.compare("benchmarks.cost.launches", cases, 1, revision)
    counts: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for case, versions in found.items():
        depth, _, method = case.partition(" ")
        for name, (one,) in versions.items():
            of = counts.setdefault(method, {}).setdefault(name, {})
            of[depth] = {what: int(number) for what, number in one.items()}
    return counts


def table(
    counts: Mapping[str, Mapping[str, Any]], gpu: Mapping[str, Mapping[str, int]] | None = None, gpu_name: str = ""
) -> str:
    """Markdown: in every cell ResNet-20 / ResNet-110.

    Args:
        counts: method -> version -> depth -> counts, see :func:`measure`.
        gpu: method -> depth -> kernels and copies that a profiler counted on a GPU, one more column.
        gpu_name: name of that GPU.
    """

    def cell(of: Mapping[str, int]) -> str:
        return " / ".join(str(of[str(depth)]) for depth in DEPTHS) if of else ""

    def counted(of: Mapping[str, Mapping[str, int]], what: str) -> str:
        return cell({depth: numbers[what] for depth, numbers in of.items()})

    versions = list(dict.fromkeys(name for of in counts.values() for name in of))
    names = ["method", *(f"kernels, {name}" for name in versions), f"operations on a CPU, {against.HERE}"]
    names += [f"kernels on an {gpu_name}"] if gpu else []
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for method, of in counts.items():
        cells = [counted(of.get(name, {}), "kernels") for name in versions] + [counted(of[against.HERE], "operations")]
        cells += [cell(gpu.get(method, {}))] if gpu else []
        lines.append(f"| {' | '.join([method, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """Count, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS)[1:], default=list(METHODS)[1:])
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--against", metavar="REV", help="a commit to compare with, on a CPU")
    parser.add_argument("--out", type=Path, help="counts of other methods on the same device stay in the file")
    options = parser.parse_args()
    if options.against and options.device == "cuda":
        parser.error("--against compares on a CPU; leave out --device")
    path: Path = options.out or result_path("launches.json", options.device)
    device = description(options.device).split(",")[0]  # threads change no count
    found = json.loads(path.read_text()) if path.exists() else {}
    known = found["counts"] if found.get("device") == device else {}
    if options.device == "cuda":
        known |= {m: {str(depth): count(m, depth, "cuda") for depth in DEPTHS} for m in options.methods}
    else:
        known |= measure(options.methods, options.against)
    counts = {method: known[method] for method in METHODS if method in known}
    print(json.dumps(counts, indent=1) if options.device == "cuda" else table(counts))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device, "counts": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
