"""Layers, optimizers and training loops of these tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_filterdiv.async_update.functional import (
    AsynchronousUpdate,
)
from lightning_filterdiv.filters import Conv

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
Make = Callable[[Sequence[nn.Parameter]], Optimizer]
STEPS = 10_000

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, dampening=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5, fused=True),
}

LAYERS: dict[str, Callable[[], Conv]] = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2)),
    "conv3d": lambda: nn.Conv3d(6, 8, (3, 2, 1)),
    "grouped": lambda: nn.Conv2d(6, 9, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "no bias": lambda: nn.Conv2d(6, 8, 3, bias=False),
    "channels_last": lambda: nn.Conv2d(6, 8, (3, 2)).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, (3, 2)),
    "transposed grouped": lambda: nn.ConvTranspose2d(6, 8, (3, 2), groups=2),
    "transposed channels_last": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2).to(memory_format=torch.channels_last),
    "transposed 1d": lambda: nn.ConvTranspose1d(6, 9, 3, groups=3),
    "transposed 3d": lambda: nn.ConvTranspose3d(6, 8, 2, groups=2),
}


def weight_mask(conv: Conv, axis: str, subset: Tensor) -> Tensor:
    """Entries of the weight in the subset, slice by slice, written independently of ``mask_layout``."""
    mask = torch.zeros(conv.weight.shape, dtype=torch.bool)
    transposed = isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    for s in subset.nonzero().flatten().tolist():
        if axis == "in":
            mask[s if transposed else (slice(None), s)] = True
        elif transposed:
            group, local = divmod(s, conv.out_channels // conv.groups)
            fan_in = conv.in_channels // conv.groups
            mask[group * fan_in : (group + 1) * fan_in, local] = True
        else:
            mask[s] = True
    return mask


def give_gradients(parameters: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def several(make: Callable[[], Conv]) -> nn.ModuleDict:
    """Two layers of one layout, one of another, and a norm that no subset touches."""
    torch.manual_seed(0)
    layers = {"a": make(), "b": make(), "c": nn.Conv2d(4, 5, 3), "norm": nn.BatchNorm2d(3)}
    return nn.ModuleDict(layers).double()


def expected_masks(model: nn.Module, layers: Mapping[str, Conv], update: AsynchronousUpdate, axis: str) -> list[Tensor]:
    """For every parameter of ``model``, which entries the last draw lets move."""
    masks = {id(p): torch.ones(p.shape, dtype=torch.bool) for p in model.parameters()}
    for name, subset in update.last_subsets.items():
        conv = layers[name]
        masks[id(conv.weight)] = weight_mask(conv, axis, subset)
        if axis == "out" and conv.bias is not None:
            masks[id(conv.bias)] = subset
    return [masks[id(p)] for p in model.parameters()]


def net(channels: int = 4) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 5, 3), nn.Flatten(1),
        nn.Linear(20, 2),
    )  # fmt: skip


def train(model: nn.Module, optimizer: Optimizer, update: AsynchronousUpdate | None, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(11)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean().backward()
        if update is not None:
            update.before_step(step)
        optimizer.step()
        if update is not None:
            update.after_step()
