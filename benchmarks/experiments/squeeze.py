"""C-SGD end to end: train, squeeze, merge, and compare with other ways to a network of equal cost.

ResNet-20 (projection shortcuts, one input channel) on 5,000 Fashion-MNIST images (a permutation seeded by the run's
seed), judged on all 10,000 test images; batch 64, SGD with Nesterov momentum 0.9, weight decay 5e-4, learning rate
0.05, divided by ten after 60 % and 87 % of the epochs; no augmentation. Every narrow network has 5/8 of all widths and
has cost 25 epochs in total (15 + 10), the figure is the accuracy after the last one.

    python -m benchmarks.experiments.squeeze --seeds 1 2 3 4 5    # skips arms whose file exists
    python -m benchmarks.experiments.squeeze --latency            # only the latency, on an idle machine
    python -m benchmarks.experiments.squeeze --table

Arms: ``trained`` (15 epochs at full width, the start of the others), ``full`` (10 more at full width), ``csgd`` (10
more with CentripetalSGD, then merged), ``scratch`` (the narrow network, 25 epochs), ``tie`` (the trained network
merged at once, by the same clusters, then 10 epochs), ``prune`` (torch-pruning's magnitude pruner, then 10 epochs).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch_pruning
from lightning.pytorch.callbacks import Callback
from torch import nn

from benchmarks.common.paths import RESULTS
from benchmarks.experiments.fits import accuracy, fit, fm5k, predictions
from benchmarks.models import CifarResNet
from benchmarks.training import report
from benchmarks.training.classification import Classifier
from benchmarks.training.data import FashionMNIST
from benchmarks.training.runs import interval, read_runs, run_missing, run_parser
from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.centripetal import cluster_channels
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.narrowing import count_macs, count_parameters, latency_ratio, merge_channels

START_EPOCHS, EPOCHS, KEEP = 15, 10, 0.625
OUT = RESULTS / "squeeze"
EXAMPLE = torch.zeros(2, 1, 28, 28)
ARMS = ("trained", "csgd", "scratch", "tie", "prune", "full")


def resnet(width: int = 16) -> nn.Module:
    """The protocol's network."""
    return CifarResNet(20, "projection", width=width, channels=1)


def train(net: nn.Module, epochs: int, data: FashionMNIST, callbacks: Sequence[Callback] = ()) -> nn.Module:
    """Train ``net`` in place."""
    decay = [round(0.6 * epochs), round(0.87 * epochs)]
    model = Classifier(net, data.image_shape, lr=0.05, nesterov=True, weight_decay=5e-4, milestones=decay)
    fit(model, data, epochs, callbacks)
    return net


def trained_network(seed: int, folder: Path) -> nn.Module:
    """The full-width network after the first phase."""
    net = resnet()
    path = folder / ".partial" / f"trained-seed{seed}.pt"
    if not path.exists():
        raise FileNotFoundError(
            f"the weights of the arm 'trained' of seed {seed} are not here: run it first, after moving "
            f"trained-seed{seed}.json away if that is there"
        )
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


def _trained(seed: int, folder: Path) -> dict[str, Any]:
    data = fm5k(seed)
    net = train(resnet(), START_EPOCHS, data)
    (folder / ".partial").mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), folder / ".partial" / f"trained-seed{seed}.pt")
    return _judged(net, data)


def _full(seed: int, folder: Path) -> dict[str, Any]:
    data = fm5k(seed)
    return _judged(train(trained_network(seed, folder), EPOCHS, data), data)


def _scratch(seed: int, folder: Path) -> dict[str, Any]:
    data = fm5k(seed)
    return _judged(train(resnet(10), START_EPOCHS + EPOCHS, data), data)


