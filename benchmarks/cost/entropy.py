"""Time and memory of measuring the entropy of Fashion-MNIST, all 60,000 training images.

    python -m benchmarks.cost.entropy --threads 1

Each pass is timed by the clock and in CPU seconds. The load of the machine (processes that wanted to run, averaged over
a minute) is recorded too. Peak memory is what a pass adds to the memory of the process before it (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.paths import RESULTS
from benchmarks.cost.measure import measured
from lightning_filterdiv.demo.data import load_fashion_mnist
from lightning_filterdiv.entropy_depth import estimate_depth_bound

RESULT = RESULTS / "entropy_speed.json"


class _Listed:
    """The same images, one item at a time, as a data set of files would give them."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def measure() -> dict[str, Any]:
    """Seconds, peak memory and result for the images in several forms."""
    images, labels = load_fashion_mnist("train")
    floats = (images.float() / 255).sub(0.286).div(0.353)
    forms: dict[str, Callable[[], object]] = {
        "raw 8-bit array": lambda: images,
        "float TensorDataset in a DataLoader": lambda: DataLoader(TensorDataset(floats, labels), batch_size=64),
        "items, one by one": lambda: _Listed(images),
    }
    estimate_depth_bound(images[:64])
    rows = {}
    for name, data in forms.items():
        source = data()
        with measured() as cost:
            found = estimate_depth_bound(source, progress=False)
        rows[name] = {
            "seconds": round(cost.seconds, 2),
            "cpu_seconds": round(cost.cpu_seconds, 2),
            "extra_mib": round(cost.extra_mib, 1),
            "images": found.n_images,
            "entropy": found.entropy,
            "std": found.std,
            "bound": found.bound,
        }
    bits = estimate_depth_bound(images, unit="bits", progress=False)
    return {
        "torch": version("torch"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "bound_bits": bits.bound,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| 60,000 images as | seconds | CPU seconds | peak extra MiB | mean entropy, nats | bound |"]
    rows.append("|---|---|---|---|---|---|")
    for name, row in result["rows"].items():
        rows.append(
            f"| {name} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['extra_mib']:.0f} "
            f"| {row['entropy']:.4f} ± {row['std']:.4f} | {row['bound']} |"
        )
    note = (
        f"Threads used: {result['threads']}, cores: {result['cores']}, processes that wanted to run: {result['load']}, "
        f"torch {result['torch']}. In bits the bound is {result['bound_bits']}."
    )
    return "\n".join([*rows, "", note])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = measure()
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
