"""Depth per stage of real and hand-made networks, and plans whose networks are built and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50

from benchmarks.models import StagedDenseNet, StagedResNet, StagedResNeXt
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.entropy_depth import network_depth, plan_depth
from lightning_filterdiv.entropy_depth.plan import chain_parameters
from lightning_filterdiv.narrowing import count_parameters


def _depths(model: nn.Module, size: int = 32, channels: int = 3, layers: Sequence[str] | None = None) -> list[Any]:
    graph = ChannelGraph.trace(model, torch.zeros(2, channels, size, size))
    return [(stage.name, stage.depth) for stage in network_depth(graph, layers).stages]


def test_resnet18() -> None:
    """Shortcut convolutions run beside longer paths and do not count."""
    model = resnet18()
    depth = network_depth(ChannelGraph.trace(model, torch.zeros(1, 3, 64, 64)))
    assert [stage.depth for stage in depth.stages] == [1, 4, 4, 4, 4]
    assert [stage.name for stage in depth.stages] == ["32x32", "16x16", "8x8", "4x4", "2x2"]
    assert [stage.width for stage in depth.stages] == [64, 64, 128, 256, 512]
    assert depth.total == 17
    assert depth.stages[1].layers == tuple(f"layer1.{block}.conv{i}" for block in (0, 1) for i in (1, 2))
    assert depth.stages[2].entry_weights == 64 * 128 * 9
    assert depth.stages[2].weights == 64 * 128 * 9 + 3 * 128 * 128 * 9
    assert depth.beyond(3) == [1, 2, 3, 4]
    assert depth.beyond(4) == []
    assert depth.advice(4) == ""


def test_resnet50() -> None:
    """Its stride sits in the 3x3 convolution: the 1x1 before it still runs at the resolution of the stage before."""
    depth = network_depth(ChannelGraph.trace(resnet50(), torch.zeros(1, 3, 64, 64)))
    assert [stage.depth for stage in depth.stages] == [1, 10, 12, 18, 8]
    assert depth.total == 49


class _Tangle(nn.Module):
    """Two branches of one and three convolutions, a functional one, a layer called twice, upsampling at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv2d(3, 4, 1)
        self.long = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(5, 4, 3, 3))
        self.up = nn.ConvTranspose2d(5, 2, 2, stride=2)
        self.unused = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.short(x) + self.long(x)
        x = self.twice(self.twice(x))
        return self.up(F.conv2d(F.max_pool2d(x, 2), self.weight, padding=1))


