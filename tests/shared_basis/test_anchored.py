"""One kernel for many layers: counts by the formula, one parameter, regulators, and refusals by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from benchmarks.models import CifarResNet
from benchmarks.models.cifar_resnet import Block
from lightning_filterdiv import BasisOrthonormality
from lightning_filterdiv.narrowing import count_parameters
from lightning_filterdiv.orthonormality import basis_penalty
from lightning_filterdiv.shared_basis import SharedConv2d, SharingError, share_anchored_filters, shared_bases
from tests.support.training import Classifier, fit


def constant_width(width: int = 8, bias: bool = False) -> nn.Sequential:
    """Two stages of one width."""

    def stage() -> nn.Sequential:
        return nn.Sequential(*(Block(width, width, 1, "pad") for _ in range(2)))

    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), stage(), nn.MaxPool2d(2), stage(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 4),
    )  # fmt: skip
    if bias:
        model[1][0].conv2.bias = nn.Parameter(torch.zeros(width))
    return model


@pytest.mark.parametrize("regulator", [False, True])
@pytest.mark.parametrize(
    ("make", "stages"),
    [
        # (layers that share, channels, blocks): the first stage has no transition.
        (lambda: CifarResNet(20), [(6, 16, 3), (5, 32, 3), (5, 64, 3)]),
        (torchvision.models.resnet18, [(4, 64, 2), (3, 128, 2), (3, 256, 2), (3, 512, 2)]),
        (torchvision.models.resnet34, [(6, 64, 3), (7, 128, 4), (11, 256, 6), (5, 512, 3)]),
    ],
    ids=["R20", "R18", "R34"],
)
def test_mix_counts(make: Any, stages: list[tuple[int, int, int]], regulator: bool) -> None:
    with torch.device("meta"):
        model = make()
        plain = count_parameters(model)
        assert share_anchored_filters(model, regulator=regulator) is model
    saved = sum((layers - 1) * 9 * width**2 for layers, width, _ in stages)
    added = sum(blocks * width**2 for _, width, blocks in stages) if regulator else 0
    assert count_parameters(model) == plain - saved + added
    found = list(shared_bases(model))
    assert [basis.weight.shape[0] for _, basis, _ in found] == [width for _, width, _ in stages]
    assert sum(isinstance(m, SharedConv2d) for m in model.modules()) == sum(layers for layers, _, _ in stages)


def test_plain_is_one_kernel() -> None:
    torch.manual_seed(0)
    model = constant_width()
    before = count_parameters(model)
    share_anchored_filters(model, mode="plain")
    assert count_parameters(model) == before - 7 * 9 * 64
    ((name, basis, _),) = shared_bases(model)
    assert name == "1.0.conv1.shared"
    rows = basis.weight.detach().flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=1e-5, rtol=0)
    x = torch.randn(2, 1, 8, 8)
    block = model[3][1]
    y = torch.randn(2, 8, 4, 4)
    inner = torch.relu(block.bn1(nn.functional.conv2d(y, basis.weight, padding=1)))
    expected = torch.relu(block.bn2(nn.functional.conv2d(inner, basis.weight, padding=1)) + y)
    torch.testing.assert_close(block(y), expected)
    model(x).sum().backward()
    assert basis.weight.grad is not None
    fresh = share_anchored_filters(constant_width(), mode="plain")
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(x), model.eval()(x))


def test_regulators_start_as_the_identity() -> None:
    torch.manual_seed(0)
    model = CifarResNet(14, channels=1, width=4).eval()
    share_anchored_filters(model)
    x = torch.randn(2, 1, 8, 8)
    outputs = model(x)
    twin = share_anchored_filters(CifarResNet(14, channels=1, width=4), regulator=True).eval()
    missing = twin.load_state_dict(
        {name.replace("bn2.", "bn2.0."): tensor for name, tensor in model.state_dict().items()}, strict=False
    )
    assert not missing.unexpected_keys
    assert {name.rsplit(".", 1)[0][-5:] for name in missing.missing_keys} == {"bn2.1"}
    assert len(missing.missing_keys) == 6
    torch.testing.assert_close(twin(x), outputs)
    with torch.no_grad():
        twin.get_parameter("stage1.0.bn2.1.weight").mul_(2)
    assert not torch.allclose(twin(x), outputs)


def test_the_penalty_finds_the_kernels() -> None:
    def excess(callbacks: list[Any]) -> float:
        torch.manual_seed(0)
        net = share_anchored_filters(CifarResNet(14, channels=1, width=4, classes=4), regulator=True)
        run = fit(callbacks, model=Classifier(net=net), max_epochs=6)
        return sum(float(basis_penalty(basis.weight.detach().flatten(1))) for _, basis, _ in shared_bases(run.model))

    callback = BasisOrthonormality()
    assert excess([callback]) < 0.2 * excess([])
    assert list(callback.layers) == [f"net.stage{i}.0.conv{1 if i == 1 else 2}.shared" for i in (1, 2, 3)]


def test_only_some_stages() -> None:
    model = share_anchored_filters(CifarResNet(14), stages=["stage2"])
    assert [name for name, _, _ in shared_bases(model)] == ["stage2.0.conv2.shared"]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: CifarResNet(14), {"mode": "plain"}, SharingError, "must be alike"),
        (lambda: CifarResNet(14), {"mode": "one"}, ValueError, "mode must be one of 'plain', 'mix'"),
        (lambda: CifarResNet(14), {"regulator": 1}, TypeError, "regulator must be True or False"),
        (lambda: CifarResNet(14), {"stages": ["stage9"]}, SharingError, "'stage9' matches no stage"),
        (lambda: CifarResNet(14), {"stages": "stage2"}, TypeError, "write stages=['stage2']"),
        (torchvision.models.mobilenet_v2, {}, SharingError, "has no stage of basic blocks"),
        (torchvision.models.resnet50, {}, SharingError, "has no stage of basic blocks"),
        (lambda: constant_width(bias=True), {}, SharingError, "'1.0.conv2' has a bias"),
        (lambda: share_anchored_filters(CifarResNet(14)), {}, SharingError, "shares its filters already"),
    ],
)
def test_refused(model: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    network = model()
    before = {name: id(p) for name, p in network.named_parameters()}
    with pytest.raises(error) as caught:
        share_anchored_filters(network, **options)
    assert message in str(caught.value)
    assert {name: id(p) for name, p in network.named_parameters()} == before


def test_a_block_without_its_norm() -> None:
    model = CifarResNet(14)
    model.get_submodule("stage2.1").bn2 = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(SharingError, match=r"block 'stage2\.1' has no batch norm bn2"):
        share_anchored_filters(model, regulator=True)
