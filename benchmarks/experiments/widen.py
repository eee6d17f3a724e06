"""C-SGD's second claim: a network trained 1.6 times as wide and squeezed against the same network trained as it is.

ResNet-20 with projection shortcuts on 5,000 Fashion-MNIST images averaged to 14x14 (a permutation seeded by the run's
seed), judged on all 10,000 test images; batch 64, SGD with Nesterov momentum 0.9, weight decay 5e-4, learning rate
0.05, divided by ten after 60 % and 87 % of each part; no augmentation. Every arm has cost 20 epochs.

    python -m benchmarks.experiments.widen --seeds 1 2 3    # skips arms whose file exists
    python -m benchmarks.experiments.widen --table

Arms: ``scratch`` (16 filters in the first stage, 20 epochs), ``squeezed`` (26 filters, 12 epochs, then 8 with
CentripetalSGD, merged to 16), ``wide`` (26 filters, 20 epochs: what there is to lose).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from benchmarks.common.paths import RESULTS
from benchmarks.experiments.fits import accuracy, fit, fm5k, predictions
from benchmarks.models import CifarResNet
from benchmarks.training import report
from benchmarks.training.classification import Classifier
from benchmarks.training.data import FashionMNIST
from benchmarks.training.runs import read_runs, run_missing, run_parser
from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.narrowing import count_macs, count_parameters

START_EPOCHS, EPOCHS = 12, 8
WIDTH, WIDE = 16, 26  # 1.6 * 16 = 25.6
OUT = RESULTS / "widen"
EXAMPLE = torch.zeros(2, 1, 14, 14)
ARMS = ("scratch", "squeezed", "wide")


def resnet(width: int) -> nn.Module:
    """The protocol's network."""
    return CifarResNet(20, "projection", width=width, channels=1)


def train(net: nn.Module, epochs: int, data: FashionMNIST, callbacks: Sequence[Callback] = ()) -> None:
    """Train ``net`` in place, the learning rate from its start."""
    decay = [round(0.6 * epochs), round(0.87 * epochs)]
    model = Classifier(net, data.image_shape, lr=0.05, nesterov=True, weight_decay=5e-4, milestones=decay)
    fit(model, data, epochs, callbacks)


def run(arm: str, seed: int) -> dict[str, Any]:
    """One arm of one seed."""
    pl.seed_everything(seed, verbose=False)
    started = time.perf_counter()
    data = fm5k(seed, nn.AvgPool2d(2))
    net = resnet(WIDTH if arm == "scratch" else WIDE)
    more: dict[str, Any] = {}
    if arm == "squeezed":
        train(net, START_EPOCHS, data)
        callback = CentripetalSGD(keep_fraction=WIDTH / WIDE, seed=seed)
        train(net, EPOCHS, data, [callback])
        _, _, images, labels = data.parts
        before = predictions(net, images)
        net, merged = callback.merge(net, EXAMPLE)
        more = {
            "accuracy_before_merge": float((before == labels).double().mean()),
            "predictions_that_differ": int((before != predictions(net, images)).sum()),
            "strength": callback.resolved_strength,
            "projection": merged.projection,
        }
    else:
        train(net, START_EPOCHS + EPOCHS, data)
    return {
        "method": arm,
        "seed": seed,
        "epochs": [START_EPOCHS, EPOCHS],
        "test_accuracy": accuracy(net, data),
        "macs": count_macs(net, EXAMPLE[:1]),
        "parameters": count_parameters(net),
        **more,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"torch": torch.__version__, "lightning": version("lightning")},
    }


_LABELS = {
    "scratch": "1x from scratch, {d} epochs",
    "squeezed": "1.6x, {s} epochs, C-SGD {e} epochs, merged to 1x",
    "wide": "1.6x, {d} epochs, not squeezed",
}


def table(folder: Path) -> str:
    """Markdown: accuracy after the last epoch, and what each network has over the one from scratch, paired by seed.

    Args:
        folder: folder of the arms' results.
    """
    if not any(folder.glob("*-seed*.json")):
        return "Not yet run."
    rows = [
        "| network | seeds | test accuracy % | difference to scratch | p | MACs | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    found = read_runs(folder, ARMS)
    for row in report.summary(found, "scratch"):
        first = found[row.method][0]
        label = _LABELS[row.method].format(s=START_EPOCHS, e=EPOCHS, d=START_EPOCHS + EPOCHS)
        macs, parameters = f"{first['macs'] / 1e6:.2f} M", f"{first['parameters']:,}"
        rows.append(f"| {' | '.join([label, str(row.seeds), *report.accuracy_cells(row), macs, parameters])} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    options = run_parser(__doc__, ARMS, [1, 2, 3], OUT).parse_args()
    run_missing(options, run, table)


if __name__ == "__main__":
    main()
