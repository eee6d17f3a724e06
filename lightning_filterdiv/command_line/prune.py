"""``filterdiv prune``: from a network to a file with a narrower one that meets a target."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_filterdiv.channel_graph import ChannelGraphError
from lightning_filterdiv.command_line.entropy import reading_data
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import load_source, saved_gate_means, search_here, zeros
from lightning_filterdiv.command_line.options import LABELLED_SOURCES
from lightning_filterdiv.command_line.outputs import check_outputs, finish
from lightning_filterdiv.narrowing.importance import gated_layers
from lightning_filterdiv.narrowing.prune import prune_channels
from lightning_filterdiv.tensors.arguments import check_integer

__all__ = ["run"]

_BATCH = 64


def run(options: argparse.Namespace) -> None:
    """Build the network, print the plan, prune, save, and print the result.

    Raises:
        CommandError: the network, the data or an option cannot be used, or the target is out of reach.
    """
    try:
        check_integer("--pairs", options.pairs, low=0)
        check_integer("--seed", options.seed, low=0)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    check_outputs(options)
    model, checkpoint = load_source(options)
    training, test = (None, None) if options.data is None else _loaders(options.data, options.seed)
    importance = options.importance
    if importance != "gates" and gated_layers(model):
        raise CommandError(
            f"{options.source}: the network was trained with gates; rank channels by them with --importance gates, "
            f"which multiplies their means into the filters. In Python, remove_gates takes gates out"
        )
    if importance == "gates" and (training is None or not gated_layers(model)):
        importance = _saved_means(options.source, model, checkpoint)
    inputs = None if options.input_shape is None else zeros(options.input_shape)
    try:
        network, report = prune_channels(
            model,
            inputs,
            importance=importance,
            keep_fraction=_keep_fraction(options.keep_fraction),
            target_macs=options.target_macs,
            target_parameters=options.target_parameters,
            scope=options.scope,
            max_layer_fraction=options.max_layer_fraction,
            channels_multiple=options.channels_multiple,
            include=options.include,
            exclude=options.exclude,
            network=options.network,
            form=options.form,
            batches=training,
            loader=test,
            seed=options.seed,
        )
    except (ChannelGraphError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise CommandError(f"{options.source}: {_in_options(' '.join(str(error).split()))}") from error
    print(report)
    finish(options, model, network, inputs, options.network)


def _keep_fraction(given: list[tuple[str, float]] | None) -> float | dict[str, float] | None:
    """Return one share, or pattern -> share.

    Raises:
        CommandError: there are shares with and without a pattern, or a pattern is repeated.
    """
    if given is None or [pattern for pattern, _ in given] == [""]:
        return None if given is None else given[0][1]
    shares = dict(given)
    if "" in shares or len(shares) < len(given):
        raise CommandError("--keep-fraction: give one SHARE, or PATTERN=SHARE once for each of several patterns")
    return shares


def _saved_means(source: str, model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the mean gates of the fit of the checkpoint."""
    means = saved_gate_means(model, checkpoint)
    if not means:
        raise CommandError(
            f"{source}: --importance gates needs a checkpoint of a fit with ChannelImportance, after its first step, "
            f"and this is none; in Python, prune_channels(model, importance='gates', batches=...) takes any network "
            f"with gates"
        )
    return means


def _in_options(message: str) -> str:
    """Return the message with options instead of arguments."""
    names = ("keep_fraction", "target_macs", "target_parameters", "max_layer_fraction", "channels_multiple")
    for name in names:
        message = message.replace(name, f"--{name.replace('_', '-')}")
    message = message.replace("(include, exclude", "(--include, --exclude")
    message = message.removesuffix(", or loss=..., a function of (model, batch)")
    message = re.sub(r"(importance|scope|network)='([\w.]+)'", r"--\1 \2", message)
    message = message.replace("--network ...", "--network NAME").replace(
        "loss=...,", "in Python prune_channels(..., loss=...),"
    )
    return message.replace("example_inputs=...", "--input-shape").replace("batches=...", "--data")


#: Names that stand for data modules of the demo.
_KNOWN_DATA = {"digits": "lightning_filterdiv.demo:Digits", "fashion_mnist": "lightning_filterdiv.demo:FashionMNIST"}


class _Reported:
    """Batches whose errors name ``--data``."""

    def __init__(self, batches: Iterable[Any], source: str) -> None:
        self.batches, self.source = batches, source

    def __iter__(self) -> Iterator[Any]:
        with reading_data(self.source):
            yield from self.batches


def _loaders(source: str, seed: int) -> tuple[Iterable[Any], Iterable[Any]]:
    """Return batches for measuring and batches for accuracy, which are the same for a plain data set."""
    package, separator, name = _KNOWN_DATA.get(source, source).partition(":")
    if not (separator and package and name):
        raise CommandError(f"--data {source!r} is none of {LABELLED_SOURCES}")
    search_here()
    try:
        built = getattr(importlib.import_module(package), name)()
        if hasattr(built, "train_dataloader"):
            built.prepare_data()
            built.setup("fit")
            judged = built.val_dataloader()
            return _Reported(built.train_dataloader(), source), _Reported(judged, source)
        generator = torch.Generator().manual_seed(seed)
        training = DataLoader(built, _BATCH, shuffle=True, generator=generator)
        return _Reported(training, source), _Reported(DataLoader(built, _BATCH), source)
    except Exception as error:  # an error of the user's class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"--data {source}: it gives no batches ({reason})") from error
