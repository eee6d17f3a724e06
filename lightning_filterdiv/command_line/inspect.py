"""``filterdiv inspect``: report the redundancy of an existing network."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_filterdiv.command_line.entropy import build_data, reading_data
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import (
    build_model,
    load_named,
    read_checkpoint,
    restore_model,
    suggest_source,
)
from lightning_filterdiv.command_line.options import MODEL_SOURCES
from lightning_filterdiv.command_line.outputs import check_replaced
from lightning_filterdiv.entropy_depth.images import image_source
from lightning_filterdiv.files import printable, safe_file_name, why_unwritable, write_files
from lightning_filterdiv.filters import Conv, NoLayersError, named_convolutions, select_filters
from lightning_filterdiv.monitor.activations import measure_channels
from lightning_filterdiv.monitor.figures import cosine_distribution, kernel_mosaic, similarity_heat_map, to_rgb
from lightning_filterdiv.monitor.page import report_page
from lightning_filterdiv.monitor.pixels import as_png
from lightning_filterdiv.monitor.report import LayerReport, as_csv, as_text, report_layers
from lightning_filterdiv.monitor.views import LayerView, view_layer
from lightning_filterdiv.selection import quote_names
from lightning_filterdiv.tensors.arguments import check_integer, check_number

__all__ = ["Inspected", "check_options", "inspect_network", "run", "write_report"]

_PLAIN: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_REPORT = ("report.txt", "report.csv", "index.html")
_BATCH = 16  # images at a time


class Inspected(NamedTuple):
    """A network and what was measured of it.

    Attributes:
        title: name in the report.
        notes: origin of its weights and the data it saw, a line each.
        rows: one per layer.
        layers: name -> convolution.
        correlations: between the channels of layers that saw data.
    """

    title: str
    notes: list[str]
    rows: list[LayerReport]
    layers: dict[str, Conv]
    correlations: dict[str, Tensor]

    def views(self) -> dict[str, LayerView]:
        """Snapshots of all layers, in their order."""
        return {name: view_layer(name, conv) for name, conv in self.layers.items()}


class _Network(NamedTuple):
    network: nn.Module
    title: str
    note: str
    trained: bool = True
    runs: bool = True


def run(options: argparse.Namespace) -> None:
    """Write ``report.txt``, ``report.csv``, ``index.html`` and the figures, and print the table.

    Raises:
        CommandError: the network, the file, an option or the folder cannot be used, or a pattern matches no layer.
    """
    check_options(options)
    try:
        check_integer("--max-figures", options.max_figures, low=0)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    found = inspect_network(options.source, options)
    heading = "\n".join([f"Filter redundancy of {found.title}", *found.notes])
    text = as_text(found.rows, heading, options.threshold)
    views = found.views()
    page = report_page(found.rows, found.title, found.notes, options.threshold, views, found.correlations)
    files = _draw(views, found.rows, options.max_figures)
    write_report(options.out, text, as_csv(found.rows), page, files)
    print(f"{text}\n\nwritten to {options.out}: {', '.join(_REPORT)} and {len(files)} figures")


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that cannot be used, before minutes of work.

    Raises:
        CommandError: a number is out of range, or the folder cannot be written or holds a report.
    """
    try:
        check_number("--threshold", options.threshold, low=0.0, below=1.0)
        check_integer("--max-images", options.max_images, low=1)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    if options.root is not None and options.data is None:
        raise CommandError("--root belongs to --data; name the data too, or leave --root out")
    pictures = sorted((options.out / "figures").glob("*.png")) if options.command == "inspect" else []
    check_replaced(options, "--out", [*(options.out / name for name in _REPORT), *pictures])
    if reason := why_unwritable(options.out, folder=True):
        raise CommandError(f"--out {options.out} cannot be written ({reason}); name another folder")


def write_report(out: Path, text: str, table: str, page: str, figures: Mapping[str, bytes]) -> None:
    """Write all files of a report, in UTF-8, or none of them.

    Raises:
        WriteError: one cannot be written.
    """
    contents = dict(zip(_REPORT, (text + "\n", table, page), strict=True))
    write_files(out, {**figures, **{name: content.encode("utf-8") for name, content in contents.items()}})


def inspect_network(source: str, options: argparse.Namespace) -> Inspected:
    """Find the network that ``source`` names and measure it.

    Args:
        source: a file, or the name of a network.
        options: options of the command.

    Raises:
        CommandError: it cannot be found or measured.
    """
    found = _find_network(source, options)
    try:
        layers = select_filters(found.network, options.include, options.exclude)
    except (NoLayersError, ValueError) as error:
        raise CommandError(str(error)) from error
    layers = _with_values(layers, found.title)
    notes = [found.note]
    correlations: dict[str, Tensor] = {}
    if options.data is not None:
        correlations, note = _show_images(found, layers, options)
        notes.append(note)
    rows = report_layers(layers, options.threshold, correlations, trained=found.trained)
    return Inspected(found.title, notes, rows, layers, correlations)


