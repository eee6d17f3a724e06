"""Several filters of one layer in a channel, and channels in the blocks of grouped convolutions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.channel_graph import Between, image
from lightning_filterdiv.centripetal import CentripetalUpdate, cluster_channels, clustered_tensors
from lightning_filterdiv.centripetal.functional import cluster_means, equalise
from lightning_filterdiv.channel_graph import ChannelGraph, NarrowingError
from lightning_filterdiv.channel_graph.narrow import tie
from lightning_filterdiv.channel_graph.verify import compare
from lightning_filterdiv.narrowing import merge_channels, narrow

from .checks import check_exact, merge, mergeable

IMAGE = image()


class Ghost(nn.Module):
    """Half of the channels are made of the other half, and a second layer is added to both."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.other, self.head = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return self.head(F.relu(torch.cat([primary, self.cheap(primary).sigmoid()], 1) + self.other(x)))


class Kernels(nn.Module):
    """Branches of two kernel sizes, weighed against each other (SKNet) or reduced at once."""

    def __init__(self, reduce: str) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze, self.select, self.head = nn.Conv2d(8, 5, 1), nn.Conv2d(5, 16, 1), nn.Conv2d(8, 4, 1)
        self.reduce = reduce

    def forward(self, x: Tensor) -> Tensor:
        stack = torch.stack([self.small(x), self.large(x)], 1)
        if self.reduce == "select":
            gates = self.select(F.relu(self.squeeze(stack.sum(1).mean((2, 3), keepdim=True))))
            stack = stack * gates.view(len(x), 2, -1, 1, 1).softmax(1)
            return self.head(stack.sum(1))
        if self.reduce == "product":  # weights of an image for all channels of a branch
            weights = x.mean((2, 3))[:, :2].softmax(-1)
            return self.head(F.relu(torch.einsum("bk,bkchw->bchw", weights, stack)))
        if self.reduce == "unbind":
            first, second = stack.unbind(1)
            return self.head(first - second.tanh())
        if self.reduce == "split":
            first, second = stack.split(1, 1)
            return self.head((first * second).squeeze(1))
        return self.head(F.relu(getattr(stack, self.reduce)(1)))


class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pieces, self.head = nn.Conv2d(3, 18, 3, padding=1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pieces(x).unflatten(1, (3, -1)).amax(1))


def _multiplier(conv: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), conv(6, 18, 1, groups=6), nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 4, 1)
    )


# name -> (network, layer, its filters in each channel, mergeable channels)
LINKED: dict[str, tuple[Callable[[], nn.Module], str, list[list[int]], int]] = {
    "ghost": (Ghost, "other", [[j, j + 6] for j in range(6)], 6),
    "weighed branches": (lambda: Kernels("select"), "select", [[j, j + 8] for j in range(8)], 8 + 5),
    "branches in a product": (lambda: Kernels("product"), "large", [[j] for j in range(8)], 8),
    "summed branches": (lambda: Kernels("sum"), "large", [[j] for j in range(8)], 8),
    "branches unbound again": (lambda: Kernels("unbind"), "large", [[j] for j in range(8)], 8),
    "branches split again": (lambda: Kernels("split"), "large", [[j] for j in range(8)], 8),
    "maximum of branches": (lambda: Kernels("amax"), "small", [[j] for j in range(8)], 8),
    "maxout": (Maxout, "pieces", [[j, j + 6, j + 12] for j in range(6)], 6),
    "depthwise multiplier": (lambda: _multiplier(nn.Conv2d), "1", [[3 * j, 3 * j + 1, 3 * j + 2] for j in range(6)], 6),
    "transposed multiplier": (lambda: _multiplier(nn.ConvTranspose2d), "1", [[j] for j in range(6)], 6),
    "pixel shuffle": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 64, 3), nn.PixelShuffle(2), nn.Conv2d(16, 3, 3)
        ),
        "2",
        [[4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3] for j in range(16)],
        8 + 16,
    ),
    "pixel shuffle of a grouped layer": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3, groups=4), nn.PixelShuffle(2), nn.Conv2d(16, 3, 3)
        ),
        "2",
        [[4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3] for j in range(16)],
        16 + 16,
    ),
    "added to itself flipped": (
        lambda: Between(lambda x: x + 2 * x.flip(1)),
        "first",
        [[j, 7 - j] for j in range(4)],
        4 + 6,
    ),
    "subtracted from itself flipped": (
        lambda: Between(lambda x: x - x.flip(1)),
        "first",
        [[j, 7 - j] for j in range(4)],
        4 + 6,
    ),
}


