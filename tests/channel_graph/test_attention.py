"""Attention: channels of queries and keys are counted pair by pair, those of values pass; heads stay alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.counted import CountedReduction
from lightning_filterdiv.channel_graph.narrow import tie
from lightning_filterdiv.channel_graph.verify import compare, randomise
from lightning_filterdiv.narrowing import load_merged, merge_channels, prune_channels, save_merged
from lightning_filterdiv.narrowing.export import export_onnx

from .checks import check_exact, merge

IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """As in Visformer; ``parts``: how queries, keys and values are cut out of one convolution."""

    def __init__(
        self, heads: int, parts: str = "unbind", fused: bool = False, norm: str = "", position: bool = False
    ) -> None:
        super().__init__()
        self.position = nn.Conv2d(8, 8, 3, padding=1, groups=8) if position else None
        self.heads, self.parts, self.fused, self.norm = heads, parts, fused, norm
        self.qkv, self.proj = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.parts == "unbind":
            q, k, v = self.qkv(x).reshape(b, 3, self.heads, c // self.heads, -1).permute(1, 0, 2, 4, 3).unbind(0)
        else:
            q, k, v = (t.view(b, self.heads, c // self.heads, h * w).transpose(-1, -2) for t in self.qkv(x).chunk(3, 1))
        if self.norm == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        elif self.norm == "rms":
            q, k = (t * (t.square().mean(-1, keepdim=True) + 0.1).rsqrt() for t in (q, k))
        if self.fused:
            y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        else:
            y = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        y = y.permute(0, 1, 3, 2).reshape(b, -1, h, w)
        if self.position is not None:
            y = y + self.position(v.permute(0, 1, 3, 2).reshape(b, -1, h, w))
        return self.proj(y)


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention, self.last = nn.Conv2d(3, 8, 3, padding=1), attention, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(F.relu(self.attention(x)))


class Separate(nn.Module):
    """As in BEiT and Swin v2: no bias of the keys, those of queries and values in parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.q_bias, self.v_bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.register_buffer("k_bias", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        y = F.linear(x.flatten(2).transpose(1, 2), self.qkv.weight, bias)
        q, k, v = y.reshape(b, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, h * w, -1)).transpose(1, 2).reshape(b, c, h, w)


FORMS = {
    "a computed bias": Separate,
    "one head": lambda: Attention(1),
    "heads": lambda: Attention(2),
    "heads, chunks": lambda: Attention(2, "chunk"),
    "fused": lambda: Attention(2, fused=True),
    "cosine": lambda: Attention(2, norm="cosine"),
    "positions of values": lambda: Attention(2, position=True),
    "heads normed by hand": lambda: Attention(2, norm="rms"),
}


@pytest.mark.parametrize("name", FORMS)
def test_nothing_but_the_output_is_pinned(name: str) -> None:
    graph, narrow = check_exact(Net(FORMS[name]()), IMAGE)
    assert graph.pinned == {"last": "network output"}
    each = 8 if name == "one head" else 4
    # A channel of queries is that of keys, in every head; values have channels of their own.
    assert {g.name: (g.size, g.rows(g.producers[0]).numel()) for g in graph.groups} == {
        "stem": (8, 8),
        "attention.qkv[0]": (each, 16),
        "attention.qkv[1]": (each, 8),
        "attention.proj": (8, 8),
    }
    check_exact(narrow, IMAGE, seed=1, keep=0.7)


UNEVEN = {"attention.qkv[0]": torch.tensor([0, 0, 0, 1]), "attention.qkv[1]": torch.tensor([0, 1, 1, 2])}


def _tied() -> tuple[nn.Module, ChannelGraph]:
    torch.manual_seed(0)
    model = Net(Attention(2)).eval()
    graph = ChannelGraph.trace(model, IMAGE)
    tie(model, graph, UNEVEN)
    return model, graph


def test_products_are_counted_by_hand() -> None:
    model, graph = _tied()
    narrow = merge(model.double(), graph, UNEVEN)
    (counted,) = (m for m in narrow.modules() if isinstance(m, CountedReduction))
    assert counted.kind == "product"
    assert counted.counts.tolist() == [3, 1]
    assert narrow.attention.qkv.out_channels == 2 * (2 + 2 + 3)
    assert compare(model, narrow, (IMAGE.double(),), {}) <= 1e-12
    with torch.no_grad():
        counted.counts[:] = 1
    assert compare(model, narrow, (IMAGE.double(),), {}) > 1e-4


