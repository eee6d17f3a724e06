"""Networks that decide on values. Decisions that rounding may change are taken over, and the numbers behind them are
compared."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.decisions import FollowDecisions, RecordDecisions, relative_difference
from lightning_filterdiv.channel_graph.narrow import merging, narrow, tie
from lightning_filterdiv.channel_graph.verify import prove, random_clusters


class Twins(nn.Module):
    """Two heads with the same weights; which of the two is larger is decided by rounding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.two.load_state_dict(self.one.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        one, two = self.one(x), self.two(x)
        return torch.maximum(one, two), one > two


class Boxes(nn.Module):
    """Scores and boxes at every position, and non-maximum suppression."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU()
        )
        self.scores, self.sizes = nn.Conv2d(24, 1, 1), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        scores = self.scores(x).flatten().sigmoid()
        sizes = self.sizes(x).flatten(2)[0].T.abs()
        corner = torch.arange(len(scores), dtype=x.dtype, device=x.device)[:, None].expand(-1, 2)
        boxes = torch.cat([corner - sizes[:, :2], corner + 1 + sizes[:, 2:]], dim=1)
        best = scores.topk(20).indices
        chosen = best[torchvision.ops.nms(boxes[best], scores[best], 0.3)]
        return {"boxes": boxes[chosen], "scores": scores[chosen], "count": torch.tensor(len(chosen))}


@pytest.mark.parametrize("network", [Twins, Boxes])
def test_what_rounding_decides_is_no_difference(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = network().eval()
    graph = ChannelGraph.trace(model, torch.randn(1, 3, 32, 32))
    assert sum(group.size for group in graph.groups) == {"Twins": 48, "Boxes": 40}[network.__name__]
    for seed in range(5):
        assert graph.verify(seed=seed) <= 1e-12


def test_a_wrong_network_is_told_though_its_decisions_are_taken_over() -> None:
    """The outputs are truth values alone: they equal the reference's whatever the narrow network computes."""

    class Mask(Twins):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[1]

    torch.manual_seed(0)
    model = Mask().eval()
    graph = ChannelGraph.trace(model, torch.randn(1, 3, 16, 16))
    clusters = random_clusters(graph, torch.Generator().manual_seed(0))
    tie(model, graph, clusters)
    keep, sums = merging(graph, clusters)
    assert prove(model, lambda m: narrow(m, graph, keep, sums), graph).exact

    def spoiled(m: nn.Module) -> nn.Module:
        result = narrow(m, graph, keep, sums)
        with torch.no_grad():
            result.get_parameter("two.2.bias").add_(1e-4)
        return result

    proof = prove(model, spoiled, graph)
    assert not proof.exact
    assert 1e-6 < proof.difference < 1e-2


def test_another_way_through_forward_is_compared_as_it_is() -> None:
    """Decisions are followed while the same operators decide; then no more."""
    x = torch.randn(4, 5)
    with RecordDecisions() as record:
        expected = x.argmax(1)
    assert [decision.operator for decision in record.decisions] == ["aten.argmax.default"]
    with FollowDecisions(record.decisions) as follow:
        assert torch.equal((x + 1e-3).argmax(1), expected)
        assert torch.equal((-x).argmin(1), (-x).argmin(1))
    assert 0 < follow.difference < 1e-2
    with FollowDecisions(record.decisions) as follow:
        assert torch.equal((-x).argmin(1), expected)  # not recorded: computed
        assert torch.equal((-x).argmax(1), x.argmin(1))  # no longer followed
    assert follow.difference == 0.0


def test_relative_difference() -> None:
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([1.0, -4.0, nan, inf])
    assert relative_difference(a, a.clone()) == 0.0
    assert relative_difference(a, torch.tensor([1.0, -3.0, nan, inf])) == 0.25
    assert relative_difference(a, torch.tensor([1.0, -4.0, 0.0, inf])) == inf
    assert relative_difference(torch.zeros(0), torch.zeros(0)) == 0.0
