from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from benchmarks.models.channel_graph import MIXING, Between, image
from lightning_filterdiv.channel_graph import ChannelGraph

from .checks import check_exact

IMAGE = image()

REFUSED: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], str]] = {
    "layer norm in a larger forward": (
        lambda: lambda x: F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1),
        r"input of layer_norm in forward, which mixes channels",
    ),
    "layer norm over channels and space": (
        lambda: nn.LayerNorm([8, 8, 8]),
        r"input of layer_norm in between, which mixes channels",
    ),
    "softmax over channels": (
        MIXING["softmax over channels"],
        r"input of softmax in between over channels, which mixes channels",
    ),
    "channel attention": (
        MIXING["channel attention"],
        r"input of matmul in forward, which multiplies every channel by every other",
    ),
    "variance over channels": (
        lambda: lambda x: x * x.var(1, keepdim=True),
        r"input of var in forward over channels, which mixes channels",
    ),
    "unknown operator": (
        lambda: lambda x: torch.cumprod(x, 2),
        r"cumprod in forward, an operator the channel graph has no",
    ),
    "constants per channel": (
        lambda: lambda x: x * torch.arange(8.0).reshape(1, 8, 1, 1),
        r"meets values that no channel owns",
    ),
    "shift of padded channels": (MIXING["shift of padded channels"], r"."),
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


def _standardised(model: Between) -> None:
    model.second = ScaledStdConv2d(8, 6, 3, padding=1)


def _spectral(model: Between) -> None:
    parametrizations.spectral_norm(model.second)


COMPUTED: dict[str, Callable[[Between], object]] = {
    "weight_norm": lambda model: parametrizations.weight_norm(model.second),
    "weight_norm by a hook": lambda model: nn.utils.weight_norm(model.second),
    "prune": lambda model: prune.l1_unstructured(model.second, "weight", 0.3),
    "standardised": _standardised,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", COMPUTED)
def test_filters_of_computed_weights_may_go_and_their_columns_may_not(kind: str) -> None:
    model = Between(nn.Identity())
    COMPUTED[kind](model)
    graph, narrowed = check_exact(model, IMAGE)
    assert re.search(r"input of conv2d in second, whose weight is computed by \w+ in second", graph.pinned["first"])
    assert [group.layers for group in graph.groups] == [("second",)]
    assert narrowed.second.out_channels < 6
    assert graph.private("second") == "forward computes the kernel of second from its weight"


@pytest.mark.parametrize("kind", ["weight norm", "standardised"])
def test_computed_weights_of_depthwise_and_grouped_layers(kind: str) -> None:
    def conv(reads: int, writes: int, groups: int) -> nn.Module:
        if kind == "standardised":
            return ScaledStdConv2d(reads, writes, 3, padding=1, groups=groups)
        return parametrizations.weight_norm(nn.Conv2d(reads, writes, 3, padding=1, groups=groups))

    plain = nn.Conv2d(3, 8, 3), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 4, 1)
    graph, narrowed = check_exact(nn.Sequential(plain[0], conv(8, 16, 8), plain[1], conv(12, 12, 2), plain[2]), IMAGE)
    assert [(g.layers, g.size, g.block_count) for g in graph.groups] == [(("0", "1"), 8, 1), (("3",), 12, 2)]
    assert graph.layers == ["0", "1", "2", "3", "4"]
    assert re.search(r"input of conv2d in 3, whose weight is computed by \w+ in 3", graph.pinned["2"])
    assert graph.private("0") == "forward computes the kernel of 1 from its weight"
    assert narrowed[1].groups == narrowed[0].out_channels < 8
    assert narrowed[3].groups == 2
    check_exact(narrowed, IMAGE, seed=1, keep=0.7)


class Order(nn.Module):
    """Efficient channel attention: a kernel slides along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).unsqueeze(1))
        return x * y.sigmoid().view(len(x), -1, 1, 1)


def test_a_kernel_along_the_channels_pins_them() -> None:
    graph = ChannelGraph.trace(Between(Order()), IMAGE)
    assert graph.pinned["first"].endswith("slides over channels, so that their order counts")


def test_a_weight_that_mixes_its_filters_is_pinned_by_name() -> None:
    model = Between(nn.Identity())
    _spectral(model)
    graph = ChannelGraph.trace(model, IMAGE)
    assert "second" not in {layer for group in graph.groups for layer in group.layers}
    assert re.search("its weight is computed by .* from all of its filters at once", graph.pinned["second"])
    assert graph.why_absent("second") == graph.pinned["second"]


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(1, -1).flatten(0, 2) @ self.matrix).view(len(x), *x.shape[2:], -1).movedim(-1, 1)


class ActivationMap(nn.Module):
    """Class activation maps: a linear layer once more, as a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.linear.weight[:, :, None, None]) * self.linear(x.mean((2, 3)))[:, :, None, None]


REASONS: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "softmax over a stack of branches": (
        lambda: Between(
            lambda x: (
                torch.stack([x, x.flip(1)], 1)
                .flatten(1, 2)
                .unflatten(1, (2, 8))
                .permute(0, 2, 1, 3, 4)
                .softmax(1)
                .sum(2)
            )
        ),
        IMAGE,
        "first",
        "input of softmax in forward over dimension 1, which mixes channels",
    ),
    "a matrix that is the weight of no layer": (
        lambda: Between(Projection()),
        IMAGE,
        "first",
        "input of matmul in between by between.matrix, which is the weight of no convolution or linear layer",
    ),
    "another layer's weight": (
        lambda: Between(ActivationMap()),
        IMAGE,
        "first",
        "input of conv2d in between, whose weight is between.linear.weight in another form: columns do not add",
    ),
    "products over channels within heads": (
        lambda: Between(
            lambda x: (x.view(2, 2, 4, -1).softmax(-1) @ x.view(2, 2, 4, -1).mT @ x.view(2, 2, 4, -1)).view(x.shape)
        ),
        torch.rand(2, 3, 8, 8),
        "first",
        "input of matmul in forward, which multiplies every channel by every other",
    ),
    "local response norm": (
        lambda: Between(nn.LocalResponseNorm(3)),
        IMAGE,
        "first",
        "input of avg_pool3d in between, which slides over channels, so that their order counts",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_name_the_operator_and_the_axis(name: str) -> None:
    make, inputs, layer, reason = REASONS[name]
    assert ChannelGraph.trace(make(), inputs).pinned[layer] == reason


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
    assert graph.pinned == {"backbone.2": "used after item in head read values that decide what forward does"}
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
    assert graph.pinned["first"] == "filters 5-7: network output"


class FixedView(nn.Module):
    """The flatten of many tutorials: the width is a number in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.second(F.relu(self.first(x)))).view(-1, 8 * 16))


def test_numbers_in_a_view_pin_nothing() -> None:
    model = FixedView()
    graph, _ = check_exact(model, IMAGE)
    assert graph.pinned == {"fc": "network output"}
    assert [g.name for g in graph.groups] == ["first", "second"]


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


def test_a_layer_that_forward_does_not_call_is_said_to_be_that() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    graph = ChannelGraph.trace(Unused(), torch.rand(1, 3, 8, 8))
    assert "unused" not in graph.layers
    assert graph.why_absent("unused").startswith("the trace follows none of its channels: forward does not call it")
    assert graph.why_absent("b") == "network output"
