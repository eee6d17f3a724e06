"""Merging: exact in float64, counts of a network built at those widths, trainable, squeezable again, and refused when
wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.models import CifarResNet
from benchmarks.models import channel_graph as models
from lightning_filterdiv.centripetal import cluster_channels
from lightning_filterdiv.channel_graph import ChannelGraph, ExampleInputsError, NarrowingError
from lightning_filterdiv.channel_graph.modules import find_tensors
from lightning_filterdiv.channel_graph.narrow import tie
from lightning_filterdiv.channel_graph.verify import random_clusters, randomise
from lightning_filterdiv.narrowing import (
    MergedFileError,
    NotTiedError,
    load_merged,
    merge_channels,
    merge_twins,
    narrow,
    prune_channels,
    save_merged,
    tie_channels,
)
from lightning_filterdiv.narrowing.export import export_onnx
from lightning_filterdiv.narrowing.measure import count_macs, count_parameters
from tests.channel_graph.checks import expected_count
from tests.channel_graph.test_zoo import build, image

INF = float("inf")
IMAGE = models.image()

SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet8_option_a": lambda: CifarResNet(8, "pad"),
    "resnet8_projection": lambda: CifarResNet(8, "projection"),
    "pre_activation": models.PreActivation,
    "unet": models.UNet,
    "densenet": models.DenseNet,
    "mobile_se": lambda: models.mobile(excite=True),
    "shuffle": models.ShuffleNet,
    "flatten_linear": models.flatten_linear,
}
# (name, merge once more). Twice for every network is minutes; ShuffleNet's forward fixes how many channels each branch
# has, so every width is found by tracing again.
SOAK_ZOO = ("resnet18", "resnet50", "densenet121", "vgg11_bn", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
            "squeezenet1_0", "shufflenet_v2_x0_5", "googlenet")  # fmt: skip
ZOO = [
    ("resnet18", False),
    ("mobilenet_v3_small", False),
    *(pytest.param(name, True, marks=pytest.mark.soak) for name in SOAK_ZOO),
]


def _outputs(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [output.clone() for output in find_tensors(model(inputs))]


def check_merge(model: nn.Module, inputs: Tensor, again: bool = True) -> nn.Module:
    """Tie random clusters and merge: same outputs to 1e-9 in float64; the result trains and is squeezed again."""
    generator = torch.Generator().manual_seed(5)
    model = model.double().eval()
    randomise(model, generator)
    inputs = inputs.double()
    graph = ChannelGraph.trace(model, inputs)
    clusters = random_clusters(graph, generator)
    untied = _outputs(model, inputs)
    tie(model, graph, clusters)
    before = _outputs(model, inputs)
    merged, report = merge_channels(model, clusters, inputs)
    for a, b, c in zip(before, _outputs(merged, inputs), untied, strict=True):
        assert float((a - b).abs().max() / a.abs().max()) <= 1e-9
        assert float((a - c).abs().max() / a.abs().max()) > 1e-6, "tying changes nothing: the test would see nothing"
    assert report.trim <= 1e-9
    assert report.projection <= 1e-9
    assert type(merged) is type(model)
    assert count_parameters(merged) == report.parameters_after == expected_count(model, graph, clusters)
    assert report.parameters_after < report.parameters_before
    assert report.macs_after < report.macs_before
    assert report.channels_after == sum(len(index.unique()) for index in clusters.values())
    if again:
        _train_a_step(merged, inputs)
        more = random_clusters(ChannelGraph.trace(merged, inputs), generator)
        twice, second = merge_channels(merged, more, inputs, tolerance=INF)
        assert second.trim <= 1e-9
        assert count_parameters(twice) < count_parameters(merged)
    return merged


def _train_a_step(model: nn.Module, inputs: Tensor) -> None:
    model.train()
    if inputs.shape[0] == 1:
        inputs = torch.cat([inputs, inputs.flip(-1)])
    kernels = [p for p in model.parameters() if p.dim() > 1]  # a bias before a norm has no gradient
    before = [p.detach().clone() for p in kernels]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    torch.stack([output.square().mean() for output in find_tensors(model(inputs))]).sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(kernels, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    model.eval()


@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str) -> None:
    torch.manual_seed(0)
    check_merge(SMALL[name](), IMAGE, again=name in ("resnet8_option_a", "shuffle", "unet"))


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
@pytest.mark.parametrize("depth", [20, 56])
@pytest.mark.soak
def test_cifar_resnets(depth: int, shortcut: Any) -> None:
    torch.manual_seed(0)
    check_merge(CifarResNet(depth, shortcut), IMAGE)


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "again"), ZOO)
def test_torchvision(name: str, again: bool) -> None:
    check_merge(build(name), image(name), again)


# --------------------------------------------------------------------------- a network built at those widths


def _vgg(widths: list[int | str]) -> nn.Module:
    """torchvision's feature extractor; its own classifier is written for 512 channels."""
    features = torchvision.models.vgg.make_layers(widths, batch_norm=True)
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * int(widths[-2]), 10))


