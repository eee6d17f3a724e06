"""What rare events cost on large networks: RePr's trace, rank, drop and regrow, and a merge; seconds and peak memory.

    python -m benchmarks.cost.events --networks resnet50 wrn28_10

Peak memory is the kernel's high-water mark of resident memory above what was resident, reset before each part (Linux);
on a GPU it is that of the allocator. Clustering and merging are measured on the CPU alone: k-means runs there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.common.device import default_device, description, result_path
from benchmarks.cost.measure import Cost, measured
from benchmarks.models import build_network
from lightning_filterdiv.centripetal import cluster_channels
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import filter_matrix, select_filters
from lightning_filterdiv.narrowing import merge_channels, tie_channels
from lightning_filterdiv.repr_.functional import rank_filters, select_dropped
from lightning_filterdiv.repr_.network import DroppedFilters
from lightning_filterdiv.similarity import orthogonality_score

T = TypeVar("T")
RESULT = result_path("events.json", "cpu")
CYCLE = ("rank", "drop", "new directions", "regrow")
TRACE, LOG, WHOLE, CLUSTER, MERGE = (
    "trace (once per fit)", "mean O for the log", "rank + drop + regrow + log", "cluster all channels to 5/8", "merge",
)  # fmt: skip


def large_network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights as for its papers' data, and a small batch that it takes."""
    torch.manual_seed(0)
    if name.startswith("wrn"):
        return build_network(name, (3, 32, 32), 10), torch.randn(2, 3, 32, 32)
    return build_network(name, (3, 224, 224), 1000), torch.randn(2, 3, 64, 64)


def measure(name: str, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds and MiB of each part of one cycle of RePr, and, on a CPU, of a merge to 5/8 of all widths."""
    model, images = large_network(name)
    model, images = model.to(device), images.to(device)
    if device.type == "cuda":
        with torch.no_grad():
            model(images)  # makes the libraries' handles
    costs: dict[str, Cost] = {}

    def timed(part: str, action: Callable[[], T]) -> T:
        with measured(device) as costs[part]:
            return action()

    graph = timed(TRACE, lambda: ChannelGraph.trace(model, images))
    first = next(iter(select_filters(model)))
    layers = {
        layer: conv
        for layer, conv in select_filters(model).items()
        if layer != first
        and conv.groups == 1
        and "downsample" not in layer
        and not isinstance(graph.private(layer), str)
    }
    matrices = {layer: filter_matrix(conv) for layer, conv in layers.items()}
    scores = timed("rank", lambda: rank_filters(matrices, "orthogonality"))
    chosen = select_dropped(scores, 0.3)
    dropped = timed("drop", lambda: DroppedFilters.drop(model, graph, chosen))
    values, _ = timed("new directions", lambda: dropped.new_filters(1.0, (0,)))
    optimizer = _with_momentum(model)
    timed("regrow", lambda: dropped.regrow(values, [optimizer]))
    timed(LOG, lambda: [orthogonality_score(matrix).mean() for matrix in matrices.values()])
    if device.type == "cpu":
        clusters = timed(CLUSTER, lambda: cluster_channels(model, graph, 0.625))
        tie_channels(model, clusters, images)
        timed(MERGE, lambda: merge_channels(model, clusters, images))
    cycle = sum(costs[part].seconds for part in CYCLE) + 2 * costs[LOG].seconds
    memory = max(costs[part].extra_mib for part in CYCLE)
    print(f"{name}: {len(layers)} layers, {dropped.count} filters dropped")
    parts = {part: {"seconds": cost.seconds, "MiB": cost.extra_mib} for part, cost in costs.items()}
    return parts | {WHOLE: {"seconds": cycle, "MiB": memory}}


def _with_momentum(model: nn.Module) -> torch.optim.Optimizer:
    """SGD that has made a step and so keeps a buffer per parameter; the step moves nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def table(record: dict[str, Any], parts: Sequence[str] | None = None, gpu: dict[str, Any] | None = None) -> str:
    """Markdown of all or some parts, with a line on the machine.

    Args:
        record: of a CPU.
        parts: which.
        gpu: likewise of a GPU, more columns.
    """
    columns = [(name, of) for name, of in record["events"].items()]
    if gpu is not None:
        columns += [(f"{name}, {gpu['device']}", of) for name, of in gpu["events"].items()]
    rows = [f"| seconds, peak extra MiB | {' | '.join(name for name, _ in columns)} |", f"|---{'|---' * len(columns)}|"]
    for part in columns[0][1] if parts is None else parts:
        cells = (f"{of[part]['seconds']:.2f} s, {of[part]['MiB']:.0f} MiB" if part in of else "" for _, of in columns)
        rows.append(f"| {part} | {' | '.join(cells)} |")
    busy = f"load average {record['load']:.1f} on {record['cores']} cores at the start"
    return "\n".join([*rows, "", f"CPU, {record['threads']} threads, torch {record['torch']}; {busy}."])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "wrn28_10"])
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load, cores, device = os.getloadavg()[0], os.cpu_count(), torch.device(options.device)
    results = {name: measure(name, device) for name in options.networks}
    record = {"device": description(device), "torch": version("torch"), "threads": torch.get_num_threads()}
    record |= {"load": load, "cores": cores, "events": results}
    print(table(record))
    path: Path = options.out or result_path("events.json", device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
