"""Does the entropy bound mark a knee? ResNet-style networks of several depths at equal parameters.

Fashion-MNIST, 5,000 training images (a permutation seeded by the run's seed), all 10,000 test images, normalised, no
augmentation; batch 64, 15 epochs, SGD momentum 0.9, weight decay 5e-4, learning rate 0.05 with cosine decay. The
network one starts from is narrow and deep; the others are shallower and broader, with as many parameters. The figure is
the test accuracy after the last epoch. Seconds are CPU seconds of one thread: other work on the machine disturbs them
less than the clock.

    python -m benchmarks.experiments.entropy_depth --seeds 1 2 3      # skips runs whose file exists
    python -m benchmarks.experiments.entropy_depth --table            # Markdown table of what is there
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.common.paths import RESULTS
from benchmarks.cost import entropy as entropy_speed
from benchmarks.models import StagedResNet, count_parameters
from benchmarks.training.loader import SeededBatches
from benchmarks.training.runs import interval, run_missing, run_parser
from lightning_filterdiv.demo import FashionMNIST

EPOCHS, LEARNING_RATE, WEIGHT_DECAY, BATCH = 15, 0.05, 5e-4, 64
#: Convolutions per stage (twice the bound of Fashion-MNIST, the bound, half of it rounded up, a single one) and the
#: widths of the three stages: the roundings of ``plan_depth``'s widths that come within 0.4 % of equal parameters.
WIDTHS = {6: (8, 16, 32), 3: (12, 23, 48), 2: (16, 31, 61), 1: (27, 54, 108)}
DEPTHS = tuple(WIDTHS)
OUT = RESULTS / "entropy_depth"


class Classifier(pl.LightningModule):
    """Cross-entropy, SGD with cosine decay over all steps."""

    def __init__(self, network: StagedResNet) -> None:
        super().__init__()
        self.network = network
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log ``test_acc``."""
        self.accuracy(self.network(batch[0]), batch[1])
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See the module."""
        optimizer = torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(depth: int, seed: int) -> dict[str, Any]:
    """Train one network and return its result."""
    depths, widths = (depth,) * 3, WIDTHS[depth]
    data = FashionMNIST(train_images=5_000, batch_size=BATCH, seed=seed)
    data.setup()
    assert data._train is not None
    pl.seed_everything(seed, verbose=False)
    model = Classifier(StagedResNet(depths, widths, channels=1))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started, processor = time.perf_counter(), time.process_time()
    trainer.fit(model, SeededBatches(data._train.tensors, BATCH, seed))
    processor, elapsed = time.process_time() - processor, time.perf_counter() - started
    (test,) = trainer.test(model, datamodule=data, verbose=False)
    return {
        "depth": depth,
        "seed": seed,
        "depths": list(depths),
        "widths": list(widths),
        "parameters": count_parameters(model.network),
        "test_accuracy": test["test_acc"],
        "epochs": EPOCHS,
        "cpu_seconds_per_epoch": round(processor / EPOCHS, 2),
        "elapsed_seconds_per_epoch": round(elapsed / EPOCHS, 2),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "lightning": version("lightning"),
            "python": platform.python_version(),
        },
    }


def table(folder: Path, bound: int) -> str:
    """Markdown: accuracy (mean, 95 % interval), paired difference to the network at the bound, parameters, seconds."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("depth*-seed*.json"))]
    accuracy: dict[int, dict[int, float]] = {}
    for result in results:
        accuracy.setdefault(result["depth"], {})[result["seed"]] = 100 * result["test_accuracy"]
    columns = ("convolutions per stage", "depth / bound", "widths", "parameters", "seeds", "test accuracy %",
               "difference to the bound", "p", "CPU s per epoch")  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    base = accuracy.get(bound, {})
    p_values: dict[int, float] = {}
    for depth in sorted(accuracy, reverse=True):
        by_seed = accuracy[depth]
        runs = [result for result in results if result["depth"] == depth]
        shared = sorted(set(by_seed) & set(base))
        delta = p_value = ""
        if depth != bound and len(shared) > 1:
            pairs = [by_seed[seed] for seed in shared], [base[seed] for seed in shared]
            p_values[depth] = float(stats.ttest_rel(*pairs).pvalue)
            delta = interval([left - right for left, right in zip(*pairs, strict=True)], "+")
            p_value = f"{p_values[depth]:.3f}"
        widths = ", ".join(map(str, runs[0]["widths"]))
        seconds = fmean(result["cpu_seconds_per_epoch"] for result in runs)
        rows.append(
            f"| {depth} | {depth / bound:.2g} | {widths} | {runs[0]['parameters']:,} | {len(by_seed)} "
            f"| {interval(list(by_seed.values()))} | {delta} | {p_value} | {seconds:.1f} |"
        )
    return "\n".join([*rows, "", _verdict(accuracy, p_values, bound)])


def _verdict(accuracy: dict[int, dict[int, float]], p_values: dict[int, float], bound: int) -> str:
    """Whether accuracy rises up to the bound and no further, in one sentence that follows from the runs."""
    means = {depth: fmean(by_seed.values()) for depth, by_seed in accuracy.items()}
    best = max(means, key=lambda depth: means[depth])
    if bound not in means or len(means) < 3:
        return "Too few runs to say whether the bound marks a knee."
    deeper = [depth for depth in means if depth > bound]
    shallower = [depth for depth in means if depth < bound]
    gains_before = all(means[bound] > means[depth] for depth in shallower)
    gains_after = any(means[depth] > means[bound] for depth in deeper)
    knee = "looks like" if gains_before and not gains_after else "does not look like"
    return (
        f"The best mean is that of {best} convolutions per stage ({best / bound:.2g} times the bound); by the means "
        f"alone, the bound {knee} a knee (better than every shallower network, not worse than any deeper one). "
        + (
            f"Differences with p < 0.05, uncorrected: depth {', '.join(clear)}."
            if (clear := [str(depth) for depth in sorted(p_values) if p_values[depth] < 0.05])
            else "No difference has p < 0.05: with so few seeds the runs neither show a knee nor exclude one."
        )
    )


def main() -> None:
    """Command line."""
    options = run_parser(__doc__, "--depths", DEPTHS, [1, 2, 3], OUT).parse_args()
    if options.table:
        bound = json.loads(entropy_speed.RESULT.read_text())["rows"]["raw 8-bit array"]["bound"]
        print(table(options.out, bound))
        return
    run_missing(options, run, prefix="depth")


if __name__ == "__main__":
    main()