# -- networks --------------------------------------------------------------------------------------------------------


def _find_network(source: str, options: argparse.Namespace) -> _Network:
    mixed = options.command == "compare"  # with two networks, an option may belong to the other one
    if ":" in source and not Path(source).exists():
        if (options.model is not None or options.config is not None) and not mixed:
            raise CommandError(f"{source!r} names a network already; --model and --config belong to a file")
        if options.weights is not None:
            network = load_named(source, options.weights, options.trust_pickle)
            return _Network(network, printable(source), f"Weights {options.weights} of {printable(source)}.")
        return _named_network(source, options.trust_pickle)
    path = Path(source)
    if not path.exists():
        raise CommandError(
            f"{source}: no such file, and no torchvision:NAME, timm:NAME or pkg.module:Class either"
            f"{suggest_source(source)}"
        )
    if options.weights is not None and not mixed:
        raise CommandError(f"--weights belongs to torchvision:NAME and timm:NAME; {source} is a file with weights")
    checkpoint = read_checkpoint(path, options.trust_pickle)
    if options.model is None and options.config is None:
        note = (
            f"Weights of {printable(path.name)}, read as they are stored. A transposed convolution looks like an "
            f"ordinary one in a file: name the network with --model or --config if it has some."
        )
        network = _plain_convolutions(checkpoint["state_dict"], path)
        return _Network(network, printable(path.name), note, runs=False)
    note = printable(f"Weights of {path.name} in {options.model or options.config}.")
    return _Network(restore_model(options.model, options.config, checkpoint), printable(path.name), note)


