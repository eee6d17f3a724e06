"""Small networks, one per structure that a channel graph must get right, and a frame for what it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lambda(nn.Module):
    """A parameter-free submodule, the usual home of an option-A shortcut."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return self.function(x)


def plain(norm: bool = True, affine: bool = True) -> nn.Module:
    """Three convolutions, pooling and a linear classifier."""
    layers: list[nn.Module] = []
    for a, b in ((3, 8), (8, 12), (12, 6)):
        layers.append(nn.Conv2d(a, b, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(b, affine=affine))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def flatten_linear() -> nn.Module:
    """(8 channels, 4 x 4) -> 128 features, with a norm over the features and a hidden linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(8 * 16),
        nn.Linear(8 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )


class BasicBlock(nn.Module):
    """Two convolutions around a shortcut, see :class:`CifarResNet`."""

    def __init__(self, a: int, b: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(b)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(b)
        self.kind, self.extra = shortcut, (b - a) // 2
        self.shortcut: nn.Module = nn.Identity()
        if a != b and shortcut == "projection":
            self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        elif a != b and shortcut == "module":
            extra = self.extra
            self.shortcut = Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra)))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, a, H, W)`` to ``(B, b, H/stride, W/stride)``."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.kind == "literal" and self.extra:  # the widths are numbers in the body
            return F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra)))
        if self.kind == "relative" and self.extra:  # the body looks at the widths it meets
            missing = out.shape[1] - x.shape[1]
            return F.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing // 2, missing - missing // 2)))
        if self.kind == "concatenate" and self.extra:  # zeros made from the input
            x = x[:, :, ::2, ::2]
            return F.relu(out + torch.cat([x, x.mul(0)], 1))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for CIFAR.

    ``shortcut``: projection, module (option A), or option A in forward: literal, relative, concatenate.
    """

    def __init__(self, shortcut: str = "projection", blocks: int = 2, widths: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers: list[nn.Module] = []
        before = widths[0]
        for i, width in enumerate(widths):
            for k in range(blocks):
                layers.append(BasicBlock(before, width, 2 if k == 0 and i > 0 else 1, shortcut))
                before = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(before, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to ``(B, 5)`` logits."""
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(F.avg_pool2d(x, x.shape[-1]).view(x.size(0), -1))
        return logits


class PreActivation(nn.Module):
    """Pre-activation ResNet: norm and relu before each convolution, the stream itself is never normalised."""

    class Block(nn.Module):
        """Norm, ReLU and convolution, twice."""

        def __init__(self, a: int, b: int, stride: int) -> None:
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, stride, 1, bias=False)
            self.bn2, self.conv2 = nn.BatchNorm2d(b), nn.Conv2d(b, b, 3, 1, 1, bias=False)
            self.shortcut = nn.Conv2d(a, b, 1, stride, bias=False) if a != b else None

        def forward(self, x: Tensor) -> Tensor:
            """``(B, a, H, W)`` to ``(B, b, H/stride, W/stride)``."""
            y = F.relu(self.bn1(x))
            skip = x if self.shortcut is None else self.shortcut(y)
            added: Tensor = self.conv2(F.relu(self.bn2(self.conv1(y))))
            return skip + added

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(self.Block(8, 8, 1), self.Block(8, 12, 2), self.Block(12, 12, 1))
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to ``(B, 5)`` logits."""
        logits: Tensor = self.fc(F.relu(self.bn(self.blocks(self.conv1(x)))).mean((2, 3)))
        return logits


class DenseNet(nn.Module):
    """One dense block and a transition: every layer's filters meet several norms."""

    def __init__(self, growth: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + i * growth) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(8 + i * growth, growth, 3, 1, 1, bias=False) for i in range(layers))
        width = 8 + layers * growth
        self.norm = nn.BatchNorm2d(width)
        self.transition = nn.Conv2d(width, width // 2, 1)
        self.fc = nn.Linear(width // 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to ``(B, 5)`` logits."""
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = self.transition(F.relu(self.norm(torch.cat(features, 1))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class MobileBlock(nn.Module):
    """Expand, norm, depthwise, norm, squeeze-and-excite, project, residual sum."""

    def __init__(self, channels: int, expanded: int, excite: bool = False) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(channels, expanded, 1, bias=False), nn.BatchNorm2d(expanded)
        self.depthwise = nn.Conv2d(expanded, expanded, 3, 1, 1, groups=expanded, bias=False)
        self.bn2 = nn.BatchNorm2d(expanded)
        self.reduce = nn.Conv2d(expanded, 4, 1) if excite else None
        self.excite = nn.Conv2d(4, expanded, 1) if excite else None
        self.project, self.bn3 = nn.Conv2d(expanded, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same shape."""
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.bn2(self.depthwise(y)))
        if self.reduce is not None and self.excite is not None:
            y = y * F.hardsigmoid(self.excite(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        added: Tensor = self.bn3(self.project(y))
        return x + added


def mobile(excite: bool = False) -> nn.Module:
    """Two MobileNet blocks between stem and classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        MobileBlock(8, 16, excite),
        MobileBlock(8, 16, excite),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Interleave the channels of ``groups`` equal parts."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNet(nn.Module):
    """Split, transform one half, concatenate, shuffle. ``module``: split and shuffle are submodules where possible."""

    def __init__(self, width: int = 16, blocks: int = 2, module: bool = False) -> None:
        super().__init__()
        half = width // 2
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(half, half, 3, 1, 1), nn.BatchNorm2d(half), nn.ReLU()) for _ in range(blocks)
        )
        self.shuffle = nn.ModuleList(Lambda(shuffle) for _ in range(blocks)) if module else None
        self.left = Lambda(lambda x: x[:, :half])
        self.right = Lambda(lambda x: x[:, half:])
        self.module = module
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to ``(B, 5)`` logits."""
        x = self.stem(x)
        for i, branch in enumerate(self.branches):
            if self.shuffle is not None and i == 0:
                a, b = self.left(x), self.right(x)
                x = self.shuffle[i](torch.cat([a, branch(b)], 1))
            else:
                a, b = x.chunk(2, 1)
                x = shuffle(torch.cat([a, branch(b)], 1))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class ModuleShuffle(nn.Module):
    """Every data movement along channels sits in a submodule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 1, 1)
        self.bn = nn.BatchNorm2d(12)
        self.shuffle = nn.ChannelShuffle(3)
        self.left, self.right = Lambda(lambda x: x[:, :6]), Lambda(lambda x: x[:, 6:])
        self.a, self.b = nn.Conv2d(6, 8, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to ``(B, 5)`` logits."""
        x = self.shuffle(F.relu(self.bn(self.stem(x))))
        x = torch.cat([self.a(self.left(x)), self.b(self.right(x))], 1)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of an image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, H, W)`` to the same shape."""
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return normed.permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Two levels with skip concatenation and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.n1 = nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6)
        self.down2, self.n2 = nn.Conv2d(6, 10, 3, 2, 1), nn.BatchNorm2d(10)
        self.up = nn.ConvTranspose2d(10, 7, 2, 2)
        self.n3 = nn.BatchNorm2d(7)
        self.fuse = nn.Conv2d(13, 9, 3, 1, 1)
        self.out = nn.Conv2d(9, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to a map ``(B, 2, H, W)``."""
        a = F.relu(self.n1(self.down1(x)))
        b = F.relu(self.n2(self.down2(a)))
        b = F.interpolate(b, scale_factor=1.0, mode="nearest")
        up = F.relu(self.n3(self.up(b)))
        up = F.pad(up, (0, a.shape[-1] - up.shape[-1], 0, a.shape[-2] - up.shape[-2]))
        mask: Tensor = self.out(F.relu(self.fuse(torch.cat([a, up], 1))))
        return mask


class TwoInTwoOut(nn.Module):
    """Two inputs, two outputs (a dict), a shared trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.depth = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(1, 8, 3, 1, 1)
        self.trunk = nn.Conv2d(8, 10, 3, 1, 1)
        self.classify, self.mask = nn.Linear(10, 4), nn.Conv2d(10, 1, 1)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
        """Images ``(B, 3, H, W)`` and ``(B, 1, H, W)`` to ``classes`` ``(B, 4)`` and ``mask`` ``(B, 1, H, W)``."""
        x = F.relu(self.trunk(F.relu(self.image(image) + self.depth(depth))))
        return {"classes": self.classify(x.amax((2, 3))), "mask": self.mask(x)}


class Between(nn.Module):
    """Two convolutions with something between them, and a third that must stay free."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.between = between
        self.second, self.third = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to ``(B, 4, H, W)``."""
        features: Tensor = self.third(F.relu(self.second(self.between(self.first(x)))))
        return features


def channel_attention(x: Tensor) -> Tensor:
    """Mix the channels of ``(B, C, H, W)`` by their products with one another."""
    flat = x.flatten(2)
    return (torch.softmax(flat @ flat.transpose(1, 2), -1) @ flat).reshape(x.shape)


class PadThenNorm(nn.Module):
    """The sum of eight channels padded to twelve in two ways, of which one is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 8, H, W)`` to the same shape."""
        mixed: Tensor = self.mix(self.norm(F.pad(x, (0, 0, 0, 0, 2, 2))) + F.pad(x, (0, 0, 0, 0, 4, 0)))
        return mixed


#: What mixes channels when it stands in :class:`Between`: norms are exact, behind the others the first layer is pinned.
MIXING: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "layer norm over channels": lambda: ChannelNorm(8),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "softmax over channels": lambda: nn.Softmax(1),
    "channel attention": lambda: channel_attention,
    "shift of padded channels": PadThenNorm,
}


def image(n: int = 2, size: int = 8, channels: int = 3) -> Tensor:
    """``(n, channels, size, size)`` of noise, the same in every call."""
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(7))
