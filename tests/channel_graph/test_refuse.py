from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_filterdiv.channel_graph import ChannelGraph

from . import models
from .checks import check_exact

IMAGE = models.image()


class Between(nn.Module):
    """Two convolutions with something between them, and a third that must stay free."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.between = between
        self.second, self.third = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(self.between(self.first(x)))))


def channel_attention(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return (torch.softmax(flat @ flat.transpose(1, 2), -1) @ flat).reshape(x.shape)


class PadThenNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(F.pad(x, (0, 0, 0, 0, 2, 2))) + F.pad(x, (0, 0, 0, 0, 4, 0)))


REFUSED: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], str]] = {
    "layer norm over channels": (
        lambda: models.ChannelNorm(8),
        r"input of layer_norm in between.norm, which mixes channels",
    ),
    "group norm": (lambda: nn.GroupNorm(2, 8), r"input of group_norm in between, which mixes channels"),
    "softmax over channels": (
        lambda: nn.Softmax(1),
        r"input of softmax in between over channels, which mixes channels",
    ),
    "channel attention": (lambda: channel_attention, r"input of matmul in forward, which mixes channels"),
    "mean over channels": (lambda: lambda x: x - x.mean(1, keepdim=True), r"mean in forward over channels"),
    "grouped": (
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
        r"input of between, a grouped convolution \(groups=2\)",
    ),
    "unknown operator": (
        lambda: lambda x: torch.cumprod(x, 2),
        r"cumprod in forward, an operator the channel graph has no",
    ),
    "gated halves": (lambda: lambda x: F.glu(torch.cat([x, x], 1), 1), r"input of glu in forward"),
    "halves multiplied": (
        lambda: lambda x: torch.cat([x[:, :4] * x[:, 4:]] * 2, 1),
        r"several filters of first meet in one channel",
    ),
    "added to itself flipped": (lambda: lambda x: x + x.flip(1), r"several filters of first meet in one channel"),
    "constants per channel": (
        lambda: lambda x: x * torch.arange(8.0).reshape(1, 8, 1, 1),
        r"meets values that no channel owns",
    ),
    "shift of padded channels": (PadThenNorm, r"."),
    "pixel shuffle": (lambda: lambda x: torch.cat([F.pixel_shuffle(x, 2)] * 4, 1), r"reads several channels as one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    make, reason = REFUSED[name]
    model = Between(make())
    graph = ChannelGraph.trace(model, IMAGE)
    assert "first" in graph.pinned
    assert re.search(reason, graph.pinned["first"]), graph.pinned["first"]
    assert "second" not in graph.pinned, "only what is concerned is pinned"
    assert graph.pinned["third"] == "network output"
    check_exact(model, IMAGE)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def test_sum_with_the_input_is_pinned() -> None:
    graph = ChannelGraph.trace(Residual(), IMAGE)
    assert graph.pinned["first"] == "meets values that no channel owns (network input 'x') in add in forward"
    assert graph.groups == []


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_computed_weights_are_pinned(kind: str) -> None:
    model = Between(nn.Identity())
    if kind == "prune":
        prune.l1_unstructured(model.second, "weight", 0.3)
    else:
        getattr(parametrizations, kind)(model.second)
    graph = ChannelGraph.trace(model, IMAGE)
    assert "whose weight is computed in forward" in graph.pinned["first"]
    assert "second" not in {layer for group in graph.groups for layer in group.layers}


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        self.head = self.Head()

    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def test_channels_that_forward_reads_are_pinned_and_those_before_are_exact() -> None:
    model = DataDependent()
    graph, _ = check_exact(model, IMAGE)
    assert [g.layers for g in graph.groups] == [("backbone.0",)]
    assert graph.pinned == {"backbone.2": "input of sum in head over channels, which mixes channels"}
    assert graph.read_values == "item in head"


class PartlyPinned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return self.second(x), x[:, 5:]


def test_partly_pinned_layers_name_the_filters() -> None:
    graph = ChannelGraph.trace(PartlyPinned(), IMAGE)
    assert graph.pinned["first"] == (
        "filters 5-7: network output; filters 0-4: their number is fixed by slice in forward"
    )


class FixedView(nn.Module):
    """The flatten of many tutorials: the width is a number in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.second(F.relu(self.first(x)))).view(-1, 8 * 16))


def test_numbers_in_a_view_pin_what_they_fix() -> None:
    model = FixedView()
    graph, _ = check_exact(model, IMAGE)
    assert graph.pinned == {"second": "their number is fixed by view in forward", "fc": "network output"}
    assert [g.name for g in graph.groups] == ["first"]


class TiedDecoder(nn.Module):
    """The decoder uses the encoder's weight, the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.encoder, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv_transpose2d(F.relu(self.encoder(self.stem(x))), self.encoder.weight))


class WeightReadTwice(nn.Module):
    def __init__(self, reader: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.reader = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), reader

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))) * self.reader(self.first.weight)


def test_tied_decoder_is_refused() -> None:
    graph = ChannelGraph.trace(TiedDecoder(), IMAGE)
    assert graph.pinned["encoder"] == "encoder.weight is the weight of layers that use it in different ways"
    assert graph.groups == []


@pytest.mark.parametrize(
    "reader",
    [lambda w: w.mean(), lambda w: torch.linalg.norm(w.flatten(1)), lambda w: w[0, 0, 0, 0], lambda w: w.exp().sum()],
    ids=["mean", "norm", "entry", "exp"],
)
def test_weights_that_are_read_otherwise_too_are_refused(reader: Callable[[Tensor], Tensor]) -> None:
    graph = ChannelGraph.trace(WeightReadTwice(reader), IMAGE)
    assert "first.weight is also read by" in graph.pinned["first"]


class Shift(nn.Module):
    """Part of the channels is shifted by slice assignment (a temporal shift module)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = torch.zeros_like(x)
        out[:, :3, 1:] = x[:, :3, :-1]
        out[:, 3:] = x[:, 3:]
        return self.second(out)


def test_slice_assignment_is_exact_or_pinned() -> None:
    graph, _ = check_exact(nn.Sequential(nn.Conv2d(3, 3, 1), Shift()), IMAGE)
    assert "1.first" in graph.pinned or graph.groups