def _plain_convolutions(weights: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Return a network of bare convolutions with every kernel of a checkpoint."""
    network = nn.Module()
    for key, tensor in weights.items():
        name, _, last = key.rpartition(".")
        if last != "weight" or not isinstance(tensor, Tensor) or tensor.dim() not in _PLAIN or not name:
            continue
        kernel_size: Any = tuple(tensor.shape[2:])
        # Filters are only read. Sizes of 0 in the file become 1 here, and select_filters reports them.
        with torch.device("meta"):
            conv = _PLAIN[tensor.dim()](max(1, tensor.shape[1]), max(1, tensor.shape[0]), kernel_size, bias=False)
        conv.weight = nn.Parameter(tensor.detach(), requires_grad=False)
        conv.in_channels, conv.out_channels = tensor.shape[1], tensor.shape[0]
        # Stored under the whole name without add_module, because a file may hold names that no attribute can have.
        network._modules[name] = conv
    if not any(True for _ in network.parameters()):
        raise CommandError(
            f"{path} holds no convolution: no weight of it has 3 to 5 dimensions; name a file of a network with some"
        )
    return network


def _with_values(layers: dict[str, Conv], title: str) -> dict[str, Conv]:
    """Return the layers whose filters can be compared. A warning names the others.

    Raises:
        CommandError: there is none.
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


def _named_network(source: str, trust_pickle: bool) -> _Network:
    """Return a network by its name, with torchvision's default weights if they are on disk. Nothing is downloaded."""
    network, title = build_model(source), printable(source)
    kind, _, name = source.partition(":")
    if kind == "torchvision":
        default = getattr(torchvision.models.get_model_weights(name), "DEFAULT", None)
        file = Path(torch.hub.get_dir()) / "checkpoints" / default.url.split("/")[-1] if default is not None else None
        if file is not None and file.is_file():
            if not trust_pickle:
                read_checkpoint(file)  # torchvision would unpickle any file there
            trained = torchvision.models.get_model(name, weights=default)
            return _Network(trained, title, f"Weights of {file.name}, found on this machine.")
    if kind not in ("torchvision", "timm"):
        if _same_weights(network, build_model(source)):
            return _Network(network, title, "Weights that the constructor brings: the same ones each time.")
        fix = f"filterdiv inspect CHECKPOINT --model {title}"
    else:
        fix = f"filterdiv inspect {title} --weights DEFAULT"
    return _Network(network, title, f"Random weights: there is nothing to advise. Trained ones: {fix}", trained=False)


def _same_weights(first: nn.Module, second: nn.Module) -> bool:
    """True if a constructor gives the same convolutions twice. Random ones differ."""
    ours, theirs = (dict(named_convolutions(network)) for network in (first, second))
    pairs = [(conv.weight, theirs[name].weight) for name, conv in ours.items() if name in theirs]
    known = all(not is_lazy(w) and not w.is_meta and w.layout == torch.strided for pair in pairs for w in pair)
    return known and all(torch.equal(one, two) for one, two in pairs)


# -- data ------------------------------------------------------------------------------------------------------------


def _show_images(
    found: _Network, layers: dict[str, Conv], options: argparse.Namespace
) -> tuple[dict[str, Tensor], str]:
    """Return correlations between channels, and a note on the images."""
    if not found.runs:
        raise CommandError(
            f"--data needs a network that runs, and {found.title} holds weights alone: name their network with "
            f"--model ({MODEL_SOURCES}) or --config"
        )
    images, note = _images(found.network, options)
    if not bool(images.isfinite().all()):
        raise CommandError(f"--data {options.data} holds NaN or infinite values; repair or remove them")

    def show() -> None:
        for part in images.split(_BATCH):
            found.network(part)

    try:
        correlations = measure_channels(found.network, layers, show)
    except Exception as error:  # the user's network does not accept images of this size
        reason = " ".join(str(error).split())[:300]
        raise CommandError(
            f"--data {options.data}: {found.title} does not run on images {tuple(images.shape[1:])} "
            f"({type(error).__name__}: {reason}); give a .pt file with a batch as the network takes it"
        ) from error
    if not correlations:
        raise CommandError(
            f"--data {options.data}: a forward pass of {found.title} runs none of the layers; name others with "
            f"--include, or leave --data out"
        )
    return correlations, note


def _images(network: nn.Module, options: argparse.Namespace) -> tuple[Tensor, str]:
    """Return ``(N, C, H, W)`` float images, and a note on them."""
    path = Path(options.data)
    if path.is_file():
        try:
            batch = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports a file that is none by many types
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CommandError(
                f"--data {path} is no file that torch.save wrote of a tensor ({reason}); save one"
            ) from error
        if not isinstance(batch, Tensor) or batch.dim() < 3 or not len(batch):
            raise CommandError(f"--data {path} holds no batch of images, a tensor (N, C, ...); save one")
        return batch[
            : options.max_images
        ].float(), f"Shown {min(len(batch), options.max_images)} images of {path.name}."
    images: list[Tensor] = []
    with reading_data(options.data):
        source = image_source(build_data(options.data, options.root), options.max_images)
        for batch in source.batches:
            images += list(batch)
            if len(images) >= options.max_images:
                break
    images = images[: options.max_images]
    if not images:
        raise CommandError(f"--data {options.data}: no image came; check the folder, split or indices")
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) != 1:
        raise CommandError(
            f"--data {options.data}: its images have {len(shapes)} shapes; a network is shown images of one: give a "
            f".pt file with a batch"
        )
    return _prepared(torch.stack(images), network), (
        f"Shown {len(images)} images of {printable(options.data)}, as they come if they are floating point, else "
        f"standardised."
    )


def _prepared(images: Tensor, network: nn.Module) -> Tensor:
    """Return images in the layout of the network: channels first, as many as its first convolution reads."""
    raw = not images.is_floating_point()
    if images.dim() == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] in (1, 3, 4) and images.shape[1] not in (1, 3, 4):
        images = images.movedim(-1, 1)
    images = images.float()
    if raw:
        images = (images - images.mean()) / images.std().clamp_min(1e-6)
    first = next(conv for _, conv in named_convolutions(network))
    if images.shape[1] == 1 and first.in_channels > 1:
        images = images.expand(-1, first.in_channels, *images.shape[2:])
    return images.contiguous()


# -- figures ---------------------------------------------------------------------------------------------------------


def _draw(views: Mapping[str, LayerView], rows: list[LayerReport], count: int) -> dict[str, bytes]:
    """Return figures of the most redundant layers as files."""

    def interest(row: LayerReport) -> tuple[float, float]:
        return row.twins / row.filters, row.over_chance if row.over_chance == row.over_chance else 0.0

    ranked = sorted(rows, key=interest, reverse=True)[:count]
    drawn = [views[row.layer] for row in rows if row in ranked]
    if not drawn:
        return {}
    pictures = {"distribution": cosine_distribution(drawn)}
    for view in drawn:
        pictures[f"similarity-{view.name}"] = similarity_heat_map(view)
        pictures[f"kernels-{view.name}"] = kernel_mosaic(view)
    return {f"figures/{safe_file_name(name)}.png": as_png(to_rgb(figure)) for name, figure in pictures.items()}
