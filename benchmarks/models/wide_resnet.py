"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016): pre-activation blocks, widths 16k, 32k, 64k."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WideResNet"]


class WideBlock(nn.Module):
    """Norm, ReLU, 3x3, norm, ReLU, dropout, 3x3; a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, H/stride, W/stride)``."""
        active = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        return out + shortcut


class WideResNet(nn.Module):
    """WRN-``depth``-``widening``.

    Args:
        depth: 6n + 4.
        widening: k.
        dropout: between the convolutions of a block.
        channels: channels of the input.
        classes: outputs.

    Raises:
        ValueError: depth is not 6n + 4.
    """

    def __init__(
        self, depth: int = 28, widening: int = 10, dropout: float = 0.0, channels: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 (10, 16, 28, 40, ...), got {depth}")
        self.conv = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        inputs = 16
        for stage, outputs in enumerate((16 * widening, 32 * widening, 64 * widening), start=1):
            blocks = nn.Sequential()
            for index in range((depth - 4) // 6):
                blocks.append(WideBlock(inputs, outputs, 2 if stage > 1 and index == 0 else 1, dropout))
                inputs = outputs
            self.add_module(f"stage{stage}", blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` images to ``(B, classes)`` logits."""
        x = self.conv(x)
        for stage in ("stage1", "stage2", "stage3"):
            x = self.get_submodule(stage)(x)
        logits: Tensor = self.classifier(F.relu(self.bn(x)).mean((2, 3)))
        return logits
