"""Cost of a callback per step: time inside its hooks divided by the time of the rest of the step, measured in one run.

    python -m benchmarks.cost.overhead --depths 20 56 --pairs 60

Every pair is one step with and one step without the callback, in random order, on the same batch. ``A/A`` repeats the
measurement without a callback on both sides, and shows which differences can be resolved on this machine. The main
number is the time inside hooks, because it is not a difference of two noisy numbers. On a CPU times are CPU time of the
process, so that other work on the machine adds little. On a GPU the device is synchronised for the clock in this module
only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.common.device import clock, default_device, description, result_path
from benchmarks.cost.measure import interleaved, median_interval
from benchmarks.models import CifarResNet
from lightning_filterdiv.async_update import AsynchronousUpdate
from lightning_filterdiv.centripetal import (
    CentripetalUpdate,
    ClusteredTensor,
    cluster_channels,
    clustered_tensors,
)
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import filter_matrix, select_filters
from lightning_filterdiv.orthonormality import OrthonormalityPenalty, filter_blocks, soft_orthogonality
from lightning_filterdiv.repr_.functional import rank_filters, select_dropped
from lightning_filterdiv.repr_.network import DroppedFilters

Hooks = tuple[Callable[[int], object], Callable[[], object]]
RESULT = result_path("overhead.json", "cpu")


def naive_update(model: nn.Module, optimizer: Optimizer) -> Hooks:
    """Run WAU the usual way: clone, draw and mask layer by layer, on the device."""
    layers = list(select_filters(model).values())
    kept: list[torch.Tensor] = []

    def before(step: int) -> None:
        kept[:] = [conv.weight.detach().clone() for conv in layers]

    def after() -> None:
        with torch.no_grad():
            for conv, old in zip(layers, kept, strict=True):
                count = conv.out_channels
                chosen = torch.zeros(count, dtype=torch.bool, device=old.device)
                chosen[torch.randperm(count, device=old.device)[: max(1, round(0.5 * count))]] = True
                conv.weight.copy_(torch.where(chosen.view(-1, 1, 1, 1), conv.weight, old))

    return before, after


def _update(**arguments: Any) -> Callable[[nn.Module, Optimizer], Hooks]:
    def build(model: nn.Module, optimizer: Optimizer) -> Hooks:
        update = AsynchronousUpdate(select_filters(model), optimizer, **arguments)
        return update.before_step, update.after_step

    return build


def sub_network_phase(model: nn.Module, optimizer: Optimizer) -> Hooks:
    """Run RePr with 30 % of the filters dropped and their consumers held."""
    graph = ChannelGraph.trace(model, torch.zeros(2, 3, 32, 32, device=next(model.parameters()).device))
    layers = {name: conv for name, conv in select_filters(model).items() if not isinstance(graph.private(name), str)}
    layers.pop(next(iter(select_filters(model))), None)
    scores = rank_filters({name: filter_matrix(conv) for name, conv in layers.items()}, "orthogonality")
    hold = DroppedFilters.drop(model, graph, select_dropped(scores, 0.3)).hold(consumers=True)
    return (lambda step: hold.before_step(optimizer)), (lambda: hold.after_step(optimizer))


def _clustered(model: nn.Module) -> list[ClusteredTensor]:
    """Everything that C-SGD acts on in a ResNet, 5/8 as many clusters as channels."""
    graph = ChannelGraph.trace(model, torch.zeros(2, 3, 32, 32, device=next(model.parameters()).device))
    return clustered_tensors(model, graph, cluster_channels(model, graph, 0.625, method="even"))


def centripetal(model: nn.Module, optimizer: Optimizer) -> Hooks:
    """C-SGD, batched by shape."""
    update = CentripetalUpdate(_clustered(model), optimizer, strength=0.03)
    return (lambda step: update.before_step()), update.after_step


def per_layer_products(model: nn.Module, optimizer: Optimizer) -> Hooks:
    """C-SGD as the official code has it: two matrix products per tensor, with Gamma and with eps (1 - Gamma)."""
    entries: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
    for tensor in _clustered(model):
        same = torch.tensor(tensor.clusters)[:, None] == torch.tensor(tensor.clusters)[None]
        average = (same / same.sum(1, keepdim=True)).to(tensor.parameter.device)
        pull = 0.03 * (torch.eye(len(average), device=average.device) - average)
        entries.append((tensor.parameter, average, pull))

    def before(step: int) -> None:
        with torch.no_grad():
            for parameter, average, pull in entries:
                if parameter.grad is not None:
                    rows = parameter.grad.reshape(len(average), -1)
                    edited = average @ rows + pull @ parameter.reshape(len(average), -1)
                    parameter.grad.copy_(edited.view_as(parameter))

    return before, lambda: None


def _penalty(**arguments: Any) -> Callable[[nn.Module, Optimizer], Hooks]:
    def build(model: nn.Module, optimizer: Optimizer) -> Hooks:
        penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, **arguments)
        return (lambda step: penalty.before_step(weight=1e-2, step=step)), penalty.after_step

    return build


def _autograd_penalty(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module, Optimizer], Hooks]:
    """Run a penalty the usual way: layer by layer, with its gradient by autograd."""

    def build(model: nn.Module, optimizer: Optimizer) -> Hooks:
        layers = list(select_filters(model).values())

        def before(step: int) -> None:
            torch.stack([1e-2 * value(conv.weight.flatten(1)) for conv in layers]).sum().backward()

        return before, lambda: None

    return build


def _official_srip(rows: torch.Tensor) -> torch.Tensor:
    """The released code's way: the d x d matrix, a fresh start, two steps of power iteration."""
    off = rows.T @ rows - torch.eye(rows.shape[1], device=rows.device)
    u = nn.functional.normalize(torch.randn(len(off), device=rows.device), dim=0)
    v = nn.functional.normalize(off.T @ u, dim=0)
    u = nn.functional.normalize(off @ v, dim=0)
    return torch.dot(u, off @ v) ** 2


