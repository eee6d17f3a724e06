"""Do shared filter bases keep accuracy, and does the penalty even gradients out over depth?

ResNet-32 (option A, one input channel) on 5,000 Fashion-MNIST images averaged to 14x14 (a permutation seeded by the
run's seed), judged on all 10,000 test images; batch 64, 15 epochs, SGD with Nesterov momentum 0.9, weight decay 5e-4,
learning rate 0.1, divided by ten after 60 % and 87 % of the epochs; no augmentation. The figure is the test accuracy
after the last epoch.

    python -m benchmarks.experiments.shared_basis --seeds 1 2 3     # skips runs whose file exists
    python -m benchmarks.experiments.shared_basis --table
    python -m benchmarks.experiments.shared_basis --figure gradients.png

Arms: ``plain``, ``shared`` (16 shared and 1 unique filters in the first stage, "S16U1"), ``shared_penalty`` (the same
with BasisOrthonormality, weight 10). After some epochs the norm of the loss's gradient with respect to the output of
every block is measured on 256 training images, batch statistics as in training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.paths import RESULTS
from benchmarks.experiments.fits import accuracy, fit, fm5k
from benchmarks.models import CifarResNet
from benchmarks.training.classification import Classifier
from benchmarks.training.runs import interval, read_runs, run_missing, run_parser
from lightning_filterdiv import BasisOrthonormality
from lightning_filterdiv.narrowing import count_parameters
from lightning_filterdiv.orthonormality import basis_penalty
from lightning_filterdiv.shared_basis import share_filter_bases, shared_bases

EPOCHS, SHARED, UNIQUE = 15, 16, 1
LOOKS = (0, 1, 5, 15)  # epochs after which gradients are looked at
OUT = RESULTS / "shared_basis"
ARMS: dict[str, tuple[bool, Callable[[], list[Callback]]]] = {
    "plain": (False, list),
    "shared": (True, list),
    "shared_penalty": (True, lambda: [BasisOrthonormality(form="basis", decoupled=False)]),
}


def gradient_profile(net: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """``|d loss / d block output|`` of every block in order, Frobenius over the batch; ``net`` stays as it is."""
    net = copy.deepcopy(net).train()
    outputs: list[Tensor] = []
    for stage in ("stage1", "stage2", "stage3"):
        for block in net.get_submodule(stage).children():
            block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss = F.cross_entropy(net(images), labels)
    return [float(f"{gradient.norm():.4g}") for gradient in torch.autograd.grad(loss, outputs)]


class Looks(Callback):
    """Gradient profiles after the epochs of ``LOOKS``."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.batch = images, labels
        self.profiles: dict[str, list[float]] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before training."""
        self.profiles["0"] = gradient_profile(pl_module.get_submodule("net"), *self.batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the epoch."""
        if (epoch := trainer.current_epoch + 1) in LOOKS:
            self.profiles[str(epoch)] = gradient_profile(pl_module.get_submodule("net"), *self.batch)


def run(arm: str, seed: int) -> dict[str, Any]:
    """Train one arm of one seed."""
    pl.seed_everything(seed, verbose=False)
    data = fm5k(seed, nn.AvgPool2d(2))
    images, labels, *_ = data.parts
    shares, callbacks = ARMS[arm]
    net: nn.Module = CifarResNet(32, channels=1)
    if shares:
        share_filter_bases(net, shared=SHARED, unique=UNIQUE)
    looks, used = Looks(images[:256], labels[:256]), callbacks()
    decay = [round(0.6 * EPOCHS), round(0.87 * EPOCHS)]
    model = Classifier(net, data.image_shape, lr=0.1, nesterov=True, weight_decay=5e-4, milestones=decay)
    fit(model, data, EPOCHS, [*used, looks])
    return {
        "arm": arm,
        "seed": seed,
        "test_accuracy": accuracy(net, data),
        "parameters": count_parameters(net),
        "profiles": looks.profiles,
        "excess": _excess(net),
        "callbacks": [repr(callback) for callback in used],
        "torch": torch.__version__,
    }


def _excess(net: nn.Module) -> dict[str, float]:
    """Stage -> penalty of its basis; empty for a plain network."""
    return {basis.gram: float(f"{basis_penalty(basis.weight.detach().flatten(1)):.4g}")
            for _, basis, _ in shared_bases(net)}  # fmt: skip


def table(folder: Path) -> str:
    """Markdown: accuracy, parameters, and how orthonormal the bases are in the end."""
    rows = ["| ResNet-32 | seeds | parameters | test accuracy % | penalty of the bases, mean over stages |"]
    rows.append("|---|---|---|---|---|")
    for arm, results in read_runs(folder, ARMS).items():
        accuracy = interval([100 * result["test_accuracy"] for result in results])
        excess = [fmean(result["excess"].values()) for result in results if result["excess"]]
        value = f"{fmean(excess):.2g}" if excess else ""
        rows.append(f"| {arm} | {len(results)} | {results[0]['parameters']:,} | {accuracy} | {value} |")
    return "\n".join(rows)


def profile_table(folder: Path) -> str:
    """Markdown: the gradient's norm at the first block over that at the last, and the spread over depth."""
    rows = ["| ResNet-32 | after epoch | first block | middle block | last block | largest / smallest over depth |"]
    rows.append("|---|---|---|---|---|---|")
    for arm, results in read_runs(folder, ARMS).items():
        for look in results[0]["profiles"]:
            profiles = [result["profiles"][look] for result in results]
            shown = [fmean(p[at] for p in profiles) for at in (0, len(profiles[0]) // 2, -1)]
            spread = fmean(max(p) / min(p) for p in profiles)
            numbers = " | ".join(f"{number:.2g}" for number in shown)
            rows.append(f"| {arm} | {look} | {numbers} | {spread:.1f} |")
    return "\n".join(rows)


def figure(folder: Path, path: Path) -> None:
    """Gradient norms over depth, one panel per look, one line per arm (mean over seeds), as PNG."""
    results = read_runs(folder, ARMS)
    looks = list(next(iter(results.values()))[0]["profiles"])
    drawn = Figure(figsize=(3.2 * len(looks), 3.0), layout="constrained")
    panels = drawn.subplots(1, len(looks), sharey=True)
    for panel, look in zip(panels, looks, strict=True):
        for arm, runs in results.items():
            profile = [fmean(column) for column in zip(*(run["profiles"][look] for run in runs), strict=True)]
            panel.plot(range(1, len(profile) + 1), profile, marker="o", markersize=3, label=arm.replace("_", " + "))
        panel.set_yscale("log")
        panel.set_title("before training" if look == "0" else f"after epoch {look}")
        panel.set_xlabel("block, from the input")
    panels[0].set_ylabel("gradient norm at the block's output")
    panels[-1].legend(fontsize="small")
    drawn.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = run_parser(__doc__, ARMS, [1, 2, 3], OUT)
    parser.add_argument("--figure", type=Path, help="write the figure of finished runs and stop")
    options = parser.parse_args()
    if options.figure:
        figure(options.out, options.figure)
        return
    run_missing(options, run, lambda folder: f"{table(folder)}\n\n{profile_table(folder)}")


if __name__ == "__main__":
    main()
