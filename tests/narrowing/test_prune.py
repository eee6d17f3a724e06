"""Pruning to a target: importances against what they claim, and the constant part that goes into the next bias."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from benchmarks.models.channel_graph import plain
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_importance import gated_layers, insert_gates, measure_importance
from lightning_filterdiv.narrowing import channel_scores, count_macs, prune_channels
from lightning_filterdiv.narrowing.prune import classification_accuracy

IMAGES = torch.zeros(1, 3, 16, 16)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 3, 16, 16, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(count)
    ]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = plain()
    for x, _ in batches():
        model(x)
    return model.eval()


def graph_of(model: nn.Module) -> ChannelGraph:
    return ChannelGraph.trace(model, IMAGES)


# -- importances -------------------------------------------------------------------------------------------------------


def test_taylor_is_the_derivative_of_the_loss_by_what_reads_the_channel() -> None:
    model = network().double()
    graph = graph_of(model)
    data = [(x.double(), y) for x, y in batches(1)]
    scores, _ = channel_scores(model, graph, graph.groups, "taylor", batches=data)
    group = graph.groups[1]
    columns = next(part for part in group.parts if part.kind == "consumer")
    for channel in range(group.size):
        losses = []
        for factor in (1 - 1e-5, 1 + 1e-5):
            scaled = copy.deepcopy(model)
            weight = scaled.get_parameter(columns.tensor)
            with torch.no_grad():
                weight.index_copy_(columns.dim, columns.rows[channel], factor * weight[:, columns.rows[channel]])
                losses.append(float(nn.functional.cross_entropy(scaled(data[0][0]), data[0][1])))
        slope = (losses[1] - losses[0]) / 2e-5
        assert float(scores[group.name][channel]) == pytest.approx(slope**2, rel=1e-5, abs=1e-14)


def test_redundancy_is_what_a_regression_on_the_others_leaves() -> None:
    model = network()
    graph = graph_of(model)
    with torch.no_grad():
        model[3].weight[5] = 2 * model[3].weight[2] - model[3].weight[7]  # expressed by two others
        model[3].weight[4] = 0
    scores, _ = channel_scores(model, graph, graph.groups, "redundancy")
    filters = nn.functional.normalize(model[3].weight.detach().double().flatten(1), dim=1)
    left, found = list(range(len(filters))), torch.zeros(len(filters), dtype=torch.float64)
    while left:
        unexplained = []
        for j in left:
            others = filters[[i for i in left if i != j]]
            gram = others @ others.T + 1e-2 * torch.eye(len(others), dtype=torch.float64)
            weights = torch.linalg.solve(gram, others @ filters[j]) if len(others) else filters[j].new_zeros(0)
            rest = filters[j] - weights @ others
            unexplained.append(float(rest.square().sum() + 1e-2 * weights.square().sum()))
        worst = min(range(len(left)), key=lambda i: unexplained[i])
        found[left[worst]] = unexplained[worst]
        left.pop(worst)
    torch.testing.assert_close(scores["3"], found, rtol=1e-6, atol=1e-9)
    assert scores["3"].argmin() == 4


def test_norms_and_scales() -> None:
    model = network()
    graph = graph_of(model)
    for order, name in ((1, "l1"), (2, "l2")):
        norms = torch.linalg.vector_norm(model[3].weight.detach().double().flatten(1), order, dim=1)
        scores, _ = channel_scores(model, graph, graph.groups, name)
        torch.testing.assert_close(scores["3"], norms / norms.mean())
    nn.init.uniform_(model[4].weight, -1, 1)
    scores, missing = channel_scores(model, graph, graph.groups, "bn_scale")
    torch.testing.assert_close(scores["3"], model[4].weight.detach().double().abs())
    assert not missing


def test_coupled_layers_are_scored_together() -> None:
    model = models.resnet18(num_classes=4).eval()
    graph = graph_of(model)
    group = next(g for g in graph.groups if len(g.layers) > 1)
    scores, _ = channel_scores(model, graph, [group], "l2")
    expected = torch.zeros(group.size, dtype=torch.float64)
    for layer in group.layers:
        norms = model.get_submodule(layer).weight.detach().double().flatten(1).norm(dim=1)
        expected += norms / norms.mean()
    torch.testing.assert_close(scores[group.name], expected / len(group.layers))


def test_given_scores_functions_and_chance() -> None:
    model = network()
    graph = graph_of(model)

    def last(_: nn.Module, group: Any) -> Tensor:
        return torch.arange(group.size).float()

    pruned = prune_channels(model, IMAGES, importance=last, keep_fraction=0.5, verbose=False)
    assert pruned.report.keep["3"].tolist() == list(range(6, 12))
    given = {"3": torch.arange(12.0).flip(0)}
    pruned = prune_channels(model, IMAGES, importance=given, keep_fraction=0.5, verbose=False)
    assert {name: kept.tolist() for name, kept in pruned.report.keep.items()} == {"3": list(range(6))}
    assert pruned.report.plan.left_alone["0"] == "importance says nothing about it"
    one, other = (channel_scores(model, graph, graph.groups, "random", seed=seed)[0]["3"] for seed in (0, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one, channel_scores(model, graph, graph.groups, "random")[0]["3"])


def test_gates_are_measured_and_multiplied_in() -> None:
    torch.manual_seed(0)
    gated = insert_gates(models.resnet18(num_classes=4)).eval()
    for layer in gated_layers(gated).values():
        nn.init.normal_(layer.gate.excite.weight, std=2.0)
    data = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))]
    means = measure_importance(gated, data)
    pruned = prune_channels(gated, IMAGES, importance="gates", keep_fraction=0.5, batches=data, verbose=False)
    assert not gated_layers(pruned.network)
    assert gated_layers(gated)
    kept = pruned.report.keep["layer1.0.conv1"]
    assert set(kept.tolist()) == set(means["layer1.0.conv1"].argsort(stable=True)[32:].tolist())
    scale = means["layer1.0.conv1"][kept].float().reshape(-1, 1, 1, 1)
    inputs = pruned.report.keep["conv1"]
    torch.testing.assert_close(
        pruned.network.layer1[0].conv1.weight, gated.layer1[0].conv1.weight[kept][:, inputs] * scale
    )
    with pytest.raises(ValueError, match="still has its gates"):
        prune_channels(network(), IMAGES, importance="gates", keep_fraction=0.5, batches=data)
    given = {f"net.{name}": mean for name, mean in means.items()}  # as the callback of a LightningModule has them
    again = prune_channels(gated, IMAGES, importance=given, keep_fraction=0.5, bias=False, verbose=False)
    assert again.report.importance == "gates"
    assert all(torch.equal(again.report.keep[name], kept) for name, kept in pruned.report.keep.items())
    for wrong, words in (
        ({name: mean for name, mean in means.items() if name != "conv1"}, "no mean of the gate that 'conv1' still has"),
        (means | {"conv1": 2 * means["conv1"] + 1}, "'conv1' must be mean gates of its 64 channels, in [0, 1]"),
        (means | {"conv1": means["conv1"][:3]}, "'conv1' must be mean gates of its 64 channels, in [0, 1]"),
        ({}, "importance has no mean of the gate that"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            prune_channels(gated, IMAGES, importance=wrong, keep_fraction=0.5, verbose=False)
    with pytest.raises(ValueError, match="importance='gates' needs batches"):
        prune_channels(gated, IMAGES, importance="gates", keep_fraction=0.5)


# -- the constant part -------------------------------------------------------------------------------------------------


def dead_channels(norm: bool) -> nn.Module:
    """Five of eight channels are constant, 0.5 or 0; a 1x1 convolution reads them."""
    torch.manual_seed(0)
    after: list[nn.Module] = [nn.BatchNorm2d(6)] if norm else []
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=not norm), *after,
        nn.ReLU(), nn.Conv2d(6, 2, 1),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[1].weight[3:] = 0
        model[1].bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.5, 0.5, 0.5, -1.0, -1.0]))
    return model


@pytest.mark.parametrize("norm", [True, False])
def test_constant_channels_go_without_a_change(norm: bool) -> None:
    model = dead_channels(norm)
    arguments: dict[str, Any] = {"importance": "bn_scale", "keep_fraction": {"0": 3 / 8}, "verbose": False}
    pruned = prune_channels(model, IMAGES, **arguments)
    assert pruned.report.change <= 1e-6
    assert pruned.report.compensation.exact == ("3",)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pruned.network(x), model(x), rtol=1e-5, atol=1e-6)
    assert prune_channels(model, IMAGES, bias=False, **arguments).report.change > 0.01


def test_the_measured_mean_keeps_the_mean_of_what_the_next_layer_writes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    data = batches()
    arguments: dict[str, Any] = {"keep_fraction": {"0": 0.5}, "batches": data, "verbose": False}
    pruned, without = (prune_channels(model, IMAGES, bias=bias, **arguments) for bias in (True, False))
    assert pruned.report.compensation.mean == ("2",)
    x = torch.cat([batch[0] for batch in data])

    def written(net: nn.Module) -> Tensor:
        return net[:3](x).mean((0, 2, 3))

    torch.testing.assert_close(written(pruned.network), written(model), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(written(without.network), written(model), atol=1e-3)


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l1", "l2", "bn_scale", "taylor", "redundancy", "random"])
def test_pruned_networks_meet_the_target_train_and_say_what_happened(
    importance: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.resnet18(num_classes=4)
    before = copy.deepcopy(model.state_dict())
    data = batches(2)
    network, report = prune_channels(
        model, IMAGES, importance=importance, target_macs=0.5, batches=data, loader=data, exclude=["fc"]
    )
    assert capsys.readouterr().out == f"{report.plan}\n"
    assert count_macs(network, IMAGES) == report.macs_after == report.plan.macs[1]
    assert report.macs_after / report.macs_before == pytest.approx(0.5, rel=0.01)
    assert report.accuracy_before == classification_accuracy(model, data)
    assert report.accuracy_after == classification_accuracy(network, data)
    assert type(network) is type(model)
    assert "not lossless" in str(report)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    nn.functional.cross_entropy(network.train()(data[0][0]), data[0][1]).backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"importance": "taylor", "target_macs": 0.5}, "importance='taylor' needs batches"),
        ({"importance": "taylor", "target_macs": 0.5, "batches": []}, "batches holds no batch"),
        ({"importance": "l3", "target_macs": 0.5}, "importance must be one of 'l1', 'l2'"),
        ({"importance": lambda m, g: torch.zeros(3), "target_macs": 0.5}, "one number per channel, 8; got (3,)"),
        ({"importance": {"0": torch.zeros(3)}, "target_macs": 0.5}, "importance of '0' is that of 3 channels"),
        ({"importance": "bn_scale", "target_macs": 0.5, "include": ["0"]}, "which 'bn_scale' reads; choose another"),
        ({"target_macs": 2.0}, "for half write 0.5"),
        ({"target_macs": 0.5, "include": ["conv9"]}, "include pattern 'conv9' matches no layer"),
        ({"target_macs": 1e-4}, "out of reach"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(arguments: dict[str, Any], words: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        prune_channels(model, IMAGES, **arguments)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3)),
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Conv2d(8, 5, 3)),
    ],
)
def test_a_network_whose_layers_are_all_pinned_is_refused_with_the_reason(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no layer is left to narrow: 0: .*; choose others with include") as caught:
        prune_channels(model, IMAGES, target_macs=0.5)
    assert "\n" not in str(caught.value)
