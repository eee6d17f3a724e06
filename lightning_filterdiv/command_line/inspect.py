"""``filterdiv inspect``: how redundant is a network that exists already?"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import build_model, read_checkpoint, restore_model
from lightning_filterdiv.command_line.options import MODEL_SOURCES
from lightning_filterdiv.files import printable, safe_file_name, why_unwritable, write_files
from lightning_filterdiv.filters import Conv, NoLayersError, select_filters
from lightning_filterdiv.monitor.figures import cosine_distribution, kernel_mosaic, similarity_heat_map, to_rgb
from lightning_filterdiv.monitor.page import Picture, as_html, as_png
from lightning_filterdiv.monitor.report import LayerReport, as_csv, as_text, report_layers
from lightning_filterdiv.monitor.views import view_layer
from lightning_filterdiv.selection import quote_names
from lightning_filterdiv.tensors.arguments import check_integer, check_number

__all__ = ["run"]

_PLAIN: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def run(options: argparse.Namespace) -> None:
    """Write ``report.txt``, ``report.csv``, ``index.html`` and the figures, and print the table.

    Raises:
        CommandError: the network, the file, an option or the folder cannot be used, or a pattern matches no layer.
    """
    try:
        check_number("--threshold", options.threshold, low=0.0, below=1.0)
        check_integer("--max-figures", options.max_figures, low=0)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    network, title, note = _find_network(options)
    try:
        layers = select_filters(network, options.include, options.exclude)
    except (NoLayersError, ValueError) as error:
        raise CommandError(str(error)) from error
    layers = _with_values(layers, title)
    if reason := why_unwritable(options.out, folder=True):
        raise CommandError(f"--out {options.out} cannot be written ({reason}); name another folder")
    rows = report_layers(layers, options.threshold)
    pictures = _draw(layers, rows, options)
    text = as_text(rows, f"Filter redundancy of {title}\n{note}", options.threshold)
    files = {f"figures/{safe_file_name(name)}.png": as_png(pixels) for name, pixels in pictures}
    pages = {
        "report.txt": text + "\n",
        "report.csv": as_csv(rows),
        "index.html": as_html(rows, title, [note], options.threshold, pictures),
    }
    write_files(options.out, files | {name: page.encode("utf-8") for name, page in pages.items()})
    print(f"{text}\n\nwritten to {options.out}: index.html, report.txt, report.csv and {len(pictures)} figures")


def _find_network(options: argparse.Namespace) -> tuple[nn.Module, str, str]:
    """Return the network, its title in the report, and a note on where its weights come from."""
    source: str = options.source
    if ":" in source and not Path(source).exists():
        if options.model is not None or options.config is not None:
            raise CommandError(f"{source!r} names a network already; --model and --config belong to a file")
        network, note = _with_local_weights(source, options.trust_pickle)
        return network, printable(source), note
    path = Path(source)
    if not path.exists():
        raise CommandError(
            f"{source}: no such file, and no torchvision:NAME, timm:NAME or pkg.module:Class either"
            f"{f'; did you mean torchvision:{source}?' if source in torchvision.models.list_models() else ''}"
        )
    checkpoint = read_checkpoint(path, options.trust_pickle)
    if options.model is None and options.config is None:
        if "callbacks" not in checkpoint and "epoch" not in checkpoint:
            raise CommandError(
                f"{path} is a bare state dict: say which network it belongs to with --model ({MODEL_SOURCES}) or "
                f"--config"
            )
        note = (
            f"Weights of {printable(path.name)}, read as they are stored. A transposed convolution looks like an "
            f"ordinary one in a file: name the network with --model or --config if it has some."
        )
        return _plain_convolutions(checkpoint["state_dict"], path), printable(path.name), note
    note = printable(f"Weights of {path.name} in {options.model or options.config}.")
    return restore_model(options.model, options.config, checkpoint), printable(path.name), note


def _plain_convolutions(weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """A network of bare convolutions that holds every kernel of a Lightning checkpoint."""
    network = nn.Module()
    for key, tensor in weights.items():
        name, _, last = key.rpartition(".")
        if last != "weight" or not isinstance(tensor, Tensor) or tensor.dim() not in _PLAIN or not name:
            continue
        kernel_size: Any = tuple(tensor.shape[2:])
        # Filters are only read: sizes of 1 are allowed where those of the file are 0, which select_filters reports.
        with torch.device("meta"):
            conv = _PLAIN[tensor.dim()](max(1, tensor.shape[1]), max(1, tensor.shape[0]), kernel_size, bias=False)
        conv.weight = nn.Parameter(tensor.detach(), requires_grad=False)
        conv.in_channels, conv.out_channels = tensor.shape[1], tensor.shape[0]
        # Under its whole name, and not by add_module: a file may hold names that no attribute can have.
        network._modules[name] = conv
    if not any(True for _ in network.parameters()):
        raise CommandError(f"{path} holds no convolution: no weight of it has 3 to 5 dimensions")
    return network


def _with_values(layers: dict[str, Conv], title: str) -> dict[str, Conv]:
    """The layers whose filters can be compared; others are named in a warning.

    Raises:
        CommandError: none can.
    """
    reasons = {name: why for name, conv in layers.items() if (why := _why_incomparable(conv.weight))}
    if len(reasons) == len(layers):
        name, why = next(iter(reasons.items()))
        raise CommandError(
            f"{title} has no layer whose filters can be compared: {name!r} {why}; inspect another network"
        )
    for why in dict.fromkeys(reasons.values()):
        warnings.warn(
            f"left out, because each {why}: {quote_names([n for n in reasons if reasons[n] == why])}", stacklevel=2
        )
    return {name: conv for name, conv in layers.items() if name not in reasons}


def _why_incomparable(weight: Tensor) -> str:
    if weight.is_complex():
        return "has complex weights"
    return "has no values (device meta)" if weight.is_meta else ""


def _with_local_weights(source: str, trust_pickle: bool) -> tuple[nn.Module, str]:
    """The network, with torchvision's default weights where they are on disk already; nothing is ever downloaded."""
    network = build_model(source)
    kind, _, name = source.partition(":")
    if kind != "torchvision":
        return network, "Random weights, as the constructor makes them."
    default = getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)
    file = Path(torch.hub.get_dir()) / "checkpoints" / default.url.split("/")[-1] if default is not None else None
    if file is None or not file.is_file():
        missing = f": {file.name} is not in torch's hub folder, and nothing is downloaded" if file is not None else ""
        return network, f"Random weights{missing}."
    if not trust_pickle:
        read_checkpoint(file)  # torchvision would unpickle whatever lies there
    return torchvision.models.get_model(name, weights=default), f"Weights of {file.name}, found on this machine."


def _draw(layers: Mapping[str, Conv], rows: list[LayerReport], options: argparse.Namespace) -> list[Picture]:
    """Figures of the layers that stand out most."""

    def interest(row: LayerReport) -> tuple[float, float]:
        return row.mergeable / row.filters, row.mean_abs_cosine - row.random_abs_cosine

    ranked = sorted(rows, key=interest, reverse=True)[: options.max_figures]
    views = [view_layer(row.layer, layers[row.layer]) for row in rows if row in ranked]
    if not views:
        return []
    pictures = [("distribution", to_rgb(cosine_distribution(views)))]
    for view in views:
        pictures.append((f"similarity-{view.name}", to_rgb(similarity_heat_map(view))))
        pictures.append((f"kernels-{view.name}", to_rgb(kernel_mosaic(view))))
    return pictures
