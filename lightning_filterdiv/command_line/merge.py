"""``filterdiv merge``: from a checkpoint with clusters to a file with the narrow network."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_filterdiv.centripetal.callback import CentripetalSGD
from lightning_filterdiv.centripetal.checkpoints import inputs_from_state, relative_to, saved_states
from lightning_filterdiv.centripetal.forecast import Forecast
from lightning_filterdiv.channel_graph import ChannelGraphError
from lightning_filterdiv.channel_graph.inputs import example_arguments
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import read_checkpoint, restore_model
from lightning_filterdiv.files import why_unwritable
from lightning_filterdiv.filters import find_submodule
from lightning_filterdiv.narrowing.files import save_merged
from lightning_filterdiv.narrowing.measure import latency_ratio
from lightning_filterdiv.narrowing.merge import NotTiedError, merge_channels
from lightning_filterdiv.tensors.arguments import check_integer, check_number

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Rebuild the network, merge, verify, save, and print what it costs before and after.

    Raises:
        CommandError: no usable checkpoint, model, clusters or example inputs, or clusters that are not tied.
    """
    try:
        if options.tolerance != float("inf"):
            check_number("--tolerance", options.tolerance, low=0.0)
        check_integer("--pairs", options.pairs, low=0)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    if reason := why_unwritable(options.out):  # before minutes of work
        raise CommandError(f"--out {options.out} cannot be written: {reason}")
    checkpoint = read_checkpoint(options.checkpoint, options.trust_pickle)
    state = _check_states(checkpoint, options.checkpoint)
    try:
        clusters = CentripetalSGD.clusters_from(checkpoint)
    except KeyError as error:
        raise CommandError(f"{options.checkpoint}: {error.args[0]}") from error
    assert state is not None  # it holds the clusters
    model = restore_model(options.model, options.config, checkpoint)
    inputs: Any = None
    network = state["arguments"]["network"]
    if options.input_shape is not None:
        inputs = torch.zeros(options.input_shape)
    elif getattr(model, "example_input_array", None) is None:
        inputs, network = inputs_from_state(state["extra"]["inputs"], network)
    clusters, network = relative_to(model, clusters, network)
    step = checkpoint.get("global_step")
    unfinished = Forecast.from_state(state["extra"]).unfinished(step) if isinstance(step, int) else None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="running statistics lag")  # the note below
            merged, report = merge_channels(model, clusters, inputs, network=network, tolerance=options.tolerance)
    except NotTiedError as error:
        error = error.before_the_end(unfinished) if unfinished else error
        reason = str(error).replace("tolerance=float('inf')", "--tolerance inf")
        raise CommandError(f"{options.checkpoint}: {reason}") from error
    except (ChannelGraphError, TypeError, ValueError, RuntimeError, MemoryError) as error:  # of sizes in a file
        raise CommandError(f"{options.checkpoint}: {error}; see --input-shape") from error
    save_merged(merged, options.out)
    if unfinished:
        print(f"checkpoint    {unfinished}")
    print(report)
    if report.averaging > options.tolerance:
        print("note          running statistics lag behind the tied weights; some batches in train mode renew them")
    if options.pairs > 0:
        print(_latency(model, merged, inputs, network, options.pairs))
    print(f"saved         {options.out}; load_merged(fresh {type(model).__name__}, path) reads it")


def _check_states(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """What the checkpoint keeps of the first CentripetalSGD; ``None``: nothing.

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


def _latency(model: nn.Module, merged: nn.Module, inputs: Any, network: str | None, pairs: int) -> str:
    first, second = (find_submodule(net.eval(), network) for net in (model, merged))
    arguments = example_arguments(first, inputs)
    batch = next(tensor.shape[0] for tensor in (*arguments[0], *arguments[1].values()) if hasattr(tensor, "shape"))
    ratio, low, high = latency_ratio(first, second, arguments[0] or arguments[1], pairs)
    threads = torch.get_num_threads()
    return (
        f"latency       {ratio:.2f} of the original ({low:.2f} to {high:.2f}), batch {batch}, CPU, {threads} thread"
        f"{'s' if threads > 1 else ''}"
    )
