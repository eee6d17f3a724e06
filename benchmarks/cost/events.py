"""Cost of rare events on large networks: RePr's trace, rank, drop and regrow, and a merge; seconds and peak memory.

    python -m benchmarks.cost.events --networks resnet50 wrn28_10
    python -m benchmarks.cost.events --processes 1 2 4   # CPU seconds of each process, with the layers divided

On a CPU seconds are CPU time of the process, so that other work on the machine adds little. Peak memory is the kernel's
high-water mark above the resident memory at the start, reset before each part (Linux). On a GPU it is that of the
allocator. Clustering and merging are measured on the CPU alone, because k-means runs there.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common.device import default_device, description, result_path
from benchmarks.cost.measure import Cost, measured
from benchmarks.cost.processes import run_processes
from benchmarks.models import build_network
from lightning_filterdiv.centripetal import cluster_channels, cluster_filters
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import filter_matrix, select_filters
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.narrowing import merge_channels, tie_channels
from lightning_filterdiv.narrowing.importance import redundancy_scores
from lightning_filterdiv.repr_.functional import rank_filters, select_dropped
from lightning_filterdiv.repr_.network import DroppedFilters
from lightning_filterdiv.similarity import orthogonality_score
from lightning_filterdiv.tensors import sharing
from lightning_filterdiv.tensors.rank_check import bit_checksums

T = TypeVar("T")
RESULT = result_path("events.json", "cpu")
DIVIDED = result_path("events_divided.json", "cpu")
NUMBERS = "monitor: numbers of a look"
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

    def seconds(part: str) -> float:
        return costs[part].cpu_seconds if device.type == "cpu" else costs[part].seconds

    graph = timed(TRACE, lambda: ChannelGraph.trace(model, images))
    matrices = ranked(model, graph)
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
    cycle = sum(map(seconds, CYCLE)) + 2 * seconds(LOG)
    memory = max(costs[part].extra_mib for part in CYCLE)
    print(f"{name}: {len(matrices)} layers, {dropped.count} filters dropped")
    parts = {part: {"seconds": seconds(part), "MiB": cost.extra_mib} for part, cost in costs.items()}
    return parts | {WHOLE: {"seconds": cycle, "MiB": memory}}


def ranked(model: nn.Module, graph: ChannelGraph) -> dict[str, Tensor]:
    """Filter matrices of the layers that RePr ranks."""
    first = next(iter(select_filters(model)))
    return {
        layer: filter_matrix(conv)
        for layer, conv in select_filters(model).items()
        if layer != first
        and conv.groups == 1
        and "downsample" not in layer
        and not isinstance(graph.private(layer), str)
    }


class _Timed:
    """Stand-in for ``divide`` in one process: every item in the only share, with its CPU time."""

    costs: ClassVar[dict[Any, float]] = {}
    seconds: ClassVar[dict[Any, float]] = {}

    def __init__(self, costs: Mapping[Any, float], shares: int) -> None:
        assert shares == 1
        _Timed.costs, _Timed.seconds = dict(costs), {}

    def __getitem__(self, rank: int) -> Iterator[Any]:
        for item in self.costs:
            start = time.process_time()
            yield item
            self.seconds[item] = time.process_time() - start


def divided(name: str) -> dict[str, dict[str, Any]]:
    """Parts of events whose layers are divided among the processes that call this.

    Returns:
        Part -> CPU seconds of each rank, bytes that are sent, and a checksum of the results; of one process also the
        estimated costs of the items that are divided and the CPU seconds of each.
    """
    model, images = large_network(name)
    graph = ChannelGraph.trace(model, images)
    layers, matrices = select_filters(model), ranked(model, graph)
    silenced = DroppedFilters.collect(model, graph, select_dropped(rank_filters(matrices), 0.3))
    many = dist.get_world_size() > 1
    work: dict[str, Callable[[], Any]] = {
        NUMBERS: lambda: redundancy_metrics(layers, among_ranks=many),
        "RePr: rank": lambda: rank_filters(matrices, among_ranks=many),
        "RePr: new directions": lambda: silenced.new_filters(1.0, (0,), among_ranks=many),
        "C-SGD: cluster to 5/8": lambda: cluster_channels(model, graph, 0.625, among_ranks=many),
        "C-SGD: importances": lambda: redundancy_scores(model, graph, graph.groups, among_ranks=many),
    }
    found: dict[str, dict[str, Any]] = {}
    redundancy_metrics({layer: layers[layer] for layer in list(layers)[:2]})  # loads libraries
    cluster_filters(torch.randn(4, 3), 2)
    for part, action in work.items():
        dist.barrier()
        start = time.process_time()
        result = action()
        mine = torch.tensor([time.process_time() - start], dtype=torch.float64)
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        packed = pickle.dumps(result)
        seconds = [float(rank) for rank in ranks]
        found[part] = {"seconds": seconds, "bytes": len(packed), "checksum": zlib.crc32(repr(_plain(result)).encode())}
    if not many:  # what more processes would divide, and what each item takes
        many = True
        for part, action in work.items():
            with patch.object(sharing, "divide", _Timed):
                action()
            found[part] |= {"costs": list(_Timed.costs.values()), "items": list(_Timed.seconds.values())}
    return found


def _plain(result: Any) -> Any:
    """Nested results with checksums in the place of tensors."""
    if isinstance(result, dict):
        return {key: _plain(value) for key, value in result.items()}
    if isinstance(result, tuple):
        return tuple(map(_plain, result))
    return bit_checksums({"": result}).tolist() if isinstance(result, Tensor) else result


def divided_table(record: dict[str, Any]) -> str:
    """Return Markdown: CPU seconds of the busiest rank, and in brackets of all ranks together.

    Raises:
        ValueError: results differ between numbers of processes.
    """
    counts = list(record["divided"])
    rows = [f"| CPU seconds of the busiest rank (of all) | {' | '.join(f'{n} processes' for n in counts)} |"]
    rows[0] = rows[0].replace("| 1 processes |", "| 1 process |")
    rows.append("|---" * (1 + len(counts)) + "|")
    for part in record["divided"][counts[0]]:
        columns = [record["divided"][count][part] for count in counts]
        if len({column["checksum"] for column in columns}) > 1:
            raise ValueError(f"{part}: the results depend on the number of processes")
        cells = [f"{max(c['seconds']):.2f} ({sum(c['seconds']):.2f})" for c in columns]
        rows.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", f"resnet50, CPU, 1 thread per process, gloo, torch {record['torch']}."])


def _with_momentum(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD after a step, with a buffer per parameter. The step moves nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def table(record: dict[str, Any], parts: Sequence[str] | None = None, gpu: dict[str, Any] | None = None) -> str:
    """Markdown of all or some parts, with a line on the machine.

    Args:
        record: record of a CPU.
        parts: names of the parts.
        gpu: record of a GPU, for more columns.
    """
    columns = [(name, of) for name, of in record["events"].items()]
    if gpu is not None:
        columns += [(f"{name}, {gpu['device']}", of) for name, of in gpu["events"].items()]
    rows = [
        f"| seconds, peak extra MiB | {' | '.join(name for name, _ in columns)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    for part in columns[0][1] if parts is None else parts:
        cells = (f"{of[part]['seconds']:.2f} s, {of[part]['MiB']:.0f} MiB" if part in of else "" for _, of in columns)
        rows.append(f"| {part} | {' | '.join(cells)} |")
    busy = f"load average {record['load']:.1f} on {record['cores']} cores at the start"
    machine = f"CPU (seconds are CPU time), {record['threads']} threads, torch {record['torch']}; {busy}."
    return "\n".join([*rows, "", machine])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "wrn28_10"])
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--processes", nargs="+", type=int, help="divide the layers among so many, on the CPU")
    parser.add_argument("--here", action="store_true", help="measure in the processes that torchrun started")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.here:
        dist.init_process_group("gloo")
        print(json.dumps(divided("resnet50")), flush=True)
        dist.destroy_process_group()
        return
    if options.processes:
        path = options.out or DIVIDED
        found = {str(n): json.loads(run_processes("benchmarks.cost.events", n)) for n in options.processes}
        known = json.loads(path.read_text())["divided"] if path.exists() else {}
        record = {"torch": version("torch"), "divided": known | found}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(divided_table(record))
        return
    load, cores, device = os.getloadavg()[0], os.cpu_count(), torch.device(options.device)
    results = {name: measure(name, device) for name in options.networks}
    record = {"device": description(device), "torch": version("torch"), "threads": torch.get_num_threads()}
    record |= {"load": load, "cores": cores, "events": results}
    print(table(record))
    path = options.out or result_path("events.json", device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
