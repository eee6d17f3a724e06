"""Does accuracy level off at the entropy bound? ResNet-style networks of several depths at equal parameters.

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
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from scipy import stats

from benchmarks.common.paths import RESULTS
from benchmarks.cost import entropy as entropy_speed
from benchmarks.experiments.fits import accuracy, fit, fm5k
from benchmarks.models import StagedResNet
from benchmarks.training.classification import Classifier
from benchmarks.training.runs import interval, read_runs, run_missing, run_parser
from lightning_filterdiv.narrowing import count_parameters

EPOCHS = 15
#: Arm -> convolutions per stage (twice the bound of Fashion-MNIST, the bound, half of it rounded up, a single one) and
#: the widths of the three stages: roundings of the widths of ``plan_depth`` within 0.4 % of equal parameters.
ARMS = {
    "depth6": (6, (8, 16, 32)),
    "depth3": (3, (12, 23, 48)),
    "depth2": (2, (16, 31, 61)),
    "depth1": (1, (27, 54, 108)),
}
OUT = RESULTS / "entropy_depth"


class Cosine(Classifier):
    """Cosine decay of the learning rate over all steps."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """See the class."""
        optimizer = self.sgd()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(arm: str, seed: int) -> dict[str, Any]:
    """Train one network and return its result."""
    depth, widths = ARMS[arm]
    depths = (depth,) * 3
    data = fm5k(seed)
    data.setup()  # is not timed
    pl.seed_everything(seed, verbose=False)
    net = StagedResNet(depths, widths, channels=1)
    started, processor = time.perf_counter(), time.process_time()
    fit(Cosine(net, data.image_shape, lr=0.05, weight_decay=5e-4), data, EPOCHS)
    processor, elapsed = time.process_time() - processor, time.perf_counter() - started
    return {
        "depth": depth,
        "seed": seed,
        "depths": list(depths),
        "widths": list(widths),
        "parameters": count_parameters(net),
        "test_accuracy": accuracy(net, data),
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
    found = {ARMS[arm][0]: runs for arm, runs in read_runs(folder, ARMS).items()}
    accuracy = {depth: {run["seed"]: 100 * run["test_accuracy"] for run in runs} for depth, runs in found.items()}
    columns = ("convolutions per stage", "depth / bound", "widths", "parameters", "seeds", "test accuracy %",
               "difference to the bound", "p", "CPU s per epoch")  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    base = accuracy.get(bound, {})
    p_values: dict[int, float] = {}
    for depth, by_seed in accuracy.items():
        runs = found[depth]
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
    """Return sentences, computed from the runs, on whether accuracy levels off at the bound."""
    means = {depth: fmean(by_seed.values()) for depth, by_seed in accuracy.items()}
    best = max(means, key=lambda depth: means[depth])
    if bound not in means or len(means) < 3:
        return "Too few runs to say if accuracy levels off at the bound."
    deeper = [depth for depth in means if depth > bound]
    shallower = [depth for depth in means if depth < bound]
    gains_before = all(means[bound] > means[depth] for depth in shallower)
    gains_after = any(means[depth] > means[bound] for depth in deeper)
    knee = "levels off" if gains_before and not gains_after else "does not level off"
    return (
        f"The best mean is that of {best} convolutions per stage ({best / bound:.2g} times the bound). By the "
        f"means alone, accuracy {knee} at the bound. "
        + (
            f"Differences with p < 0.05, uncorrected: depth {', '.join(clear)}."
            if (clear := [str(depth) for depth in sorted(p_values) if p_values[depth] < 0.05])
            else "No difference has p < 0.05. With so few seeds the runs cannot tell if accuracy levels off there."
        )
    )


def main() -> None:
    """Command line."""
    options = run_parser(__doc__, ARMS, [1, 2, 3], OUT).parse_args()

    def tabulate(folder: Path) -> str:
        return table(folder, json.loads(entropy_speed.RESULT.read_text())["rows"]["raw 8-bit array"]["bound"])

    run_missing(options, run, tabulate)


if __name__ == "__main__":
    main()
