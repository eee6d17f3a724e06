"""Convolutions of every class, and which weights lie behind a channel."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_filterdiv.filters import (
    Conv,
)

ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CLASSES = ORDINARY + TRANSPOSED
KERNEL = (3, 2, 1)
IMAGE = (5, 4, 3)
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def spatial_dims(cls: type) -> int:
    return int(cls.__name__[-2])


def build(cls: type, channels: int, filters: int, groups: int = 1, layout: str = "contiguous") -> Conv:
    """A float64 convolution with asymmetric kernel and the weight in the given memory layout."""
    dims = spatial_dims(cls)
    conv = cls(channels, filters, KERNEL[:dims], groups=groups, dtype=torch.float64)
    if layout == "channels_last" and dims > 1:
        conv.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    elif layout == "strided":  # every second entry of a larger tensor: neither contiguous nor dense
        wide = torch.randn(*conv.weight.shape, 2, dtype=torch.float64)
        conv.weight.data = wide[..., 0]
    return conv


def inputs(conv: Conv) -> Tensor:
    dims = spatial_dims(type(conv))
    return torch.rand(2, conv.in_channels, *IMAGE[:dims], dtype=torch.float64) + 0.5


def weights_behind_output(conv: Conv, channel: int) -> Tensor:
    """Bool mask over the weight: which entries output channel ``channel`` depends on, by differentiation."""
    (gradient,) = torch.autograd.grad(conv(inputs(conv))[:, channel].sum(), conv.weight)
    return gradient != 0


def weights_behind_input(conv: Conv, channel: int) -> Tensor:
    """Bool mask over the weight: which entries see input channel ``channel``, by differentiation."""
    only = torch.zeros_like(image := inputs(conv))
    only[:, channel] = image[:, channel]
    (gradient,) = torch.autograd.grad(conv(only).sum(), conv.weight)
    return gradient != 0


@st.composite
def convolutions(draw: st.DrawFn) -> Conv:
    cls = draw(st.sampled_from(CLASSES))
    groups = draw(st.integers(1, 3))
    return build(
        cls,
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        groups,
        draw(st.sampled_from(["contiguous", "channels_last", "strided"])),
    )
