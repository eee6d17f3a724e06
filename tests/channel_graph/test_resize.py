"""Which groups forward lets nobody narrow, found on shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.models import channel_graph as models
from lightning_filterdiv.channel_graph import ChannelGraph, pointwise
from lightning_filterdiv.channel_graph.resize import find_unresizable
from lightning_filterdiv.channel_graph.trace import trace_at

from .checks import EXACT

IMAGE = torch.zeros(1, 3, 32, 32)


class Fixed(nn.Module):
    """A number in forward fits the width of the second convolution only; ``trait`` says what does not run on meta."""

    def __init__(self, trait: str = "") -> None:
        super().__init__()
        self.trait = trait
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.trait == "a tensor made in forward":
            x = x * torch.linspace(0, 1, x.shape[-1])
        elif self.trait == "a number read from a tensor":
            x = x * (1 if x.sum().item() == 0 else -1)
        elif self.trait == "a shape that depends on values":
            x = x[:, :, : len(torch.nonzero(x[0, 0, :, 0] == x[0, 0, :, 0]))]
        return self.head(self.pool(self.conv2(x).relu()).view(-1, 32))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "squeezenet1_0": torchvision.models.squeezenet1_0,
    "CifarResNet": models.CifarResNet,
    "DenseNet": models.DenseNet,
    "U-Net": models.UNet,
    "a width fixed in forward": Fixed,
}


def trace_before_trials(model: nn.Module) -> ChannelGraph:
    return trace_at(model.eval(), ((IMAGE,), {}), "", ChannelGraph)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=pytest.mark.soak if name == "mobilenet_v3_small" else (), id=name)
        for name, make in NETWORKS.items()
    ],
)
def test_only_what_a_number_in_forward_fixes_is_unresizable(make: Callable[[], nn.Module]) -> None:
    graph = trace_before_trials(make())
    assert [group.name for group in find_unresizable(graph)] == (["conv2"] if make is Fixed else [])


def test_tensors_made_in_forward_do_not_matter() -> None:
    graph, plain = ChannelGraph.trace(Fixed("a tensor made in forward"), IMAGE), ChannelGraph.trace(Fixed(), IMAGE)
    assert (
        [(g.name, g.size) for g in graph.groups]
        == [(g.name, g.size) for g in plain.groups]
        == [("conv1", 12), ("conv2", 8)]
    )
    assert graph.pinned == plain.pinned
    assert graph.verify() <= EXACT


@pytest.mark.parametrize("trait", ["a number read from a tensor", "a shape that depends on values"])
def test_what_is_used_after_a_read_is_pinned_and_nothing_is_tried(trait: str) -> None:
    graph = ChannelGraph.trace(Fixed(trait), IMAGE)
    assert graph.groups == []
    assert "read values that decide what forward does" in graph.pinned["conv2"]
    assert find_unresizable(graph) == []


def everything(graph: ChannelGraph) -> Any:
    """All that a graph says, in a form that compares."""
    groups = [(g.name, [(p.tensor, p.kind, p.dim, p.rows.tolist()) for p in g.parts]) for g in graph.groups]
    answers = {layer: graph.private(layer) for layer in graph.layers}
    private = {k: v if isinstance(v, str) else [(name, rows.tolist()) for name, rows in v] for k, v in answers.items()}
    return groups, graph.pinned, private, {layer: dict(graph._region(layer).exposed) for layer in graph.layers}


class Joins(nn.Module):
    """Sums, products, a maximum and a quotient of channels that meet, some of them padded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(3, 6, 3, padding=1) for _ in range(8))
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g, h = (conv(x) for conv in self.conv)
        y = torch.maximum(a.relu(), b) + torch.sigmoid(c) * (d + 1) + (e + 1) / (f.exp() + 2)
        padded = torch.cat([g[:, :4].tanh(), torch.zeros_like(g[:, :2])], dim=1)
        return self.head(y + padded + h * h.relu())


@pytest.mark.parametrize(
    "make",
    [
        Joins,
        models.CifarResNet,
        lambda: models.mobile(excite=True),
        models.PreActivation,
        pytest.param(torchvision.models.mobilenet_v3_small, marks=pytest.mark.soak),
    ],
    ids=["joins", "CifarResNet", "mobile with SE", "pre-activation", "mobilenet_v3_small"],
)
def test_channels_that_meet_at_once_or_one_by_one(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, at_once = make().eval(), 0
    original = pointwise._Join._meet_alike

    def count(join: Any, columns: Any) -> Any:
        nonlocal at_once
        results = original(join, columns)
        at_once += results is not None
        return results

    monkeypatch.setattr(pointwise._Join, "_meet_alike", count)
    found = everything(trace_before_trials(model))
    assert at_once > 0
    monkeypatch.setattr(pointwise._Join, "_meet_alike", lambda join, columns: None)
    assert everything(trace_before_trials(model)) == found