BUILT: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Any]] = {
    "resnet": (lambda: CifarResNet(8, "projection"), lambda: CifarResNet(8, "projection", width=10), 0.625),
    "resnet_option_a": (lambda: CifarResNet(8, "pad"), lambda: CifarResNet(8, "pad", width=10), 0.625),
    "vgg_bn": (
        lambda: _vgg([16, "M", 32, "M", 64, "M"]),
        lambda: _vgg([10, "M", 20, "M", 40, "M"]),
        0.625,
    ),
    "densenet": (
        lambda: torchvision.models.DenseNet(16, (2, 2), 32, num_classes=10),
        lambda: torchvision.models.DenseNet(10, (2, 2), 20, num_classes=10),
        0.625,
    ),
}


@pytest.mark.parametrize("name", BUILT)
def test_counts_are_those_of_a_network_built_at_those_widths(name: str) -> None:
    wide, narrow, fraction = BUILT[name]
    torch.manual_seed(0)
    model, built, inputs = wide().eval(), narrow().eval(), models.image(size=32)
    graph = ChannelGraph.trace(model, inputs)
    clusters = cluster_channels(model, graph, fraction, method="even")
    merged, report = merge_channels(model, clusters, inputs, tolerance=INF)
    own, expected = dict(merged.named_parameters()), dict(built.named_parameters())
    assert {key: p.shape for key, p in own.items()} == {key: p.shape for key, p in expected.items()}
    assert report.parameters_after == count_parameters(built)
    assert report.macs_after == count_macs(built, inputs)
    if name != "resnet_option_a":  # its zero-padding shortcuts became channel maps
        built.load_state_dict(merged.state_dict())
        torch.testing.assert_close(built(inputs), merged(inputs), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- what is kept


def test_the_original_is_untouched_and_the_rest_is_kept() -> None:
    torch.manual_seed(0)
    model = CifarResNet(8, "projection").to(memory_format=torch.channels_last)
    model.conv.weight.requires_grad_(False)
    model.stage2.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    clusters = cluster_channels(model, ChannelGraph.trace(model, IMAGE), 0.5)
    merged = merge_channels(model, clusters, IMAGE, tolerance=INF).network
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not merged.conv.weight.requires_grad
    assert merged.training
    assert not merged.stage2.training
    assert merged.stage3[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert merged.stage1[0].conv1.out_channels == 8


def test_dtype_is_kept_and_float32_agrees() -> None:
    torch.manual_seed(0)
    model = CifarResNet(8, "pad").eval()
    clusters = cluster_channels(model, ChannelGraph.trace(model, IMAGE), 0.625)
    tie_channels(model, clusters, IMAGE)
    merged = merge_channels(model, clusters, IMAGE).network
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(merged(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- files, export


@pytest.mark.parametrize("name", ["resnet8_option_a", "mobile_se"])
def test_save_and_load(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SMALL[name]().eval()
    for stage in range(2):  # also what was merged twice
        graph = ChannelGraph.trace(model, IMAGE)
        clusters = cluster_channels(model, graph, 0.75, method="imbalanced")
        tie_channels(model, clusters, IMAGE)
        model = merge_channels(model, clusters, IMAGE).network
        save_merged(model, tmp_path / "narrow.pt")
        content = torch.load(tmp_path / "narrow.pt", weights_only=True)
        assert content["version"] == 1
        loaded = load_merged(SMALL[name]().eval(), tmp_path / "narrow.pt")
        assert torch.equal(loaded(IMAGE), model(IMAGE)), stage
        assert [str(m) for m in loaded.modules()] == [str(m) for m in model.modules()]
        _train_a_step(loaded, IMAGE)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    model = CifarResNet(8, "projection")
    clusters = cluster_channels(model, ChannelGraph.trace(model, IMAGE), 0.5)
    save_merged(merge_channels(model, clusters, IMAGE, tolerance=INF).network, tmp_path / "narrow.pt")
    other = CifarResNet(14, "projection")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(MergedFileError, match=r"CifarResNet.*the file lacks 'stage1\.1\.conv1\.weight'"):
        load_merged(other, tmp_path / "narrow.pt")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(MergedFileError, match=r"the network has no 'stage2\.0\.shortcut\.0\.weight'"):
        load_merged(CifarResNet(8, "pad"), tmp_path / "narrow.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    (tmp_path / "noise.pt").write_text("noise")
    for wrong in ("other.pt", "noise.pt"):
        with pytest.raises(MergedFileError, match="is not a file that save_merged wrote"):
            load_merged(CifarResNet(8), tmp_path / wrong)
    with pytest.raises(FileNotFoundError):
        load_merged(CifarResNet(8), tmp_path / "missing.pt")


@pytest.mark.parametrize("name", ["resnet8_option_a", "mobile_se"])
def test_torch_export_with_a_dynamic_batch(name: str) -> None:
    torch.manual_seed(0)
    model = SMALL[name]().eval()
    merged = merge_channels(
        model, cluster_channels(model, ChannelGraph.trace(model, IMAGE), 0.625), IMAGE, tolerance=INF
    ).network
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(merged, (IMAGE,), dynamic_shapes=({0: batch},)).module()
    for n in (1, 2, 7):
        x = models.image(n=n)
        torch.testing.assert_close(program(x), merged(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="its ONNX exporter needs a protobuf of its time")
def test_onnx_with_a_dynamic_batch(tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    model = SMALL["resnet8_option_a"]().eval()
    merged = merge_channels(
        model, cluster_channels(model, ChannelGraph.trace(model, IMAGE), 0.625), IMAGE, tolerance=INF
    ).network
    path = tmp_path / "narrow.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(merged, (IMAGE,), path, dynamo=True, input_names=["x"], dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for n in (1, 5):
        x = models.image(n=n)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), merged(x).detach(), rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------- wrong input


def _model() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = CifarResNet(8, "projection").eval()
    return model, cluster_channels(model, ChannelGraph.trace(model, IMAGE), 0.625)


def test_an_untrained_model_is_refused_with_the_projection_error() -> None:
    model, clusters = _model()
    with pytest.raises(NotTiedError, match=r"changes the outputs by \S+ \(relative\), more than tolerance=0\.001") as e:
        merge_channels(model, clusters, IMAGE)
    assert "tolerance=float('inf')" in str(e.value)
    merged, report = merge_channels(model, clusters, IMAGE, tolerance=INF)
    assert report.projection > 1e-2
    assert report.deviation > 1e-2
    assert report.trim <= 1e-9
    assert f"{report.projection:.1e}" in str(report)
    assert merged(IMAGE).shape == model(IMAGE).shape


def test_wrong_clusters_and_inputs() -> None:
    model, clusters = _model()
    some = next(iter(clusters))
    with pytest.raises(NarrowingError, match=r"no such channel group: 'classifier' \(.*output"):
        merge_channels(model, {"classifier": torch.arange(10)}, IMAGE)
    with pytest.raises(NarrowingError, match="no such channel group: 'nowhere'"):
        tie_channels(model, {"nowhere": torch.arange(3)}, IMAGE)
    with pytest.raises(NarrowingError, match="expected that many integers"):
        merge_channels(model, {some: clusters[some][:-1]}, IMAGE)
    with pytest.raises(ExampleInputsError, match="does not accept the example inputs"):
        merge_channels(model, clusters, torch.zeros(2, 5, 8, 8))
    with pytest.raises(ExampleInputsError, match="no example inputs for CifarResNet"):
        merge_channels(model, clusters)
    with pytest.raises(ValueError, match="tolerance must be a finite number"):
        merge_channels(model, clusters, IMAGE, tolerance=-1.0)
    with pytest.raises(ValueError, match=r"keep_fraction pattern 'layer9\.\*' matches no layer"):
        cluster_channels(model, ChannelGraph.trace(model, IMAGE), {"layer9.*": 0.5})
    graph = ChannelGraph.trace(model, IMAGE)
    coupled = {"conv": 0.5, "stage1.0.conv2": 0.75}
    with pytest.raises(ValueError, match="different fractions to layers that share channels"):
        cluster_channels(model, graph, coupled)


class _Remembers(nn.Module):
    """Adds a grid that is made anew where the shape is not that of the last call, as heads of detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.shape: torch.Size | None = None
        self.grid = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, 4, H, W)``."""
        if self.shape != x.shape:
            self.shape, self.grid = x.shape, torch.arange(x.shape[-1], dtype=x.dtype)
        result: Tensor = self.conv(x) + self.grid
        return result


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="its ONNX exporter needs a protobuf of its time")
def test_onnx_of_a_network_that_remembers_the_last_shape(tmp_path: Path) -> None:
    model = _Remembers().eval()
    for batch in (1, 2):
        model(torch.randn(batch, 3, 8, 8))
    assert export_onnx(model, tmp_path / "net.onnx", torch.zeros(2, 3, 8, 8)) <= 1e-3
    torch.testing.assert_close(model(torch.zeros(2, 3, 8, 8)).shape, torch.Size([2, 4, 8, 8]))


# -- weights that are no numbers ---------------------------------------------------------------------------------------


def _tie(model: nn.Module, clusters: dict[str, Tensor]) -> None:
    tie_channels(model, clusters, IMAGE)


def _narrow(model: nn.Module, clusters: dict[str, Tensor]) -> None:
    narrow(model, ChannelGraph.trace(model, IMAGE), {name: torch.arange(1) for name in clusters})


WAYS: dict[str, Callable[[nn.Module, dict[str, Tensor]], object]] = {
    "merge": lambda model, clusters: merge_channels(model, clusters, IMAGE, tolerance=INF),
    "twins": lambda model, clusters: merge_twins(model, IMAGE),
    "prune": lambda model, clusters: prune_channels(model, IMAGE, keep_fraction=0.5),
    "narrow": _narrow,
    "tie": _tie,
    "verify": lambda model, clusters: ChannelGraph.trace(model, IMAGE).verify(),
}


@pytest.mark.parametrize("value", [float("nan"), INF])
@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_no_numbers_are_refused(way: str, value: float) -> None:
    """In one filter of the last layer: the other outputs are finite."""
    model = models.plain()
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = random_clusters(graph, torch.Generator().manual_seed(0))
    name, last = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight[0, 0] = value
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(
        NarrowingError, match=f"weight of '{name}' holds NaN or inf; has the training diverged"
    ) as caught:
        WAYS[way](model, clusters)
    assert "\n" not in str(caught.value)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[key].nan_to_num())


def test_statistics_that_are_no_numbers_are_refused_and_large_ones_are_not() -> None:
    model = models.plain()
    clusters = random_clusters(ChannelGraph.trace(model, IMAGE), torch.Generator().manual_seed(0))
    name, norm = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_var is not None
    norm.running_var.fill_(3e38)  # their sum is infinite
    merge_channels(model, clusters, IMAGE, tolerance=INF)
    norm.running_var[1] = float("nan")
    with pytest.raises(NarrowingError, match=f"running_var of '{name}' holds NaN"):
        merge_channels(model, clusters, IMAGE, tolerance=INF)


class _Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """NaN for every number."""
        return torch.log(-x.abs() - 1)


def test_outputs_that_are_no_numbers_prove_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _Logarithm(), nn.Conv2d(8, 5, 3))
    with pytest.raises(NarrowingError, match=r"every output of Sequential is NaN or infinite, from '1' on") as caught:
        prune_channels(model, IMAGE, keep_fraction=0.5, bias=False, verbose=False)
    assert "\n" not in str(caught.value)


def test_steps_before_the_merge_are_measured_one_by_one() -> None:
    """Weights apart: projection; statistics apart: averaging; as two comparisons of whole networks find them."""
    model = models.plain().eval()
    graph = ChannelGraph.trace(model, IMAGE)
    clusters = random_clusters(graph, torch.Generator().manual_seed(0))
    randomise(model, torch.Generator().manual_seed(1))
    tie(model, graph, clusters)
    halfway = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in [*halfway.named_buffers()]:
            if name.endswith("running_mean"):
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2)))
    start = copy.deepcopy(halfway)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)))
    both = merge_channels(start, clusters, IMAGE, tolerance=INF).report
    weights = copy.deepcopy(start)
    tie(weights, graph, clusters)
    for name, tensor in weights.named_buffers():
        tensor.copy_(start.get_buffer(name))
    again = merge_channels(weights, clusters, IMAGE, tolerance=INF).report
    assert again.projection < 1e-6 < both.projection
    assert both.averaging == pytest.approx(again.averaging, rel=1e-6)
    assert both.averaging > 1e-3


