"""Random small CNNs, made of a list of (operation, number) pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from benchmarks.models.channel_graph import Lambda, shuffle

# Operations whose channels can all be narrowed, whatever surrounds them.
FREE = (
    "conv",
    "norm",
    "relu",
    "silu",
    "residual",
    "concatenate",
    "repeat",
    "pool",
    "space pad",
    "excite",
    "depthwise",
    "ghost",
    "branches",
    "multiplier",
    "layer norm",
    "response norm",
    "linear",
    "channel mean",
    "split numbers",
    "attention",
    "patches",
)
# Free by themselves, but blocks of a few channels, or of unlike ones, may be too small to lose any.
BLOCKS = ("grouped", "grouped up", "group norm", "split branches", "maxout")
# Operations that may pin, or tie counts together.
MIXED = (*FREE, *BLOCKS, "split", "slice", "channel pad", "shuffle", "shuffle module", "pad module", "sigmoid", "spare")
# Channels that meet other channels of their own layer.
HOSTILE = (*MIXED, "flip sum")


def networks(operations: tuple[str, ...], most: int = 5) -> st.SearchStrategy[RandomNet]:
    """Networks of 1 to ``most`` random operations after a first convolution."""
    step = st.tuples(st.sampled_from(operations), st.integers(0, 3))
    return st.builds(RandomNet, st.lists(step, min_size=1, max_size=most), st.booleans())


class Split(nn.Module):
    """Treat two parts of the channels unlike, whose sizes are stored numbers."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split(self.sizes, 1)
        return torch.cat([F.relu(first), second], 1)


class Attention(nn.Module):
    """Heads cut out of one convolution."""

    def __init__(self, channels: int, heads: int, size: int) -> None:
        super().__init__()
        self.shape = (3, heads, size)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * heads * size, 1), nn.Conv2d(heads * size, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).unflatten(1, self.shape).transpose(-1, -2).unbind(1)
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.proj(y.transpose(-1, -2).reshape(x.shape[0], -1, *x.shape[2:]))