@pytest.mark.parametrize("name", LINKED)
def test_filters_that_meet_in_a_channel_are_linked(name: str) -> None:
    make, layer, rows, count = LINKED[name]
    graph, narrowed = check_exact(make(), IMAGE)
    group = next(g for g in graph.groups if layer in g.layers)
    found = group.rows(layer).reshape(group.size, -1)
    assert sorted(sorted(row) for row in found.tolist()) == rows
    assert mergeable(graph) == count
    assert set(graph.pinned.values()) == {"network output"}
    assert check_exact(narrowed, IMAGE, seed=1)[0].pinned == graph.pinned, "and narrowed again"


def test_filter_k_is_merged_with_filter_k() -> None:
    """The sum of two ghosts, by hand: channels 0 and 2 of six become one."""
    model = Ghost().double()
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = {"primary": torch.tensor([0, 1, 0, 2, 3, 4])}
    before = model.other.weight.detach().clone()
    columns = model.head.weight.detach().clone()
    tie(model, graph, clusters)
    assert torch.equal(model.other.weight[0], (before[0] + before[2]) / 2)
    assert torch.equal(model.other.weight[6], (before[6] + before[8]) / 2)
    narrowed = merge(model, graph, clusters)
    assert torch.equal(narrowed.other.weight, model.other.weight[[0, 1, 3, 4, 5, 6, 7, 9, 10, 11]])
    assert torch.equal(narrowed.head.weight[:, [0, 5]], columns[:, [0, 6]] + columns[:, [2, 8]])


class Swapped(nn.Module):
    """The filters of a channel stand in another order for every other channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        both = torch.stack([a, a.sigmoid()], 2)  # (N, 4, 2, H, W)
        signs = torch.stack([both, both.flip(2)], 1).flatten(1, 3)  # twice, the second time the other way round
        b = torch.cat([self.b(x), self.b(x)], 1)
        return self.head((signs * b)[:, :8] + (signs * b)[:, 8:])


def test_filters_in_different_roles_are_told_apart() -> None:
    graph = ChannelGraph.trace(Swapped(), IMAGE)
    assert graph.verify() <= 1e-12


def test_a_layer_in_one_channel_is_pinned() -> None:
    graph = ChannelGraph.trace(Between(lambda x: x + x.roll(1, 1)), IMAGE)
    assert graph.pinned["first"] == "8 filters of first meet in one channel"


class Heads(nn.Module):
    """Softmax inside heads, whose number or whose width is a number in forward."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.head, self.shape = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 4, 1), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).unflatten(1, self.shape).softmax(2).flatten(1, 2))


def test_a_number_that_narrow_branches_would_contradict_is_rewritten() -> None:
    free = ChannelGraph.trace(Heads((-1, 3)), IMAGE)
    assert free.groups[0].rows("first").sort(dim=1).values.tolist() == [[3 * j, 3 * j + 1, 3 * j + 2] for j in range(4)]
    assert free.verify() <= 1e-12
    fixed, narrow = check_exact(Heads((4, -1)), IMAGE)
    assert fixed.pinned == {"head": "network output"}
    assert isinstance(narrow, torch.fx.GraphModule)


# -- blocks ------------------------------------------------------------------------------------------------------------


def _grouped(conv: type[nn.Module] = nn.Conv2d) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        conv(8, 12, 3, padding=1, groups=2),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    )


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_grouped_convolutions_are_narrowed_on_both_sides(conv: type[nn.Module]) -> None:
    graph, narrowed = check_exact(_grouped(conv), IMAGE, keep=0.5)
    assert [(g.name, g.size, g.block_count) for g in graph.groups] == [("0", 8, 2), ("3", 12, 2)]
    assert graph.groups[0].blocks.tolist() == [0] * 4 + [1] * 4
    assert graph.groups[1].blocks.tolist() == [0] * 6 + [1] * 6
    assert graph.pinned == {"6": "network output"}
    grouped = narrowed[3]
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 4, 6)
    assert grouped.weight.shape[:2] == ((6, 2) if conv is nn.Conv2d else (4, 3))
    check_exact(narrowed, IMAGE, seed=1, keep=0.5)
    assert check_exact(narrowed, IMAGE, seed=2, keep=0.5)[1][3].groups == 2