def test_attention_is_counted_where_torch_fuses_it() -> None:
    """Batch 1, 6 tokens of 8 numbers: projections in and out, products over tokens, two layers behind."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    expected = 6 * (3 * 8 * 8 + 8 * 8 + 2 * 8 * 16) + 2 * 6 * 6 * 8
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(model, torch.randn(1, 6, 8)) == expected
    assert torch.backends.mha.get_fastpath_enabled() == enabled


class Attended(nn.Module):
    """Convolutions, whose positions are the tokens of torch's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 8, 3, 2))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(self.body(x).flatten(2).transpose(1, 2))
        return encoded


@pytest.mark.parametrize("make", [Attended, lambda: models.mobile(excite=True)], ids=["fused", "plain"])
def test_the_report_counts_what_torch_counts(make: Callable[[], nn.Module]) -> None:
    """The forward passes of the proof tell it, unless a fused operator hides its products."""
    torch.manual_seed(0)
    model = make().eval()
    clusters = random_clusters(ChannelGraph.trace(model, IMAGE), torch.Generator().manual_seed(0), 0.5)
    merged, report = merge_channels(model, clusters, IMAGE, tolerance=INF)
    assert (report.macs_before, report.macs_after) == (count_macs(model, IMAGE), count_macs(merged, IMAGE))
    assert report.macs_after < report.macs_before


