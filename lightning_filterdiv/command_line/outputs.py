"""Output files of commands: the check before minutes of work, and the last part of ``merge`` and ``prune``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_filterdiv.channel_graph.inputs import example_arguments
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.files import why_unwritable
from lightning_filterdiv.filters import find_submodule
from lightning_filterdiv.narrowing.export import ExportError, export_onnx, latency_table
from lightning_filterdiv.narrowing.files import save_merged
from lightning_filterdiv.narrowing.measure import latency_ratio

__all__ = ["check_outputs", "check_replaced", "finish"]


def check_replaced(options: argparse.Namespace, option: str, paths: Iterable[Path]) -> None:
    """Refuse to replace existing files, for all commands.

    Raises:
        CommandError: one of ``paths`` exists and ``--overwrite`` is not given.
    """
    # A device or a pipe is written to, not replaced.
    if not options.overwrite and (there := next(filter(Path.is_file, paths), None)) is not None:
        raise CommandError(f"{option}: {there} exists; name another place, or add --overwrite to replace it")


def check_outputs(options: argparse.Namespace) -> None:
    """Check the files of ``--out`` and ``--onnx``, before minutes of work.

    Raises:
        CommandError: one cannot be written, exists without ``--overwrite``, or both are the same.
    """
    for name, path in (("--out", options.out), ("--onnx", options.onnx)):
        if path is None:
            continue
        if reason := why_unwritable(path):
            raise CommandError(f"{name} {path} cannot be written: {reason}")
        check_replaced(options, name, [path])
    if options.onnx is not None and options.onnx.resolve() == options.out.resolve():
        raise CommandError(f"--onnx and --out are the same file, {options.out}; name two")


def finish(options: argparse.Namespace, model: nn.Module, narrow: nn.Module, inputs: Any, network: str | None) -> None:
    """Save the narrow network, export it if asked, and print the costs of both networks.

    Raises:
        CommandError: the network has no ONNX form.
    """
    save_merged(narrow, options.out)
    print(f"saved         {options.out}; load_merged(fresh {type(model).__name__}, path) reads it")
    try:
        if options.onnx is not None:
            difference = export_onnx(narrow, options.onnx, inputs, network=network)
            print(f"ONNX          {options.onnx}, any batch size; onnxruntime differs by {difference:.1e} (relative)")
        if options.pairs > 0 and options.onnx is None:
            print(_latency(model, narrow, inputs, network, options.pairs))
        elif options.pairs > 0:
            rows = latency_table(model, narrow, inputs, network=network, pairs=options.pairs)
            threads = torch.get_num_threads()
            print(f"latency, CPU, {threads} thread{'s' if threads > 1 else ''}, median of {options.pairs}")
            print("\n".join(map(str, rows)))
    except ExportError as error:
        raise CommandError(f"--onnx {options.onnx}: {error}") from error


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
