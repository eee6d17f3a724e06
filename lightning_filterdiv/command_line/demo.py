"""``filterdiv demo``: train a small network plain and with methods, and compare what comes out."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from tqdm import tqdm

from lightning_filterdiv.async_update import WeightAsynchronousUpdate
from lightning_filterdiv.centripetal import CentripetalSGD
from lightning_filterdiv.channel_importance import ChannelImportance
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.demo.data import Digits, FashionMNIST, Images
from lightning_filterdiv.demo.model import SmallConvNet
from lightning_filterdiv.entropy_depth import EntropyDepthBound
from lightning_filterdiv.expansion import ExpandNet
from lightning_filterdiv.files import why_unwritable
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.monitor import FilterSimilarityMonitor
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.narrowing import count_macs, count_parameters, latency_ratio, save_merged
from lightning_filterdiv.orthonormality import BasisOrthonormality
from lightning_filterdiv.repr_ import RePr
from lightning_filterdiv.shared_basis import share_filter_bases

__all__ = ["DATA", "METHODS", "run"]

_BATCH = 256  # images of a timed forward pass


@dataclass(frozen=True)
class Method:
    """One way to train: callbacks, and a change of the network before training."""

    callbacks: Callable[[], list[pl.Callback]]
    prepare: Callable[[nn.Module], Any] = lambda model: None
    least_epochs: int = 1


def _share(model: nn.Module) -> None:
    share_filter_bases(model, layers=["net.conv2", "net.conv3"], shared=16, unique=2)


#: Methods by ``--method``.
METHODS: dict[str, Method] = {
    "csgd": Method(lambda: [CentripetalSGD(keep_fraction=0.5)]),
    "soft": Method(lambda: [BasisOrthonormality(form="soft")]),
    "repr": Method(lambda: [RePr()], least_epochs=3),
    "wau": Method(lambda: [WeightAsynchronousUpdate(update_fraction=0.5)]),
    "shared": Method(lambda: [BasisOrthonormality()], _share),
    "expand": Method(lambda: [ExpandNet(exclude=["net.conv1"])]),
    "importance": Method(lambda: [ChannelImportance()]),
    "entropy": Method(lambda: [EntropyDepthBound()]),
}
#: Data module by ``--data``; every entry takes the seed.
DATA: dict[str, Callable[[int], Images]] = {
    "digits": lambda seed: Digits(seed=seed),
    "fashion_mnist": lambda seed: FashionMNIST(train_images=5_000, seed=seed),
}


class _Board(TensorBoardLogger):
    """TensorBoard logger without the card for the number of the epoch."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)


@dataclass
class Outcome:
    """One column of the table.

    Attributes:
        network: in eval mode.
        predictions: ``(N,)`` class of each test image.
        accuracy: share of test images that are classified correctly.
        training: CPU seconds of the fit; None for a network that was not trained.
        latency: time of a forward pass over that of the plain network.
    """

    network: nn.Module
    predictions: Tensor
    accuracy: float
    training: float | None
    latency: float = 1.0


def run(options: argparse.Namespace) -> None:
    """Train plain and with each method from the same start. Print the comparison, and where the files are.

    Raises:
        CommandError: an option or the folder cannot be used.
    """
    if options.epochs < 1:
        raise CommandError(f"--epochs must be at least 1, got {options.epochs}")
    if options.seed < 0:
        raise CommandError(f"--seed must be at least 0, got {options.seed}")
    methods = list(dict.fromkeys(options.method))
    for name in methods:
        if options.epochs < METHODS[name].least_epochs:
            raise CommandError(
                f"--method {name} needs at least {METHODS[name].least_epochs} epochs, got --epochs {options.epochs}"
            )
    if reason := why_unwritable(options.out, folder=True):
        raise CommandError(f"--out {options.out} cannot be written ({reason}); name another folder")
    outcomes: dict[str, Outcome] = {}
    saved: list[str] = []
    with _quiet(), tqdm(total=options.epochs * (1 + len(methods)), unit="epoch", disable=None) as bar:
        _warm_up(options)
        outcomes["plain"], _, _ = _train("plain", Method(list), options, bar)
        for name in methods:
            outcomes[name], model, callbacks = _train(name, METHODS[name], options, bar)
            for callback in callbacks:
                if isinstance(callback, CentripetalSGD):
                    merged = callback.merge(model)
                    outcomes["merged"] = _judge(merged.network, DATA[options.data](options.seed), None)
                    # In the folder of this run's TensorBoard files, which is new each time, so that nothing is
                    # replaced.
                    path = Path(model.trainer.log_dir or options.out / name) / "narrow.pt"
                    save_merged(merged.network, path)
                    saved.append(f"Narrow network, for load_merged: {path}")
    plain = outcomes["plain"].network
    images = torch.zeros(_BATCH, 1, *[DATA[options.data](options.seed).image_size] * 2)
    for name, outcome in outcomes.items():
        if name != "plain":
            outcome.latency = latency_ratio(plain, outcome.network, images)[0]
    print(_report(outcomes, saved, options))


