"""Networks whose depth and width are free in every stage: ResNet, DenseNet and ResNeXt style.

``depths[s]`` is the number of convolutions at the resolution of stage ``s`` on the longest path, the stem counting into
the first stage: what ``lightning_filterdiv.entropy_depth.network_depth`` measures. Every stage after the first halves
the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["StagedDenseNet", "StagedResNeXt", "StagedResNet"]


def _check(depths: Sequence[int], widths: Sequence[int]) -> None:
    if not depths or len(depths) != len(widths) or min(*depths, *widths) < 1:
        raise ValueError(f"depths and widths need one number >= 1 per stage, got {list(depths)} and {list(widths)}")


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Convolutions with norms around a shortcut without parameters: every second pixel, channels padded with zeros.

    Args:
        layers: convolutions with norms, applied one after the other with ReLU between.
        inputs: channels that come in.
        outputs: channels that go out.
        stride: stride of the first layer.
    """

    def __init__(self, layers: Sequence[nn.Module], inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.extra_channels, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, ceil(H/stride), ceil(W/stride))``."""
        inner = x
        for index, layer in enumerate(self.layers):
            inner = layer(F.relu(inner) if index else inner)
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))
        return F.relu(inner + shortcut)


class _Staged(nn.Module):
    """Stem, stages, global average, linear classifier."""

    def __init__(self, stages: Sequence[nn.Module], stem: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` images to ``(B, classes)`` logits."""
        x = F.relu(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


class StagedResNet(_Staged):
    """Residual blocks of two 3x3 convolutions; an odd depth ends with a block of one.

    Args:
        depths: convolutions per stage.
        widths: channels per stage.
        channels: channels of the input.
        classes: outputs.

    Raises:
        ValueError: not one number >= 1 per stage.
    """

    def __init__(self, depths: Sequence[int], widths: Sequence[int], channels: int = 3, classes: int = 10) -> None:
        _check(depths, widths)
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = nn.Sequential()
            remaining = depth - (stage == 0)
            stride = 1 if stage == 0 else 2
            while remaining:
                count = min(2, remaining)
                layers = [_convolution(inputs, width, 3, stride)]
                layers += [_convolution(width, width, 3) for _ in range(count - 1)]
                blocks.append(Residual(layers, inputs, width, stride))
                inputs, stride, remaining = width, 1, remaining - count
            stages.append(blocks)
        super().__init__(stages, _convolution(channels, widths[0], 3), inputs, classes)


class StagedResNeXt(_Staged):
    """Bottleneck blocks (1x1, grouped 3x3, 1x1 to twice the width); the stride is in the first convolution.

    What a depth leaves over beyond blocks of three is a shorter block without its last, or first two, convolutions.

    Args:
        depths: convolutions per stage.
        widths: channels of the grouped convolutions per stage; the stage's output has twice as many.
        cardinality: groups.
        channels: channels of the input.
        classes: outputs.

    Raises:
        ValueError: not one number >= 1 per stage, or a width that ``cardinality`` does not divide.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        cardinality: int = 4,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        _check(depths, widths)
        if any(width % cardinality for width in widths):
            raise ValueError(f"widths must be multiples of cardinality={cardinality}, got {list(widths)}")
        stages: list[nn.Module] = []
        inputs = 2 * widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = nn.Sequential()
            remaining = depth - (stage == 0)
            stride = 1 if stage == 0 else 2
            while remaining:
                count = min(3, remaining)
                if count == 1:
                    layers = [_convolution(inputs, 2 * width, 1, stride)]
                else:
                    last = 2 * width if count == 2 else width
                    layers = [
                        _convolution(inputs, width, 1, stride),
                        _convolution(width, last, 3, groups=cardinality),
                    ]
                    layers += [_convolution(width, 2 * width, 1)] if count == 3 else []
                blocks.append(Residual(layers, inputs, 2 * width, stride))
                inputs, stride, remaining = 2 * width, 1, remaining - count
            stages.append(blocks)
        super().__init__(stages, _convolution(channels, 2 * widths[0], 3), inputs, classes)


class DenseLayer(nn.Module):
    """Norm, ReLU, 3x3 convolution; its output is appended to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, inputs + growth, H, W)``."""
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], dim=1)


class StagedDenseNet(_Staged):
    """Dense layers without bottleneck (DenseNet-40); a 1x1 transition and pooling end every stage but the last.

    The stem counts into the first stage, each transition into the stage it ends.

    Args:
        depths: convolutions per stage; the first stage needs at least 2 where another follows.
        widths: growth rate per stage.
        channels: channels of the input.
        classes: outputs.
        stem: its channels; twice the first growth rate by default.

    Raises:
        ValueError: not one number >= 1 per stage, or no room for stem and transition.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        channels: int = 3,
        classes: int = 10,
        stem: int | None = None,
    ) -> None:
        _check(depths, widths)
        if len(depths) > 1 and depths[0] < 2:
            raise ValueError(f"the first stage holds stem and transition: depths[0] must be >= 2, got {depths[0]}")
        stages: list[nn.Module] = []
        features = first = 2 * widths[0] if stem is None else stem
        for stage, (depth, growth) in enumerate(zip(depths, widths, strict=True)):
            final = stage == len(depths) - 1
            layers = nn.Sequential()
            for _ in range(depth - (stage == 0) - (not final)):
                layers.append(DenseLayer(features, growth))
                features += growth
            if final:
                layers.extend([nn.BatchNorm2d(features), nn.ReLU()])
            else:
                transition = nn.Conv2d(features, features, 1, bias=False)
                layers.extend([nn.BatchNorm2d(features), nn.ReLU(), transition, nn.AvgPool2d(2)])
            stages.append(layers)
        super().__init__(stages, _convolution(channels, first, 3), features, classes)
