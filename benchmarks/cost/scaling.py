"""Predict what each callback costs on 8 to 1,024 GPUs, from counted quantities and published hardware figures.

    python -m benchmarks.cost.scaling           # count, predict, print
    python -m benchmarks.cost.scaling --check   # on this machine's CPU: predict the time inside hooks, and measure it

Counted, on real tensors: kernels, bytes and matrix-product operations of the hooks of one step, operations of a forward
pass. Measured elsewhere: what an event costs. Published: memory bandwidth and peak rates. Assumed, and said so in
``docs/scaling.md``: the shares of the peaks that are reached.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.common.device import read_result, result_path
from benchmarks.cost.events import LOG, NUMBERS
from benchmarks.cost.fake_device import KernelCounter, host_draws_apart, profiled_operations
from benchmarks.cost.overhead import trained_hooks
from benchmarks.models import CifarResNet, build_network
from lightning_filterdiv.narrowing import count_macs, count_parameters
from lightning_filterdiv.tensors.flat_buffer import FlatBuffer
from lightning_filterdiv.tensors.sharing import divide

RESULT = result_path("scaling.json", "cpu")
SHOWN = ("wau", "repr sub-network phase", "csgd", "basis", "soft", "srip")
GPUS_SHOWN = (8, 64, 256, 1024)


class Gpu(NamedTuple):
    """Published figures of one device."""

    name: str
    bandwidth: float  # bytes/s of memory
    bf16: float  # dense FLOP/s of bfloat16 products
    fp32: float  # FLOP/s outside tensor cores: torch's default for float32 products
    tf32: float  # FLOP/s of float32 products after torch.set_float32_matmul_precision("high")
    network: float  # bytes/s per device between machines
    reached: float  # assumed share of ``bf16`` that training reaches


#: NVIDIA's data sheets of A100 (SXM, 80 GB), H100 (SXM) and H200 (SXM: an H100 with faster memory); one 200 or 400 Gb/s
#: adapter per device.
GPUS = (
    Gpu("A100", 2.039e12, 312e12, 19.5e12, 156e12, 25e9, 0.2),
    Gpu("H100", 3.35e12, 989e12, 67e12, 495e12, 50e9, 0.1),
    Gpu("H200", 4.8e12, 989e12, 67e12, 495e12, 50e9, 0.1),
)
#: Assumed shares of the peaks that the hooks reach, bandwidth and products; and seconds between two kernels.
REACHED_BANDWIDTH, REACHED_PRODUCTS, GAP = 0.6, 0.3, 4e-6
#: Seconds that the host needs for the hooks of a step, and for each of their kernels: a least-squares fit of relative
#: errors to what ``benchmarks.cost.large_steps`` measured on an H200 for the methods without large matrix products
#: (``FITTED``); the other methods check it.
HOST_STEP, HOST_KERNEL = 1.2e-3, 20e-6
FITTED = ("wau", "repr sub-network phase", "srip")
#: Assumed, of results that ranks send each other: seconds of a collective, bytes per second that are packed and read.
COLLECTIVE, READ = 1e-3, 1e9


class Workload(NamedTuple):
    """A network and its data."""

    network: str
    image_shape: tuple[int, int, int]
    classes: int
    batch: int  # images per device and step
    images: int  # of an epoch


WORKLOADS = {
    "ResNet-50, ImageNet": Workload("resnet50", (3, 224, 224), 1000, 64, 1_281_167),
    "WRN-28-10, CIFAR": Workload("wrn28_10", (3, 32, 32), 10, 64, 50_000),
}


class Count(NamedTuple):
    """Counts of the hooks of one step."""

    kernels: int
    bytes: int
    flops: int


def count_hooks(method: str, model: nn.Module) -> Count:
    """Count kernels, bytes and operations of the hooks of one step as on a GPU, without draws on the host.

    Args:
        method: method of ``benchmarks.cost.overhead``.
        model: on the CPU.
    """
    optimizer, (before, after) = trained_hooks(method, model)
    counter = KernelCounter("cpu")
    with patch.object(FlatBuffer, "cpu_shortcuts", False):
        with counter, host_draws_apart(counter):
            before(1)
        optimizer.step()
        with counter:
            after()
    return Count(counter.kernels.total(), counter.bytes, counter.flops)


def forward_flops(workload: Workload) -> int:
    """Operations of a forward pass of one image: two per multiply-add."""
    with torch.device("meta"):
        net = build_network(workload.network, workload.image_shape, workload.classes)
        return 2 * count_macs(net, torch.empty(1, *workload.image_shape))


def host_seconds(count: Count) -> float:
    """Time that the host needs to start the hooks of a step."""
    return HOST_STEP + count.kernels * HOST_KERNEL


def hook_seconds(count: Count, gpu: Gpu, tf32: bool = False) -> float:
    """Return the time inside the hooks of a step if the GPU waits for its host: the slower of both."""
    return max(host_seconds(count), device_seconds(count, gpu, tf32))


def device_seconds(count: Count, gpu: Gpu, tf32: bool = False) -> float:
    """The GPU's time for the hooks of a step, nothing overlapped."""
    rate = gpu.tf32 if tf32 else gpu.fp32
    moved, computed = count.bytes / (REACHED_BANDWIDTH * gpu.bandwidth), count.flops / (REACHED_PRODUCTS * rate)
    return count.kernels * GAP + moved + computed


