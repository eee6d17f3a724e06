"""Shared filter bases: counts of the paper, one parameter everywhere, and refusals by name."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from benchmarks.models import CifarResNet
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.narrowing import count_parameters
from lightning_filterdiv.shared_basis import (
    FilterBasis,
    SharedBasisConv2d,
    SharedConv2d,
    SharingError,
    share_filter_bases,
    shared_bases,
)


def cifar_resnet34() -> nn.Module:
    """The paper's CIFAR-100 network: 3x3 stem, no max-pooling."""
    model = torchvision.models.resnet34(num_classes=100)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Without weights: shapes are all that counts."""
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize(
    ("make", "shared", "double", "plain", "count"),
    [
        (cifar_resnet34, 8, False, 21_328_292, 5_865_428),
        (cifar_resnet34, 32, False, 21_328_292, 7_726_676),
        (torchvision.models.resnet34, 32, False, 21_797_672, 8_196_056),
        (torchvision.models.resnet34, 32, True, 21_797_672, 9_762_776),
        (lambda: CifarResNet(32), 8, False, 464_154, 150_666),
        (lambda: CifarResNet(32), 16, False, 464_154, 197_258),
    ],
    ids=["R34 S8U1", "R34 S32U1", "ImageNet S32U1", "ImageNet S32U1*", "R32 S8U1", "R32 S16U1"],
)
def test_parameter_counts_of_the_paper(
    make: Callable[[], nn.Module], shared: int, double: bool, plain: int, count: int
) -> None:
    model = on_meta(make)
    assert count_parameters(model) == plain
    assert share_filter_bases(model, shared=shared, unique=1, double=double) is model
    assert count_parameters(model) == count


def cifar_densenet121() -> nn.Module:
    """The released CIFAR-100 network: 3x3 stem without norm and pooling; its transitions lack a ReLU."""
    model = torchvision.models.densenet121(num_classes=100)
    model.features.conv0 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.features.norm0, model.features.relu0, model.features.pool0 = nn.Identity(), nn.Identity(), nn.Identity()
    return model


def cifar_resnext50() -> nn.Module:
    model = torchvision.models.resnext50_32x4d(num_classes=100)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


# ssregibility/Net_RL2, models/cifar100/densenet.py and resnext.py: every class instantiated and counted.
@pytest.mark.parametrize(
    ("make", "shared", "unique", "plain", "count"),
    [
        (cifar_densenet121, 16, 1, 7_048_548, 5_084_504),
        (cifar_densenet121, 32, 1, 7_048_548, 5_189_784),
        (cifar_densenet121, 64, 8, 7_048_548, 5_881_860),
        (cifar_resnext50, 32, 4, 23_177_124, 17_511_940),
        (cifar_resnext50, 64, 16, 23_177_124, 20_016_420),
        (cifar_resnext50, None, None, 23_177_124, 22_748_580),  # S64U64
    ],
)
def test_parameter_counts_of_the_released_dense_and_grouped_networks(
    make: Callable[[], nn.Module], shared: int | None, unique: int | None, plain: int, count: int
) -> None:
    model = on_meta(make)
    assert count_parameters(model) == plain
    share_filter_bases(model, shared=shared, unique=unique)
    assert count_parameters(model) == count
    with torch.device("meta"):
        assert model.eval()(torch.empty(1, 3, 32, 32)).shape == (1, 100)


def test_a_dense_block_shares_in_all_its_layers() -> None:
    """Against the formula of the released layer, block by block, and the bases one by one."""
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(4, (2, 3), 8, bn_size=2, num_classes=5)
    share_filter_bases(model, shared=6, unique=2)
    assert [name for name, _, _ in shared_bases(model)] == [
        "features.denseblock1.denselayer1.conv2.shared", "features.denseblock2.denselayer1.conv2.shared",
    ]  # fmt: skip
    layers = [model.get_submodule(f"features.denseblock2.denselayer{i}") for i in (1, 2, 3)]
    assert len({id(layer.conv2.basis) for layer in layers}) == 1
    assert all(layer.conv2.rank == 8 for layer in layers)
    layer, x = layers[1].eval(), torch.randn(2, layers[1].norm1.num_features, 5, 5)
    inner = layer.conv1(torch.relu(layer.norm1(x)))
    inner = torch.relu(layer.norm2(inner))
    conv = layer.conv2
    filters = torch.cat(
        [F.conv2d(inner, conv.unique.weight, padding=1), F.conv2d(inner, conv.basis.weight, padding=1)], 1
    )
    torch.testing.assert_close(layer(x), conv.coefficients(conv.norm(filters)))


def test_a_grouped_stage_shares_behind_its_first_block() -> None:
    torch.manual_seed(0)
    model = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 3, 3, 3], num_classes=5, groups=4, width_per_group=8
    )
    share_filter_bases(model, shared=16, unique=8)
    first, second, third = (model.get_submodule(f"layer2.{i}") for i in range(3))
    assert isinstance(first.conv2, nn.Conv2d)
    assert second.conv2.basis is third.conv2.basis
    basis, unique = second.conv2.basis, second.conv2.unique
    # layer1 has 32 channels in 4 groups, 8 filters in each: S = 16 is 2 groups, U = 8 is 1; layer2 is twice as wide.
    assert (basis.in_channels, basis.out_channels, basis.groups) == (64, 32, 2)
    assert (unique.out_channels, unique.groups) == (16, 2)
    x = torch.randn(2, 64, 5, 5)
    expected = [F.conv2d(x, layer.weight, padding=1, groups=layer.groups) for layer in (unique, basis)]
    torch.testing.assert_close(second.conv2(x), torch.cat(expected, 1))
    assert (second.bn2.num_features, second.conv3.in_channels) == (48, 48)
    rows = basis.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(32), atol=1e-5, rtol=0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("unique", [0, 2])
def test_a_layer_is_the_papers_formula(unique: int, double: bool) -> None:
    torch.manual_seed(0)
    model = share_filter_bases(CifarResNet(20), shared=5, unique=unique, double=double).double().eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SharedBasisConv2d)}
    assert list(layers)[:4] == ["stage1.1.conv1", "stage1.1.conv2", "stage1.2.conv1", "stage1.2.conv2"]
    assert {name.split(".")[1] for name in layers} == {"1", "2"}, "the first block keeps its convolutions"
    for name, layer in layers.items():
        for norm in (layer.norm,):
            norm.running_mean.normal_()  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        scale = {"1": 1, "2": 2, "3": 4}[name[5]]
        assert layer.rank == (5 + unique) * scale
        x = torch.randn(2, layer.basis.in_channels, 7, 6, dtype=torch.float64)
        parts = [nn.functional.conv2d(x, layer.basis.weight, padding=1)]
        if layer.unique is not None:
            parts.insert(0, nn.functional.conv2d(x, layer.unique.weight, padding=1))
        expected = layer.coefficients(layer.norm(torch.cat(parts, dim=1)))
        torch.testing.assert_close(layer(x), expected)
        weight, bias = layer.composed_weight()
        torch.testing.assert_close(nn.functional.conv2d(x, weight, bias, padding=1), expected)
        assert torch.linalg.matrix_rank(weight.flatten(1)) <= layer.rank


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = share_filter_bases(CifarResNet(20), shared=8, double=True)
    for stage in ("stage1", "stage2", "stage3"):
        bases = [basis for _, basis, _ in shared_bases(model) if basis.gram == stage]
        assert len(bases) == 2
        rows = torch.cat([basis.weight.detach().flatten(1) for basis in bases])
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    layer = model.get_submodule("stage3.1.conv1")
    assert isinstance(layer, SharedBasisConv2d)
    fan_out = layer.coefficients.out_channels
    assert float(layer.coefficients.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_a_basis_is_one_parameter() -> None:
    torch.manual_seed(0)
    model = share_filter_bases(CifarResNet(20), shared=8)
    bases = {name: basis for name, basis, _ in shared_bases(model)}
    assert list(bases) == [f"stage{i}.1.conv1.shared" for i in (1, 2, 3)]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "shared" in name]
    assert names == [f"{name}.weight" for name in bases]
    assert [key for key in model.state_dict() if "shared" in key] == names
    chosen = select_filters(model)
    assert all(chosen[name] is basis for name, basis in bases.items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert all(owned.count(id(basis.weight)) == 1 for basis in bases.values())
    # Its gradient is the sum over the four layers that use it.
    for parameter in model.parameters():
        parameter.grad = None
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    layers = [m for m in model.stage1.modules() if isinstance(m, SharedBasisConv2d)]
    assert len(layers) == 4
    assert all(layer.basis is bases["stage1.1.conv1.shared"] for layer in layers)
    assert [layer.owns_basis for layer in layers] == [True, False, False, False]


def _same(model: nn.Module, other: nn.Module) -> bool:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return torch.equal(model.eval()(x), other.eval()(x))


def test_round_trips() -> None:
    """state_dict into a fresh network, ``assign``, ``to_empty``, deepcopy and pickle: the layers keep sharing."""
    torch.manual_seed(0)
    model = share_filter_bases(CifarResNet(14), shared=4)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    fresh = share_filter_bases(CifarResNet(14), shared=4)
    assert not _same(model, fresh)
    fresh.load_state_dict(state)
    assert _same(model, fresh)
    with torch.device("meta"):
        empty = CifarResNet(14)
    share_filter_bases(empty, shared=4)
    empty.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    materialised = share_filter_bases(CifarResNet(14), shared=4).to("meta").to_empty(device="cpu")
    materialised.load_state_dict(state)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    loaded = torch.load(io.BytesIO(pickled.getvalue()), weights_only=False)
    for other in (empty, materialised, copy.deepcopy(model), loaded):
        assert _same(model, other)
        layers = [m for m in other.stage1.modules() if isinstance(m, SharedBasisConv2d)]
        assert len({id(layer.basis.weight) for layer in layers}) == 1
        assert layers[0].basis.weight is not model.get_submodule("stage1.1.conv1").basis.weight
        with torch.no_grad():
            layers[0].basis.weight.zero_()
        assert not _same(model, other)


def test_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    share_filter_bases(model, shared=3, layers=["0", "1", "2"])
    x = torch.randn(2, 4, 5, 5)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), eager(x))
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_bottleneck_and_inverted_residual_blocks_share_whole_convolutions() -> None:
    """ResNet-50-Shared and MobileNetV2-Shared: existing 1x1 convolutions are the coefficients."""
    resnet = on_meta(torchvision.models.resnet50)
    plain = count_parameters(resnet)
    saved = {name: p.numel() for name, p in resnet.named_parameters()}
    share_filter_bases(resnet)
    blocks = [(stage, block) for stage, count in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(2, count)]
    expected = sum(saved[f"layer{stage}.{block}.conv2.weight"] for stage, block in blocks)
    assert plain - count_parameters(resnet) == expected
    assert [basis.gram for _, basis, _ in shared_bases(resnet)] == [f"layer{s}.conv2" for s in (1, 2, 3, 4)]
    twice = share_filter_bases(on_meta(torchvision.models.resnet50), double=True)
    expected += sum(saved[f"layer{stage}.{block}.conv3.weight"] for stage, block in blocks)
    assert plain - count_parameters(twice) == expected
    assert {basis.pool for _, basis, _ in shared_bases(twice)} == {"conv2", "conv3"}

    mobile = share_filter_bases(torchvision.models.mobilenet_v2(), double=True)
    names = [(basis.gram, basis.pool) for _, basis, _ in shared_bases(mobile)]
    assert sorted(names) == sorted(
        (f"stage{s}.{role}", role) for s in (3, 4, 5, 6) for role in ("expansion", "projection")
    )
    mobile(torch.randn(2, 3, 32, 32)).sum().backward()
    for _, basis, own in shared_bases(mobile):
        assert not own
        assert basis.weight.grad is not None
        rows = basis.weight.detach().flatten(1)
        side = rows if len(rows) <= rows.shape[1] else rows.T
        torch.testing.assert_close(side @ side.T, torch.eye(len(side)), atol=1e-4, rtol=0)


def test_layers_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding="same") for _ in range(4)))
    share_filter_bases(model, shared=6, unique=2, layers={"early": ["1", "2"], "late": ["3", "4"]})
    assert [(name, basis.gram) for name, basis, _ in shared_bases(model)] == [
        ("1.shared", "early"),
        ("3.shared", "late"),
    ]
    assert model[1].coefficients.bias is not None, "the layers had a bias"
    assert model(torch.randn(2, 1, 9, 9)).shape == (2, 8, 9, 9)
    one = share_filter_bases(nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3))), layers=["0", "2"])
    assert isinstance(one[0], SharedBasisConv2d)
    assert isinstance(one[1], nn.Conv2d)


def test_layers_by_pattern() -> None:
    """In the order in which they are named; wrappers add nothing to their names."""
    net = CifarResNet(14)
    model = torch.compile(nn.ModuleDict({"net": net}), backend="eager")
    share_filter_bases(model, shared=4, layers=["net.stage1.1.conv?", "net.stage1.0.conv2"])
    assert [(n, b.gram) for n, b, _ in shared_bases(net)] == [("stage1.1.conv1.shared", "net.stage1.1.conv1")]
    sharing = [name for name, module in net.named_modules() if isinstance(module, SharedBasisConv2d)]
    assert sharing == ["stage1.0.conv2", "stage1.1.conv1", "stage1.1.conv2"]


def test_a_layer_under_two_names_shares_under_both() -> None:
    model = share_filter_bases(_under_two_names(), shared=4, layers=["0", "1"])
    assert model[0] is model[2]
    assert isinstance(model[0], SharedBasisConv2d)
    model = share_filter_bases(_under_two_names(), shared=4, layers=["*"])
    assert model[0] is model[2]
    assert isinstance(model[1], SharedBasisConv2d)


def test_device_dtype_and_mode_follow_the_network() -> None:
    model = CifarResNet(14).double().eval()
    share_filter_bases(model, shared=4, stages=["stage2"])
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert [basis.gram for _, basis, _ in shared_bases(model)] == ["stage2"]
    assert model.get_submodule("stage2.1.conv1").basis.out_channels == 8, "stage names do not change the scale"


class _Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = CifarResNet(14)


def _under_two_names() -> nn.Module:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(conv, nn.Conv2d(4, 4, 3, padding=1), conv)


BASIC = "stage1, stage2, stage3"
REFUSED: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("rank", lambda: share_filter_bases(CifarResNet(14), shared=150), SharingError, "more than the 144 numbers"),
    (
        "joint rank",
        lambda: share_filter_bases(CifarResNet(14), shared=80, double=True),
        SharingError,
        "stage1: two bases of 80 and unique=1",
    ),
    (
        "stage",
        lambda: share_filter_bases(CifarResNet(14), stages=["stag1"]),
        SharingError,
        "closest name is 'stage1'",
    ),
    ("stage text", lambda: share_filter_bases(CifarResNet(14), stages="stage1"), TypeError, "write stages=['stage1']"),
    (
        "too few blocks",
        lambda: share_filter_bases(on_meta(torchvision.models.mobilenet_v2), stages=["stage1"]),
        SharingError,
        "'stage1' matches no stage with enough blocks to share",
    ),
    ("no stage", lambda: share_filter_bases(CifarResNet(14), stages=[]), ValueError, "stages=[] shares nothing"),
    ("one block", lambda: share_filter_bases(CifarResNet(8)), SharingError, "name the convolutions that are to share"),
    ("vgg", lambda: share_filter_bases(on_meta(torchvision.models.vgg11)), SharingError, "VGG has no stage"),
    (
        "zero",
        lambda: share_filter_bases(CifarResNet(14), shared=0),
        ValueError,
        "shared must be an integer >= 1, got 0",
    ),
    ("negative", lambda: share_filter_bases(CifarResNet(14), unique=-1), ValueError, "unique must be an integer >= 0"),
    ("flag", lambda: share_filter_bases(CifarResNet(14), double=2), TypeError, "double must be True or False"),  # type: ignore[arg-type]
    (
        "bottleneck",
        lambda: share_filter_bases(on_meta(torchvision.models.resnet50), shared=32),
        ValueError,
        "leave both at None",
    ),
    (
        "filters that fall into no groups",
        lambda: share_filter_bases(on_meta(torchvision.models.resnext50_32x4d), shared=30),
        SharingError,
        "'layer1.1.conv2': shared=30 filters do not fall into groups over 128 channels",
    ),
    (
        "a second basis of a dense block",
        lambda: share_filter_bases(on_meta(torchvision.models.densenet121), double=True),
        ValueError,
        "grouped and dense blocks have one layer that shares and no second basis; leave double out",
    ),
    (
        "dense twice",
        lambda: share_filter_bases(share_filter_bases(on_meta(cifar_densenet121))),
        SharingError,
        "'features.denseblock1.denselayer1.conv2' shares its filters already",
    ),
    (
        "twice",
        lambda: share_filter_bases(share_filter_bases(CifarResNet(14), shared=4), shared=4),
        SharingError,
        "'stage1.1.conv1' shares its filters already",
    ),
    (
        "unknown layer",
        lambda: share_filter_bases(_Wrapped(), layers=["backbone.stage1.0.conv1", "backbone.stage1.0.conv9"]),
        SharingError,
        "'backbone.stage1.0.conv9' matches no convolution; the closest name is 'backbone.stage1.0.conv",
    ),
    (
        "strided",
        lambda: share_filter_bases(CifarResNet(14), layers=["stage2.0.conv1", "stage2.1.conv1"]),
        SharingError,
        "'stage2.0.conv1' has stride (2, 2)",
    ),
    (
        "channels",
        lambda: share_filter_bases(CifarResNet(14), layers=["stage1.0.conv1", "stage2.1.conv1"]),
        SharingError,
        "'stage2.1.conv1' has in_channels=32, 'stage1.0.conv1' 16",
    ),
    (
        "grouped",
        lambda: share_filter_bases(nn.Sequential(*(nn.Conv2d(4, 4, 3, groups=2) for _ in range(2))), layers=["0", "1"]),
        SharingError,
        "'0' is a grouped convolution (groups=2)",
    ),
    (
        "linear",
        lambda: share_filter_bases(CifarResNet(14), layers=["classifier", "conv"]),
        SharingError,
        "'classifier' is a Linear",
    ),
    ("alone", lambda: share_filter_bases(CifarResNet(14), layers=["conv"]), SharingError, "by at least two layers"),
    ("same twice", lambda: share_filter_bases(CifarResNet(14), layers=["conv", "conv"]), SharingError, "named twice"),
    (
        "text",
        lambda: share_filter_bases(CifarResNet(14), layers="conv"),
        TypeError,
        "layers must be a list of name",
    ),
    (
        "both",
        lambda: share_filter_bases(CifarResNet(14), layers=["conv", "conv"], stages=["stage1"]),
        ValueError,
        "give neither stages nor double",
    ),
    (
        "one layer under two names",
        lambda: share_filter_bases(_under_two_names(), layers=["0", "1", "2"]),
        SharingError,
        "'2' is named twice",
    ),
    (
        "two groups",
        lambda: share_filter_bases(
            CifarResNet(14),
            layers={"a": ["stage1.0.conv1", "stage1.0.conv2"], "b": ["stage1.0.conv2", "stage1.1.conv1"]},
        ),
        SharingError,
        "'stage1.0.conv2' is in two groups, 'a' and 'b'",
    ),
    (
        "parametrized",
        lambda: share_filter_bases(
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3)),
            layers=["0", "1"],
        ),
        SharingError,
        "'0' has a weight computed by a parametrization (weight_norm, prune, ...); remove the parametrization first",
    ),
    (
        "lazy",
        lambda: share_filter_bases(nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3)), layers=["0", "1"]),
        SharingError,
        "'0' is lazy",
    ),
    ("empty basis", lambda: FilterBasis(4, 0, 3), ValueError, "got filters=0"),
    ("unique", lambda: SharedBasisConv2d(FilterBasis(4, 2, 3), 4, unique=-1), ValueError, "unique must be >= 0"),
]


@pytest.mark.parametrize(("action", "error", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refusals(action: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        action()
    assert message in str(caught.value)


def test_a_refusal_leaves_the_network_as_it_was() -> None:
    model = CifarResNet(14)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SharingError):  # the last stage is refused after the first two were planned
        share_filter_bases(model, shared=40, unique=130)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bases_made_by_separate_calls_are_separate() -> None:
    """One name would make their filters orthonormal together."""
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(6)))
    share_filter_bases(model, shared=4, layers=["0", "1"])
    share_filter_bases(model, shared=4, layers=["2", "3"])
    assert [basis.gram for _, basis, _ in shared_bases(model)] == ["0", "2"]
    with pytest.raises(SharingError, match="shared basis called '2' already"):
        share_filter_bases(model, shared=4, layers={"2": ["4", "5"]})
    twins = nn.ModuleDict({side: on_meta(torchvision.models.mobilenet_v2) for side in ("left", "right")})
    share_filter_bases(twins, stages=["left.stage3", "right.stage3"])
    assert [basis.gram for _, basis, _ in shared_bases(twins)] == ["left.stage3.expansion", "right.stage3.expansion"]


def test_inside_another_module() -> None:
    model = _Wrapped()
    share_filter_bases(model, shared=4, stages=["backbone.stage3"])
    assert [name for name, _, _ in shared_bases(model)] == ["backbone.stage3.1.conv1.shared"]
    assert "of another layer" in repr(model.get_submodule("backbone.stage3.1.conv2"))
    assert isinstance(SharedConv2d(FilterBasis(3, 5, 1))(torch.randn(1, 3, 2, 2)), torch.Tensor)
