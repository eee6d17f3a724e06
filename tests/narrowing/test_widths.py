"""The solver of widths: exact costs, targets that are met, and what it says where they cannot be."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torchvision import models

from benchmarks.models.channel_graph import flatten_linear, plain
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.narrow import narrow
from lightning_filterdiv.narrowing import (
    TargetError,
    WidthPlan,
    WidthRule,
    count_macs,
    count_parameters,
    network_cost,
    plan_widths,
    prune_channels,
)
from lightning_filterdiv.selection import NoLayersError

IMAGES = torch.zeros(1, 3, 32, 32)


def regnet() -> nn.Module:
    return models.regnet_y_400mf(num_classes=10)


def transposed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2), nn.ReLU(), nn.Conv2d(12, 4, 1))


class NonLocal(nn.Module):
    """A product of activations whose cost grows with the channels of its values, and one that no channel changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.values, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1), nn.Conv2d(8, 4, 1)
        self.queries, self.keys = nn.Conv2d(12, 6, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        queries, keys, values = (layer(x).flatten(2) for layer in (self.queries, self.keys, self.values))
        weights = torch.softmax(queries.transpose(1, 2) @ keys, dim=-1)
        return self.last((values @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


class Heads(nn.Module):
    """Attention with heads, by torch's own operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.all, self.last = nn.Conv2d(3, 12, 3), nn.Linear(12, 3 * 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x)).flatten(2).transpose(1, 2)
        parts = self.all(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts.unbind(0))
        return self.last(mixed.transpose(1, 2).flatten(2).mean(1))


NETWORKS = {
    "plain": (plain, IMAGES),
    "flatten": (flatten_linear, torch.zeros(1, 3, 8, 8)),
    "transposed": (transposed, IMAGES),
    "products of activations": (NonLocal, torch.zeros(2, 3, 8, 8)),
    "heads": (Heads, torch.zeros(2, 3, 8, 8)),
    "resnet18": (lambda: models.resnet18(num_classes=10), IMAGES),
    "mobilenet": (lambda: models.mobilenet_v2(num_classes=10), IMAGES),
    "regnet": (regnet, IMAGES),
}


def traced(name: str) -> ChannelGraph:
    build, images = NETWORKS[name]
    model = build().eval()
    KEPT[:] = [model]
    return ChannelGraph.trace(model, images)


KEPT: list[nn.Module] = []  # a graph keeps no network alive but its own


def scores(graph: ChannelGraph) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.rand(group.size, generator=generator) for group in graph.groups}


@pytest.mark.parametrize("name", NETWORKS)
def test_cost_is_that_of_the_narrow_network(name: str) -> None:
    graph = traced(name)
    macs, parameters = network_cost(graph, "macs"), network_cost(graph, "parameters")
    assert (macs.full, parameters.full) == (
        count_macs(graph.model, graph.arguments[0]),
        count_parameters(graph.model),
    )
    generator = torch.Generator().manual_seed(1)
    keep = {}
    for group in graph.groups:
        each = int(torch.randint(1, group.size // group.block_count + 1, (), generator=generator))
        keep[group.name] = torch.cat([members[:each] for members in group.members()]).sort().values
    small = narrow(graph.model, graph, keep)
    counts = [len(keep[group.name]) for group in graph.groups]
    assert macs.of(counts) == count_macs(small, graph.arguments[0])
    assert parameters.of(counts) == count_parameters(small)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("measure", ["macs", "parameters"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet", "regnet"])
def test_a_target_is_met_within_one_percent(name: str, measure: str, scope: str) -> None:
    graph = traced(name)
    for target in (0.8, 0.5, 0.25):
        rule = WidthRule(**{f"target_{measure}": target}, scope=scope)
        plan = plan_widths(graph, rule, scores=scores(graph))
        before, after = getattr(plan, measure)
        assert abs(after / before / target - 1) <= 0.01
        assert not plan.note
        if scope == "layer":  # the same share everywhere, but for single channels, of every block where there are some
            shares = [
                ((plan.counts[g.name] - 2 * g.block_count) / g.size, (plan.counts[g.name] + 2 * g.block_count) / g.size)
                for g in graph.groups
            ]
            assert max(low for low, _ in shares) <= min(high for _, high in shares)


def test_global_widths_follow_the_scores() -> None:
    graph = traced("plain")
    given = scores(graph)
    first, second = (group.name for group in graph.groups[:2])
    given[first] = torch.linspace(0.99, 1.01, len(given[first]))  # hardly any channel below the mean
    plan = plan_widths(graph, WidthRule(keep_fraction=0.6, scope="global"), scores=given)
    share = {name: plan.counts[name] / plan.sizes[name] for name in (first, second)}
    assert share[first] > share[second]
    assert sum(plan.counts.values()) == -(-6 * sum(plan.sizes.values()) // 10)


@pytest.mark.parametrize("multiple", [4, 8])
def test_multiples_come_within_half_of_the_smallest_step(multiple: int) -> None:
    graph = traced("resnet18")
    plan = plan_widths(graph, WidthRule(target_macs=0.5, channels_multiple=multiple))
    assert all(count % multiple == 0 for count in plan.counts.values())
    cost = network_cost(graph, "macs")
    counts = [plan.counts[group.name] for group in graph.groups]
    apart = abs(cost.of(counts) - 0.5 * cost.full)
    steps = [
        abs(value - cost.of(counts))
        for sign in (-1, 1)
        for value in cost.with_changes(counts, [sign * multiple] * len(counts))
    ]
    assert apart <= 0.5 * min(steps)


def test_blocks_keep_equally_many_and_no_layer_loses_more_than_allowed() -> None:
    graph = traced("regnet")
    rule = WidthRule(target_macs=0.6, scope="global", max_layer_fraction=0.45)
    plan = plan_widths(graph, rule, scores=scores(graph))
    for group in graph.groups:
        assert plan.counts[group.name] % group.block_count == 0
        assert plan.counts[group.name] >= 0.55 * group.size - 1e-9
    assert any(group.block_count > 1 and plan.counts[group.name] < group.size for group in graph.groups)


def test_widths_that_forward_ties_together_are_made_up_for() -> None:
    model = models.shufflenet_v2_x0_5(num_classes=10).eval()
    graph = ChannelGraph.trace(model, IMAGES)
    plan = plan_widths(graph, WidthRule(target_macs=0.5))
    before, after = plan.macs
    assert abs(after / before / 0.5 - 1) <= 0.01
    assert graph.expressible_counts(plan.counts) == plan.counts


def test_a_plan_is_a_table() -> None:
    graph = traced("plain")
    text = str(plan_widths(graph, WidthRule(target_macs=0.5), left_alone={"8": "network output"}))
    lines = text.splitlines()
    assert lines[0].split() == ["channels", "of", "now", "kept", "share"]
    assert any(line.startswith("MACs: ") for line in lines)
    assert lines[-2] == "asked for: target_macs=0.5"
    assert lines[-1] == "left alone: 8: network output"


def test_fractions_by_pattern() -> None:
    graph = traced("plain")
    plan = plan_widths(graph, WidthRule(keep_fraction={"0": 0.5}))
    assert plan.counts == {"0": 4, "3": 12, "6": 6}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "give one of keep_fraction, target_macs and target_parameters: none of them was given"),
        ({"keep_fraction": 0.5, "target_macs": 0.5}, "got keep_fraction and target_macs"),
        ({"target_macs": 1.5}, "is a share of the full network, 0 < target_macs <= 1, got 1.5; for half write 0.5"),
        ({"target_macs": 0.0}, "target_macs must be a finite number with 0 < target_macs <= 1"),
        ({"target_macs": 0.5, "channels_multiple": 0}, "channels_multiple must be an integer >= 1"),
        ({"target_macs": 0.5, "max_layer_fraction": 1.0}, "max_layer_fraction < 1"),
        ({"target_macs": 0.5, "scope": "network"}, "scope must be one of 'layer', 'global'"),
        ({"keep_fraction": {"*": 0.5}, "scope": "global"}, "scope='global' needs one number"),
    ],
)
def test_bad_rules(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        WidthRule(**arguments)
    assert "\n" not in str(caught.value)


def test_what_is_out_of_reach_says_what_is_not() -> None:
    graph = traced("resnet18")
    with pytest.raises(TargetError, match="out of reach") as caught:
        plan_widths(graph, WidthRule(target_macs=0.2, max_layer_fraction=0.3))
    message = str(caught.value)
    assert "max_layer_fraction=0.3" in message
    assert "\n" not in message
    least = float(message.partition("Ask for at least ")[2].partition(",")[0])
    plan = plan_widths(graph, WidthRule(target_macs=least, max_layer_fraction=0.3))
    assert isinstance(plan, WidthPlan)
    with pytest.raises(ValueError, match=r"more than max_layer_fraction=0\.3"):
        plan_widths(graph, WidthRule(keep_fraction=0.5, max_layer_fraction=0.3))


def test_nothing_left_to_narrow() -> None:
    with pytest.raises(NoLayersError, match="no layer is left to narrow: 0: network output") as caught:
        prune_channels(nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGES, target_macs=0.5)
    assert "\n" not in str(caught.value)
