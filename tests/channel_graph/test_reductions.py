"""Reductions over channels that forward makes itself: counted in graph form where clusters are unequal."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from benchmarks.models.channel_graph import image
from lightning_filterdiv.channel_graph import ChannelGraph, NarrowingError
from lightning_filterdiv.channel_graph.counted import CountedReduction
from lightning_filterdiv.channel_graph.narrow import tie
from lightning_filterdiv.channel_graph.verify import compare, randomise
from lightning_filterdiv.narrowing import load_merged, merge_channels, prune_channels, save_merged

from .checks import check_exact, merge

IMAGE = image()
UNEQUAL = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
EQUAL = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])

Reduce = Callable[[Tensor], Tensor]
# name -> (reduction to one channel, needs counts where clusters are equal, where they are unequal)
REDUCTIONS: dict[str, tuple[Reduce, bool, bool]] = {
    "mean": (lambda x: x.mean(1, keepdim=True), False, True),
    "mean without dimension": (lambda x: x.mean(dim=1).unsqueeze(1), False, True),
    "mean of everything": (lambda x: x.mean((1, 2, 3), keepdim=True), False, True),
    "mean of all entries": (lambda x: x.mean(), False, True),
    "mean of the last": (lambda x: x.permute(0, 2, 3, 1).mean(-1).unsqueeze(1), False, True),
    "sum": (lambda x: x.sum(1, keepdim=True), True, True),
    "norm": (lambda x: x.norm(dim=1, keepdim=True), True, True),
    "squares": (lambda x: x.pow(2).mean(1, keepdim=True).add(1e-5).rsqrt(), False, True),
    "max": (lambda x: x.max(1, keepdim=True)[0], False, False),
    "amax": (lambda x: x.amax(1, keepdim=True), False, False),
    "min": (lambda x: x.min(dim=1).values.unsqueeze(1), False, False),
}


class Gate(nn.Module):
    """Scale every position by something of all channels."""

    def __init__(self, reduce: Reduce) -> None:
        super().__init__()
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.reduce(x))


class Around(nn.Module):
    def __init__(self, inner: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.first, self.inner, self.second = nn.Conv2d(3, width, 3), inner, nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.inner(F.relu(self.first(x))))


class SpatialAttention(nn.Module):
    """Of CBAM: mean and maximum over channels say which positions count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.conv(seen))


