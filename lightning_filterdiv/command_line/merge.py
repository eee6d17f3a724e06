"""``filterdiv merge``: from a checkpoint with clusters to a file with the narrow network."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from lightning_filterdiv.centripetal.callback import CentripetalSGD
from lightning_filterdiv.centripetal.checkpoints import inputs_from_state, relative_to, saved_states
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
    try:
        clusters = CentripetalSGD.clusters_from(checkpoint)
    except KeyError as error:
        raise CommandError(f"{options.checkpoint}: {error.args[0]}") from error
    model = restore_model(options.model, options.config, checkpoint)
    state = saved_states(checkpoint)[0]
    inputs: Any = None
    network = state["arguments"]["network"]
    if options.input_shape is not None:
        inputs = torch.zeros(options.input_shape)
    elif getattr(model, "example_input_array", None) is None:
        inputs, network = inputs_from_state(state["extra"]["inputs"], network)
    clusters, network = relative_to(model, clusters, network)
    try:
        merged, report = merge_channels(model, clusters, inputs, network=network, tolerance=options.tolerance)
    except NotTiedError as error:
        reason = str(error).replace("tolerance=float('inf')", "--tolerance inf")
        raise CommandError(f"{options.checkpoint}: {reason}") from error
    except (ChannelGraphError, ValueError) as error:
        raise CommandError(f"{options.checkpoint}: {error}; see --input-shape") from error
    save_merged(merged, options.out)
    print(report)
    if options.pairs > 0:
        print(_latency(model, merged, inputs, network, options.pairs))
    print(f"saved         {options.out}; load_merged(fresh {type(model).__name__}, path) reads it")


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
