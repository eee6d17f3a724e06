"""Norms over channels: merged exactly, weighed where clusters are unequal; pruning keeps them plain."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from benchmarks.models.channel_graph import image
from lightning_filterdiv.centripetal import CentripetalUpdate, cluster_channels, clustered_tensors
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.counted import (
    COUNTED,
    CountedGroupNorm,
    CountedLayerNorm,
    CountedNorm,
    CountedResponseNorm,
    CountedRMSNorm,
    counted_form,
)
from lightning_filterdiv.channel_graph.narrow import tie
from lightning_filterdiv.channel_graph.verify import compare, randomise
from lightning_filterdiv.narrowing import load_merged, merge_channels, prune_channels, save_merged
from lightning_filterdiv.narrowing import narrow as prune

from .checks import check_exact, merge, mergeable

IMAGE = image()
UNEQUAL = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
EQUAL = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


class Around(nn.Module):
    """Two convolutions around a norm of 8 channels."""

    def __init__(self, norm: nn.Module, last: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.last = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.last else self.norm(x)
        return self.second(F.gelu(x))


class HandMade(nn.Module):
    """The layer norm of many copies of ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels)), nn.Parameter(torch.rand(channels))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


# name -> (norm, channels last, what takes its place)
NORMS: dict[str, tuple[Callable[[], nn.Module], bool, type[CountedNorm]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(8), True, CountedLayerNorm),
    "LayerNorm without affine": (lambda: nn.LayerNorm(8, elementwise_affine=False), True, CountedLayerNorm),
    "LayerNorm without bias": (lambda: nn.LayerNorm(8, bias=False, eps=1e-3), True, CountedLayerNorm),
    "torchvision LayerNorm2d": (lambda: TorchvisionLayerNorm2d(8), False, CountedLayerNorm),
    "timm LayerNorm": (lambda: timm.layers.LayerNorm(8), True, CountedLayerNorm),
    "timm LayerNorm2d": (lambda: timm.layers.LayerNorm2d(8), False, CountedLayerNorm),
    "hand-made": (lambda: HandMade(8), False, CountedLayerNorm),
    "RMSNorm": (lambda: nn.RMSNorm(8), True, CountedRMSNorm),
    "timm RmsNorm": (lambda: timm.layers.RmsNorm(8), True, CountedRMSNorm),
    "timm RmsNorm2d": (lambda: timm.layers.RmsNorm2d(8), False, CountedRMSNorm),
    "GroupNorm of one": (lambda: nn.GroupNorm(1, 8), False, CountedGroupNorm),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), False, CountedGroupNorm),
    "timm GroupNorm1": (lambda: timm.layers.GroupNorm1(8), False, CountedGroupNorm),
    "norm with an activation": (lambda: timm.layers.LayerNormAct2d(8, act_layer=nn.Tanh), False, CountedLayerNorm),
    "group norm with an activation": (lambda: timm.layers.GroupNormAct(8, group_size=8), False, CountedGroupNorm),
    "response norm": (lambda: GlobalResponseNorm(8, channels_last=False), False, CountedResponseNorm),
    "response norm, channels last": (lambda: GlobalResponseNorm(8, channels_last=True), True, CountedResponseNorm),
}


@pytest.mark.parametrize("name", NORMS)
def test_unequal_clusters_are_weighed_and_equal_ones_are_not(name: str) -> None:
    make, last, kind = NORMS[name]
    model = Around(make(), last).double().eval()
    randomise(model, torch.Generator().manual_seed(0))
    graph = ChannelGraph.trace(model, IMAGE)
    assert graph.pinned == {"second": "network output"}
    blocks = 2 if name == "GroupNorm" else 1
    assert [(g.name, g.size, g.block_count) for g in graph.groups] == [("first", 8, blocks)]
    for clusters in (UNEQUAL, EQUAL):
        tied = copy.deepcopy(model)
        tie(tied, graph, {"first": clusters})
        narrow = merge(tied, graph, {"first": clusters})
        assert compare(tied, narrow, (IMAGE.double(),), {}) <= 1e-12
        assert type(narrow.norm) is (kind if clusters is UNEQUAL else type(model.norm))
    assert tuple(getattr(narrow.norm, "normalized_shape", (4,))) == (4,)
    assert getattr(narrow.norm, "num_channels", 4) == 4