def step_seconds(workload: Workload, gpu: Gpu, flops: int) -> float:
    """Return the time of forward and backward (twice forward). Communication counts as hidden, which makes the share of
    the hooks large."""
    return 3 * flops * workload.batch / (gpu.reached * gpu.bf16)


def communication_seconds(parameters: int, devices: int, gpu: Gpu) -> float:
    """A ring all-reduce of float32 gradients: 2 (n - 1) / n times the bytes through every adapter."""
    return 2 * (devices - 1) / devices * 4 * parameters / gpu.network


def counted() -> dict[str, Any]:
    """Everything that is counted, for the result file."""
    found: dict[str, Any] = {}
    for name, workload in WORKLOADS.items():
        hooks: dict[str, Any] = {}
        parameters = 0
        for method in SHOWN:
            torch.manual_seed(0)
            model = build_network(workload.network, workload.image_shape, workload.classes)
            parameters = count_parameters(model)
            hooks[method] = count_hooks(method, model)._asdict()
        found[name] = {"forward_flops": forward_flops(workload), "parameters": parameters, "hooks": hooks}
    return found


def step_table(result: dict[str, Any]) -> str:
    """Markdown: predicted share of a step, the same for every number of devices; in brackets that of the GPU alone."""
    columns = [(gpu, tf32) for gpu in GPUS for tf32 in (False, True)]
    names = [f"{gpu.name}{', TF32' if tf32 else ''} %" for gpu, tf32 in columns]
    rows = [f"| network | callback | kernels | host, ms | MB touched | GFLOP | {' | '.join(names)} |"]
    rows.append("|---|---|---|---|---|---|" + "---|" * len(columns))
    for name, of in result["counted"].items():
        workload = WORKLOADS[name]
        for method, counts in of["hooks"].items():
            count = Count(**counts)
            numbers = []
            for gpu, tf32 in columns:
                step = step_seconds(workload, gpu, of["forward_flops"])
                shares = [100 * seconds(count, gpu, tf32) / step for seconds in (hook_seconds, device_seconds)]
                numbers.append(f"{shares[0]:.1f} ({shares[1]:.1f})")
            rows.append(
                f"| {name} | {method} | {count.kernels} | {1e3 * host_seconds(count):.1f} | {count.bytes / 1e6:.0f} "
                f"| {count.flops / 1e9:.1f} | {' | '.join(numbers)} |"
            )
    return "\n".join(rows)


class Event(NamedTuple):
    """Work that is done now and then.

    Attributes:
        divided: (items' seconds, items' estimated costs, bytes of the results) of each part whose layers are divided.
        whole: seconds of work that every rank repeats, or that rank 0 does while the others wait.
        per_epoch: number of events per epoch.
    """

    divided: tuple[tuple[tuple[float, ...], tuple[float, ...], int], ...]
    whole: float
    per_epoch: float

    def seconds(self, devices: int, gpu: Gpu) -> float:
        """Predicted time of one event, with the layers divided among so many devices; 1: not divided."""
        total = self.whole
        for seconds, costs, size in self.divided:
            parts = divide(dict(enumerate(costs)), devices)
            total += max(sum(seconds[item] for item in part) for part in parts)
            if devices > 1:
                total += 2 * COLLECTIVE + 2 * (devices - 1) / devices * size / gpu.network + size / READ
        return total


def measured_events() -> dict[str, Event]:
    """Events of ResNet-50, from what was measured on a CPU."""
    events = read_result("events.json")["events"]["resnet50"]
    look = read_result("monitor.json")["looks"]["resnet50"]
    parts = read_result("events_divided.json")["divided"]["1"]
    seconds = {name: of["seconds"] for name, of in events.items()}

    def part(name: str) -> tuple[tuple[float, ...], tuple[float, ...], int]:
        return tuple(parts[name]["items"]), tuple(parts[name]["costs"]), parts[name]["bytes"]

    figures = look["CPU seconds"] - look["CPU seconds of the numbers alone"]
    # The mean overlap for the log is that of the ranking, in single precision; it sends a number per layer.
    items, costs, _ = part("RePr: rank")
    overlap = (tuple(item * seconds[LOG] / sum(items) for item in items), costs, 0)
    of_repr = (part("RePr: rank"), part("RePr: new directions"), overlap, overlap)
    return {
        "RePr 20/10/3 of 100 epochs": Event(of_repr, seconds["drop"] + seconds["regrow"], 0.03),
        "monitor, numbers every epoch": Event((part(NUMBERS),), 0.0, 1.0),
        "monitor, figures every tenth epoch": Event((), figures, 0.1),
    }