def _network(inner: nn.Module) -> nn.Module:
    model = Around(inner).double().eval()
    randomise(model, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("name", REDUCTIONS)
def test_channels_are_counted_where_clusters_are_unequal(name: str) -> None:
    reduce, *counts = REDUCTIONS[name]
    model = _network(Gate(reduce))
    graph = ChannelGraph.trace(model, IMAGE)
    assert graph.pinned == {"second": "network output"}
    for clusters, is_counted in zip((EQUAL, UNEQUAL), counts, strict=True):
        tied = copy.deepcopy(model)
        tie(tied, graph, {"first": clusters})
        narrow = merge(tied, graph, {"first": clusters})
        assert compare(tied, narrow, (IMAGE.double(),), {}) <= 1e-12
        assert isinstance(narrow.inner, fx.GraphModule) == is_counted
        assert any(isinstance(module, CountedReduction) for module in narrow.modules()) == is_counted


@pytest.mark.parametrize("name", REDUCTIONS)
def test_narrow_again(name: str) -> None:
    _, narrow = check_exact(Around(Gate(REDUCTIONS[name][0])), IMAGE, keep=0.7)
    graph, twice = check_exact(narrow, IMAGE, seed=1, keep=0.5)
    assert graph.pinned == {"second": "network output"}
    counted = [module for module in twice.modules() if isinstance(module, CountedReduction)]
    assert all(int(module.counts.sum()) == 8 for module in counted)
    assert len(counted) == REDUCTIONS[name][2]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_pruning_keeps_a_plain_reduction(name: str) -> None:
    reduce = REDUCTIONS[name][0]
    model = _network(Gate(reduce))
    pruned, report = prune_channels(model, IMAGE.double(), keep_fraction=0.5)
    assert report.difference <= 1e-9
    assert isinstance(pruned.inner, Gate)
    x = F.relu(pruned.first(IMAGE.double()))
    torch.testing.assert_close(pruned(IMAGE.double()), pruned.second(x * torch.sigmoid(reduce(x))))


def test_spatial_attention_is_merged_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Around(SpatialAttention()).eval()
    graph = ChannelGraph.trace(model, IMAGE)
    assert graph.private("first") == "input of mean in inner, which mixes channels"
    tie(model, graph, {"first": UNEQUAL})
    merged, report = merge_channels(model, {"first": UNEQUAL}, IMAGE)
    assert report.trim <= 1e-12
    assert [str(choice) for choice in report.forms] == ["inner: graph form (mean counts channels)"]
    torch.testing.assert_close(merged(IMAGE), model(IMAGE))
    save_merged(merged, tmp_path / "narrow.pt")
    loaded = load_merged(Around(SpatialAttention()).eval(), tmp_path / "narrow.pt")
    assert torch.equal(loaded(IMAGE), merged(IMAGE))
    assert [str(module) for module in loaded.modules()] == [str(module) for module in merged.modules()]
    for other in (copy.deepcopy(merged), loaded.train()):
        other(torch.cat([IMAGE, IMAGE])).square().mean().backward()
        assert all(p.grad is not None for p in other.parameters())
    torch.testing.assert_close(merged.to(torch.bfloat16)(IMAGE.bfloat16()).float(), model(IMAGE), rtol=0.1, atol=0.1)


class Inline(nn.Module):
    """The network's own forward takes the mean; twice, of other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x - x.mean(1, keepdim=True))
        return self.last(F.normalize(x, dim=1))


def test_a_reduction_in_the_forward_of_the_whole_network() -> None:
    graph, narrow = check_exact(Inline(), IMAGE, keep=0.5)
    assert graph.pinned == {"last": "network output"}
    assert isinstance(narrow, fx.GraphModule)
    graph, _ = check_exact(narrow, IMAGE, seed=1, keep=0.5)
    assert graph.pinned == {"last": "network output"}
    assert prune_channels(Inline(), IMAGE, keep_fraction=0.5).report.difference <= 1e-9


def test_module_form_takes_equal_clusters_only() -> None:
    model = _network(Gate(REDUCTIONS["mean"][0]))
    graph = ChannelGraph.trace(model, IMAGE)
    tie(model, graph, {"first": EQUAL})
    assert isinstance(merge_channels(model, {"first": EQUAL}, IMAGE, form="module").network.inner, Gate)
    with pytest.raises(NarrowingError, match=r"mean in inner must count channels.*make all clusters equally large"):
        merge_channels(model, {"first": UNEQUAL}, IMAGE, form="module", tolerance=float("inf"))


class TwoCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.second = nn.Conv2d(3, 8, 3), Gate(REDUCTIONS["mean"][0]), nn.Conv2d(8, 8, 3)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gate(self.second(self.gate(self.first(x)))))


def test_a_body_that_counts_other_channels_in_each_call_pins_them() -> None:
    graph = ChannelGraph.trace(TwoCalls(), IMAGE)
    assert graph.groups == []
    assert "gate is called several times, with other channels to count" in graph.pinned["second"]


class OneStream(TwoCalls):
    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.first(x))
        return self.last(self.gate(x + self.second(F.pad(x, (1, 1, 1, 1)))))


def test_a_body_that_counts_the_same_channels_in_each_call_is_one_graph() -> None:
    graph, _ = check_exact(OneStream(), IMAGE, keep=0.5)
    assert [g.layers for g in graph.groups] == [("first", "second")]


class Lightning(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Inline()

    def forward(self, x: Tensor) -> Tensor:
        x = self.net.first(x)
        return self.net.last(self.net.second(x * x.mean(1, keepdim=True)))


def test_a_forward_without_a_graph_form_pins_what_it_counts() -> None:
    graph = ChannelGraph.trace(Lightning(), IMAGE)
    assert [g.name for g in graph.groups] == ["net.second"]
    assert "mean in forward over channels, which must count them, and" in graph.pinned["net.first"]
    assert "LightningModule, which keeps its class" in graph.pinned["net.first"]


@pytest.mark.parametrize(
    ("reduce", "reason"),
    [
        (lambda x: x.max(1, keepdim=True)[1].float(), "input of max in inner over channels, which mixes channels"),
        (lambda x: x.softmax(1), "input of softmax in inner over channels, which mixes channels"),
        (lambda x: x.cumsum(1), "input of cumsum in inner over channels, which mixes channels"),
        (lambda x: x.norm(p=1, dim=1, keepdim=True), "input of .*norm in inner over channels, which mixes channels"),
    ],
    ids=["argmax", "softmax", "cumsum", "another norm"],
)
def test_what_no_count_makes_right_is_pinned(reduce: Reduce, reason: str) -> None:
    graph = ChannelGraph.trace(Around(Gate(reduce)), IMAGE)
    assert re.fullmatch(reason, graph.pinned["first"])


def test_indices_in_the_output_pin() -> None:
    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x)
            values, indices = x.max(1)
            return self.last(x) * values.unsqueeze(1), indices

    assert "numbers them in a network output" in ChannelGraph.trace(Numbered(), IMAGE).pinned["first"]