def test_clusters_are_averaged_and_summed_member_by_member() -> None:
    """Bit for bit what a loop over members gives, for clusters of one to four channels in any order."""
    torch.manual_seed(0)
    index = torch.tensor([0, 0, 3, 1, 2, 2, 0, 3, 2, 4, 0])
    model = nn.Sequential(nn.Conv2d(3, len(index), 3), nn.ReLU(), nn.Conv2d(len(index), 4, 3))
    graph = ChannelGraph.trace(model, IMAGE)
    weight, columns = (model.get_parameter(f"{layer}.weight").detach().clone() for layer in (0, 2))
    tie(model, graph, {"0": index})
    merged = merge_channels(model, {"0": index}, IMAGE).network
    for place, first in enumerate(sorted(int((index == c).nonzero()[0]) for c in index.unique())):
        members = (index == index[first]).nonzero().squeeze(1).tolist()
        total, column = weight[first].double(), columns[:, first]
        for member in members[1:]:
            total, column = total + weight[member], column + columns[:, member]
        mean = (total / len(members)).float()
        assert all(torch.equal(model.get_parameter("0.weight")[member], mean) for member in members)
        assert torch.equal(merged.get_parameter("0.weight")[place], mean)
        assert torch.equal(merged.get_parameter("2.weight")[:, place], column)
