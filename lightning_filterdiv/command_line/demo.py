"""``filterdiv demo``: train a small network twice, plain and with a callback, and look at its filters."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_filterdiv.async_update import WeightAsynchronousUpdate
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.demo.data import Digits, FashionMNIST, Images
from lightning_filterdiv.demo.model import SmallConvNet
from lightning_filterdiv.files import why_unwritable
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.monitor import FilterSimilarityMonitor
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.repr_ import RePr
from lightning_filterdiv.training.callback import FilterCallback

__all__ = ["DATA", "METHODS", "run"]


def _short_repr(epochs: int) -> RePr:
    """The paper's 20/10/3 of 100 epochs, scaled; a single cycle where there is no room for three."""
    if epochs < 3:
        raise CommandError(f"--method repr needs at least 3 epochs, got --epochs {epochs}")
    return RePr(full_epochs=max(1, epochs // 5), sub_epochs=max(1, epochs // 10), cycles=3 if epochs >= 10 else 1)


#: Callback by ``--method``; every entry takes the number of epochs of the demo.
METHODS: dict[str, Callable[[int], FilterCallback]] = {
    "repr": _short_repr,
    "wau": lambda epochs: WeightAsynchronousUpdate(update_fraction=0.5),
}
#: Data module by ``--data``; every entry takes the seed.
DATA: dict[str, Callable[[int], Images]] = {
    "digits": lambda seed: Digits(seed=seed),
    "fashion_mnist": lambda seed: FashionMNIST(train_images=5_000, seed=seed),
}


class _Board(TensorBoardLogger):
    """Without the card that Lightning adds to every number: which epoch it was."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


class Outcome(NamedTuple):
    """What one training run is judged by."""

    accuracy: float
    seconds: float
    redundancy: dict[str, dict[str, float]]


def run(options: argparse.Namespace) -> None:
    """Train plain and with the callback from the same start, print the comparison and where to look.

    Raises:
        CommandError: an option or the folder cannot be used.
    """
    if options.epochs < 1:
        raise CommandError(f"--epochs must be at least 1, got {options.epochs}")
    if options.seed < 0:
        raise CommandError(f"--seed must be at least 0, got {options.seed}")
    if reason := why_unwritable(options.out, folder=True):
        raise CommandError(f"--out {options.out} cannot be written ({reason}); name another folder")
    method = METHODS[options.method](options.epochs)
    outcomes = {
        "plain": _train("plain", None, options),
        options.method: _train(options.method, method, options),
    }
    print(_report(outcomes, options))


def _train(name: str, callback: FilterCallback | None, options: argparse.Namespace) -> Outcome:
    print(f"\n--- {name}: {callback if callback is not None else 'no callback'}", flush=True)
    pl.seed_everything(options.seed, verbose=False)
    data = DATA[options.data](options.seed)
    model = SmallConvNet(image_size=data.image_size)
    monitor = FilterSimilarityMonitor(every_n_epochs=max(1, options.epochs // 5))
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=options.epochs,
        logger=_Board(options.out, name=name, default_hp_metric=False),
        callbacks=[*([callback] if callback is not None else []), monitor],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    started = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - started
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    return Outcome(result["test_acc"], seconds, redundancy_metrics(select_filters(model)))


def _report(outcomes: dict[str, Outcome], options: argparse.Namespace) -> str:
    columns = list(outcomes)
    rows = [("test accuracy", [f"{100 * outcomes[name].accuracy:.1f} %" for name in columns])]
    for layer in outcomes[columns[0]].redundancy:
        for metric, label, pattern in (
            ("cosine_over_chance", "mean |cos| / chance", "{:.2f}"),
            ("effective_rank", "effective rank / full", "{:.3f}"),
        ):
            values = [pattern.format(outcomes[name].redundancy[layer][metric]) for name in columns]
            rows.append((f"{layer}  {label}", values))
    rows.append(("seconds", [f"{outcomes[name].seconds:.1f}" for name in columns]))
    width = max(len(label) for label, _ in rows)
    lines = ["", f"{'':{width}}  " + "".join(f"{name:>10}" for name in columns)]
    lines += [f"{label:{width}}  " + "".join(f"{value:>10}" for value in values) for label, values in rows]
    lines += [
        "",
        f"One seed ({options.seed}) on {options.data}: a look at the tools, not evidence for a method.",
        "Filter similarity before, during and after training:",
        f"    tensorboard --logdir {options.out}",
    ]
    return "\n".join(lines)
