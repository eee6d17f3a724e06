from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.models import channel_graph as models
from lightning_filterdiv.channel_graph import ChannelGraph, NarrowingError, widths
from lightning_filterdiv.channel_graph.channel_map import ChannelMap
from lightning_filterdiv.channel_graph.narrow import merging, narrow, tie
from lightning_filterdiv.channel_graph.verify import random_clusters

from .checks import check_exact, merge, mergeable, parameter_count

IMAGE = models.image()

# name -> (network, inputs, mergeable channels: all filters that are not outputs, coupled ones counted once)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, int]] = {
    "plain": (models.plain, IMAGE, 8 + 12 + 6),
    "plain without norm": (lambda: models.plain(norm=False), IMAGE, 8 + 12 + 6),
    "norm without affine": (lambda: models.plain(affine=False), IMAGE, 8 + 12 + 6),
    "flatten to linear": (models.flatten_linear, IMAGE, 6 + 8 + 10),
    # Three stages (8, 16, 32) and two inner layers in each.
    "projection": (models.CifarResNet, IMAGE, 3 * (8 + 16 + 32)),
    # Option A: a stage keeps the channels of the one before and adds those that were padded: 32 in all.
    "option A module": (lambda: models.CifarResNet("module"), IMAGE, 32 + 2 * (8 + 16 + 32)),
    # ... of which forward lets only the first 8 be narrowed when its pad widths are numbers.
    "option A literal": (lambda: models.CifarResNet("literal"), IMAGE, 2 * (8 + 16 + 32) + 32),
    "option A relative": (lambda: models.CifarResNet("relative"), IMAGE, 32 + 2 * (8 + 16 + 32)),
    "pre-activation": (models.PreActivation, IMAGE, 8 + 8 + 12 + 12 + 12),
    "dense": (models.DenseNet, IMAGE, 8 + 3 * 6 + 13),
    "mobile": (models.mobile, IMAGE, 8 + 16 + 16),
    "squeeze and excite": (lambda: models.mobile(excite=True), IMAGE, 8 + 2 * (16 + 4)),
    "shuffle in forward": (models.ShuffleNet, IMAGE, 16 + 8 + 8),
    "shuffle partly modules": (lambda: models.ShuffleNet(module=True), IMAGE, 16 + 8 + 8),
    "shuffle as modules": (models.ModuleShuffle, IMAGE, 12 + 8 + 8),
    "U-Net": (models.UNet, IMAGE, 6 + 10 + 7 + 9),
    "two inputs and outputs": (models.TwoInTwoOut, (IMAGE, models.image(channels=1)), 8 + 10),
}


#: Each has a sister of the same structure that runs by default.
LONG = ("option A relative", "shuffle partly modules")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.soak) if n in LONG else n for n in CASES])
def test_random_ties_narrow_exactly(name: str) -> None:
    make, inputs, count = CASES[name]
    graph, narrowed = check_exact(make(), inputs)
    assert mergeable(graph) == count
    # An ordinary network of the same class: it trains, and it can be traced and narrowed again.
    narrowed.train()
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    outputs = narrowed(*(a.double() for a in args))
    sum(t.sum() for t in (outputs.values() if isinstance(outputs, dict) else [outputs])).backward()
    assert all(p.grad is not None for p in narrowed.parameters())
    again, twice = check_exact(narrowed, inputs, seed=1, keep=0.7)
    assert mergeable(again) < count
    assert parameter_count(twice) < parameter_count(narrowed)