def event_share(event: Event, devices: int, result: dict[str, Any], *, divided: bool) -> float:
    """Predicted share of the training time of ResNet-50 on A100 that an event takes."""
    gpu, workload, of = GPUS[0], WORKLOADS["ResNet-50, ImageNet"], result["counted"]["ResNet-50, ImageNet"]
    step = max(
        step_seconds(workload, gpu, of["forward_flops"]),
        communication_seconds(of["parameters"], devices, gpu),
    )
    epoch = workload.images / (workload.batch * devices) * step
    return event.per_epoch * event.seconds(devices if divided else 1, gpu) / epoch


def event_table(result: dict[str, Any]) -> str:
    """Markdown: share of the training time that events take, by number of devices."""
    rows = ["| event | layers | seconds, one CPU | " + " | ".join(f"{n} GPUs" for n in GPUS_SHOWN) + " |"]
    rows.append("|---|---|---|" + "---|" * len(GPUS_SHOWN))
    for name, event in measured_events().items():
        for divided in (False, True) if event.divided else (False,):
            shares = [event_share(event, devices, result, divided=divided) for devices in GPUS_SHOWN]
            cells = (f"{100 * share:.{0 if share > 0.1 else 1}f} %" for share in shares)
            layers = "" if not event.divided else "divided" if divided else "all on every rank"
            rows.append(f"| {name} | {layers} | {event.seconds(1, GPUS[0]):.1f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _time(action: Callable[[], Any], repeats: int) -> float:
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return median(times)


def calibrate() -> dict[str, float]:
    """Measure the figures of this machine on operations that no callback uses."""
    small, large = torch.zeros(8), torch.zeros(4_000_000)
    left = torch.randn(8, 64, 576)
    gap = _time(lambda: small.add_(1.0), 300)
    # Tensors of the size of a layer: they are in the cache, as the weights of a small network are.
    layer = [torch.zeros(36_864) for _ in range(64)]
    inside = _time(lambda: torch._foreach_add_(layer, 1.0), 60)
    return {
        "gap": gap,
        "bandwidth": 2 * 4 * 36_864 * 64 / max(inside - 64 * gap, 1e-9),
        "memory_bandwidth": 2 * large.nbytes / _time(lambda: large.add_(1.0), 20),
        "flops": 2 * 8 * 64 * 64 * 576 / _time(lambda: torch.bmm(left, left.mT), 60),
    }


def check(depths: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Predicted and measured time inside hooks on this machine's CPU, one thread.

    On a CPU a ``_foreach`` operation is one operation per tensor, so operations are counted as the profiler sees them.
    """
    torch.set_num_threads(1)
    machine = calibrate()
    rows = []
    for depth in depths:
        for method in SHOWN:
            torch.manual_seed(0)
            count = count_hooks(method, CifarResNet(depth))
            # A network of its own: hooks of two updates would share storage.
            _, (before, after) = trained_hooks(method, CifarResNet(depth))

            def hooks(before: Callable[[int], object] = before, after: Callable[[], object] = after) -> None:
                before(1)
                after()

            operations = profiled_operations(hooks).total()
            predicted = (
                operations * machine["gap"] + count.bytes / machine["bandwidth"] + count.flops / machine["flops"]
            )
            rows.append(
                {
                    "network": f"ResNet-{depth}",
                    "method": method,
                    "operations": operations,
                    "bytes": count.bytes,
                    "predicted": predicted,
                    "measured": _time(hooks, repeats),
                }
            )
    return {"machine": machine, "rows": rows}


def check_table(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| network | callback | operations | MB touched | predicted, ms | measured, ms | ratio |"]
    rows.append("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        predicted, measured = 1e3 * row["predicted"], 1e3 * row["measured"]
        rows.append(
            f"| {row['network']} | {row['method']} | {row['operations']} | {row['bytes'] / 1e6:.1f} "
            f"| {predicted:.2f} | {measured:.2f} | {predicted / measured:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="predict and measure on this machine, idle")
    parser.add_argument("--depths", nargs="+", type=int, default=[20, 56])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.check:
        result["check"] = check(tuple(options.depths), options.repeats)
    else:
        result["counted"] = counted()
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(check_table(result["check"]) if options.check else f"{step_table(result)}\n\n{event_table(result)}")


if __name__ == "__main__":
    main()
