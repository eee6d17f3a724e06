"""``filterdiv merge``: from a checkpoint with clusters to a file with the narrow network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_filterdiv.arguments import check_integer, check_number
from lightning_filterdiv.centripetal.callback import CentripetalSGD
from lightning_filterdiv.centripetal.checkpoints import inputs_from_state, relative_to, saved_states
from lightning_filterdiv.centripetal.files import save_merged, unwritable
from lightning_filterdiv.centripetal.measure import latency_ratio
from lightning_filterdiv.centripetal.merge import NotTiedError, merge_with_report
from lightning_filterdiv.channel_graph import ChannelGraphError
from lightning_filterdiv.channel_graph.inputs import example_arguments
from lightning_filterdiv.channel_graph.modules import find_submodule
from lightning_filterdiv.model_source import (
    ModelSourceError,
    add_model_arguments,
    build_model,
    load_weights,
    read_checkpoint,
)

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of ``filterdiv merge``."""
    parser.add_argument("checkpoint", type=Path, help="a Lightning checkpoint of a fit with CentripetalSGD")
    parser.add_argument("--out", type=Path, required=True, help="file for the narrow network, see load_merged")
    add_model_arguments(parser)
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="N,C,H,W",
        help="shape of the input to trace with; default: what the checkpoint or the model knows",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest relative change of the outputs by setting members of clusters to their mean; 'inf' merges anyway",
    )
    parser.add_argument("--pairs", type=int, default=20, help="timed forward passes per network, 0 for no timing")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers such as 1,3,224,224, got {text!r}")
    return shape


def run(options: argparse.Namespace) -> int:
    """Rebuild the network, merge, verify, save, and print what it costs before and after.

    Returns:
        The exit status, 0.

    Raises:
        ModelSourceError: no usable checkpoint, model, clusters or example inputs, or clusters that are not tied.
    """
    try:
        if options.tolerance != float("inf"):
            check_number("--tolerance", options.tolerance, low=0.0)
        check_integer("--pairs", options.pairs, low=0)
    except (TypeError, ValueError) as error:
        raise ModelSourceError(str(error)) from error
    if reason := unwritable(options.out):  # before minutes of work
        raise ModelSourceError(f"--out {options.out} cannot be written: {reason}")
    checkpoint = read_checkpoint(options.checkpoint, options.trust_pickle)
    try:
        clusters = CentripetalSGD.clusters_from(checkpoint)
    except KeyError as error:
        raise ModelSourceError(f"{options.checkpoint}: {error.args[0]}") from error
    model = build_model(options.model, options.config, checkpoint.get("hyper_parameters"))
    load_weights(model, checkpoint["state_dict"])
    state = saved_states(checkpoint)[0]
    inputs: Any = None
    network = state["arguments"]["network"]
    if options.input_shape is not None:
        inputs = torch.zeros(options.input_shape)
    elif getattr(model, "example_input_array", None) is None:
        inputs, network = inputs_from_state(state["extra"]["inputs"], network)
    clusters, network = relative_to(model, clusters, network)
    try:
        merged, report = merge_with_report(model, clusters, inputs, network=network, tolerance=options.tolerance)
    except NotTiedError as error:
        reason = str(error).replace("tolerance=float('inf')", "--tolerance inf")
        raise ModelSourceError(f"{options.checkpoint}: {reason}") from error
    except (ChannelGraphError, ValueError) as error:
        raise ModelSourceError(f"{options.checkpoint}: {error}; see --input-shape") from error
    save_merged(merged, options.out)
    print(report)
    if options.pairs > 0:
        print(_latency(model, merged, inputs, network, options.pairs))
    print(f"saved         {options.out}; load_merged(fresh {type(model).__name__}, path) reads it")
    return 0


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