def test_columns_are_added_up_inside_their_block() -> None:
    model = _grouped()
    graph = ChannelGraph.trace(model, IMAGE)
    before = model[3].weight.detach().clone()
    after = merge(model, graph, {"0": torch.tensor([0, 1, 0, 2, 3, 4, 5, 5])})[3].weight
    first, second = before[:6], before[6:]
    assert torch.equal(after[:6], torch.stack([first[:, 0] + first[:, 2], first[:, 1], first[:, 3]], 1))
    assert torch.equal(after[6:], torch.stack([second[:, 0], second[:, 1], second[:, 2] + second[:, 3]], 1))


def test_clusters_that_break_blocks_are_an_error() -> None:
    model = _grouped()
    graph = ChannelGraph.trace(model, IMAGE)
    with pytest.raises(NarrowingError, match=r"group '0' has 2 blocks, and cluster 0 joins channels 0 and 7 of differ"):
        merge(model, graph, {"0": torch.tensor([0, 1, 2, 3, 4, 5, 6, 0])})
    with pytest.raises(NarrowingError, match=r"clusters of group '0' leave \[2, 4\] channels in its 2 blocks"):
        tie(model, graph, {"0": torch.tensor([0, 0, 1, 1, 2, 3, 4, 5])})
    with pytest.raises(NarrowingError, match=r"keep\['3'\] of group '3' leave \[2, 1\] channels in its 2 blocks"):
        narrow(model, graph, {"3": torch.tensor([0, 1, 6])})


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_blocks_are_pruned(conv: type[nn.Module]) -> None:
    model = _grouped(conv).double().eval()
    graph = ChannelGraph.trace(model, IMAGE)
    kept = {"0": torch.tensor([1, 3, 4, 6]), "3": torch.tensor([0, 2, 5, 6, 7, 11])}
    pruned = narrow(model, graph, kept)
    ignoring = [model[:3](IMAGE.double())[:, [1, 3, 4, 6]]]
    weight = model[3].weight.detach()
    blocks = [weight[:6, [1, 3]], weight[6:, [0, 2]]] if conv is nn.Conv2d else [weight[[1, 3]], weight[[4, 6]]]
    rows = [[0, 2, 5], [0, 1, 5]]
    if conv is nn.Conv2d:
        kernel = torch.cat([block[row] for block, row in zip(blocks, rows, strict=True)])
        out = F.conv2d(ignoring[0], kernel, model[3].bias[kept["3"]], padding=1, groups=2)
    else:
        kernel = torch.cat([block[:, row] for block, row in zip(blocks, rows, strict=True)])
        out = F.conv_transpose2d(ignoring[0], kernel, model[3].bias[kept["3"]], padding=1, groups=2)
    norm = model[4]
    out = F.batch_norm(out, norm.running_mean[kept["3"]], norm.running_var[kept["3"]], eps=norm.eps).relu()
    expected = F.conv2d(out, model[6].weight[:, kept["3"]], model[6].bias)
    torch.testing.assert_close(pruned(IMAGE.double()), expected, rtol=1e-10, atol=1e-10)


class TwoReaders(nn.Module):
    """Two grouped convolutions read the same channels in blocks that do not coincide."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 3, 1)
        self.a, self.b = nn.Conv2d(24, 24, 1, groups=a), nn.Conv2d(24, 24, 1, groups=b)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(self.a(x).relu() + self.b(x))


def test_blocks_of_several_readers_are_intersected_or_pinned() -> None:
    graph, _ = check_exact(TwoReaders(2, 4), IMAGE)
    assert [(g.name, g.block_count) for g in graph.groups] == [("stem", 4), ("a", 4)]
    apart = ChannelGraph.trace(TwoReaders(2, 3), IMAGE)
    # The intersections of 2 and 3 blocks of 24 channels have 8, 4, 4 and 8.
    assert apart.pinned["stem"] == "the blocks of a (groups=2) do not fit the blocks of other layers"


def test_blocks_of_one_channel_are_pinned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=4), nn.Conv2d(4, 2, 1))
    graph, _ = check_exact(model, IMAGE)
    assert graph.pinned["1"] == "every block of 1 (groups=4) has one channel of them"
    assert [(g.name, g.block_count) for g in graph.groups] == [("0", 4)]


class Unequal(nn.Module):
    """The blocks of a grouped convolution hold different layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x).relu()], 1))


def test_layers_that_fill_one_block_alone_are_pinned() -> None:
    graph = ChannelGraph.trace(Unequal(), IMAGE)
    assert graph.groups == []
    assert graph.pinned["a"] == "the blocks of head (groups=2) have unequal shares of them"


