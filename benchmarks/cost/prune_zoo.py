"""Prune many networks to half of the MACs by every importance, and by torch-pruning in the same run.

Each pruned network must reach 50 % of the MACs within 1 %, run, train a step and export to ONNX (checked in
onnxruntime). torch-pruning's magnitude pruner gets the same networks and target; its answer counts as working when it
reaches 45 to 55 %, runs, trains a step and exports too.

    python -m benchmarks.cost.prune_zoo                      # all networks, all importances
    python -m benchmarks.cost.prune_zoo --networks resnet20  # some
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch_pruning
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from benchmarks.common.paths import RESULTS
from benchmarks.models import CifarResNet
from benchmarks.training.runs import write_whole
from lightning_filterdiv.narrowing import Importance, count_macs, prune_channels
from lightning_filterdiv.narrowing.export import export_onnx

__all__ = ["IMPORTANCES", "NETWORKS", "beside", "check", "main", "table"]

#: Gates need a network that was trained with them: see tests/narrowing/test_prune.py.
IMPORTANCES = tuple(name for name in get_args(Importance) if name != "gates")
OUT = RESULTS / "prune_zoo.json"


class Network(NamedTuple):
    """Function that builds a network, and the size of its images."""

    build: Callable[[], nn.Module]
    size: int
    channels: int = 3


def _torchvision(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **more)


def _timm(name: str) -> Callable[[], nn.Module]:
    import timm

    return lambda: timm.create_model(name, num_classes=10)


def _yolo() -> nn.Module:
    import importlib

    built: nn.Module = importlib.import_module("ultralytics").YOLO("yolov8n.yaml").model
    return built.float()


NETWORKS = {
    "resnet20": Network(lambda: CifarResNet(20, "projection"), 32),
    "resnet56": Network(lambda: CifarResNet(56, "projection"), 32),
    "resnet18": Network(_torchvision("resnet18", num_classes=10), 64),
    "resnet50": Network(_torchvision("resnet50", num_classes=10), 64),
    "mobilenet_v2": Network(_torchvision("mobilenet_v2", num_classes=10), 64),
    "regnet_y_400mf": Network(_torchvision("regnet_y_400mf", num_classes=10), 64),
    "convnext_tiny": Network(_torchvision("convnext_tiny", num_classes=10), 64),
    "ghostnetv2_100": Network(lambda: _timm("ghostnetv2_100")(), 64),
    "fcn_resnet50": Network(_torchvision("fcn_resnet50", weights_backbone=None, num_classes=5), 64),
    "yolov8n": Network(_yolo, 64),
}


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean square of all outputs, a loss for networks of any kind."""
    outputs = [leaf for leaf in tree_leaves(model(batch[0])) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([output.float().square().mean() for output in outputs]).sum()


def prepared(name: str) -> tuple[nn.Module, Tensor, list[tuple[Tensor]]]:
    """The network with statistics of two batches, an example and those batches."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.build().train()
    batches = [(torch.randn(4, network.channels, network.size, network.size),) for _ in range(2)]
    with torch.no_grad():
        for batch in batches:
            model(*batch)
    return model.eval(), batches[0][0][:2], batches


def _trains(model: nn.Module, batch: tuple[Tensor]) -> None:
    loss_of(model.train(), batch).backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=1e-4).step()
    model.eval()


def check(name: str, importance: Importance, onnx: bool = True) -> str:
    """Return ``"works"`` with the share reached, or the reason why not.

    Args:
        name: name of the network.
        importance: measure by which channels are ranked.
        onnx: export too.
    """
    model, example, batches = prepared(name)
    try:
        pruned, report = prune_channels(
            model, example, importance=importance, target_macs=0.5, batches=batches, loss=loss_of, verbose=False
        )
    except ValueError as error:
        return f"refused: {error}"
    share = count_macs(pruned, example) / count_macs(model, example)
    if abs(share / 0.5 - 1) > 0.01:
        return f"reaches {share:.3f}: {report.plan.note}"
    with torch.no_grad():
        pruned(example)
    _trains(pruned, batches[0])
    return (onnx and _no_onnx(pruned, example)) or f"works ({share:.4f})"


def _no_onnx(model: nn.Module, example: Tensor) -> str:
    """Return why no ONNX file computes the same as the network; empty if one does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(model, Path(folder) / "network.onnx", example)
        except RuntimeError as error:
            return f"no ONNX: {error}"
    return ""


def beside(name: str) -> str:
    """The same by torch-pruning's magnitude pruner."""
    model, example, batches = prepared(name)
    before = count_macs(model, example)
    try:
        last = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
        pruner = torch_pruning.MagnitudePruner(
            model, example, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
            iterative_steps=50, ignored_layers=[last],
        )  # fmt: skip
        for _ in range(50):
            pruner.step()
            if count_macs(model, example) <= 0.5 * before:
                break
        share = count_macs(model, example) / before
        with torch.no_grad():
            model(example)
        _trains(model, batches[0])
    except Exception as error:  # any error is its answer
        return f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if abs(share / 0.5 - 1) > 0.1:
        return f"misses the target ({share:.4f})"
    return _no_onnx(model.eval(), example) or f"works ({share:.4f})"


def table(results: dict[str, dict[str, str]]) -> str:
    """Markdown: the share that each importance reaches, network by network."""
    lines = [
        f"| network | {' | '.join(f'`{name}`' for name in IMPORTANCES)} | torch-pruning |",
        f"|---|{'---|' * (len(IMPORTANCES) + 1)}",
    ]
    for name in NETWORKS:
        cells = [_cell(results.get(name, {}).get(column, "")) for column in (*IMPORTANCES, "torch-pruning")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(answer: str) -> str:
    if answer.startswith("works ("):
        return answer.removeprefix("works (").rstrip(")")
    if answer.startswith("refused") and "no batch norm" in answer:
        return "refused: no batch norm"
    return answer.replace("|", "/")


def main() -> None:
    """Command line: one line per network and importance, and a file of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--importances", nargs="+", choices=IMPORTANCES, default=list(IMPORTANCES))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.networks:
        row = found.setdefault(name, {})
        for importance in options.importances:
            row[importance] = _answer(lambda: check(name, importance))  # noqa: B023
            print(f"{name:<16} {importance:<11} {row[importance]}", flush=True)
        row["torch-pruning"] = _answer(lambda: beside(name))  # noqa: B023
        print(f"{name:<16} {'tp':<11} {row['torch-pruning']}", flush=True)
        write_whole(options.out, json.dumps(found, indent=1) + "\n")


def _answer(action: Callable[[], str]) -> str:
    try:
        return action()
    except ImportError as error:
        return f"not run: {error}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


if __name__ == "__main__":
    main()