def _csgd(seed: int, folder: Path) -> dict[str, Any]:
    data = fm5k(seed)
    callback = CentripetalSGD(keep_fraction=KEEP, seed=seed)
    net = train(trained_network(seed, folder), EPOCHS, data, [callback])
    _, _, images, labels = data.parts
    before = predictions(net, images)
    narrow, report = callback.merge(net, EXAMPLE)
    after = predictions(narrow, images)
    torch.save(net.state_dict(), folder / ".partial" / f"csgd-seed{seed}.pt")
    return {
        **_judged(narrow, data),
        "accuracy_before_merge": float((before == labels).double().mean()),
        "predictions_that_differ": int((before != after).sum()),
        "strength": callback.resolved_strength,
        "forecast_k": callback.forecast_k,
        "largest_deviation": callback.largest_deviation,
        "projection": report.projection,
        "trim": report.trim,
    }


def _tie(seed: int, folder: Path) -> dict[str, Any]:
    data = fm5k(seed)
    net = trained_network(seed, folder)
    graph = ChannelGraph.trace(net, EXAMPLE)
    clusters = cluster_channels(net, graph, KEEP, seed=seed)
    narrow, report = merge_channels(net, clusters, EXAMPLE, tolerance=float("inf"))
    at_once = accuracy(narrow, data)
    return {
        **_judged(train(narrow, EPOCHS, data), data),
        "accuracy_at_once": at_once,
        "projection": report.projection,
    }


def _prune(seed: int, folder: Path) -> dict[str, Any]:
    data = fm5k(seed)
    net = trained_network(seed, folder)
    torch_pruning.MagnitudePruner(
        net, EXAMPLE, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=1 - KEEP,
        ignored_layers=[net.classifier],
    ).step()  # fmt: skip
    at_once = accuracy(net, data)
    return {**_judged(train(net, EPOCHS, data), data), "accuracy_at_once": at_once}


RUN: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "trained": _trained, "csgd": _csgd, "scratch": _scratch, "tie": _tie, "prune": _prune, "full": _full,
}  # fmt: skip


def _judged(net: nn.Module, data: FashionMNIST) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy(net, data),
        "macs": count_macs(net, EXAMPLE[:1]),
        "parameters": count_parameters(net),
    }