METHODS: dict[str, Callable[[nn.Module, Optimizer], Hooks]] = {
    "A/A": lambda model, optimizer: (lambda step: None, lambda: None),
    "wau": _update(),
    "wau hold=gradient": _update(hold="gradient"),
    "wau official": _update(axis="in", sampling="with_replacement"),
    "repr sub-network phase": sub_network_phase,
    "naive per-layer wau": naive_update,
    "csgd": centripetal,
    "official per-layer csgd": per_layer_products,
    "basis": _penalty(form="basis"),
    "soft": _penalty(form="soft"),
    "soft decoupled": _penalty(form="soft", decoupled=True),
    "mutual_coherence": _penalty(form="mutual_coherence"),
    "srip": _penalty(form="srip"),
    "convolutional": _penalty(form="convolutional"),
    "per-layer autograd soft": _autograd_penalty(soft_orthogonality),
    "per-layer autograd srip": _autograd_penalty(_official_srip),
}


def trained_hooks(method: str, model: nn.Module) -> tuple[Optimizer, Hooks]:
    """Optimizer and hooks of a model that has made one step: there are gradients, momentum and buffers."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, after = METHODS[method](model, optimizer)
    before(0)
    optimizer.step()
    after()
    return optimizer, (before, after)


class Cost(NamedTuple):
    """Medians over steps."""

    method: str
    depth: int
    inside_hooks: float  # time inside hooks / time of the rest of the step
    ratio: float  # step with / step without, interleaved
    low: float  # bootstrap 95 % interval of the ratio
    high: float
    step_ms: float
    pairs: int  # of steps, with and without


def _now(device: torch.device) -> float:
    return time.process_time() if device.type == "cpu" else clock(device)


def measure(method: str, depth: int, pairs: int, device: torch.device, batch: int = 64) -> Cost:
    """Train two copies of a ResNet side by side, one with the hooks."""
    torch.manual_seed(0)
    reference = CifarResNet(depth).to(device)
    models = [CifarResNet(depth).to(device) for _ in range(2)]
    for model in models:
        model.load_state_dict(reference.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for m in models]
    before, after = METHODS[method](models[1], optimizers[1])
    images = torch.randn(batch, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch,), device=device)

    def step(which: int, number: int) -> tuple[float, float]:
        hooked = 0.0
        start = _now(device)
        optimizers[which].zero_grad()
        nn.functional.cross_entropy(models[which](images), labels).backward()
        if which:
            mark = _now(device)
            before(number)
            hooked += _now(device) - mark
        optimizers[which].step()
        if which:
            mark = _now(device)
            after()
            hooked += _now(device) - mark
        return _now(device) - start, hooked

    steps = interleaved(step, pairs)
    inside = median(hooked / (total - hooked) for _, (total, hooked) in steps)
    ratio, low, high = median_interval([total / without for (without, _), (total, _) in steps])
    return Cost(method, depth, inside, ratio, low, high, 1000 * median(without for (without, _), _ in steps), pairs)


def table(costs: Sequence[Cost], gpu: Sequence[Cost] = (), gpu_name: str = "") -> str:
    """Markdown.

    Args:
        costs: rows.
        gpu: the same measured on a GPU, two more columns; a row may be in either.
        gpu_name: name of that GPU.
    """
    names = ["method", "network", "time inside hooks / rest of the step", "step with / without (95 %)"]
    names += [f"{gpu_name}: inside hooks / rest", "step with / without (95 %)"] if gpu else []
    by_device = [{(cost.depth, cost.method): cost for cost in of} for of in (costs, gpu)[: 2 if gpu else 1]]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for depth in sorted({depth for found in by_device for depth, _ in found}):
        for method in dict.fromkeys(method for found in by_device for of, method in found if of == depth):
            cells = [method, f"ResNet-{depth}"]
            for found in by_device:
                c = found.get((depth, method))
                cells.append("" if c is None or method == "A/A" else f"{100 * c.inside_hooks:.2f} %")
                cells.append("" if c is None else f"{c.ratio:.3f} ({c.low:.3f} to {c.high:.3f})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(record: dict[str, Any]) -> str:
    """Device, version and steps behind the medians of a result file: ``"CPU, torch 2.15.0, medians of 40 steps"``."""
    pairs: dict[int, list[int]] = {}
    for depth, count in sorted({(cost["depth"], cost["pairs"]) for cost in record["costs"]}):
        pairs.setdefault(count, []).append(depth)
    if len(pairs) == 1:
        (steps,) = map(str, pairs)
    else:
        steps = ", ".join(f"{count} (ResNet-{', '.join(map(str, depths))})" for count, depths in pairs.items())
    return f"{record['device']}, torch {record['torch']}, medians of {steps} steps"


def _merged(path: Path, head: dict[str, Any], costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """The rows of the file that were measured on the same device and not now, and those measured now."""
    rows = {(cost.depth, cost.method): cost._asdict() for cost in costs}
    if path.exists():
        found = json.loads(path.read_text())
        if all(found[key] == value for key, value in head.items()):
            rows = {(row["depth"], row["method"]): row for row in found["costs"]} | rows
    order = list(METHODS)
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], order.index(key[1])))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--depths", nargs="+", type=int, default=[20, 56])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, help="rows measured before on the same device stay in the file")
    options = parser.parse_args()
    device = torch.device(options.device)
    head = {"device": description(device), "torch": version("torch"), "batch": 64}
    path: Path = options.out or result_path("overhead.json", device)
    path.parent.mkdir(parents=True, exist_ok=True)
    costs: list[Cost] = []
    for depth in options.depths:
        for name in options.methods:
            costs.append(measure(name, depth, options.pairs, device))
            path.write_text(json.dumps(head | {"costs": _merged(path, head, costs)}, indent=1) + "\n")
    print(table(costs))


if __name__ == "__main__":
    main()
