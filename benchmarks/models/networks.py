"""Networks by name, as the configurations say it, fitted to the images of a data set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any, Literal, get_args

import torchvision
from torch import nn

from benchmarks.models.cifar_resnet import CifarResNet
from benchmarks.models.plain import SmallNet, plain_convolutions, released_c3
from benchmarks.models.staged import StagedDenseNet
from benchmarks.models.wide_resnet import WideResNet

__all__ = ["NetworkName", "build_network", "check_network"]

NetworkName = Literal[
    "c3", "c3_released", "c8", "resnet20", "resnet32", "resnet56", "resnet110", "resnet20_projection",
    "resnet56_projection", "densenet40", "wrn28_10", "wrn16_4", "vgg16_bn", "resnet18", "resnet34", "resnet50",
    "mobilenet_v2", "small_net",
]  # fmt: skip
#: Images up to this size get the usual changes for small images: stride 1 at the start, no early pooling.
SMALL = 64


def _first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, conv) for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d))


def _torchvision(name: str, channels: int, size: int, classes: int, **options: Any) -> nn.Module:
    model: nn.Module = getattr(torchvision.models, name)(num_classes=classes, **options)
    path, conv = _first_convolution(model)
    small = size <= SMALL
    kernel = 3 if small else conv.kernel_size[0]
    stride = 1 if small else conv.stride[0]
    if (channels, kernel, stride) != (conv.in_channels, conv.kernel_size[0], conv.stride[0]):
        new = nn.Conv2d(channels, conv.out_channels, kernel, stride, kernel // 2, bias=conv.bias is not None)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
    if small and name.startswith("resnet"):
        model.maxpool = nn.Identity()
    if small and name.startswith("vgg"):
        if size < 32:
            raise ValueError(f"{name} pools five times and needs images of at least 32 pixels, got {size}")
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, classes)
    return model


def _cifar(depth: int, shortcut: Literal["pad", "projection"]) -> Callable[..., nn.Module]:
    def build(channels: int, size: int, classes: int, **options: Any) -> nn.Module:
        return CifarResNet(depth, shortcut, channels=channels, classes=classes, **options)

    return build


def _c3(channels: int, size: int, classes: int, width: int = 32) -> nn.Module:
    return plain_convolutions(3, width, channels, size, classes)


def _c3_released(channels: int, size: int, classes: int, width: int = 32) -> nn.Module:
    return released_c3(width, channels, size, classes)


def _small_net(channels: int, size: int, classes: int, kernel_size: int = 7) -> nn.Module:
    return SmallNet(kernel_size, channels, size, classes)


def _c8(channels: int, size: int, classes: int, width: int = 32) -> nn.Module:
    return plain_convolutions(8, width, channels, size, classes)


def _densenet40(channels: int, size: int, classes: int, growth: int = 12) -> nn.Module:
    """Three blocks of twelve layers between stem, two transitions and the classifier; the stem has 16 channels."""
    return StagedDenseNet((14, 13, 12), (growth,) * 3, channels=channels, classes=classes, stem=16)


def _wide(depth: int, widening: int) -> Callable[..., nn.Module]:
    def build(channels: int, size: int, classes: int, **options: Any) -> nn.Module:
        return WideResNet(depth, widening, channels=channels, classes=classes, **options)

    return build


_OWN: dict[str, Callable[..., nn.Module]] = {
    "c3": _c3,
    "c3_released": _c3_released,
    "c8": _c8,
    "small_net": _small_net,
    **{f"resnet{depth}": _cifar(depth, "pad") for depth in (20, 32, 56, 110)},
    **{f"resnet{depth}_projection": _cifar(depth, "projection") for depth in (20, 56)},
    "densenet40": _densenet40,
    "wrn28_10": _wide(28, 10),
    "wrn16_4": _wide(16, 4),
}


def check_network(name: str) -> None:
    """Raise where ``name`` is neither one of :data:`NetworkName` nor a path to import from.

    Raises:
        ValueError: it says what there is.
    """
    if name not in get_args(NetworkName) and "." not in name:
        known = ", ".join(get_args(NetworkName))
        raise ValueError(f"model.network must be one of {known}, or module.function of your own, got {name!r}")


def _imported(path: str) -> Callable[..., nn.Module]:
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., nn.Module] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"model.network {path!r} cannot be imported ({error}); give module.function, with the module's folder in "
            f"PYTHONPATH or the command started from there"
        ) from error
    return found


def _own_network(path: str, channels: int, size: int, classes: int, options: dict[str, Any]) -> nn.Module:
    build = _imported(path)
    try:
        signature(build).bind(channels, size, classes, **options)
    except TypeError as error:
        raise ValueError(f"model.options {options} do not fit {path}: {error}") from error
    network = build(channels, size, classes, **options)  # what goes wrong in there is shown as it is
    if not isinstance(network, nn.Module):
        raise TypeError(f"model.network {path} made {type(network).__name__}, not a torch.nn.Module")
    return network


def build_network(name: str, image_shape: tuple[int, int, int], classes: int, **options: Any) -> nn.Module:
    """The network of that name for images ``(channels, height, width)``.

    Args:
        name: one of :data:`NetworkName`, or ``module.function`` of your own, called as
            ``function(channels, size, classes, **options)``.
        image_shape: shape of one image; height and width are equal.
        classes: outputs.
        options: further arguments of that network, such as ``width``.

    Raises:
        ValueError: unknown name, nothing to import there, an option that the network does not know, images that are
            not square or too small.
        TypeError: what was imported makes no module.
    """
    check_network(name)
    channels, height, width = image_shape
    if height != width:
        raise ValueError(f"the networks of the benchmarks need square images, got {height}x{width}")
    if "." in name:
        return _own_network(name, channels, height, classes, options)
    build = _OWN.get(name) or partial(_torchvision, name)
    try:
        return build(channels, height, classes, **options)
    except TypeError as error:
        raise ValueError(f"model.options {options} do not fit {name}: {error}") from error