class Shuffled(nn.Module):
    """Halves are dealt out in turn before a grouped convolution: its blocks alternate along the layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        n, channels, height, width = x.shape
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
        return self.head(F.relu(self.grouped(x)))


class ShuffledForward(Shuffled):
    """The same in a forward that has no graph form."""

    def forward(self, *images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images[0])


@pytest.mark.parametrize(
    ("clusters", "form"),
    # Blocks 0 0 1 1 0 0 1 1: with the first one forward, as it is, brings kept channels to their blocks.
    [([0, 0, 1, 1, 2, 2, 3, 3], "module"), ([0, 1, 2, 3, 0, 1, 2, 3], "graph"), ([0, 0, 2, 3, 1, 1, 3, 2], "graph")],
)
def test_forward_keeps_its_form_where_it_brings_channels_to_their_blocks(clusters: list[int], form: str) -> None:
    torch.manual_seed(0)
    model = Shuffled().double().eval()
    index = {"stem": torch.tensor(clusters)}
    tie(model, ChannelGraph.trace(model, IMAGE.double()), index)
    merged = merge_channels(model, index, IMAGE.double())
    assert [choice.form for choice in merged.report.forms] == [form]
    assert compare(model, merged.network, (IMAGE.double(),), {}) <= 1e-12


def test_alternating_blocks_are_pinned_where_forward_has_no_graph_form() -> None:
    graph = ChannelGraph.trace(ShuffledForward(), IMAGE)
    assert "any number of arguments" in graph.pinned["stem"]
    assert [group.name for group in graph.groups] == ["grouped"]


def test_columns_of_blocks_are_told_to_those_who_hold_them() -> None:
    graph = ChannelGraph.trace(_grouped(), IMAGE)
    columns = graph.consumer_columns("0")
    assert [(c.tensor, c.block, c.columns.tolist(), c.filters.tolist()) for c in columns] == [
        ("3.weight", (0, 6), [0, 1, 2, 3], [0, 1, 2, 3]),
        ("3.weight", (6, 12), [0, 1, 2, 3], [4, 5, 6, 7]),
    ]


@pytest.mark.parametrize("method", ["kmeans", "even", "imbalanced"])
def test_clustering_keeps_to_blocks(method: str) -> None:
    model = _grouped()
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = cluster_channels(model, graph, 0.6, method=method)
    assert {name: len(index.unique()) for name, index in clusters.items()} == {"0": 6, "3": 8}
    for group in graph.groups:
        per_block = [clusters[group.name][members].unique() for members in group.members()]
        assert not set(per_block[0].tolist()) & set(per_block[1].tolist())
        assert len(per_block[0]) == len(per_block[1])
    assert graph.expressible_counts({"0": 5, "3": 1}) == {"0": 6, "3": 2}


@pytest.mark.parametrize("make", [_grouped, lambda: _grouped(nn.ConvTranspose2d), Ghost, lambda: Kernels("select")])
def test_centripetal_steps_merge_exactly(make: Callable[[], nn.Module]) -> None:
    """Members are equal after one step with eps = 1 / lr, bit for bit where they were, and merging changes nothing."""
    torch.manual_seed(0)
    model = make().double()
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = cluster_channels(model, graph, 0.5)
    tensors = clustered_tensors(model, graph, clusters)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    update = CentripetalUpdate(tensors, optimizer, strength=10.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(IMAGE.double()).square().mean().backward()
        update.before_step()
        optimizer.step()
        update.after_step()
        optimizer.state.clear()  # momentum would carry the first pull on, running statistics what was seen before
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
    model.eval()
    tied = make().double().eval()
    tied.load_state_dict(model.state_dict())
    tie(tied, graph, clusters)
    assert compare(model, tied, (IMAGE.double(),), {}) <= 1e-12
    assert compare(model, merge(model, graph, clusters), (IMAGE.double(),), {}) <= 1e-12


def test_rows_of_a_grouped_transposed_kernel_are_averaged_as_by_hand() -> None:
    model = _grouped(nn.ConvTranspose2d)
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = {"3": torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 8, 9])}
    tensor = next(t for t in clustered_tensors(model, graph, clusters) if t.name == "3.weight")
    weight = model[3].weight.detach().clone()
    values = weight.clone()
    equalise(values, tensor)
    expected = weight.clone()
    expected[:4, :2] = weight[:4, :2].mean(1, keepdim=True)
    expected[4:, 1:3] = weight[4:, 1:3].mean(1, keepdim=True)
    torch.testing.assert_close(values, expected)
    assert not tensor.is_vector
    assert torch.equal(cluster_means(torch.eye(2), torch.tensor([0, 1])), torch.eye(2))