class RandomNet(nn.Module):
    def __init__(self, steps: list[tuple[str, int]], flatten: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.steps, self.flatten = steps, flatten
        self.parts = nn.ModuleList()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            channels = 8
            for operation, number in steps:
                part, channels = self._part(operation, number, channels)
                self.parts.append(part)
            self.hidden = nn.Linear(channels * (16 if flatten else 1), 6)
            self.out = nn.Linear(6, 3)

    def extra_repr(self) -> str:
        return f"{self.steps}, flatten={self.flatten}"

    @staticmethod
    def _part(operation: str, number: int, c: int) -> tuple[nn.Module, int]:
        new = 4 + 2 * number

        def conv(a: int, b: int) -> nn.Module:
            return nn.Conv2d(a, b, 3, padding=1)

        if operation == "conv":
            return conv(c, new), new
        if operation == "norm":
            return nn.BatchNorm2d(c), c
        if operation in ("residual", "spare"):
            return conv(c, c), c
        if operation == "attention":
            return Attention(c, 1 + number % 2, 2 + number), c
        if operation == "concatenate":
            return conv(c, new), c + new
        if operation == "repeat":
            return nn.Identity(), 2 * c
        if operation == "excite":
            return nn.Sequential(nn.Conv2d(c, 3, 1), nn.ReLU(), nn.Conv2d(3, c, 1), nn.Sigmoid()), c
        if operation == "ghost":
            return nn.ModuleList([nn.Conv2d(c, c, 3, padding=1, groups=c), nn.Conv2d(c, 2 * c, 1)]), 2 * c
        if operation in ("branches", "split branches"):
            return nn.ModuleList([nn.Conv2d(c, new, 1), conv(c, new), nn.Conv2d(new, 2 * new, 1)]), new
        if operation == "multiplier":
            return nn.Conv2d(c, 2 * c, 3, padding=1, groups=c), 2 * c
        if operation == "layer norm":
            return (LayerNorm2d(c) if number % 2 else nn.LayerNorm(c, elementwise_affine=number > 0)), c
        if operation == "response norm":
            return GlobalResponseNorm(c, channels_last=False), c
        if operation == "split numbers":
            return Split([c - c // 2, c // 2]), c
        if operation == "linear":
            return nn.Sequential(nn.Linear(c, new), nn.GELU(), nn.Linear(new, c)), c
        if operation in ("grouped", "grouped up"):
            groups = 2 if c % 2 == 0 else 1
            kind = nn.Conv2d if operation == "grouped" else nn.ConvTranspose2d
            return kind(c, 2 * new, 3, padding=1, groups=groups), 2 * new
        if operation == "group norm":
            return nn.GroupNorm(2 if c % 2 == 0 and number else 1, c), c
        if operation == "maxout":
            return nn.Conv2d(c, 3 * new, 1), new
        if operation == "depthwise":
            return nn.Conv2d(c, c, 3, padding=1, groups=c), c
        if operation == "split":
            return conv(c // 2, new), c - c // 2 + new
        if operation == "slice":
            return nn.Identity(), max(1, c - number)
        if operation == "channel pad":
            return nn.Identity(), c + 1 + number
        if operation == "pad module":
            return Lambda(lambda x: F.pad(x, (0, 0, 0, 0, number, 1))), c + 1 + number
        if operation == "shuffle module":
            return (Lambda(shuffle) if c % 2 == 0 else nn.Identity()), c
        return nn.Identity(), c

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for (operation, number), part in zip(self.steps, self.parts, strict=True):
            x = self._step(operation, number, part, x)
        x = F.adaptive_avg_pool2d(x, 4 if self.flatten else 1).flatten(1)
        return self.out(F.relu(self.hidden(x)))

    @staticmethod
    def _step(operation: str, number: int, part: nn.Module, x: Tensor) -> Tensor:
        if operation in ("relu", "silu", "sigmoid"):
            return {"relu": F.relu, "silu": F.silu, "sigmoid": torch.sigmoid}[operation](x)
        if operation in ("residual", "attention"):
            return x + part(x)
        if operation == "spare":
            F.relu(x + part(x))
            return x
        if operation == "patches":
            return F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)
        if operation == "concatenate":
            return torch.cat([x, part(x)], 1)
        if operation == "repeat":
            return torch.cat([x, -x], 1)
        if operation == "pool":
            return F.max_pool2d(x, 3, 1, 1) if number % 2 else F.avg_pool2d(x, 3, 1, 1)
        if operation == "space pad":
            return F.max_pool2d(F.pad(x, (1, 1, 2, 0)), 3, 1)
        if operation == "excite":
            return x * part(x.mean((2, 3), keepdim=True))
        if operation == "ghost":
            return torch.cat([x, torch.sigmoid(part[0](x))], 1) + part[1](x)
        if operation in ("branches", "split branches"):
            stack = torch.stack([part[0](x), part[1](x)], 1)
            if operation == "split branches":
                first, second = stack.unbind(1) if number % 2 else stack.flatten(1, 2).chunk(2, 1)
                return first * second.tanh()
            gates = part[2](stack.sum(1).mean((2, 3), keepdim=True))
            weighed = stack * gates.view(len(x), 2, -1, 1, 1).softmax(1)
            return weighed.sum(1) if number % 2 else weighed.amax(1)
        if operation == "channel mean":
            seen = x.mean(1, keepdim=True) if number < 2 else x.amax(1, keepdim=True)
            return x * torch.sigmoid(seen) if number % 2 else x - seen
        if operation == "layer norm" and not number % 2:
            return part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if operation == "linear":
            return x + part(x.movedim(1, -1)).movedim(-1, 1)
        if operation == "maxout":
            return part(x).unflatten(1, (3, -1)).amax(1)
        if operation == "split":
            a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
            return torch.cat([part(a), F.relu(b)], 1)
        if operation == "slice":
            return x[:, : x.shape[1] - number] if x.shape[1] > number else x[:, :1]
        if operation == "channel pad":
            return F.pad(x, (0, 0, 0, 0, number, 1))
        if operation == "shuffle":
            return shuffle(x) if x.shape[1] % 2 == 0 else x
        if operation == "flip sum":
            return x + x.flip(1)
        return part(x)
