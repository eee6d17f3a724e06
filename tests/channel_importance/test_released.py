"""Places, sizes and rules of the released networks (JingfeiChang/UCP)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, resnet50, vgg11_bn

from benchmarks.models import CifarResNet
from lightning_filterdiv import ChannelImportance
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_importance import (
    RELEASED_RULES,
    ChannelGate,
    gated_layers,
    insert_gates,
    measure_importance,
    remove_gates,
    select_channels,
)
from lightning_filterdiv.narrowing import count_parameters
from tests.support.training import Classifier, fit


@pytest.mark.parametrize(("channels", "parameters"), [(8, 25), (16, 49), (32, 2 * 32 * 2), (256, 2 * 256 * 16)])
def test_gates_have_the_released_size(channels: int, parameters: int) -> None:
    """models/se_module.py: one hidden unit and biases up to 16 channels, C // 16 units without above."""
    net = nn.Sequential(nn.Conv2d(1, channels, 3))
    insert_gates(net, placement="cifar")
    assert count_parameters(net[0].gate) == parameters  # type: ignore[arg-type]


def test_reduction_gives_narrow_layers_more_hidden_units() -> None:
    assert tuple(ChannelGate(32, reduction=4).squeeze.weight.shape) == (8, 32)
    net = insert_gates(nn.Sequential(nn.Conv2d(1, 32, 3)), reduction=4)
    assert tuple(net[0].gate.squeeze.weight.shape) == (8, 32)  # type: ignore[index,union-attr]


def test_cifar_blocks_have_one_gate_in_front_of_the_first_norm() -> None:
    torch.manual_seed(0)
    net = insert_gates(CifarResNet(8, channels=1), placement="cifar").eval()
    assert list(gated_layers(net)) == [f"stage{stage}.0.conv1" for stage in (1, 2, 3)]
    block, x = net.get_submodule("stage2.0"), torch.randn(2, 16, 8, 8)
    first = block.conv1  # type: ignore[union-attr]
    convolved = nn.functional.conv2d(x, first.weight, stride=2, padding=1)  # type: ignore[union-attr]
    inner = block.conv2(torch.relu(block.bn1(first.gate(convolved))))  # type: ignore[union-attr,operator]
    torch.testing.assert_close(block(x), torch.relu(block.bn2(inner) + block.shortcut(x)))  # type: ignore[union-attr,operator]


def test_imagenet_basic_blocks_have_one_gate_between_norm_and_relu() -> None:
    torch.manual_seed(0)
    net = insert_gates(resnet18(num_classes=3), placement="imagenet").eval()
    assert list(gated_layers(net)) == [f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)]
    block, x = net.layer2[1], torch.randn(2, 128, 4, 4)  # type: ignore[union-attr,index]
    normed = nn.functional.batch_norm(
        block.conv1(x), block.bn1.running_mean, block.bn1.running_var, block.bn1.weight, block.bn1.bias
    )
    inner = block.bn2(block.conv2(torch.relu(block.bn1.gate(normed))))
    torch.testing.assert_close(block(x), torch.relu(inner + x))


def test_imagenet_bottlenecks_have_one_gate_in_front_of_the_last_convolution() -> None:
    torch.manual_seed(0)
    net = insert_gates(resnet50(num_classes=3), placement="imagenet").eval()
    assert len(gated_layers(net)) == 16
    assert next(iter(gated_layers(net))) == "layer1.0.conv2"
    block, x = net.layer1[1], torch.randn(2, 256, 4, 4)  # type: ignore[union-attr,index]
    inner = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))))
    last = nn.functional.conv2d(block.conv3.gate(inner), block.conv3.weight)
    torch.testing.assert_close(block(x), torch.relu(block.bn3(last) + x))


@pytest.mark.parametrize("placement", ["cifar", "imagenet"])
def test_gates_come_out_again(placement: Any) -> None:
    net = resnet18(num_classes=3).eval()
    plain, x = copy.deepcopy(net), torch.randn(1, 3, 32, 32)
    remove_gates(insert_gates(net, placement=placement))
    assert [type(module) for module in net.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(net(x), plain(x))


def test_measured_channels_are_those_of_the_named_convolution() -> None:
    torch.manual_seed(0)
    net = insert_gates(resnet50(num_classes=3), placement="imagenet")
    importance = measure_importance(net, [torch.randn(2, 3, 32, 32)])
    assert {name: len(gates) for name, gates in importance.items()} == {
        name: conv.out_channels for name, conv in resnet50().named_modules()
        if isinstance(conv, nn.Conv2d) and name.endswith("conv2")
    }  # fmt: skip


def test_the_bottleneck_rule_is_a_threshold_per_block() -> None:
    """imagenet_pruned.py: gates above .99 times the mean of the block's, of the middle 3x3."""
    torch.manual_seed(0)
    net, x = resnet50(num_classes=3), torch.zeros(1, 3, 32, 32)
    importance = {
        name: torch.rand(conv.out_channels, dtype=torch.float64)
        for name, conv in net.named_modules()
        if isinstance(conv, nn.Conv2d)
    }
    keep = select_channels(ChannelGraph.trace(net, x), importance, **RELEASED_RULES["imagenet_bottleneck"])
    assert set(keep) == {name for name in importance if name.endswith("conv2")}
    for name, kept in keep.items():
        gates = importance[name]
        assert kept.tolist() == [i for i, gate in enumerate(gates.tolist()) if gate > 0.99 * float(gates.mean())]


def test_the_callback_trains_released_gates() -> None:
    torch.manual_seed(0)
    callback = ChannelImportance(placement="cifar", reduction=2)
    model = Classifier(net=CifarResNet(8, channels=1, width=4))
    fit([callback], model=model)
    assert {name: len(gates) for name, gates in callback.importance.items()} == {
        "net.stage1.0.conv1": 4, "net.stage2.0.conv1": 8, "net.stage3.0.conv1": 16
    }  # fmt: skip
    assert all(bool(((gates > 0) & (gates < 1)).all()) for gates in callback.importance.values())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (resnet50, {"placement": "cifar"}, "'layer1.0' is a bottleneck; use 'imagenet'"),
        (vgg11_bn, {"placement": "imagenet"}, "VGG has none; use 'cifar'"),
        (resnet18, {"placement": "imagenet", "include": ["conv1"]}, "layer 'conv1' has no gate with placement"),
        (resnet18, {"placement": "everywhere"}, "placement must be one of"),
        (resnet18, {"reduction": 0}, "reduction must be an integer >= 1"),
    ],
)
def test_refused(model: Any, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        net = model()
    with pytest.raises(ValueError, match=message):
        insert_gates(net, **options)


def test_norms_that_are_replaced_take_no_gate_away_in_silence() -> None:
    callback = ChannelImportance(placement="imagenet")

    class Replaced(Classifier):
        def configure_optimizers(self) -> Any:
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)
            return super().configure_optimizers()

    with pytest.raises(Exception, match="was taken out of the network after ChannelImportance had inserted it"):
        fit([callback], model=Replaced(net=CifarResNet(8, channels=1, width=4)))
