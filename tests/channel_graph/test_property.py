from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

from benchmarks.models import channel_graph as models
from lightning_filterdiv.channel_graph import ChannelGraph

from .checks import EXACT
from .grammar import FREE, HOSTILE, MIXED, RandomNet, networks

IMAGE = models.image(size=6)
# A trace costs a good part of a second: no time for shrinking, the first failing network is small enough to read.
LONG = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
}


def check_free(examples: int) -> None:
    """No pins but the output's, and everything verifies."""

    @settings(max_examples=examples, **LONG)
    @given(networks(FREE))
    def check(model: RandomNet) -> None:
        graph = ChannelGraph.trace(model, IMAGE)
        assert graph.pinned == {"out": "network output"}
        assert graph.verify() <= EXACT

    check()


def check_mixed(examples: int) -> None:
    """Whatever is not pinned verifies; most networks keep a convolution that is not pinned."""
    keeps = []

    @settings(max_examples=examples, **LONG)
    @given(networks(MIXED))
    def check(model: RandomNet) -> None:
        graph = ChannelGraph.trace(model, IMAGE)
        assert graph.verify() <= EXACT
        narrowable = {layer for group in graph.groups for layer in group.layers}
        keeps.append(any(isinstance(model.get_submodule(layer), nn.Conv2d) for layer in narrowable))

    check()
    assert len(keeps) >= examples // 2
    assert sum(keeps) >= 0.8 * len(keeps)


@pytest.mark.soak
def test_hostile_networks_are_exact() -> None:
    @settings(max_examples=150, **LONG)
    @given(networks(HOSTILE))
    def check(model: RandomNet) -> None:
        assert ChannelGraph.trace(model, IMAGE).verify() <= EXACT

    check()


def test_free_networks_have_no_pins() -> None:
    check_free(8)


def test_mixed_networks_are_exact() -> None:
    check_mixed(10)


@pytest.mark.soak
def test_many_free_networks_have_no_pins() -> None:
    check_free(150)


@pytest.mark.soak
def test_many_mixed_networks_are_exact() -> None:
    check_mixed(400)


def test_the_check_can_fail() -> None:
    """A graph that forgets what happened between producer and consumer is found out."""
    model = RandomNet([("split", 1), ("norm", 0)], flatten=False)
    graph = ChannelGraph.trace(model, IMAGE)
    assert graph.verify() <= EXACT
    group = graph.groups[0]
    wrong = next(p for p in group.parts if p.kind == "consumer")
    wrong.rows.copy_(wrong.rows.roll(1, 0))
    with pytest.raises(ValueError, match="differs by"):
        graph.verify()
    assert torch.isfinite(wrong.rows.double()).all()