def test_counting_leaves_spectral_norms_as_they_are() -> None:
    """Reading the weight of such a layer in training takes a step of its power iteration."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3, groups=1, padding=1))
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(8, 6, (3, 1), groups=2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    depth = network_depth(ChannelGraph.trace(model, torch.zeros(2, 3, 8, 8)))
    assert [stage.weights for stage in depth.stages] == [8 * 3 * 9, 6 * 4 * 3]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_tangled_network() -> None:
    model = _Tangle()
    depth = network_depth(ChannelGraph.trace(model, torch.zeros(2, 3, 8, 8)))
    assert [(stage.name, stage.depth) for stage in depth.stages] == [("8x8", 4), ("4x4", 1), ("8x8", 1)]
    assert depth.stages[0].layers == ("long.0", "long.2", "twice", "twice")
    assert depth.stages[0].width == 4
    assert depth.stages[2].layers == ("up",)
    assert _depths(model, 8, layers=["short", "up"]) == [("8x8", 2)]
    with pytest.raises(ValueError, match="check include and exclude"):
        _depths(model, 8, layers=["elsewhere"])


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet": StagedResNet,
    "resnext": StagedResNeXt,
    "densenet": StagedDenseNet,
}


@pytest.mark.parametrize("depths", [(2, 1, 1), (3, 3, 3), (6, 2, 5), (4,)], ids=str)
@pytest.mark.parametrize("style", BUILDERS)
def test_builders_have_the_depth_they_are_asked_for(style: str, depths: tuple[int, ...]) -> None:
    widths = (8, 12, 16)[: len(depths)]
    model = BUILDERS[style](depths, widths, channels=1)
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)
    expected = list(zip(("16x16", "8x8", "4x4"), depths, strict=False))
    assert _depths(model, 16, 1) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: StagedResNet((0, 1), (4, 4)), "one number >= 1 per stage"),
        (lambda: StagedResNet((2, 1), (4,)), "one number >= 1 per stage"),
        (lambda: StagedResNeXt((2, 1), (4, 6)), "multiples of cardinality=4"),
        (lambda: StagedDenseNet((1, 3), (4, 4)), "depths\\[0\\] must be >= 2"),
    ],
)
def test_builders_refuse(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# --------------------------------------------------------------------------- plans


def _count(style: str) -> Callable[[Sequence[int], Sequence[int]], int]:
    def count(depths: Sequence[int], widths: Sequence[int]) -> int:
        with torch.device("meta"):
            return count_parameters(BUILDERS[style](depths, widths))

    return count


@pytest.mark.parametrize("bound", [2, 3, 4, 6])
@pytest.mark.parametrize("style", BUILDERS)
def test_planned_networks_have_equal_parameters(style: str, bound: int) -> None:
    """Narrow and deep against broad and shallow: built, counted, equal up to the rounding of widths."""
    depths, widths = (9, 9, 9), (16, 32, 64)
    step = 4 if style == "resnext" else 1
    plan = plan_depth(depths, widths, bound, parameters=_count(style), multiple_of=step)
    assert plan.depths == (bound,) * 3
    assert all(new > old for new, old in zip(plan.widths, widths, strict=True))
    assert all(width % step == 0 for width in plan.widths)
    model = BUILDERS[style](plan.depths, plan.widths)
    reference = BUILDERS[style](depths, widths)
    assert count_parameters(model) == pytest.approx(count_parameters(reference), rel=0.01 if step == 1 else 0.03)
    assert plan.parameters == count_parameters(model)
    assert plan.change == pytest.approx(count_parameters(model) / count_parameters(reference) - 1)


@settings(max_examples=40, deadline=None)
@given(
    stages=st.lists(st.tuples(st.integers(1, 30), st.integers(16, 512)), min_size=1, max_size=5),
    bound=st.integers(2, 8),
)
def test_plans_of_chains(stages: list[tuple[int, int]], bound: int) -> None:
    depths, widths = [d for d, _ in stages], [w for _, w in stages]
    plan = plan_depth(depths, widths, bound)
    assert plan.depths == tuple(min(d, bound) for d in depths)
    for old, new, depth in zip(widths, plan.widths, depths, strict=True):
        assert new == old if depth <= bound else new >= old
    assert abs(plan.change) < 0.05
    if not any(depth > bound for depth in depths):
        assert plan.change == 0


def test_a_single_convolution_makes_up_for_many() -> None:
    """27 w weights for 27 * 231 + 14 * 9 * 231^2: absurdly broad, but as large."""
    plan = plan_depth([15], [231], 1)
    assert abs(plan.change) < 0.001


def test_a_plan_by_hand() -> None:
    """One stage: 9 (3 w + 8 w^2) weights at depth 9 and w = 16 are 9 (3 v + 2 v^2) at depth 3, v = 31.6."""
    plan = plan_depth([9], [16], 3)
    assert plan.widths == (32,)
    assert plan.reference == 9 * (3 * 16 + 8 * 16 * 16)
    assert plan.parameters == chain_parameters([3], [32]) == 9 * (3 * 32 + 2 * 32 * 32)
    assert plan_depth([9], [1600], 3).widths == (3200,), "3 v + 2 v^2 = 3 w + 8 w^2 has the root 3199.6"


def test_the_plan_of_a_traced_network_is_that_of_its_builder() -> None:
    """From the trace alone, without knowing how the network is built."""
    model = StagedResNet((6, 6, 6), (8, 16, 32), channels=1)
    depth = network_depth(ChannelGraph.trace(model, torch.zeros(2, 1, 28, 28)))
    plan = depth.plan(3)
    broad = StagedResNet(plan.depths, plan.widths, channels=1)
    assert count_parameters(broad) == pytest.approx(count_parameters(model), rel=0.02)
    assert "stage 1 (28x28, stem.0 to " in depth.advice(3)
    assert f"6 convolutions of width 8 -> 3 of width {plan.widths[0]}" in depth.advice(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], 3), ValueError, "depths and widths must name the same stages"),
        (([3, 3], [8], 3), ValueError, "depths and widths must name the same stages, got 2 and 1"),
        (([0], [8], 3), ValueError, "every entry of depths must be an integer >= 1"),
        (([2], [0.5], 3), TypeError, "every entry of widths must be an integer"),
        (([2], [8], 0), ValueError, "bound must be an integer >= 1"),
    ],
)
def test_wrong_plans(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_depth(*arguments)
