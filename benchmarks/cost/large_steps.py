"""Measure on a GPU the steps that ``benchmarks.cost.scaling`` predicts: large networks, with every callback's hooks.

    python -m benchmarks.cost.large_steps --steps 40

Training as its users do it: bfloat16 autocast, ``channels_last``, SGD with momentum; the hooks in float32, which is
torch's default, and in TF32. The device is synchronised around the hooks here, so nothing hides behind other work.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.common.device import clock, description, result_path
from benchmarks.cost.launches import Count
from benchmarks.cost.overhead import METHODS
from benchmarks.cost.scaling import GPUS, SHOWN, WORKLOADS, Workload, hook_seconds, step_seconds
from benchmarks.models import build_network

RESULT = result_path("large_steps.json", "cuda")
COUNTED = result_path("scaling.json", "cpu")


class Measured(NamedTuple):
    """Of one callback on one network on a GPU; seconds."""

    network: str
    method: str
    tf32: bool
    hooks: float  # inside the hooks, median over steps
    step: float  # the rest of the step, median over steps


def measure(workload: Workload, name: str, device: torch.device, steps: int) -> list[Measured]:
    """Train as a user of a large network does (bfloat16 autocast, channels_last, SGD), hooks in float32 and in TF32.

    Args:
        workload: network, and images of noise.
        name: name of the workload.
        device: a GPU.
        steps: how many count, after five that do not.
    """
    torch.manual_seed(0)
    model = build_network(workload.network, workload.image_shape, workload.classes).to(device)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randn(workload.batch, *workload.image_shape, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(workload.classes, (workload.batch,), device=device)
    rows = []
    for method in SHOWN:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        before, after = METHODS[method](model, optimizer)
        for tf32 in (False, True):
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            inside, rest = [], []
            for number in range(steps + 5):
                marks = [clock(device)]
                optimizer.zero_grad()
                with torch.autocast(device.type, torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                marks.append(clock(device))
                before(number)
                marks.append(clock(device))
                optimizer.step()
                marks.append(clock(device))
                after()
                marks.append(clock(device))
                parts = [end - start for start, end in pairwise(marks)]
                inside.append(parts[1] + parts[3])
                rest.append(parts[0] + parts[2])
            rows.append(Measured(name, method, tf32, median(inside[5:]), median(rest[5:])))
    torch.set_float32_matmul_precision("highest")
    return rows


def table(record: dict[str, Any]) -> str:
    """Markdown: predicted for the published figures of this GPU and the version that was measured, and measured.

    Raises:
        ValueError: there are no published figures of this GPU in ``benchmarks.cost.scaling``.
    """
    gpu = next((gpu for gpu in GPUS if gpu.name in record["device"]), None)
    if gpu is None:
        raise ValueError(
            f"{record['device']} is not in benchmarks.cost.scaling.GPUS; add its data sheet's figures there"
        )
    rows = ["| network | callback | products | hooks, predicted | measured | ratio | rest of the step, predicted "
            "| measured | share, predicted | measured |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in (Measured(**row) for row in record["rows"]):
        of = record["counted"][row.network]
        hooks = hook_seconds(Count(**of["hooks"][row.method]), gpu, row.tf32)
        step = step_seconds(WORKLOADS[row.network], gpu, of["forward_flops"])
        hooks_ms = f"{1e3 * hooks:.2f} ms | {1e3 * row.hooks:.2f} ms"
        step_ms = f"{1e3 * step:.1f} ms | {1e3 * row.step:.1f} ms"
        rows.append(
            f"| {row.network} | {row.method} | {'TF32' if row.tf32 else 'float32'} | {hooks_ms} "
            f"| {hooks / row.hooks:.2f} | {step_ms} | {100 * hooks / step:.1f} % | {100 * row.hooks / row.step:.1f} % |"
        )
    return "\n".join([*rows, "", f"{record['device']}, torch {record['torch']}, 64 images, bfloat16 autocast."])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    device = torch.device("cuda")
    rows = [row for name, of in WORKLOADS.items() for row in measure(of, name, device, options.steps)]
    record = {"device": description(device), "torch": version("torch"), "rows": [row._asdict() for row in rows]}
    record["counted"] = json.loads(COUNTED.read_text())["counted"]  # of this version; later ones count otherwise
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