def test_parameter_count_by_hand() -> None:
    """conv 3->8, 8->12, 12->6 (3x3, no bias, norms), linear 6->4; 8->4, 12->6, 6->3 channels kept."""
    model = models.plain()
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = {g.name: torch.arange(g.size) % (g.size // 2) for g in graph.groups}
    tie(model, graph, clusters)
    narrowed = merge(model, graph, clusters)
    convs = 9 * (3 * 4 + 4 * 6 + 6 * 3)
    assert parameter_count(narrowed) == convs + 2 * (4 + 6 + 3) + (3 * 4 + 4)
    assert [(m.in_channels, m.out_channels) for m in narrowed.modules() if isinstance(m, nn.Conv2d)] == [
        (3, 4),
        (4, 6),
        (6, 3),
    ]
    assert [m.num_features for m in narrowed.modules() if isinstance(m, nn.BatchNorm2d)] == [4, 6, 3]
    assert narrowed[-1].in_features == 3


def test_first_members_are_kept_and_columns_summed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph = ChannelGraph.trace(model, models.image(channels=1))
    first, second = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    narrowed = merge(model, graph, {"0": torch.tensor([5, 2, 5, 9])})
    assert torch.equal(narrowed[0].weight, first[[0, 1, 3]])
    assert torch.equal(narrowed[2].weight[:, 0], second[:, 0] + second[:, 2])
    assert torch.equal(narrowed[2].weight[:, 1:], second[:, [1, 3]])
    assert torch.equal(model[0].weight, first), "the original is untouched"


def test_channel_map_replaces_the_shortcut_and_is_composed() -> None:
    graph, narrowed = check_exact(models.CifarResNet("module"), IMAGE)
    assert [type(b.shortcut).__name__ for b in narrowed.layers] == [
        "Identity",
        "Identity",
        "ChannelMap",
        "Identity",
        "ChannelMap",
        "Identity",
    ]
    _, twice = check_exact(narrowed, IMAGE, seed=3)
    nested = [m for m in twice.modules() if isinstance(m, ChannelMap) and isinstance(m.inner, ChannelMap)]
    assert not nested
    assert {g.name for g in graph.groups} == {g.name for g in ChannelGraph.trace(twice, IMAGE).groups}


def test_widths_that_forward_cannot_express_are_an_error() -> None:
    model = models.ShuffleNet()
    graph = ChannelGraph.trace(model, IMAGE)
    unequal = {"stem[2]": torch.arange(8) % 5}
    with pytest.raises(NarrowingError, match=r"cannot express the counts .*stem\[2\].*5.*auto.*expressible_counts"):
        narrow(model, graph, *merging(graph, unequal), form="module")
    counts = graph.expressible_counts({g.name: 3 * g.size // 4 for g in graph.groups})
    assert counts == {
        "stem[0]": 3,
        "stem[1]": 3,
        "stem[2]": 6,
        "branches.0.0[0]": 3,
        "branches.0.0[1]": 3,
        "branches.1.0": 6,
    }


def test_counts_are_free_where_forward_does_not_tie_them() -> None:
    graph = ChannelGraph.trace(models.plain(), IMAGE)
    assert graph.expressible_counts({"0": 3}) == {"0": 3, "3": 12, "6": 6}


class _Treated(nn.Module):
    """Two halves of one layer, treated differently, read by the same convolution."""

    def __init__(self, treat: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.treat = treat

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.second(torch.cat([self.treat(a), b], 1)).mean((2, 3))


class _Sampled(nn.Module):
    """A spatial transformer: one path says where the other is read."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.offsets, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 2, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        where = self.offsets(x).permute(0, 2, 3, 1).tanh()
        return self.head(nn.functional.grid_sample(self.features(x).relu(), where, align_corners=False))


def test_channels_are_sampled_alike_wherever_another_path_says() -> None:
    graph, _ = check_exact(_Sampled(), IMAGE)
    assert [group.name for group in graph.groups] == ["features"]
    assert graph.pinned["offsets"] == "acts on all channels at once in grid_sampler_2d in forward"


def test_a_gated_linear_unit_is_a_product_of_halves() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.GLU(1), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    graph, _ = check_exact(model, IMAGE)
    assert [(group.name, group.size) for group in graph.groups] == [("0", 6), ("2", 4)]


class _Recurrent(nn.Module):
    """A recurrent layer reads the channels of a convolution, position by position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.lstm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.LSTM(6, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(self.inner(self.conv(x).relu()).flatten(2).transpose(1, 2))[0]
        return states


def test_what_a_recurrent_layer_reads_is_pinned_and_the_rest_is_not() -> None:
    graph, _ = check_exact(_Recurrent(), IMAGE)
    assert [group.name for group in graph.groups] == ["conv"]
    assert graph.pinned["inner"] == "lstm.weight_ih_l0 belongs to a LSTM, which cannot be narrowed"
    assert "unsafe_split" not in graph.pinned["lstm"]


class _Halves(nn.Module):
    """Three stages that forward splits in halves, each on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(inputs, 8, 3, padding=1) for inputs in (3, 8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            a, b = conv(x).chunk(2, 1)
            x = torch.cat([b, torch.relu(a)], 1)
        return self.fc(x.mean((2, 3)))


def test_one_trial_asks_whether_classes_can_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace makes none: what forward does not follow by itself can be written as a graph."""
    traces = []
    original = widths.layout_for

    def counted(graph: ChannelGraph, wanted: Mapping[str, int]) -> widths.Layout | None:
        traces.append(dict(wanted))
        return original(graph, wanted)

    monkeypatch.setattr(widths, "layout_for", counted)
    graph = ChannelGraph.trace(_Halves(), IMAGE)
    assert len(graph.constrained) == 3
    assert len(traces) == 0
    wanted = {g.name: g.size // 2 for g in graph.groups}
    assert graph.expressible_counts(wanted) == wanted
    assert len(traces) == 1


class _HalfRigid(nn.Module):
    """Forward splits one layer by its width and gives the other a fixed shape."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.fixed = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.free(x).chunk(2, 1)
        x = self.fixed(torch.cat([b, torch.relu(a)], 1))
        return self.fc(x.view(len(x), 2, 4, *x.shape[2:]).flatten(1, 2).mean((2, 3)))


def test_a_number_in_a_shape_pins_nothing() -> None:
    graph, _ = check_exact(_HalfRigid(), IMAGE)
    assert graph.pinned == {"fc": "network output"}
    assert [(g.name, g.size) for g in graph.groups] == [("free[0]", 4), ("free[1]", 4), ("fixed", 8)]


@pytest.mark.parametrize(
    "treat",
    [
        F.relu,
        lambda x: x.flip(3),
        lambda x: x.transpose(2, 3),
        lambda x: x.roll(1, 2),
        lambda x: F.max_pool2d(x, 3, 1, 1),
    ],
    ids=["relu", "flip", "transpose", "roll", "pool"],
)
def test_channels_with_another_history_are_never_one_group(treat: Callable[[Tensor], Tensor]) -> None:
    """Producer and consumer are the same for all 8; merging across the halves would be wrong."""
    graph, _ = check_exact(_Treated(treat), IMAGE)
    assert [(g.name, g.size) for g in graph.groups] == [("first[0]", 4), ("first[1]", 4)]


class _Positions(nn.Module):
    """Half of the channels are transposed before the flatten: their columns come in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(torch.cat([x[:, :3].flatten(1), x[:, 3:].transpose(2, 3).flatten(1)], 1))


def test_flattened_columns_correspond_position_by_position() -> None:
    graph, _ = check_exact(_Positions(), IMAGE)
    assert [g.size for g in graph.groups] == [3, 3]


class _Twice(nn.Module):
    """The same channel twice in a concatenation, with a norm over both copies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(F.relu(self.norm(torch.cat([x, -x], 1))))


class _Frozen(nn.Module):
    """FrozenBatchNorm2d, a layer scale of shape (C, 1, 1), a per-channel offset of shape (1, C, 1, 1), PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, bias=False), FrozenBatchNorm2d(6)
        self.scale, self.offset = nn.Parameter(torch.rand(6, 1, 1)), nn.Parameter(torch.rand(1, 6, 1, 1))
        self.temperature = nn.Parameter(torch.tensor([1.5]))
        self.act, self.second = nn.PReLU(6), nn.Conv2d(6, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.norm(self.first(x)) * self.scale + self.offset) * self.temperature)


class _Shared(nn.Module):
    """One convolution and one norm called twice, on different channels: those become one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.norm = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.BatchNorm2d(6),
        )
        self.alias = self.norm
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.alias(self.block(x)))
        return self.fc(self.block(x).mean((2, 3)))


class _Attention(nn.Module):
    """Spatial attention: a mask that broadcasts over channels changes no channel's identity."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 1, 1), nn.Conv2d(6, 4, 1)
        self.mask = nn.Parameter(torch.rand(1, 1, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x * torch.sigmoid(self.gate(x)) * self.mask + 1)


class _OneD(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(2, 6, 3),
            nn.InstanceNorm1d(6, affine=True),
            nn.GELU(),
            nn.Conv1d(6, 6, 3, groups=6),
            nn.Conv1d(6, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Multiplier(nn.Module):
    """Depthwise with two outputs per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.Conv2d(5, 10, 3, groups=5), nn.BatchNorm2d(10), nn.Conv2d(10, 4, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.ConvTranspose3d(4, 5, 2, 2)
        )
        self.out = nn.Conv3d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.interpolate(self.net(x), scale_factor=2, mode="trilinear"))


class _Patches(nn.Module):
    """Patches become items of the batch, and an image again, as in MobileViT: channels keep their places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, c, h, w = x.shape
        x = x.reshape(b * c * (h // 2), 2, w // 2, 2).transpose(1, 2).reshape(b, c, h * w // 4, 4).transpose(1, 3)
        x = x + self.inner(x)
        x = x.transpose(1, 3).reshape(b * c * (h // 2), w // 2, 2, 2).transpose(1, 2)
        return self.last(x.reshape(b, c, h, w))


class _Unfold(nn.Module):
    """Windows as features of a linear layer, and added up again: overlapping, and as a sub-pixel layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.reader = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6 * 4, 5)
        self.parts, self.last = nn.Conv2d(6, 3 * 4, 2, 2), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        x = F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)
        read = self.reader(F.unfold(x, 2, stride=2).transpose(1, 2))
        whole = F.fold(self.parts(F.relu(x)).flatten(2), x.shape[2:], 2, stride=2)
        return read, self.last(whole)


class _Windows(nn.Module):
    """Tensor.unfold, as in halo attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unfold(2, 4, 2).unfold(3, 4, 2)
        return self.last(F.relu(x).flatten(2, 3).flatten(3).amax(3).transpose(1, 2))


class _Idle(nn.Module):
    """WaveNet: the last block writes into a stream that nobody reads any more, and it must still fit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Conv1d(2, 6, 3), nn.ModuleList(nn.Conv1d(6, 8, 2) for _ in range(2))
        self.back, self.skips = (nn.ModuleList(nn.Conv1d(4, n, 1) for _ in range(2)) for n in (6, 5))
        self.spare, self.last = nn.Conv1d(5, 7, 1), nn.Conv1d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.first(x), torch.zeros(())
        for block, back, read in zip(self.blocks, self.back, self.skips, strict=True):
            y, gate = block(x).chunk(2, 1)
            y = y.tanh() * gate.sigmoid()
            skip = (skip[..., -y.shape[-1] :] if skip.ndim else skip) + read(y)
            x = x[..., -y.shape[-1] :] + back(y)
        self.spare(skip)
        return self.last(skip)


class _Reshaped(nn.Module):
    """A generator: features become images by numbers in the forward of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 6 * 4), nn.BatchNorm2d(6)
        self.second, self.last = nn.ConvTranspose2d(6, 4, 4, 2), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(self.norm(self.first(x).view(-1, 6, 2, 2)))))


@pytest.mark.parametrize(
    ("make", "inputs", "count"),
    [
        (_Patches, IMAGE, 6),
        (_Unfold, IMAGE, 6 + 3),
        (_Windows, IMAGE, 6),
        (_Idle, torch.rand(2, 2, 12), 6 + 2 * 4 + 5),
        (_Reshaped, torch.rand(2, 5), 6 + 4),
        (_Twice, IMAGE, 6),
        (_Frozen, IMAGE, 6),
        (_Shared, IMAGE, 6),
        (_Attention, IMAGE, 6),
        (_OneD, torch.rand(2, 2, 12), 6),
        (_Multiplier, IMAGE, 5),
        (_Volume, torch.rand(1, 1, 4, 4, 4), 4 + 5),
    ],
    ids=[
        "patches",
        "unfold and fold",
        "windows",
        "idle layers",
        "features to images",
        "twice",
        "frozen norm and scales",
        "shared",
        "spatial attention",
        "1-D",
        "depthwise multiplier",
        "3-D",
    ],
)
def test_more_structures(make: Callable[[], nn.Module], inputs: Tensor, count: int) -> None:
    graph, _ = check_exact(make(), inputs)
    assert mergeable(graph) == count


def test_a_layer_without_a_use_says_so() -> None:
    assert ChannelGraph.trace(_Idle(), torch.rand(2, 2, 12)).pinned == {
        "spare": "forward does not use what it computes",
        "last": "network output",
    }


def test_members_are_named() -> None:
    graph = ChannelGraph.trace(_Frozen(), IMAGE)
    (group,) = graph.groups
    members = {(p.tensor, p.dim) for p in group.parts if p.kind == "member"}
    assert members == {
        ("norm.weight", 0),
        ("norm.bias", 0),
        ("norm.running_mean", 0),
        ("norm.running_var", 0),
        ("scale", 0),
        ("offset", 1),
        ("act.weight", 0),
    }


def test_random_clusters_are_random() -> None:
    graph = ChannelGraph.trace(models.plain(), IMAGE)
    draws = [random_clusters(graph, torch.Generator().manual_seed(s))["3"].tolist() for s in range(2)]
    assert draws[0] != draws[1]


class WeighedPositions(nn.Module):
    """A mean over positions with computed weights: the context of GCNet, or attention with one head."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.weigh, self.write, self.first = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 8, 1), first

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weigh(x).flatten(2).softmax(2)
        if self.first:
            context = x.flatten(2) @ weights.transpose(1, 2)
        else:
            context = (weights @ x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return x + self.write(context.unsqueeze(3))


@pytest.mark.parametrize("first", [True, False])
def test_products_that_sum_over_positions_keep_channels_apart(first: bool) -> None:
    graph, _ = check_exact(nn.Sequential(nn.Conv2d(3, 8, 3), WeighedPositions(first), nn.Conv2d(8, 4, 1)), IMAGE)
    assert {g.layers for g in graph.groups} == {("0", "1.write")}
    assert set(graph.pinned) == {"1.weigh", "2"}
