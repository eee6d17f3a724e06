"""``filterdiv merge``: from a checkpoint with clusters to a file with the narrow network."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_filterdiv.centripetal.callback import CentripetalSGD
from lightning_filterdiv.centripetal.checkpoints import inputs_from_state, relative_to, saved_states
from lightning_filterdiv.centripetal.forecast import Forecast
from lightning_filterdiv.channel_graph import ChannelGraphError, ExampleInputsError, TraceError
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import (
    load_source,
    read_checkpoint,
    restore_model,
    with_values,
    zeros,
)
from lightning_filterdiv.command_line.outputs import check_outputs, finish
from lightning_filterdiv.narrowing.merge import NotTiedError, merge_channels
from lightning_filterdiv.narrowing.twins import merge_twins
from lightning_filterdiv.tensors.arguments import check_integer

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Rebuild the network, merge, verify, save, and print the costs before and after.

    Raises:
        CommandError: no usable checkpoint, model, clusters or example inputs, or clusters that are not tied.
    """
    try:
        check_integer("--pairs", options.pairs, low=0)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    if not options.tolerance >= 0:  # NaN too
        raise CommandError(f"--tolerance must be a number with 0 <= --tolerance, or inf, got {options.tolerance}")
    check_outputs(options)
    if options.twins is not None:
        _merge_twins(options)
        return
    for name in ("weights", "network", "include", "exclude"):
        if getattr(options, name) is not None:
            raise CommandError(f"--{name} belongs to --twins; what CentripetalSGD made equal stands in the checkpoint")
    checkpoint = read_checkpoint(Path(options.source), options.trust_pickle)
    state = _check_states(checkpoint, options.source)
    try:
        clusters = CentripetalSGD.clusters_from(checkpoint)
    except KeyError as error:
        raise CommandError(f"{options.source}: {error.args[0]}") from error
    assert state is not None  # it holds the clusters
    model = with_values(restore_model(options.model, options.config, checkpoint))
    inputs: Any = None
    network = state["arguments"]["network"]
    if options.input_shape is not None:
        inputs = zeros(options.input_shape)
    elif getattr(model, "example_input_array", None) is None:
        inputs, network = inputs_from_state(state["extra"]["inputs"], network)
    clusters, network = relative_to(model, clusters, network)
    step = checkpoint.get("global_step")
    unfinished = Forecast.from_state(state["extra"]).unfinished(step) if isinstance(step, int) else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="running statistics lag")  # the note below
            merged, report = merge_channels(
                model, clusters, inputs, network=network, tolerance=options.tolerance, form=options.form
            )
    except NotTiedError as error:
        error = error.before_the_end(unfinished) if unfinished else error
        reason = str(error).replace("tolerance=float('inf')", "--tolerance inf")
        raise CommandError(f"{options.source}: {reason}") from error
    except (ChannelGraphError, TypeError, ValueError, RuntimeError, MemoryError) as error:  # of sizes in a file
        known = isinstance(error, ValueError) and not isinstance(error, ExampleInputsError | TraceError)
        raise CommandError(f"{options.source}: {error}{'' if known else '; see --input-shape'}") from error
    if unfinished:
        print(f"checkpoint    {unfinished}")
    print(report)
    if report.averaging > options.tolerance:
        print("note          running statistics lag behind the tied weights; some batches in train mode renew them")
    finish(options, model, merged, inputs, network)


def _merge_twins(options: argparse.Namespace) -> None:
    model, _ = load_source(options)
    inputs = None if options.input_shape is None else zeros(options.input_shape)
    try:
        merged, report = merge_twins(
            model,
            inputs,
            threshold=options.twins,
            include=options.include,
            exclude=options.exclude,
            network=options.network,
            form=options.form,
        )
    except (ChannelGraphError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        reason = str(error).replace("threshold", "--twins").replace("example_inputs=...", "--input-shape")
        raise CommandError(f"{options.source}: {reason}") from error
    print(report)
    finish(options, model, merged, inputs, options.network)


def _check_states(checkpoint: Mapping[str, Any], path: str) -> dict[str, Any] | None:
    """Return the state of the first CentripetalSGD in the checkpoint; ``None`` if there is none.

    Raises:
        CommandError: an entry is missing, has another type, or is of a newer release.
    """
    states = saved_states(checkpoint)
    known: int = CentripetalSGD().state_dict()["version"]
    for state in states:
        version, arguments, extra = state.get("version"), state.get("arguments"), state["extra"]
        if isinstance(version, int) and version > known:
            raise CommandError(
                f"{path}: the state of CentripetalSGD was written by a newer release of lightning_filterdiv (state "
                f"version {version}, this one reads {known}); update the package"
            )
        wrong = [
            entry
            for entry, right in (
                ("version", isinstance(version, int)),
                ("arguments", isinstance(arguments, dict) and _is_name(arguments.get("network", 0))),
                ("clusters", _are_clusters(extra["clusters"])),
                ("inputs", "inputs" in extra and _are_inputs(extra["inputs"])),
                ("course", _is_forecast(extra)),
            )
            if not right
        ]
        if wrong:
            raise CommandError(
                f"{path}: the state of CentripetalSGD is damaged, its entry {wrong[0]!r} is missing or not what the "
                f"callback wrote; merge another checkpoint of the fit"
            )
    return states[0] if states else None


def _is_name(value: object) -> bool:
    return value is None or isinstance(value, str)


def _are_clusters(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(index, Tensor)
        and (index.dtype, index.layout, index.dim()) == (torch.int64, torch.strided, 1)
        and index.numel() > 0
        and not index.is_meta
        for name, index in value.items()
    )


def _is_forecast(extra: Mapping[str, Any]) -> bool:
    try:
        Forecast.from_state(extra)
    except (KeyError, TypeError, ValueError):
        return False
    return True


def _are_inputs(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and isinstance(value.get("args"), list | tuple)
        and isinstance(value.get("kwargs"), dict)
        and _is_name(value.get("network", 0))
    )
