"""Plain stacks of convolutions: RePr's "vanilla" networks C3 and C8, C3 as its released code builds it, SmallNet."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn

__all__ = ["SmallNet", "plain_convolutions", "released_c3"]


def plain_convolutions(
    depth: int = 8, width: int = 32, channels: int = 1, image_size: int = 28, classes: int = 10
) -> nn.Sequential:
    """``depth`` 3x3 convolutions of ``width`` filters with ReLU and a linear classifier (RePr, section 5).

    Max-pooling by two follows the convolutions that end the first and the second third of the depth (the paper does
    not say where it pools). Depth 3 on grey images is ``lightning_filterdiv.demo.three_convolutions``.

    Args:
        depth: convolutions, at least 3; named ``conv1``, ``conv2``, ...
        width: filters per layer.
        channels: channels of the input.
        image_size: height and width of the input, at least 4.
        classes: outputs.

    Raises:
        ValueError: depth below 3 or images below 4 pixels.
    """
    if depth < 3 or image_size < 4:
        raise ValueError(f"depth must be >= 3 and image_size >= 4, got {depth} and {image_size}")
    net = nn.Sequential()
    pools = {depth // 3, 2 * depth // 3}
    for index in range(1, depth + 1):
        net.add_module(f"conv{index}", nn.Conv2d(channels if index == 1 else width, width, 3, padding=1))
        net.add_module(f"relu{index}", nn.ReLU())
        if index in pools:
            net.add_module(f"pool{index}", nn.MaxPool2d(2))
    net.add_module("flatten", nn.Flatten())
    net.add_module("classifier", nn.Linear(width * (image_size // 4) ** 2, classes))
    return net


def released_c3(width: int = 32, channels: int = 3, image_size: int = 32, classes: int = 10) -> nn.Sequential:
    """Return C3 as the code that RePr's first author released builds it (iamaaditya/repr-ortho, ``model.py``).

    Three 5x5 convolutions with ReLU, a 3x3 max-pool of stride 2 behind each, a linear classifier. Weights are drawn
    from a normal distribution of deviation .04, cut off at two deviations; biases are zero. That code pads its pools at
    the bottom and the right only, this network on all sides: both halve the image, rounded up.

    Args:
        width: filters per layer.
        channels: channels of the input.
        image_size: height and width of the input.
        classes: outputs.
    """
    net = nn.Sequential()
    size = image_size
    for index in range(1, 4):
        net.add_module(f"conv{index}", nn.Conv2d(channels if index == 1 else width, width, 5, padding=2))
        net.add_module(f"relu{index}", nn.ReLU())
        net.add_module(f"pool{index}", nn.MaxPool2d(3, 2, padding=1))
        size = (size + 1) // 2
    net.add_module("flatten", nn.Flatten())
    net.add_module("classifier", nn.Linear(width * size**2, classes))
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.04, a=-0.08, b=0.08)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return net


class SmallNet(nn.Sequential):
    """The compact network of ExpandNets' CIFAR experiments (GUOShuxuan/expandnets, ``exp_cifar/models``).

    Three convolutions of 8, 16 and 32 filters, each with batch norm, ReLU and a 2x2 max-pool, then linear layers of 64
    units and ``classes``.

    Args:
        kernel_size: kernel size of all convolutions, odd; 7 in ``cifar_tiny_7.py``.
        channels: channels of the input.
        image_size: height and width of the input, at least 8.
        classes: outputs.
    """

    conv1: nn.Conv2d

    def __init__(self, kernel_size: int = 7, channels: int = 3, image_size: int = 32, classes: int = 10) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        widths = (channels, 8, 16, 32)
        for index, (before, after) in enumerate(pairwise(widths), start=1):
            layers[f"conv{index}"] = nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2)
            layers[f"norm{index}"] = nn.BatchNorm2d(after)
            layers[f"relu{index}"] = nn.ReLU()
            layers[f"pool{index}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = nn.Linear(32 * (image_size // 8) ** 2, 64)
        layers["relu4"] = nn.ReLU()
        layers["fc2"] = nn.Linear(64, classes)
        super().__init__(layers)
