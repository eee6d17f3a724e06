"""``filterdiv prune``: from a network to a file with a narrower one that meets a target."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_filterdiv.channel_graph import ChannelGraphError
from lightning_filterdiv.command_line.entropy import reading_data
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import (
    build_model,
    read_checkpoint,
    restore_model,
    search_here,
    suggest_source,
    with_values,
    zeros,
)
from lightning_filterdiv.command_line.options import MODEL_SOURCES
from lightning_filterdiv.command_line.outputs import check_outputs, finish
from lightning_filterdiv.narrowing.prune import prune_channels
from lightning_filterdiv.tensors.arguments import check_integer

__all__ = ["run"]

_BATCH = 64


def run(options: argparse.Namespace) -> None:
    """Build the network, print the plan, prune, save, and print what that did.

    Raises:
        CommandError: the network, the data or an option cannot be used, or the target is out of reach.
    """
    try:
        check_integer("--pairs", options.pairs, low=0)
        check_integer("--seed", options.seed, low=0)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    check_outputs(options)
    model = with_values(_network(options))
    training, test = (None, None) if options.data is None else _loaders(options.data, options.seed)
    inputs = None if options.input_shape is None else zeros(options.input_shape)
    try:
        network, report = prune_channels(
            model,
            inputs,
            importance=options.importance,
            keep_fraction=options.keep_fraction,
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


def _in_options(message: str) -> str:
    """The message with options in the place of arguments."""
    names = ("keep_fraction", "target_macs", "target_parameters", "max_layer_fraction", "channels_multiple")
    for name in names:
        message = message.replace(name, f"--{name.replace('_', '-')}")
    message = message.replace("(include, exclude", "(--include, --exclude")
    message = message.removesuffix(", or loss=..., a function of (model, batch)")
    message = re.sub(r"importance='(\w+)'", r"--importance \1", message)
    return message.replace("example_inputs=...", "--input-shape").replace("batches=...", "--data")


def _network(options: argparse.Namespace) -> Any:
    source: str = options.source
    if ":" in source and not Path(source).exists():
        if options.model is not None or options.config is not None:
            raise CommandError(f"{source!r} names a network already; --model and --config belong to a file")
        return build_model(source)
    if not Path(source).exists():
        raise CommandError(f"{source}: no such file, and none of {MODEL_SOURCES} either{suggest_source(source)}")
    return restore_model(options.model, options.config, read_checkpoint(Path(source), options.trust_pickle))


class _Reported:
    """Batches whose errors name ``--data``."""

    def __init__(self, batches: Iterable[Any], source: str) -> None:
        self.batches, self.source = batches, source

    def __iter__(self) -> Iterator[Any]:
        with reading_data(self.source):
            yield from self.batches


def _loaders(source: str, seed: int) -> tuple[Iterable[Any], Iterable[Any]]:
    """Batches to measure on and batches to judge on; of a plain data set the same."""
    package, separator, name = source.partition(":")
    if not (separator and package and name):
        raise CommandError(f"--data {source!r} is no pkg.module:Name of a data set or LightningDataModule")
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
    except Exception as error:  # of whatever the user's class does
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"--data {source}: it gives no batches ({reason})") from error
