"""Cost of a trace: seconds and peak extra memory, compared with one forward pass of the same network at batch 1.

    python -m benchmarks.cost.channel_graph

Each number comes from a separate process, so that memory freed before cannot hide later use. Memory is the highest
resident set during the call minus the one before it (Linux only: the high-water mark is reset in between). The forward
pass keeps its activations, as in training. Modules that a first trace imports are imported before the measurement.
Seconds are CPU time of the process on one thread, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.common.paths import RESULTS
from benchmarks.cost.measure import measured
from lightning_filterdiv.channel_graph import ChannelGraph

RESULT = RESULTS / "channel_graph_cost.json"
NETWORKS = ("resnet50", "densenet121")


def measure(network: str, what: str, size: int) -> dict[str, float]:
    """Seconds and peak extra MiB of ``what``: a ``trace`` or a ``forward`` pass with ``size`` x ``size`` images."""
    torch.manual_seed(0)
    ChannelGraph.trace(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8))
    model: torch.nn.Module = torchvision.models.get_model(network, weights=None)
    images = torch.zeros(1, 3, size, size)
    with measured() as cost:
        if what == "trace":
            ChannelGraph.trace(model, images)
        else:
            model.eval()(images).sum()
    return {"seconds": cost.seconds, "CPU seconds": cost.cpu_seconds, "MiB": cost.extra_mib}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| network | image | trace, CPU | peak extra memory | one forward pass, batch 1 |", "|---|---|---|---|---|"]
    for key, row in results.items():
        trace, forward = row["trace"], row["forward"]
        network, size = key.split("@")
        rows.append(
            f"| {network} | {size} | {trace['CPU seconds']:.1f} s | {trace['MiB']:.0f} MiB | {forward['MiB']:.0f} MiB |"
        )
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "WHAT", "SIZE"), help="measure this here and print JSON")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.one:
        network, what, size = options.one
        print(json.dumps(measure(network, what, int(size))))
        return
    results: dict[str, Any] = {}
    for network in NETWORKS:
        for size in ("224",):
            for what in ("trace", "forward"):
                command = [sys.executable, "-m", "benchmarks.cost.channel_graph", "--one", network, what, size]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.setdefault(f"{network}@{size}", {})[what] = json.loads(done.stdout.splitlines()[-1])
            record = {"torch": version("torch"), "threads": torch.get_num_threads(), "results": results}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