def run(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """One arm of one seed."""
    pl.seed_everything(seed, verbose=False)
    started = time.perf_counter()
    result = RUN[arm](seed, folder)
    seconds = round(time.perf_counter() - started, 1)
    versions = {
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "torch_pruning": version("torch-pruning"),
    }
    return {
        "arm": arm,
        "seed": seed,
        "epochs": [START_EPOCHS, EPOCHS],
        **result,
        "seconds": seconds,
        "versions": versions,
    }


def latency(pairs: int) -> dict[str, Any]:
    """Latency of the merged network over that of the original, interleaved, beside the ratio of their MACs."""
    torch.manual_seed(0)
    net = resnet().eval()
    graph = ChannelGraph.trace(net, EXAMPLE)
    clusters = cluster_channels(net, graph, KEEP, method="even")
    narrow, report = merge_channels(net, clusters, EXAMPLE, tolerance=float("inf"))
    found: dict[str, Any] = {"macs_ratio": report.macs_after / report.macs_before, "threads": torch.get_num_threads()}
    for batch in (1, 64):
        ratio, low, high = latency_ratio(net, narrow, torch.randn(batch, 1, 28, 28), pairs)
        found[f"batch{batch}"] = {"ratio": ratio, "low": low, "high": high}
    return found


_LABELS = {
    "trained": "full width, {s} epochs (start of the others)",
    "full": "full width, {s} + {e} epochs",
    "csgd": "C-SGD {e} epochs after the start, merged",
    "scratch": "narrow network from scratch, {d} epochs",
    "tie": "merged at once (same clusters), then {e} epochs",
    "prune": "torch-pruning by magnitude, then {e} epochs",
}


def table(folder: Path) -> str:
    """Markdown: accuracy after the last epoch, and what each network has over C-SGD's, paired by seed.

    Args:
        folder: folder of the arms' results.
    """
    rows = [
        "| network | seeds | test accuracy % | difference to C-SGD, merged | p | MACs | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    found = read_runs(folder, _LABELS)
    compared = {arm: runs for arm, runs in found.items() if arm != "trained"}
    summary = {row.method: row for row in report.summary(compared, "csgd")}
    for arm, runs in found.items():
        if arm in summary:
            accuracy_cells = report.accuracy_cells(summary[arm])
        else:
            accuracy_cells = [interval([100 * run["test_accuracy"] for run in runs]), "", ""]
        label = _LABELS[arm].format(s=START_EPOCHS, e=EPOCHS, d=START_EPOCHS + EPOCHS)
        macs, parameters = f"{runs[0]['macs'] / 1e6:.2f} M", f"{runs[0]['parameters']:,}"
        rows.append(f"| {' | '.join([label, str(len(runs)), *accuracy_cells, macs, parameters])} |")
    return "\n".join(rows)


def merge_table(folder: Path) -> str:
    """Markdown: what merging itself did, one column per seed."""
    found = read_runs(folder, ("csgd", "trained"))
    if "csgd" not in found:
        return "Not yet run."
    runs, start = found["csgd"], {run["seed"]: run for run in found["trained"]}
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "accuracy before the merge": lambda r: f"{100 * r['accuracy_before_merge']:.2f} %",
        "accuracy after the merge": lambda r: f"{100 * r['test_accuracy']:.2f} %",
        "test predictions that differ, of 10,000": lambda r: f"{r['predictions_that_differ']}",
        "strength (auto)": lambda r: f"{r['strength']:.3g}",
        "forecast K, the smallest of all tensors": lambda r: f"{r['forecast_k']:.1f}",
        "largest measured deviation of a tensor": lambda r: f"{r['largest_deviation']:.1e}",
        "projection changes outputs by (relative)": lambda r: f"{r['projection']:.1e}",
        "trimming changes outputs by (relative, float64)": lambda r: f"{r['trim']:.1e}",
        "MACs": lambda r: f"{100 * (r['macs'] / start[r['seed']]['macs'] - 1):+.1f} %",
        "parameters": lambda r: f"{100 * (r['parameters'] / start[r['seed']]['parameters'] - 1):+.1f} %",
    }
    seeds = " | ".join(f"seed {run['seed']}" for run in runs)
    rows = [f"| | {seeds} |", f"|---{'|---' * len(runs)}|"]
    rows += [f"| {name} | {' | '.join(show(run) for run in runs)} |" for name, show in lines.items()]
    return "\n".join(rows)


def latency_table(path: Path) -> str:
    """Markdown."""
    if not path.exists():
        return "Not yet measured."
    found = json.loads(path.read_text())
    rows = ["| | narrow / original |", "|---|---|", f"| MACs | {found['macs_ratio']:.3f} |"]
    for batch in (1, 64):
        entry = found[f"batch{batch}"]
        interval = f"({entry['low']:.3f} to {entry['high']:.3f})"
        rows.append(f"| latency, batch {batch}, CPU, {found['threads']} thread | {entry['ratio']:.3f} {interval} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = run_parser(__doc__, ARMS, [1, 2, 3, 4, 5], OUT)
    parser.add_argument("--latency", action="store_true", help="measure latency and stop")
    parser.add_argument("--pairs", type=int, default=60, help="of --latency")
    options = parser.parse_args()
    if options.latency:
        torch.set_num_threads(1)
        (options.out / "latency.json").write_text(json.dumps(latency(options.pairs), indent=1) + "\n")
        print(latency_table(options.out / "latency.json"))
        return
    run_missing(
        options,
        lambda arm, seed: run(arm, seed, options.out),
        lambda folder: f"{table(folder)}\n\n{merge_table(folder)}",
    )


if __name__ == "__main__":
    main()