@pytest.mark.parametrize("name", NORMS)
def test_narrow_again_and_with_random_clusters(name: str) -> None:
    make, last, kind = NORMS[name]
    _, narrow = check_exact(Around(make(), last), IMAGE, keep=0.7)
    counts = narrow.norm.counts if isinstance(narrow.norm, kind) else torch.ones(6, dtype=torch.int64)
    graph, twice = check_exact(narrow, IMAGE, seed=1, keep=0.5)
    assert graph.pinned == {"second": "network output"}
    if isinstance(narrow.norm, kind):
        assert isinstance(twice.norm, kind)
        assert int(twice.norm.counts.sum()) == int(counts.sum()) == 8


@pytest.mark.parametrize("name", NORMS)
def test_pruning_keeps_a_plain_norm(name: str) -> None:
    make, last, _ = NORMS[name]
    model = Around(make(), last).double().eval()
    randomise(model, torch.Generator().manual_seed(0))
    graph = ChannelGraph.trace(model, IMAGE)
    kept = torch.tensor([1, 2, 4, 7])
    pruned = prune(model, graph, {"first": kept})
    assert type(pruned.norm) is type(model.norm)
    x = model.first(IMAGE.double())[:, kept]
    tensors = {n: p.detach()[kept] for n, p in model.norm.named_parameters()}
    norm = copy.deepcopy(pruned.norm)
    norm.load_state_dict(tensors)
    x = norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if last else norm(x)
    expected = F.conv2d(F.gelu(x), model.second.weight[:, kept], model.second.bias)
    torch.testing.assert_close(pruned(IMAGE.double()), expected)
    # One that was weighed is pruned, too.
    tie(model, graph, {"first": UNEQUAL})
    narrow = merge(model, graph, {"first": UNEQUAL})
    again = ChannelGraph.trace(narrow, IMAGE)
    if name != "GroupNorm":
        assert prune(narrow, again, {"first": torch.tensor([0, 2])}).first.out_channels == 2


COUNTS = torch.tensor([3, 1, 2, 2])


def _repeated(values: Tensor, dim: int) -> Tensor:
    return values.repeat_interleave(COUNTS, dim)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("kind", COUNTED)
def test_counted_norms_are_the_plain_ones_of_repeated_channels(kind: str, dtype: torch.dtype) -> None:
    """The oracle: repeat every channel as often as it counts, apply torch's norm, and take the first of each."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)
    weight, bias = (nn.Parameter(torch.rand(4, generator=generator, dtype=torch.float64)) for _ in range(2))
    new = COUNTED[kind](COUNTS, weight, bias, eps=1e-3, dim=1, groups=2 if kind == "CountedGroupNorm" else 1)
    wide, w, b = _repeated(x, 1), _repeated(weight, 0), _repeated(bias, 0)
    if kind == "CountedLayerNorm":
        expected = F.layer_norm(wide.movedim(1, -1), (8,), w, b, 1e-3).movedim(-1, 1)
    elif kind == "CountedRMSNorm":
        expected = F.rms_norm(wide.movedim(1, -1), (8,), w, 1e-3).movedim(-1, 1) + b.view(-1, 1, 1)
    elif kind == "CountedGroupNorm":
        expected = F.group_norm(wide, 2, w, b, 1e-3)
    else:
        norms = wide.norm(dim=(2, 3), keepdim=True)
        expected = wide + b.view(-1, 1, 1) + w.view(-1, 1, 1) * wide * norms / (norms.mean(1, keepdim=True) + 1e-3)
    first = [0, 3, 4, 6]
    tolerance = {torch.float64: 1e-12, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(new.to(dtype)(x.to(dtype)), expected[:, first].to(dtype), rtol=tolerance, atol=tolerance)
    assert repr(new).startswith(f"{kind}(4 for 8, eps=0.001, dim=1")


@pytest.mark.parametrize("kind", COUNTED)
def test_counted_norms_are_ordinary_modules(kind: str) -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
    new = COUNTED[kind](COUNTS, weight, bias, dim=1, groups=2 if kind == "CountedGroupNorm" else 1).eval()
    x = torch.randn(2, 4, 3, 3)
    expected = new(x)
    content = io.BytesIO()
    torch.save(new, content)
    content.seek(0)
    for other in (copy.deepcopy(new), torch.load(content, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert other.options == new.options
    assert [n for n, _ in new.named_parameters()] == ["weight", "bias"]
    assert "counts" in new.state_dict()
    new(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in new.parameters())
    program = torch.export.export(new, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    torch.testing.assert_close(program.module()(x[:1].repeat(3, 1, 1, 1)), new(x[:1].repeat(3, 1, 1, 1)))
    torch._dynamo.reset()  # graphs of other tests in this process count towards its limit
    compiled = torch.compile(new, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert new(x.bfloat16()).dtype == torch.bfloat16


class Shifted(nn.LayerNorm):
    """A subclass that does something else, too."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.square())


