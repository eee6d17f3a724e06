"""Run inside ``torchrun --nproc-per-node 2``: divided work has the bits of a single process, and no rank hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_filterdiv import CentripetalSGD, FilterSimilarityMonitor, RePr
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import filter_matrix, select_filters
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.narrowing.clusters import cluster_channels
from lightning_filterdiv.narrowing.importance import redundancy_scores
from lightning_filterdiv.repr_.functional import rank_filters
from lightning_filterdiv.repr_.network import DroppedFilters
from lightning_filterdiv.tensors import sharing
from lightning_filterdiv.tensors.rank_check import RankDivergenceError
from tests.ddp import test_two_ranks as two
from tests.ddp.test_two_ranks import fit_ddp, raises_on_every_rank, setup_module
from tests.support.training import small_net

__all__ = ["setup_module"]  # pytest calls it: the process group, and the rank


def same(one: Any, other: Any) -> bool:
    """True if two nested results are equal to the bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or one != one)


def network() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    net = nn.Sequential(*small_net()[:9], nn.Conv2d(8, 40, 1), nn.ReLU(), nn.Conv2d(40, 40, 3, padding=1))
    return net, ChannelGraph.trace(net, torch.zeros(1, 1, 8, 8))


def new_filters(among_ranks: bool) -> Any:
    net, graph = network()
    dropped = DroppedFilters.drop(net, graph, {"3": torch.tensor([1, 4]), "9": torch.arange(11)})
    return dropped.new_filters(1.0, (3,), among_ranks=among_ranks)


WORK: dict[str, Callable[[nn.Module, ChannelGraph, bool], Any]] = {
    "look": lambda net, graph, among: redundancy_metrics(select_filters(net), among_ranks=among),
    "ranking": lambda net, graph, among: rank_filters(
        {name: filter_matrix(conv) for name, conv in select_filters(net).items()}, among_ranks=among
    ),
    "new directions": lambda net, graph, among: new_filters(among),
    "clusters": lambda net, graph, among: cluster_channels(net, graph, 0.5, among_ranks=among),
    "importances": lambda net, graph, among: redundancy_scores(net, graph, graph.groups, among_ranks=among),
}


@pytest.mark.parametrize("name", WORK)
def test_divided_work_has_the_bits_of_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[list[Any]] = []
    divide = sharing.divide
    monkeypatch.setattr(sharing, "divide", lambda *a: (found := divide(*a), parts.extend(found))[0])
    shared = WORK[name](*network(), True)
    assert len(parts) == 2
    assert all(parts), "a rank has nothing to do"
    assert shared
    assert same(shared, WORK[name](*network(), False))


#: By callback: what it knows after a fit.
METHODS: dict[str, Callable[[], Callback]] = {
    "repr": lambda: RePr(full_epochs=1, sub_epochs=1, cycles=1),
    "csgd": lambda: CentripetalSGD(keep_fraction=0.5, scope="global"),
    "monitor": lambda: FilterSimilarityMonitor(figures=False),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_ends_as_if_every_rank_computed_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = METHODS[name]()
    first = fit_ddp([shared], max_steps=18)
    monkeypatch.setattr(sharing, "divide", lambda costs, shares: [list(costs)] * shares)
    whole = METHODS[name]()
    second = fit_ddp([whole], max_steps=18)
    assert same(first.tensors(), second.tensors())
    assert same(shared.state_dict(), whole.state_dict())
    states: list[Any] = [None, None]
    dist.all_gather_object(states, shared.state_dict())
    assert same(*states), "ranks must hold one state"


def test_an_error_on_one_rank_is_raised_on_both() -> None:
    def compute(layer: str) -> Tensor:
        if layer == "b":
            raise ValueError(f"layer {layer} holds NaN")
        return torch.zeros(3)

    costs = {"a": 2.0, "b": 1.0}
    message = raises_on_every_rank(lambda: sharing.share(costs, compute, among_ranks=True), ValueError)
    assert message == "layer b holds NaN"
    mine = costs | {"b": 1.0 + two.RANK}
    raises_on_every_rank(lambda: sharing.share(mine, len, among_ranks=True), RankDivergenceError)
    sent = sharing.share(costs, lambda layer: torch.arange(5 if layer == "a" else 100_000), among_ranks=True)
    assert [part.numel() for part in sent.values()] == [5, 100_000]
