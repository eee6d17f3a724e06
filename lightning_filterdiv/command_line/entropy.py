"""``filterdiv entropy``: the depth bound of a data set, compared with the depth of a network."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGraphError
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import build_model, search_here, with_values, zeros
from lightning_filterdiv.command_line.options import DATA_SOURCES
from lightning_filterdiv.entropy_depth.depth import NetworkDepth, network_depth
from lightning_filterdiv.entropy_depth.estimate import estimate_depth_bound
from lightning_filterdiv.entropy_depth.functional import DepthBound
from lightning_filterdiv.entropy_depth.images import ImageDataError, image_source
from lightning_filterdiv.filters import named_convolutions

__all__ = ["build_data", "run"]

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def run(options: argparse.Namespace) -> None:
    """Print entropy and bound, and with a model its depth per stage and a plan.

    Raises:
        CommandError: data or a network that cannot be used; with the reason.
    """
    if options.max_images is not None and options.max_images < 1:
        raise CommandError(f"--max-images must be at least 1, got {options.max_images}")
    data = build_data(options.data, options.root)
    with reading_data(options.data):
        bound = estimate_depth_bound(data, options.unit, options.rounding, options.max_images)
    print(bound.describe())
    if options.model is None and options.config is None:
        return
    model = with_values(build_model(options.model, options.config))
    inputs = _example_inputs(model, data, options.input_shape)
    try:
        graph = ChannelGraph.trace(model, inputs)
        depth = network_depth(graph)
    except (ChannelGraphError, ValueError) as error:
        reason = str(error).replace("example_inputs=...", "--input-shape")
        raise CommandError(f"{type(model).__name__} cannot be traced: {reason}; see --input-shape") from error
    print(_comparison(type(model).__name__, depth, bound))


@contextlib.contextmanager
def reading_data(source: str) -> Iterator[None]:
    """Report an error while ``--data`` is read, also one of a user's class, in one line.

    Raises:
        CommandError: the data hold no images, or reading them failed.
    """
    try:
        yield
    except CommandError:
        raise
    except ImageDataError as error:
        raise CommandError(f"--data {source}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CommandError(
            f"--data {source}: reading it fails ({type(error).__name__}: {reason}); repair it or name other data"
        ) from error


def _comparison(name: str, depth: NetworkDepth, bound: DepthBound) -> str:
    plan = depth.plan(bound.bound)
    lines = ["", f"{name}: {depth.describe()}", ""]
    columns = ("stage", "resolution", "depth", "bound", "width", "plan")
    lines.append("".join(f"{column:>14}" for column in columns))
    rows = zip(depth.stages, plan.depths, plan.widths, strict=True)
    for index, (stage, planned, width) in enumerate(rows, start=1):
        words = f"{planned} x {width}" if planned < stage.depth else "as it is"
        cells = (index, stage.name, stage.depth, bound.bound, stage.width, words)
        lines.append("".join(f"{cell!s:>14}" for cell in cells))
    deep = len(depth.beyond(bound.bound))
    lines.append("")
    if deep:
        lines.append(
            f"{deep} of {len(depth.stages)} stages are deeper than the bound. The plan (convolutions x width) has "
            f"{100 * plan.change:+.1f} % weights on the longest path."
        )
    else:
        lines.append("No stage is deeper than the bound.")
    return "\n".join(lines)


# -- data ------------------------------------------------------------------------------------------------------------


class _Folder:
    """Image files below a folder, in order of their names."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        file = self.files[index]
        try:
            with Image.open(file) as image:
                return image.convert("L" if image.mode in ("1", "L") else "RGB")
        except Exception as error:  # Pillow reports a damaged file by many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CommandError(
                f"{file} is not an image that can be read ({reason}); remove it or copy it again"
            ) from error


def build_data(source: str, root: Path | None) -> Any:
    """Return the data that ``--data`` names, for :func:`~lightning_filterdiv.entropy_depth.images.image_source`.

    Raises:
        CommandError: there is no such data, or it cannot be read.
    """
    kind, separator, name = source.partition(":")
    if root is not None and source != "fashion_mnist" and kind != "torchvision":
        raise CommandError(f"--root belongs to --data fashion_mnist and torchvision:NAME; leave it out for {source!r}")
    known: dict[str, Callable[[], Tensor]] = {
        "digits": _digits,
        "fashion_mnist": lambda: _fashion_mnist(root),
    }
    if source in known:
        return known[source]()
    if Path(source).is_dir():
        folder = _Folder(Path(source))
        if not len(folder):
            raise CommandError(f"--data {source}: the folder holds no image files ({', '.join(sorted(_ENDINGS))})")
        return folder
    if not (separator and kind and name):
        raise CommandError(f"--data {source!r} is none of {DATA_SOURCES}")
    if kind == "torchvision":
        return _torchvision(name, root)
    search_here()
    try:
        built = getattr(importlib.import_module(kind), name)()
    except Exception as error:  # an error of the user's class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"--data {source}: it cannot be built without arguments ({reason})") from error
    return built


def _digits() -> Tensor:
    from lightning_filterdiv.demo import Digits

    return Digits().load()[0]


def _fashion_mnist(root: Path | None) -> Tensor:
    from lightning_filterdiv.demo.data import load_fashion_mnist

    try:
        return load_fashion_mnist("train", root)[0]
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error


def _torchvision(name: str, root: Path | None) -> Any:
    from torchvision import datasets

    if name not in datasets.__all__:
        raise CommandError(f"torchvision has no data set {name!r}: {', '.join(datasets.__all__[:12])}, ...")
    if root is None:
        raise CommandError(f"--data torchvision:{name} needs --root, the folder its files are in")
    try:
        return getattr(datasets, name)(str(root))
    except Exception as error:  # every data set has errors of its own for files that are missing
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"--data torchvision:{name} at {root}: {reason} (nothing is downloaded)") from error


def _example_inputs(model: nn.Module, data: Any, shape: tuple[int, ...] | None) -> Any:
    """Return the model's own example, else zeros of the images' size with the channels of its first convolution."""
    if shape is not None:
        return zeros(shape)
    if getattr(model, "example_input_array", None) is not None:
        return None
    first = next((conv for _, conv in named_convolutions(model)), None)
    if first is None:
        raise CommandError(f"{type(model).__name__} has no convolution: there is no depth to speak of; name another")
    image = list(next(image_source(data, 1).batches).shape[1:])
    channels_last = len(image) == 3 and image[-1] <= 4 < image[0]
    return torch.zeros(1, first.in_channels, *(image[:2] if channels_last else image[-2:]))