def _with_two_children() -> nn.Module:
    norm = timm.layers.LayerNormAct(8, drop_layer=nn.Dropout)
    assert isinstance(norm.drop, nn.Dropout)
    return norm


@pytest.mark.parametrize(
    "norm",
    [Shifted(8), timm.layers.SimpleNorm(8), _with_two_children()],
    ids=["subclass", "another mean", "two children"],
)
def test_a_module_that_is_no_known_norm_is_pinned(norm: nn.Module) -> None:
    assert counted_form(norm, (1, 6, 6, 8), 3) is None
    graph = ChannelGraph.trace(Around(norm, last=True), IMAGE)
    assert "norm, which mixes channels" in graph.pinned["first"]


def test_a_silent_filter_does_not_reach_a_norm() -> None:
    graph = ChannelGraph.trace(Around(nn.LayerNorm(8), last=True), IMAGE)
    assert graph.private("first") == "input of layer_norm in norm, which mixes channels"


def _convnext(width: int = 12) -> nn.Module:
    """A small ConvNeXt: stem, two blocks with layer scale, a strided layer, a block, a head."""

    def block(channels: int) -> nn.Module:
        return CNBlock(channels, 0.5, 0.0)

    return nn.Sequential(
        nn.Conv2d(3, width, 2, 2),
        TorchvisionLayerNorm2d(width),
        block(width),
        block(width),
        TorchvisionLayerNorm2d(width),
        nn.Conv2d(width, 2 * width, 2, 2),
        block(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(2 * width),
        nn.Linear(2 * width, 4),
    )


def test_a_small_convnext_by_hand() -> None:
    graph, narrow = check_exact(_convnext(), image(size=16))
    assert graph.pinned == {"10": "network output"}
    assert {g.name: g.size for g in graph.groups} == {
        "0": 12,
        "2.block.3": 48,
        "3.block.3": 48,
        "5": 24,
        "6.block.3": 96,
    }
    assert graph.group("0").layers == ("0", "2.block.0", "2.block.5", "3.block.0", "3.block.5")
    assert [p.tensor for p in graph.group("0").counted] == [f"{n}.counts" for n in ("1", "2.block.2", "3.block.2", "4")]
    assert narrow[2].layer_scale.shape == (7, 1, 1)


def _trained(model: nn.Module, size: int) -> tuple[nn.Module, dict[str, Tensor], Tensor, ChannelGraph]:
    """After steps of C-SGD that bring every cluster together."""
    torch.manual_seed(0)
    images = torch.randn(32, 3, size, size)
    targets = torch.randint(4, (32,))
    graph = ChannelGraph.trace(model, images[:1])
    clusters = cluster_channels(model, graph, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    update = CentripetalUpdate(clustered_tensors(model, graph, clusters), optimizer, strength=2.0)
    losses = []
    for _ in range(160):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        update.before_step()
        optimizer.step()
        update.after_step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    return model.eval(), clusters, images, graph


@pytest.mark.parametrize("kind", ["ConvNeXt", "grouped"])
def test_trained_with_centripetal_steps_and_merged_without_a_changed_prediction(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def grouped() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2, 1, groups=4, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 16, 3, 2, 1, groups=2),
            nn.GroupNorm(4, 16),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 4),
        )

    make = _convnext if kind == "ConvNeXt" else grouped
    model, clusters, images, _ = _trained(make(), 16)
    merged, report = merge_channels(model, clusters, images[:1])
    assert report.trim <= 1e-9
    assert report.projection <= 1e-4
    assert torch.equal(merged(images).argmax(1), model(images).argmax(1))
    assert report.parameters_after < 0.6 * report.parameters_before
    save_merged(merged, tmp_path / "narrow.pt")
    loaded = load_merged(make().eval(), tmp_path / "narrow.pt")
    assert torch.equal(loaded(images), merged(images))
    assert [str(m) for m in loaded.modules()] == [str(m) for m in merged.modules()]
    if kind == "ConvNeXt":
        assert any(isinstance(m, CountedLayerNorm) for m in loaded.modules())


