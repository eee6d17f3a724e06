"""Gates, their mean over images, selections, and pruned networks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18, resnet50, vgg11_bn

from benchmarks.models import CifarResNet
from lightning_filterdiv import ChannelImportance
from lightning_filterdiv.channel_graph import ChannelGraph, NarrowingError
from lightning_filterdiv.channel_graph.verify import randomise
from lightning_filterdiv.channel_importance import (
    ChannelGate,
    gated_layers,
    insert_gates,
    measure_importance,
    remove_gates,
    select_channels,
)
from lightning_filterdiv.demo import three_convolutions
from lightning_filterdiv.filters import NoLayersError
from lightning_filterdiv.narrowing import narrow
from tests.support.training import STEPS_PER_EPOCH, Classifier, batches, fit


def test_the_gate_is_its_formula() -> None:
    torch.manual_seed(0)
    gate, x = ChannelGate(40).double(), torch.randn(3, 40, 5, 4).double()
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {
        "squeeze.weight": (2, 40), "excite.weight": (40, 2)
    }  # fmt: skip
    for image, out in zip(x, gate(x), strict=True):
        hidden = (gate.squeeze.weight @ image.mean((1, 2))).clamp_min(0)
        factor = 1 / (1 + torch.exp(-gate.excite.weight @ hidden))
        torch.testing.assert_close(out, image * factor[:, None, None], rtol=1e-12, atol=1e-12)


def test_insert_and_remove() -> None:
    model = mobilenet_v2().eval()
    plain = copy.deepcopy(model)
    names, conv = list(model.state_dict()), model.features[0][0]
    insert_gates(model, exclude=["features.18.*"])
    layers = gated_layers(model)
    assert model.features[0][0] is conv
    assert not any(layer.groups > 1 for layer in layers.values())
    assert len(layers) == 52 - 17 - 1
    insert_gates(model)
    assert len(gated_layers(model)) == 52 - 17
    assert conv.gate is gated_layers(model)["features.0.0"].gate  # type: ignore[union-attr]
    remove_gates(model)
    assert list(model.state_dict()) == names
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(x), plain(x))
    with pytest.raises(NoLayersError, match="has no gate to remove"):
        remove_gates(model)
    with pytest.raises(ValueError, match=r"'features\.1\.conv\.0\.0' is an nn\.Conv2d with 32 groups"):
        insert_gates(model, include=["features.1.conv.0.0"])


def _by_hand(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Image by image, with hooks on the sigmoid's input."""
    found: dict[str, list[Tensor]] = {}
    handles = [
        conv.gate.excite.register_forward_hook(
            lambda m, i, out, name=name: found.setdefault(name, []).append(torch.sigmoid(out))
        )
        for name, conv in gated_layers(model).items()
    ]
    for image in images:
        model(image[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double().mean(0) for name, rows in found.items()}


def test_measured_importance_is_the_mean_over_images() -> None:
    torch.manual_seed(0)
    model = insert_gates(three_convolutions(width=20, image_size=8))
    model[0].train(False)  # type: ignore[index]
    modes = [m.training for m in model.modules()]
    images = torch.randn(10, 1, 8, 8)
    measured = measure_importance(model, [(images[:7], None), images[7:]])
    assert [m.training for m in model.modules()] == modes
    expected = _by_hand(model.eval(), images)
    assert measured.keys() == expected.keys() == {"conv1", "conv2", "conv3"}
    for name, gates in measured.items():
        torch.testing.assert_close(gates, expected[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="holds no images"):
        measure_importance(model, [])
    with pytest.raises(NoLayersError, match="has no gates"):
        measure_importance(three_convolutions(), [images])


class _Recorder(ChannelImportance):
    """Keeps every gate vector that training computed, image by image."""

    def prepare(self, trainer: Any, pl_module: Any) -> None:
        super().prepare(trainer, pl_module)
        self.seen: dict[str, list[Tensor]] = {}
        for name, conv in self.layers.items():
            conv.gate.excite.register_forward_hook(  # type: ignore[union-attr,operator]
                lambda m, i, out, name=name: self.seen.setdefault(name, []).append(torch.sigmoid(out.detach()))
            )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_callback_averages_the_last_epoch(accumulate: int) -> None:
    callback = _Recorder()
    model = Classifier(lr_scale=1.5)
    fit([callback], model=model, validation=batches(steps=2), accumulate_grad_batches=accumulate)
    gates = callback.importance
    assert list(gates) == ["net.0", "net.3", "net.5", "net.7"]
    for name, rows in callback.seen.items():
        training = [row for row in rows if len(row) == 16]
        per_epoch = STEPS_PER_EPOCH + 2  # validation too
        last = training[-per_epoch:][:STEPS_PER_EPOCH]
        torch.testing.assert_close(gates[name], torch.cat(last).double().mean(0), rtol=1e-5, atol=1e-7)
    assert gated_layers(model), "the network keeps what it was trained with"


# --------------------------------------------------------------------------- pruning


def _random_keep(graph: ChannelGraph, names: list[str], fraction: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = graph.expressible_counts(
        {g.name: max(1, round(fraction * g.size)) for g in graph.groups if g.name in names}
    )
    return {
        group.name: torch.randperm(group.size, generator=generator)[: counts[group.name]]
        for group in graph.groups
        if group.name in names
    }


NETWORKS: dict[str, Any] = {
    "c3": lambda: (three_convolutions(width=8, image_size=8), (1, 8)),
    "resnet8, option A": lambda: (CifarResNet(8, channels=1, width=4), (1, 8)),
    "resnet18": lambda: (resnet18(num_classes=5), (3, 32)),
}
WIDE: dict[str, Any] = {
    "resnet50": lambda: (resnet50(num_classes=5), (3, 32)),
    "vgg11_bn": lambda: (vgg11_bn(num_classes=5), (3, 32)),
    "mobilenet_v2": lambda: (mobilenet_v2(num_classes=5), (3, 32)),
}


@pytest.mark.parametrize("name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.soak) for name in WIDE)])
def test_pruned_is_silenced(name: str) -> None:
    """Against the whole network with hooks that zero the channels in front of everything that reads them."""
    torch.manual_seed(0)
    model, (channels, size) = (NETWORKS | WIDE)[name]()
    model = model.double().eval()
    randomise(model, torch.Generator().manual_seed(1))
    x = torch.randn(2, channels, size, size, dtype=torch.float64)
    graph = ChannelGraph.trace(model, x)
    alone = [g for g in graph.groups if len(g.producers) == 1]
    keep = _random_keep(graph, [g.name for g in alone], 0.6)
    pruned = narrow(model, graph, keep)
    modules = dict(model.named_modules())
    expected, before = copy.deepcopy(model), model(x)
    for group in alone:
        removed = torch.ones(group.size, dtype=torch.bool)
        removed[keep[group.name]] = False
        for part in group.parts:
            if part.kind == "consumer":
                weight = expected.get_parameter(part.tensor).data
                for column in part.rows[removed].reshape(-1).tolist():
                    weight.select(part.dim, column).zero_()
        layer = pruned.get_submodule(group.producers[0])
        own = modules[group.producers[0]]
        if len(graph.groups) and group.size == graph.filter_count(group.producers[0]):
            rows = keep[group.name].sort().values
            assert layer.weight.shape[0] == len(rows)
            if group.producers[0] == "conv1":  # reads the images: its rows are what was kept, in order
                assert torch.equal(layer.weight, own.weight[rows])
    difference = (pruned(x) - expected(x)).abs().max() / expected(x).abs().max()
    assert float(difference) < 1e-12
    assert float((before - expected(x)).abs().max()) > 1e-6
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    pruned.train()(x.repeat(2, 1, 1, 1)).sum().backward()
    assert type(pruned) is type(model)


def test_a_residual_sum_can_be_named() -> None:
    model, x = CifarResNet(8, channels=1, width=4), torch.randn(1, 1, 8, 8)
    graph = ChannelGraph.trace(model, x)
    importance = {
        name: torch.rand(conv.out_channels) for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d)
    }
    internal = select_channels(graph, importance)
    assert list(internal) == ["stage1.0.conv1", "stage2.0.conv1", "stage3.0.conv1"]
    everything = select_channels(graph, importance, include=["*"], keep_fraction=0.75)
    assert set(internal) < set(everything)
    pruned = narrow(model, graph, everything)
    assert pruned.classifier.in_features < model.classifier.in_features  # type: ignore[union-attr]
    assert pruned(x).shape == (1, 10)


def test_names_inside_and_around_a_module() -> None:
    """``conv1`` of the stem is no prefix away from ``layer1.0.conv1``."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet18(num_classes=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x)
            return y

    x = torch.zeros(1, 3, 32, 32)
    inner, outer = resnet18(num_classes=2), Around()
    gates = {n: torch.rand(m.out_channels) for n, m in inner.named_modules() if isinstance(m, nn.Conv2d)}
    expected = select_channels(ChannelGraph.trace(inner, x), gates)
    assert len(expected) == 8
    around = select_channels(ChannelGraph.trace(outer, x), gates)
    assert {name: kept.tolist() for name, kept in around.items()} == {
        f"net.{name}": kept.tolist() for name, kept in expected.items()
    }
    again = select_channels(ChannelGraph.trace(inner, x), {f"net.{name}": g for name, g in gates.items()})
    assert {n: k.tolist() for n, k in again.items()} == {n: k.tolist() for n, k in expected.items()}


def test_selection() -> None:
    model, x = three_convolutions(width=4, image_size=8), torch.zeros(1, 1, 8, 8)
    graph = ChannelGraph.trace(model, x)
    gates = {
        "net.conv1": torch.tensor([0.5, 0.6, 0.4, 0.5]),
        "net.conv2": torch.tensor([0.7, 0.1, 0.7, 0.9]),
        "net.conv3": torch.full((4,), 0.5),
    }

    def chosen(rule: Any, **options: Any) -> dict[str, list[int]]:
        return {name: kept.tolist() for name, kept in select_channels(graph, gates, rule, **options).items()}

    # Means .5, .6, .5; a thousandth below the mean is kept.
    assert chosen("threshold") == {"conv1": [0, 1, 3], "conv2": [0, 2, 3], "conv3": [0, 1, 2, 3]}
    assert chosen("threshold", threshold=1.9) == {"conv1": [1], "conv2": [3], "conv3": [0]}
    assert chosen("uniform") == {"conv1": [0, 1], "conv2": [0, 3], "conv3": [0, 1]}
    assert chosen("uniform", keep_fraction=0.1, exclude=["conv3"]) == {"conv1": [1], "conv2": [3]}
    assert chosen("uniform", include=["conv[12]"], keep_fraction=0.75) == {"conv1": [0, 1, 3], "conv2": [0, 2, 3]}
    with pytest.raises(ValueError, match="has 4: it was measured on another network"):
        select_channels(graph, {"conv1": torch.ones(5)})
    with pytest.raises(NoLayersError, match="name layers of a group in include"):
        select_channels(graph, {"other": torch.ones(4)})
    with pytest.raises(ValueError, match="rule must be one of"):
        select_channels(graph, gates, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 < keep_fraction <= 1"):
        select_channels(graph, gates, keep_fraction=0.0)


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"conv9": torch.tensor([0])}, NarrowingError, "no such channel group: 'conv9'"),
        ({"classifier": torch.tensor([0])}, NarrowingError, "network output"),
        ({"conv1": torch.tensor([4])}, ValueError, "at least one of the channels 0..3"),
        ({"conv1": torch.tensor([-1])}, ValueError, "each once"),
        ({"conv1": torch.tensor([1, 1])}, ValueError, "each once"),
        ({"conv1": torch.tensor([], dtype=torch.long)}, ValueError, "at least one"),
        ({"conv1": torch.tensor([True, False, True, True])}, ValueError, "as integers"),
    ],
)
def test_refused(keep: dict[str, Tensor], error: type[Exception], message: str) -> None:
    model, x = three_convolutions(width=4, image_size=8), torch.zeros(1, 1, 8, 8)
    graph = ChannelGraph.trace(model, x)
    with pytest.raises(error) as caught:
        narrow(model, graph, keep)
    assert message in str(caught.value)


def test_gates_must_go_first() -> None:
    model, x = three_convolutions(width=4, image_size=8), torch.zeros(1, 1, 8, 8)
    graph = ChannelGraph.trace(model, x)
    with pytest.raises(ValueError, match="'conv1' still has its gate"):
        narrow(insert_gates(model), graph, {"conv1": torch.tensor([0])})
