"""Cluster the channels of a ResNet-50 for C-SGD: CPU time here and at another commit, and the sum of squares.

    python -m benchmarks.cost.clustering --against 26da89e

The time is that of one thread for all groups, 5/8 of their channels kept. The sum of squares to the clusters' means is
compared, group by group, with the best of ten starts of scikit-learn's ``KMeans`` on the same kernels, for networks
from several seeds. Groups wider than ``--widest`` are left out of this comparison, because ten starts take minutes for
them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.common.device import description, result_path
from benchmarks.cost import against
from lightning_filterdiv.centripetal import cluster_channels
from lightning_filterdiv.channel_graph import ChannelGraph

RESULT = result_path("clustering.json", "cpu")


def network(seed: int) -> tuple[nn.Module, ChannelGraph]:
    """A ResNet-50 and its channel graph."""
    torch.manual_seed(seed)
    model: nn.Module = torchvision.models.resnet50()
    return model, ChannelGraph.trace(model, torch.zeros(1, 3, 64, 64))


def prepare(case: str) -> Callable[[], Mapping[str, float]]:
    """A measurement of the time, for the seed ``case``."""
    model, graph = network(int(case))

    def measure() -> Mapping[str, float]:
        start = time.process_time()
        cluster_channels(model, graph, 0.625)
        return {"seconds": time.process_time() - start}

    return measure


def worker() -> None:
    """Run in a process of :func:`benchmarks.cost.against.compare`."""
    torch.set_num_threads(1)
    against.serve(prepare)


def sum_of_squares(rows: Tensor, index: Tensor) -> float:
    """Squared distances of rows to the means of their clusters."""
    means = torch.zeros(int(index.max()) + 1, rows.shape[1], dtype=rows.dtype).index_add_(0, index, rows)
    return float((rows - (means / index.bincount()[:, None])[index]).square().sum())


def compare_with_ten_starts(seed: int, widest: int) -> list[dict[str, Any]]:
    """Group -> our sum of squares over that of scikit-learn."""
    from sklearn.cluster import KMeans

    from lightning_filterdiv.narrowing.clusters import kernels_of

    model, graph = network(seed)
    names = [group.name for group in graph.groups if group.size <= widest]
    clusters = cluster_channels(model, graph, 0.625, groups=names)
    rows = []
    for group in graph.groups:
        if group.name not in clusters:
            continue
        kernels, index = kernels_of(model, group), clusters[group.name]
        # Ten starts depend on distances alone, and a triangle has the same ones in fewer coordinates.
        short = torch.linalg.qr(kernels.T, mode="r").R.T if kernels.shape[1] > len(kernels) else kernels
        ten = KMeans(int(index.max()) + 1, n_init=10, random_state=seed).fit(short.contiguous().numpy())
        ratio = sum_of_squares(kernels, index) / float(ten.inertia_)
        rows.append({"group": group.name, "size": group.size, "seed": seed, "ratio": ratio})
    return rows


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| version | CPU seconds, ResNet-50 |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in record["seconds"].items()]
    lines += ["", "| channels | groups x seeds | sum of squares / ten starts, median | largest |", "|---|---|---|---|"]
    for size in sorted({row["size"] for row in record["ratios"]}):
        ratios = [row["ratio"] for row in record["ratios"] if row["size"] == size]
        lines.append(f"| {size} | {len(ratios)} | {median(ratios):.3f} | {max(ratios):.3f} |")
    return "\n".join([*lines, "", f"{record['device']}, torch {record['torch']}; {record['seeds']} seeds."])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--widest", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--against", metavar="REV", help="a commit to compare with, in the same run")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = against.compare("benchmarks.cost.clustering", ["0"], options.rounds, options.against)["0"]
    record: dict[str, Any] = {
        "device": description("cpu"),
        "torch": version("torch"),
        "seeds": options.seeds,
        "seconds": {name: median(one["seconds"] for one in measured) for name, measured in found.items()},
        "ratios": [row for seed in range(options.seeds) for row in compare_with_ten_starts(seed, options.widest)],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