def test_saved_loaded_trained_and_of_other_sizes(tmp_path: Path) -> None:
    model, _ = _tied()
    merged, report = merge_channels(model, UNEVEN, IMAGE)
    assert report.trim <= 1e-12
    assert [str(choice) for choice in report.forms] == ["attention: graph form (view fixes widths)"]
    save_merged(merged, tmp_path / "narrow.pt")
    loaded = load_merged(Net(Attention(2)).eval(), tmp_path / "narrow.pt")
    other = torch.rand(3, 3, 5, 6)
    assert torch.equal(loaded(other), merged(other))
    torch.testing.assert_close(merged(other), model(other))
    loaded.train()(other).square().mean().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_exported_and_in_onnxruntime(tmp_path: Path) -> None:
    model, _ = _tied()
    merged = merge_channels(model, UNEVEN, IMAGE).network
    assert sum(isinstance(m, CountedReduction) for m in merged.modules()) == 1
    images = torch.rand(5, 3, 8, 8)
    exported = torch.export.export(merged, (IMAGE,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(images), model(images))
    assert export_onnx(merged, tmp_path / "narrow.onnx", IMAGE) <= 1e-5


def test_trained_traced_and_squeezed_again() -> None:
    model, _ = _tied()
    merged = merge_channels(model, UNEVEN, IMAGE).network.train()
    optimizer = torch.optim.SGD(merged.parameters(), lr=0.1)
    merged(IMAGE).square().mean().backward()
    optimizer.step()
    merged.eval()
    graph = ChannelGraph.trace(merged, IMAGE)
    assert graph.pinned == {"last": "network output"}
    clusters = {group.name: torch.arange(group.size) // 2 for group in graph.groups}
    tie(merged, graph, clusters)
    narrow, report = merge_channels(merged, clusters, IMAGE)
    assert report.trim <= 1e-12
    (counted,) = (m for m in narrow.modules() if isinstance(m, CountedReduction))
    assert counted.counts.tolist() == [4], "three of the first merge and one"
    torch.testing.assert_close(narrow(IMAGE), merged(IMAGE))


def test_pruned() -> None:
    assert prune_channels(Net(Attention(2)), IMAGE, keep_fraction=0.5).report.difference <= 1e-9


class SelfAttention(nn.Module):
    """SAGAN: fewer channels of queries and keys than of values, which are added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 8, 1)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weights = torch.bmm(self.q(x).view(b, -1, h * w).transpose(1, 2), self.k(x).flatten(2)).softmax(-1)
        return self.gain * torch.bmm(self.v(x).flatten(2), weights.transpose(1, 2)).view(b, c, h, w) + x


def test_the_values_may_belong_to_a_stream() -> None:
    graph, _ = check_exact(Net(SelfAttention()), IMAGE)
    assert graph.pinned == {"last": "network output"}
    assert {g.layers: g.size for g in graph.groups} == {
        ("stem", "attention.v"): 8,
        ("attention.q", "attention.k"): 6,
    }


class Linear(nn.Module):
    """Attention between channels: products of all pairs."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.flatten(2).chunk(3, 1) if x.shape[1] % 3 == 0 else (x.flatten(2),) * 3
        return ((k.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2) @ q).view_as(x)


class Heads(nn.Module):
    """Every head has one channel: nothing is left to choose."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(x.shape[0], 8, 1, -1).flatten(0, 1)
        weights = (q.transpose(1, 2) @ q).softmax(-1)
        return (q @ weights.transpose(1, 2)).view_as(x)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (Linear, "which multiplies every channel by every other"),
        (Heads, "which multiplies the channels at each place of dimension 0 by another matrix"),
    ],
    ids=["pairs of channels", "heads of one channel"],
)
def test_refused_with_the_true_reason(between: Callable[[], nn.Module], reason: str) -> None:
    graph = ChannelGraph.trace(Net(between()), IMAGE)
    assert graph.pinned["stem"] == f"input of matmul in attention, {reason}"
    assert not [g for g in graph.groups if "stem" in g.layers]


class Branches(nn.Module):
    """Halves of a layer as branches of unequal width: a view lays them out along a dimension of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 12, 3), nn.Conv2d(6, 5, 1), nn.Conv2d(11, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        a, b = x.view(x.shape[0], 2, 6, x.shape[2] * x.shape[3]).transpose(2, 3).unbind(1)
        b = b.transpose(1, 2).unflatten(2, x.shape[2:])
        return self.last(torch.cat([self.second(a.transpose(1, 2).unflatten(2, x.shape[2:])), b], 1))


def test_a_view_of_branches_of_unequal_width() -> None:
    model = Branches().double().eval()
    randomise(model, torch.Generator().manual_seed(0))
    graph = ChannelGraph.trace(model, IMAGE)
    assert graph.pinned == {"last": "network output"}
    clusters = {"first[0]": torch.tensor([0, 0, 0, 1, 2, 2]), "first[1]": torch.tensor([0, 1, 2, 3, 3, 4])}
    tied = copy.deepcopy(model)
    tie(tied, graph, clusters)
    narrow = merge(tied, graph, clusters)
    assert narrow.first.out_channels == 3 + 5
    assert compare(tied, narrow, (IMAGE.double(),), {}) <= 1e-12
