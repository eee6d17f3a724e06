"""torchvision networks: counts derived by hand, physical narrowing exact in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from lightning_filterdiv.channel_graph.counted import CountedLayerNorm

from .checks import check_exact, mergeable

# Mergeable channels: every filter that is not a network output, channels coupled by a sum or a product counted once.
COUNTS = {
    # Two inner layers per stage (2 * 960) and the four residual streams (64 + 128 + 256 + 512).
    "resnet18": 2 * 960 + 960,
    # Stem 64; per block two inner layers of 64, 128, 256, 512 (3, 4, 6, 3 blocks); four streams of 256, 512, 1024,
    # 2048.
    "resnet50": 64 + 2 * (3 * 64 + 4 * 128 + 6 * 256 + 3 * 512) + 256 + 512 + 1024 + 2048,
    # Stem 64; 58 layers of 128 + 32 channels; three transitions of 128, 256, 512.
    "densenet121": 64 + 58 * (128 + 32) + 128 + 256 + 512,
    # Convolutions 64, 128, 2 * 256, 4 * 512 and two hidden layers of 4096.
    "vgg11_bn": 64 + 128 + 2 * 256 + 4 * 512 + 2 * 4096,
    # Stem 32, streams 16, 24, 32, 64, 96, 160, 320, head 1280; expanded widths: six times the input of every block but
    # the first.
    "mobilenet_v2": 32
    + (16 + 24 + 32 + 64 + 96 + 160 + 320)
    + 1280
    + 6 * (16 + 2 * 24 + 3 * 32 + 4 * 64 + 3 * 96 + 3 * 160),
    # Streams 16, 16, 24, 40, 48, 96; expanded widths; squeeze widths; head 576 and 1024.
    "mobilenet_v3_small": (16 + 16 + 24 + 40 + 48 + 96)
    + (72 + 88 + 96 + 240 + 240 + 120 + 144 + 288 + 576 + 576)
    + (8 + 24 + 64 + 64 + 32 + 40 + 72 + 144 + 144)
    + 576
    + 1024,
    # Streams 32, 16, 24, 40, 80, 112, 192, 320, head 1280; expanded: six times each block's input (the first not at
    # all);
    # squeeze: a quarter of each block's input.
    "efficientnet_b0": (32 + 16 + 24 + 40 + 80 + 112 + 192 + 320 + 1280)
    + 6 * (16 + 2 * 24 + 2 * 40 + 3 * 80 + 3 * 112 + 4 * 192)
    + (8 + 4 + 2 * 6 + 2 * 10 + 3 * 20 + 3 * 28 + 4 * 48),
    # Stem 24; first blocks: both branches' outputs (w / 2 each) and one inner layer; other blocks: inner layer and
    # output.
    "shufflenet_v2_x0_5": 24
    + 3 * 24 + 3 * 48
    + 3 * 48 + 7 * 96
    + 3 * 96 + 3 * 192
    + 1024,
    # Stem 96; per fire module squeeze and two expansions.
    "squeezenet1_0": 96 + (16 + 128) * 2 + (32 + 256) * 2 + (48 + 384) * 2 + (64 + 512) * 2,
    # Stem 64 + 64 + 192; per inception module its six layers; two auxiliary heads of 128 and 1024.
    "googlenet": 320
    + sum(
        map(
            sum,
            [
                (64, 96, 128, 16, 32, 32),
                (128, 128, 192, 32, 96, 64),
                (192, 96, 208, 16, 48, 64),
                (160, 112, 224, 24, 64, 64),
                (128, 128, 256, 24, 64, 64),
                (112, 144, 288, 32, 64, 64),
                (256, 160, 320, 32, 128, 128),
                (256, 160, 320, 32, 128, 128),
                (384, 192, 384, 48, 128, 128),
            ],
        )
    )
    + 2 * (128 + 1024),
    # As a ResNet: what grouped layers read and write lives in 32 blocks.
    "resnext50_32x4d": 64 + 256 + 512 + 1024 + 2048 + 2 * (3 * 128 + 4 * 256 + 6 * 512 + 3 * 1024),
}  # fmt: skip


def build(name: str) -> nn.Module:
    options: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options)


def image(name: str) -> torch.Tensor:
    size = {"inception_v3": 299, "googlenet": 224, "squeezenet1_0": 96}.get(name, 64)
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.zoo
def test_a_shallow_shufflenet() -> None:
    """Every kind of block of ShuffleNetV2, fewer of each: the whole one is among the soak tests."""
    torch.manual_seed(0)
    model = torchvision.models.ShuffleNetV2([1, 3, 1], [24, 48, 96, 192, 1024])
    graph, _ = check_exact(model, image("shufflenet_v2_x0_5"))
    assert mergeable(graph) == 24 + 3 * 24 + 3 * 48 + 2 * 96 + 3 * 96 + 1024
    assert set(graph.pinned.values()) == {"network output"}


#: Deeper or wider than others of their kind; of ShuffleNetV2, a shallow one runs by default.
DEEP = ("resnet50", "vgg11_bn", "densenet121", "efficientnet_b0", "googlenet", "shufflenet_v2_x0_5")


@pytest.mark.zoo
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.soak) if n in DEEP else n for n in COUNTS])
def test_counts_and_exactness(name: str) -> None:
    graph, _ = check_exact(build(name), image(name))
    assert mergeable(graph) == COUNTS[name]
    assert set(graph.pinned.values()) == {"network output"}
    if name == "resnext50_32x4d":
        assert {g.name: g.block_count for g in graph.groups if g.blocks is not None} == {
            f"layer{stage}.{block}.conv{conv}": 32
            for stage, blocks in enumerate((3, 4, 6, 3), 1)
            for block in range(blocks)
            for conv in (1, 2)
        }


@pytest.mark.soak
def test_inception() -> None:
    graph, _ = check_exact(build("inception_v3"), image("inception_v3"))
    assert set(graph.pinned.values()) == {"network output"}


def test_the_published_totals() -> None:
    assert [COUNTS[n] for n in ("resnet18", "mobilenet_v2", "squeezenet1_0", "densenet121")] == [
        2880,
        9128,
        2976,
        10240,
    ]


@pytest.mark.zoo
def test_convnext() -> None:
    """Four streams, of which layer norms take means, and the hidden layers of the blocks; depthwise layers follow."""
    model = torchvision.models.convnext_tiny(weights=None)
    graph, narrowed = check_exact(model, image("convnext_tiny"))
    assert mergeable(graph) == 4 * (3 * 96 + 3 * 192 + 9 * 384 + 3 * 768) + 96 + 192 + 384 + 768
    assert graph.pinned == {"classifier.2": "network output"}
    assert sum(isinstance(m, CountedLayerNorm) for m in narrowed.modules()) == 23


@pytest.mark.zoo
def test_regnet() -> None:
    """Stem and four streams, two inner layers a block, and a quarter of the block's input for its excitation."""
    graph, _ = check_exact(build("regnet_y_400mf"), image("regnet_y_400mf"))
    excitation = [32, 48, *[104] * 3, *[208] * 6, *[440] * 5]
    assert mergeable(graph) == (
        32 + 48 + 104 + 208 + 440 + 2 * (48 + 3 * 104 + 6 * 208 + 6 * 440) + sum(n // 4 for n in excitation)
    )
    assert set(graph.pinned.values()) == {"network output"}
    assert {g.block_count for g in graph.groups} == {1, 6, 13, 26, 55}
