"""Partitions of filters: exactly so many clusters, k-means where it is asked for, wrong arguments."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models import channel_graph as models
from lightning_filterdiv.centripetal import (
    cluster_channels,
    cluster_filters,
)
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.narrowing.widths import kept_count

IMAGE = models.image()


@pytest.mark.parametrize("method", ["kmeans", "even", "imbalanced"])
@pytest.mark.parametrize(("count", "kept"), [(16, 10), (7, 7), (9, 1), (64, 40)])
def test_every_method_gives_exactly_so_many_clusters(method: Any, count: int, kept: int) -> None:
    filters = torch.randn(count, 27, generator=torch.Generator().manual_seed(0))
    filters[1::2] = filters[0]  # fewer distinct filters than clusters
    index = cluster_filters(filters, kept, method=method, seed=3)
    assert index.dtype == torch.int64
    assert sorted(index.unique().tolist()) == list(range(kept))
    assert torch.equal(index, cluster_filters(filters, kept, method=method, seed=3))
    sizes = index.bincount()
    if method == "even":
        assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
        assert int(sizes.max() - sizes.min()) <= 1
    if method == "imbalanced":
        assert sizes.tolist() == [count - kept + 1] + [1] * (kept - 1)


def test_kmeans_finds_what_belongs_together() -> None:
    centres = 10 * torch.randn(4, 20, generator=torch.Generator().manual_seed(1))
    truth = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 0])
    noise = torch.randn(10, 20, generator=torch.Generator().manual_seed(2))
    assert torch.equal(cluster_filters(centres[truth] + 0.1 * noise, 4), truth)


@pytest.mark.parametrize(("count", "length", "kept"), [(16, 27, 10), (32, 2000, 20), (12, 12, 5), (20, 400, 19)])
def test_kmeans_in_the_space_of_the_filters_is_kmeans(
    count: int, length: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long rows are clustered by as many coordinates as there are filters; every distance, so every cluster, stays."""
    filters = torch.randn(count, length, generator=torch.Generator().manual_seed(4)).double()
    seen: list[Tensor] = []
    fit = KMeans.fit

    def spy(self: KMeans, rows: Any) -> KMeans:
        seen.append(torch.from_numpy(rows))
        return fit(self, rows)  # type: ignore[no-any-return]

    monkeypatch.setattr(KMeans, "fit", spy)
    short = cluster_filters(filters, kept, seed=2)
    assert seen[0].shape == (count, min(count, length))
    apart = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(apart(seen[0], seen[0]), apart(filters, filters))
    monkeypatch.setattr(torch.linalg, "qr", lambda rows, mode: SimpleNamespace(R=rows))  # no change of coordinates
    assert torch.equal(cluster_filters(filters, kept, seed=2), short)
    assert seen[1].shape == (count, length)


@pytest.mark.parametrize("spectrum", ["flat", "decaying"])
def test_one_start_is_enough_for_many_filters(spectrum: str) -> None:
    """Within 1.5 % of the sum of squares that ten starts reach, for a tenth of minutes."""
    generator = torch.Generator().manual_seed(5)
    filters = torch.randn(520, 520, generator=generator, dtype=torch.float64)
    if spectrum == "decaying":
        scales = torch.arange(1, 521, dtype=torch.float64).rsqrt()
        filters = torch.linalg.qr(filters).Q * scales @ torch.randn(520, 520, generator=generator, dtype=torch.float64)
    index = cluster_filters(filters, 325)
    assert sorted(index.unique().tolist()) == list(range(325))
    centres = torch.zeros(325, 520, dtype=torch.float64).index_add_(0, index, filters)
    centres /= index.bincount()[:, None]
    ten = KMeans(325, n_init=10, random_state=0).fit(filters.numpy()).inertia_
    assert float((filters - centres[index]).square().sum()) < 1.015 * ten


@pytest.mark.parametrize(("count", "starts"), [(512, 10), (513, 1)])
def test_many_filters_are_clustered_from_one_start(count: int, starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fit = KMeans.fit
    monkeypatch.setattr(KMeans, "fit", lambda self, rows: seen.append(self.n_init) or fit(self, rows))
    cluster_filters(torch.randn(count, 2, generator=torch.Generator().manual_seed(0)), 3)
    assert seen == [starts]


def test_wrong_cluster_arguments() -> None:
    filters = torch.randn(8, 3)
    for wrong, message in ((0, "between 1 and the 8 filters, got 0"), (9, "got 9")):
        with pytest.raises(ValueError, match=message):
            cluster_filters(filters, wrong)
    with pytest.raises(ValueError, match="method must be one of"):
        cluster_filters(filters, 3, method="fuzzy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be a \(J, d\) matrix"):
        cluster_filters(torch.zeros(3), 2)


def test_kept_counts() -> None:
    assert [kept_count(16, f) for f in (13 / 16, 11 / 16, 5 / 8, 1.0, 0.01)] == [13, 11, 10, 16, 1]
    assert kept_count(10, 0.7) == 7  # 0.7 * 10 is a little more than 7 in floating point
    assert kept_count(3, 1 / 3) == 1


def test_coupled_layers_share_one_clustering_of_all_their_kernels() -> None:
    """Two layers of a residual sum: what only the second one tells apart must still be told apart."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
            self.out = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.a(x) + self.b(x)))

    model = Sum()
    with torch.no_grad():
        model.a.weight.fill_(1.0)
        model.b.weight.copy_(torch.tensor([0.0, 5.0, 0.0, 5.0]).view(4, 1, 1, 1).expand(4, 3, 1, 1))
    clusters = cluster_channels(model, ChannelGraph.trace(model, IMAGE), 0.5)
    assert {name: index.tolist() for name, index in clusters.items()} == {"a": [0, 1, 0, 1]}