@contextmanager
def _quiet() -> Iterator[None]:
    """Show only one progress bar and warnings of this package."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for category in (PossibleUserWarning, DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            warnings.filterwarnings("ignore", ".*srun.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Advance(pl.Callback):
    """Advances the bar by an epoch."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.bar.update()


def _trainer(options: argparse.Namespace, callbacks: list[pl.Callback], **more: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=options.epochs,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
        **more,
    )


def _warm_up(options: argparse.Namespace) -> None:
    """Train on one batch, untimed. The first batch imports modules and, on a new machine, compiles them."""
    data = DATA[options.data](options.seed)
    trainer = _trainer(options, [], fast_dev_run=1, logger=False)
    trainer.fit(SmallConvNet(image_size=data.image_size), datamodule=data)


def _train(
    name: str, method: Method, options: argparse.Namespace, bar: tqdm[Any]
) -> tuple[Outcome, pl.LightningModule, list[pl.Callback]]:
    bar.set_description(name)
    if bar.disable:  # stderr is no terminal
        print(f"{name}: training for {options.epochs} epochs", file=sys.stderr, flush=True)
    pl.seed_everything(options.seed, verbose=False)
    data = DATA[options.data](options.seed)
    model = SmallConvNet(image_size=data.image_size)
    method.prepare(model)
    callbacks = method.callbacks()
    monitor = FilterSimilarityMonitor(every_n_epochs=max(1, options.epochs // 5))
    logger = _Board(options.out, name=name, default_hp_metric=False)
    trainer = _trainer(options, [*callbacks, monitor, _Advance(bar)], logger=logger)
    started = time.process_time()
    trainer.fit(model, datamodule=data)
    seconds = time.process_time() - started
    return _judge(model, data, seconds), model, callbacks


@torch.no_grad()
def _judge(model: nn.Module, data: Images, seconds: float | None) -> Outcome:
    data.setup()
    network = model.to("cpu").eval()
    parts = [(network(images).argmax(1), labels) for images, labels in data.test_dataloader()]
    predictions, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Outcome(network, predictions, float((predictions == labels).double().mean()), seconds)


def _report(outcomes: dict[str, Outcome], saved: list[str], options: argparse.Namespace) -> str:
    image = torch.zeros(1, 1, *[DATA[options.data](options.seed).image_size] * 2)

    def redundancy(outcome: Outcome, metric: str) -> str:
        layers = select_filters(outcome.network)
        if not layers:
            return "-"
        return f"{mean(of[metric] for of in redundancy_metrics(layers).values()):.2f}"

    rows: list[tuple[str, list[str]]] = [
        ("test accuracy", [f"{100 * o.accuracy:.1f} %" for o in outcomes.values()]),
        ("parameters", [f"{count_parameters(o.network):,}" for o in outcomes.values()]),
        ("MACs per image", [f"{count_macs(o.network, image):,}" for o in outcomes.values()]),
        ("latency / plain", [f"{o.latency:.2f}" for o in outcomes.values()]),
        ("|cos| of filters / chance", [redundancy(o, "cosine_over_chance") for o in outcomes.values()]),
        ("effective rank / full", [redundancy(o, "effective_rank") for o in outcomes.values()]),
        ("training, CPU seconds", ["-" if o.training is None else f"{o.training:.1f}" for o in outcomes.values()]),
    ]
    width = max(len(label) for label, _ in rows)
    lines = ["", f"{'':{width}}  " + "".join(f"{name:>12}" for name in outcomes)]
    lines += [f"{label:{width}}  " + "".join(f"{value:>12}" for value in values) for label, values in rows]
    lines.append("")
    if "merged" in outcomes:
        before, after = outcomes["csgd"].predictions, outcomes["merged"].predictions
        changed = int((before != after).sum())
        lines.append(f"Merging changed {changed} of {len(before):,} predictions of the trained network.")
    lines += [
        *saved,
        f"One seed ({options.seed}) on {options.data}: a look at the tools, not evidence for a method.",
        "",
        "Filters before, during and after training:",
        f"    tensorboard --logdir {options.out}",
    ]
    return "\n".join(lines)
