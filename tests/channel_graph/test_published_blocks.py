"""Blocks as their authors write them, between two convolutions: only the output is pinned, and merging is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph

from .checks import check_exact

IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class BottleneckAttention(nn.Module):
    """BAM: a gate of one channel, expanded over all of them before it meets the gates per channel."""

    def __init__(self, repeats: bool) -> None:
        super().__init__()
        self.channel, self.space, self.repeats = nn.Linear(12, 12), nn.Conv2d(12, 1, 1), repeats

    def forward(self, x: Tensor) -> Tensor:
        gate = self.channel(x.mean((2, 3)))[:, :, None, None].expand_as(x)
        space = self.space(x)
        space = space.repeat(1, x.shape[1], 1, 1) if self.repeats else space.expand_as(x)
        return x * (1 + torch.sigmoid(gate * space))


class Standardised(nn.Module):
    """NAFNet's norm over channels, computed in forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / (variance + self.eps).sqrt()
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Mosaic(nn.Module):
    """Such a norm behind a pixel shuffle, where four filters of one channel lie at different positions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.norm = nn.Conv2d(12, 16, 2, 2), nn.Conv2d(16, 48, 1), Standardised(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.pixel_shuffle(self.up(self.down(x)), 2) + x)


class Chebyshev(nn.Module):
    """A Chebyshev expansion: the polynomial of degree zero is one everywhere, and a convolution reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv2d(12, 12, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        polynomials = (torch.ones_like(x), x, 2 * x * x - 1)
        return sum((part(p) for part, p in zip(self.parts, polynomials, strict=True)), torch.zeros(()))


class TokenMixing(nn.Module):
    """MLP-Mixer: a linear layer along positions, alike for every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(64, 20), nn.GELU(), nn.Linear(20, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        y = y + self.tokens(y.transpose(1, 2)).transpose(1, 2)
        return y.transpose(1, 2).reshape(x.shape)


class Mask(nn.Module):
    """Truth values that switch channels off."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(12).view(1, 12, 1, 1) % 3 > 0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class Resized(nn.Module):
    """Resized without aliasing, as positions of a ViT are."""

    def forward(self, x: Tensor) -> Tensor:
        half = F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
        return x + F.interpolate(half, size=x.shape[2:], mode="bilinear", antialias=True)


class CostVolume(nn.Module):
    """GwcNet: correlations of blocks of channels at several shifts, written into a tensor made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(3, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        volume = x.new_zeros(len(x), 3, 4, *x.shape[2:])
        for shift in range(4):
            product = x[..., shift:] * x[..., : x.shape[-1] - shift]
            volume[:, :, shift, :, shift:] = product.view(len(x), 3, 4, *product.shape[2:]).mean(2)
        return self.volume(volume).mean(2)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "expanded gate": (lambda: BottleneckAttention(False), 12),
    "repeated gate": (lambda: BottleneckAttention(True), 12),
    "norm behind a pixel shuffle": (Mosaic, 12 + 16),
    "ones in the places of channels": (Chebyshev, 12 + 12),
    "linear layers along positions": (TokenMixing, 12),
    "mask of truth values": (Mask, 12),
    "resized without aliasing": (Resized, 12),
    "correlations of blocks": (CostVolume, 3 + 12),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_merged_exactly(name: str) -> None:
    torch.manual_seed(0)
    make, count = BLOCKS[name]
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.Sequential(make()), nn.Conv2d(12, 4, 1))
    graph, narrow = check_exact(model, IMAGE)
    gates = {"1.0.space": "acts on all channels at once in mul in 1.0"} if "gate" in name else {}
    assert graph.pinned == {"2": "network output"} | gates
    assert sum(group.size for group in graph.groups) == count
    check_exact(narrow, IMAGE, seed=1, keep=0.7)


def test_only_channels_that_a_mask_treats_alike_are_merged() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), Mask(), nn.Conv2d(12, 4, 1))
    graph = ChannelGraph.trace(model, IMAGE)
    assert sorted(group.size for group in graph.groups) == [4, 8]
    masked = next(group for group in graph.groups if group.size == 4)
    assert masked.rows("0").flatten().tolist() == [0, 3, 6, 9]


class Standardise(nn.Conv2d):
    """Weight standardisation written by hand."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        return F.conv2d(input, weight, self.bias, self.stride, self.padding)


class Binary(nn.Conv2d):
    """XNOR-Net: signs, with the mean size of each filter."""

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.conv2d(input.sign(), self.weight.sign() * scale, None, self.stride, self.padding)


@pytest.mark.parametrize("kind", [Standardise, Binary])
def test_filters_of_a_weight_that_is_scaled_by_its_own_means_can_go(kind: type[nn.Conv2d]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8, 12, 3), nn.Conv2d(12, 4, 1))
    graph, _ = check_exact(model, IMAGE)
    assert [(group.name, group.size) for group in graph.groups] == [("1", 12)]
    assert graph.pinned["0"].endswith("columns do not add")


class Masked(nn.Module):
    """PixelCNN: kernels with a mask of their own shape, in the forward of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 4, 1)
        self.register_buffer("mask", torch.ones(12, 8, 3, 3))
        self.mask[:, :, 1, 2:], self.mask[:, :, 2] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight * self.mask
        return self.last(F.conv2d(self.first(x).relu(), weight, self.second.bias, padding=1).relu())


def test_filters_of_a_kernel_with_a_mask_can_go() -> None:
    graph, narrow = check_exact(Masked(), IMAGE)
    assert [(group.name, group.size) for group in graph.groups] == [("second", 12)]
    assert narrow.mask.shape == narrow.second.weight.shape


class Normalised(nn.Module):
    """A kernel divided by the norm of all filters, in the forward of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight
        return self.last(F.conv2d(self.first(x), weight / weight.norm(), self.second.bias))


def test_a_layer_whose_weight_forward_takes_is_named() -> None:
    graph = ChannelGraph.trace(Normalised(), IMAGE)
    assert graph.pinned["second"] == "its weight is computed by div in forward, from all of its filters at once"
    assert graph.pinned["first"] == "input of conv2d in forward, whose weight is computed by div in forward"
