"""Compare importances for pruning with C-SGD and torch-pruning, at equal widths, MACs and epochs.

ResNet-20 (projection shortcuts, one input channel) on FM5k's images: 5,000 of Fashion-MNIST (a permutation drawn from
the run's seed), judged on all 10,000 test images; batch 64, SGD with Nesterov momentum 0.9, weight decay 5e-4, learning
rate 0.05, divided by ten after 60 % and 87 % of the epochs; no augmentation. One parent per seed is trained for 40
epochs; every arm starts from it, ends with half of its MACs in the same widths, and is trained for 20 epochs more.

    python -m benchmarks.experiments.prune --seeds 1 2 3    # skips arms whose file exists
    python -m benchmarks.experiments.prune --table

Arms: ``parent``; ``csgd`` (CentripetalSGD during the 20 epochs, then merged); ``redundancy``, ``taylor``, ``l2``,
``bn_scale``, ``random`` (:func:`~lightning_filterdiv.narrowing.prune_channels`, then 20 epochs); ``torch_pruning``
(its magnitude pruner at the same widths, then 20 epochs); ``full`` (20 more epochs at full width). Pruning arms also
record the accuracy before any fine-tuning, with and without the correction of the next bias. For ``csgd`` this is the
accuracy of the parent, merged at once by the same clusters.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch_pruning
from torch import nn

from benchmarks.common.paths import RESULTS
from benchmarks.experiments.fits import accuracy, fm5k
from benchmarks.experiments.squeeze import EXAMPLE, resnet, train
from benchmarks.training import report
from benchmarks.training.data import FashionMNIST
from benchmarks.training.runs import interval, read_runs, run_missing, run_parser
from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.centripetal import cluster_channels
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.narrowing import (
    Importance,
    Pruned,
    WidthPlan,
    WidthRule,
    count_macs,
    count_parameters,
    merge_channels,
    plan_widths,
    prune_channels,
)

PARENT_EPOCHS, EPOCHS, TARGET, BATCHES = 40, 20, 0.5, 16
OUT = RESULTS / "prune"
IMPORTANCES = ("redundancy", "taylor", "l2", "bn_scale", "random")
ARMS = ("parent", "csgd", *IMPORTANCES, "torch_pruning", "full")


def parent(seed: int, folder: Path) -> nn.Module:
    """The trained network of full width; it is trained where its weights are not here."""
    path = folder / ".partial" / f"parent-seed{seed}.pt"
    if not path.exists():
        pl.seed_everything(seed, verbose=False)
        net = train(resnet(), PARENT_EPOCHS, fm5k(seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net = resnet()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


def _plan(net: nn.Module) -> WidthPlan:
    return plan_widths(ChannelGraph.trace(net, EXAMPLE), WidthRule(target_macs=TARGET))


def _batches(data: FashionMNIST) -> list[Any]:
    """Training images in the order of the data set, not drawn: the same for every arm."""
    images, labels, _, _ = data.parts
    return list(zip(images.split(64), labels.split(64), strict=True))[:BATCHES]


def _csgd(net: nn.Module, data: FashionMNIST, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    graph = ChannelGraph.trace(net, EXAMPLE)
    clusters = cluster_channels(net, graph, plan=_plan(net), seed=seed)
    at_once = merge_channels(net, clusters, EXAMPLE, tolerance=float("inf")).network
    found = {"accuracy_at_once": accuracy(at_once, data)}
    callback = CentripetalSGD(target_macs=TARGET, seed=seed)
    train(net, EPOCHS, data, [callback])
    found["accuracy_before_merge"] = accuracy(net, data)
    narrow, merged = callback.merge(net, EXAMPLE)
    found |= {"forecast_k": callback.forecast_k or 0.0, "projection": merged.projection}
    return narrow, found


def _pruned(importance: Importance, net: nn.Module, data: FashionMNIST, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    def prune(bias: bool) -> Pruned:
        return prune_channels(
            net, EXAMPLE, importance=importance, target_macs=TARGET, batches=_batches(data), max_batches=BATCHES,
            bias=bias, seed=seed, verbose=False,
        )  # fmt: skip

    without = prune(bias=False).network
    narrow, pruned = prune(bias=True)
    found = {
        "accuracy_at_once": accuracy(narrow, data),
        "accuracy_at_once_without_bias": accuracy(without, data),
        "change": pruned.change,
    }
    return train(narrow, EPOCHS, data), found


def _torch_pruning(net: nn.Module, data: FashionMNIST) -> tuple[nn.Module, dict[str, Any]]:
    plan = _plan(net)
    modules = dict(net.named_modules())
    ratios = {
        modules[layer]: 1 - (count + 0.5) / plan.sizes[name]  # it keeps the integer below
        for name, count in plan.counts.items()
        for layer in plan.layers[name]
        if count < plan.sizes[name]
    }
    torch_pruning.MagnitudePruner(
        net, EXAMPLE, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.0,
        pruning_ratio_dict=ratios, ignored_layers=[modules["classifier"]],
    ).step()  # fmt: skip
    found = {"accuracy_at_once": accuracy(net, data)}
    return train(net, EPOCHS, data), found


def run(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """One arm of one seed."""
    started = time.process_time()
    data = fm5k(seed)
    net = parent(seed, folder)
    pl.seed_everything(seed, verbose=False)
    found: dict[str, Any] = {}
    if arm == "csgd":
        net, found = _csgd(net, data, seed)
    elif arm == "torch_pruning":
        net, found = _torch_pruning(net, data)
    elif arm == "full":
        train(net, EPOCHS, data)
    elif arm != "parent":
        net, found = _pruned(cast(Importance, arm), net, data, seed)
    return {
        "method": arm,
        "seed": seed,
        "epochs": [PARENT_EPOCHS, EPOCHS],
        "test_accuracy": accuracy(net, data),
        "macs": count_macs(net, EXAMPLE[:1]),
        "parameters": count_parameters(net),
        **found,
        "cpu_seconds": round(time.process_time() - started, 1),
        "versions": {"torch": torch.__version__, "torch_pruning": version("torch-pruning")},
    }


_LABELS = {
    "parent": "full width, {p} epochs (start of the others)",
    "full": "full width, {p} + {e} epochs",
    "csgd": "C-SGD, then merged (at once: the start, merged without C-SGD)",
    "torch_pruning": "torch-pruning, magnitude",
}


def table(folder: Path) -> str:
    """Markdown: accuracy at once and after fine-tuning, and what each arm has over C-SGD, paired by seed.

    Args:
        folder: folder of the arms' results.
    """
    rows = [
        "| channels chosen by | seeds | at once % | without bias % | fine-tuned % | difference to C-SGD | p | MACs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = read_runs(folder, ARMS)
    compared = {arm: runs for arm, runs in found.items() if arm != "parent"}
    summary = {row.method: row for row in report.summary(compared, "csgd")} if "csgd" in found else {}
    for arm, runs in found.items():
        cells: list[str] = []
        for key in ("accuracy_at_once", "accuracy_at_once_without_bias"):
            values = [100 * run[key] for run in runs if key in run]
            cells.append(interval(values) if values else "")
        if arm in summary:
            cells += report.accuracy_cells(summary[arm])
        else:
            cells += [interval([100 * run["test_accuracy"] for run in runs]), "", ""]
        label = _LABELS.get(arm, arm).format(p=PARENT_EPOCHS, e=EPOCHS)
        macs = f"{runs[0]['macs'] / 1e6:.2f} M"
        rows.append(f"| {' | '.join([label, str(len(runs)), *cells, macs])} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    options = run_parser(__doc__, ARMS, [1, 2, 3], OUT).parse_args()
    run_missing(options, lambda arm, seed: run(arm, seed, options.out), table)


if __name__ == "__main__":
    main()