def test_the_residual_stream_of_a_transformer() -> None:
    """Queries and keys, values, hidden layers and the stream that they write into are narrowed; every head alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=4
        )
    graph, narrow = check_exact(model, image(size=16))
    inner = {"attn.qkv[0]": 6, "attn.qkv[1]": 6, "mlp.fc1": 48}
    blocks = {f"blocks.{i}.{name}": size for i in range(2) for name, size in inner.items()}
    assert {g.name: g.size for g in graph.groups} == {"patch_embed.proj": 12, **blocks}
    assert set(graph.pinned.values()) == {"network output"}
    assert narrow.cls_token.shape == (1, 1, 7)
    assert narrow.pos_embed.shape == (1, 5, 7)


class Translator(nn.Module):
    """Instance norms without tensors, with and without an affine part, behind an addition and a modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.plain, self.affine, self.style = nn.InstanceNorm2d(8), nn.InstanceNorm2d(8, affine=True), nn.Linear(3, 16)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.style(x.mean((2, 3)))[..., None, None].chunk(2, 1)
        x = torch.relu(self.plain(self.first(x)))
        x = x + self.affine(self.second(x))
        return self.third(self.plain(x) * (1 + scale) + shift)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_an_instance_norm_keeps_the_channels_of_a_batch_together(images: int) -> None:
    """It sees a batch of B images with C channels as one image with B * C."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where num_features is another number
        graph, narrowed = check_exact(Translator(), torch.randn(images, 3, 8, 8))
        assert set(graph.pinned) == {"third"}
        assert mergeable(graph) == 8
        width = narrowed.first.out_channels
        assert width < 8
        assert (narrowed.plain.num_features, narrowed.affine.num_features) == (width, width)


class Skip(nn.Module):
    """A U-Net's skip connection: the blocks of a group norm hold unequal shares of the layers that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.inner, self.norm = nn.GroupNorm(4, 16), nn.GroupNorm(8, 40)
        self.third, self.last = nn.Conv2d(40, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(F.silu(self.inner(x)))
        return self.last(self.third(F.silu(self.norm(torch.cat([x, y], 1)))) + x)


def test_blocks_with_unequal_shares_are_counted_each_by_itself(tmp_path: Path) -> None:
    graph, narrow = check_exact(Skip(), IMAGE)
    assert graph.pinned == {"last": "network output"}
    # Blocks of five channels meet blocks of four: the first 16 channels lie in seven of both.
    sizes = {"first": [4, 1, 3, 2, 2, 3, 1], "second": [4, 5, 5, 5, 5]}
    assert {k: [g.size for g in graph.groups if k in g.layers] for k in sizes} == sizes
    assert all(g.blocks is None for g in graph.groups)
    check_exact(narrow, IMAGE, seed=1)

    model = Skip().eval()
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = {g.name: torch.arange(g.size) // 2 for g in graph.groups if g.layers == ("second",)}
    tie(model, graph, clusters)
    merged, report = merge_channels(model, clusters, IMAGE)
    assert report.trim <= 1e-12
    assert isinstance(merged.norm, CountedGroupNorm)
    assert merged.norm.sizes == (5, 5, 5, 3, 3, 3, 3, 3)
    assert merged.norm.counts.tolist() == [1] * 16 + [2, 2] + [2, 2, 1] * 4
    save_merged(merged, tmp_path / "narrow.pt")
    loaded = load_merged(Skip().eval(), tmp_path / "narrow.pt")
    assert torch.equal(loaded(IMAGE), merged(IMAGE))


def test_a_pruned_norm_stays_plain_where_its_blocks_stay_equal() -> None:
    model = Skip().eval()
    graph = ChannelGraph.trace(model, IMAGE)
    even = {g.name: torch.arange(g.size - 1) for g in graph.groups if g.layers == ("second",) and g.size == 5}
    uneven = prune(model, graph, even)
    assert isinstance(uneven.norm, CountedGroupNorm)
    assert uneven.norm.sizes == (5, 5, 5, 5, 4, 4, 4, 4)
    assert prune_channels(Skip(), IMAGE, keep_fraction=0.5).report.difference <= 1e-9
