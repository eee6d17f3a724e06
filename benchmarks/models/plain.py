"""Plain stacks of convolutions: RePr's "vanilla" networks C3 and C8."""

from __future__ import annotations

from torch import nn

__all__ = ["plain_convolutions"]


def plain_convolutions(
    depth: int = 8, width: int = 32, channels: int = 1, image_size: int = 28, classes: int = 10
) -> nn.Sequential:
    """``depth`` 3x3 convolutions of ``width`` filters with ReLU and a linear classifier (RePr, section 5).

    Max-pooling by two follows the convolutions that end the first and the second third of the depth (the paper does
    not say where it pools). Depth 3 on grey images is ``lightning_filterdiv.demo.three_convolutions``.

    Args:
        depth: convolutions, at least 3; named ``conv1``, ``conv2``, ...
        width: filters per layer.
        channels: of the input.
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
