"""ResNets for 32x32 images (He et al., CVPR 2016, section 4.2): 6n + 2 layers of widths w, 2w, 4w."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CifarResNet"]


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides; no parameters."""

    def __init__(self, extra_channels: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C + extra, ceil(H/2), ceil(W/2))``."""
        before = self.extra_channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.extra_channels - before))


class Block(nn.Module):
    """Two 3x3 convolutions with norms around an identity, option A or projection shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Literal["pad", "projection"]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            self.shortcut = PadShortcut(outputs - inputs) if shortcut == "pad" else projection

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, H/stride, W/stride)``."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-20, -32, -56, -110 for small images.

    Args:
        depth: 6n + 2.
        shortcut: ``"pad"`` (option A, the original) or ``"projection"`` (1x1 convolution and norm).
        width: channels of the first stage.
        channels: channels of the input.
        classes: outputs.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(
        self,
        depth: int = 20,
        shortcut: Literal["pad", "projection"] = "pad",
        width: int = 16,
        channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (20, 32, 56, 110, ...), got {depth}")
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        inputs = width
        for stage, outputs in enumerate((width, 2 * width, 4 * width), start=1):
            blocks = nn.Sequential()
            for index in range((depth - 2) // 6):
                stride = 2 if stage > 1 and index == 0 else 1
                blocks.append(Block(inputs, outputs, stride, shortcut))
                inputs = outputs
            self.add_module(f"stage{stage}", blocks)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` images to ``(B, classes)`` logits."""
        x = F.relu(self.bn(self.conv(x)))
        for stage in ("stage1", "stage2", "stage3"):
            x = getattr(self, stage)(x)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
