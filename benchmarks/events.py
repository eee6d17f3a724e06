"""What RePr's events cost on a large network: trace, rank, drop, regrow; seconds and peak extra memory.

python -m benchmarks.events --network resnet50
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
import torchvision
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import Conv, filter_matrix, select_filters
from lightning_filterdiv.randomness import keyed_generator
from lightning_filterdiv.repr_.functional import rank_filters, regrow_filters, select_dropped
from lightning_filterdiv.repr_.network import DroppedFilters
from lightning_filterdiv.similarity import orthogonality_score

T = TypeVar("T")
RESULT = Path(__file__).parent / "results" / "events.json"


def measure(network: str) -> dict[str, float]:
    """Seconds per part of one cycle on a torchvision network with random weights."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(network, weights=None)
    seconds: dict[str, float] = {}

    def timed(name: str, action: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = action()
        seconds[name] = time.perf_counter() - start
        return result

    graph = timed("trace (once per fit)", lambda: ChannelGraph.trace(model, torch.zeros(1, 3, 64, 64)))
    first = next(iter(select_filters(model)))
    layers = {
        name: conv
        for name, conv in select_filters(model).items()
        if name != first and conv.groups == 1 and "downsample" not in name and not isinstance(graph.private(name), str)
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matrices = {name: filter_matrix(conv) for name, conv in layers.items()}
    scores = timed("rank", lambda: rank_filters(matrices, "orthogonality"))
    chosen = select_dropped(scores, 0.3)
    dropped = timed("drop", lambda: DroppedFilters.drop(model, graph, chosen))
    values = timed("new directions", lambda: _directions(layers, dropped))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    timed("regrow", lambda: dropped.regrow(values, [optimizer]))
    timed("mean O for the log", lambda: [orthogonality_score(matrix).mean() for matrix in matrices.values()])
    parts = ("rank", "drop", "new directions", "regrow")
    seconds["rank + drop + regrow + log"] = sum(seconds[key] for key in parts) + 2 * seconds["mean O for the log"]
    print(f"{network}: {len(layers)} layers, {dropped.count} filters dropped")
    seconds["peak extra MiB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    return seconds


def _directions(layers: dict[str, Conv], dropped: DroppedFilters) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for layer, rows in dropped.filters.items():
        matrix = filter_matrix(layers[layer])
        surviving = torch.ones(len(matrix), dtype=torch.bool)
        surviving[rows] = False
        generator = keyed_generator(0, layer)
        values[layer], _ = regrow_filters(dropped.old_filters(layer), matrix[surviving], 1.0, generator)
    return values


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    names = list(results)
    rows = [f"| | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    for key in results[names[0]]:
        unit = "" if "MiB" in key else " s"
        rows.append(f"| {key} | {' | '.join(f'{results[name][key]:.2f}{unit}' for name in names)} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    results = {name: measure(name) for name in options.networks}
    print(table(results))
    record = {"torch": version("torch"), "threads": torch.get_num_threads(), "seconds": results}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
