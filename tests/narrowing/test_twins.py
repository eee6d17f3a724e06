"""Twins: found up to a positive scale where folding it is exact, merged, and the change of outputs reported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.narrowing import NoTwinsError, merge_twins
from lightning_filterdiv.narrowing.twins import rescale_channels

IMAGES = torch.zeros(1, 3, 12, 12)


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    for _ in range(3):
        model(torch.randn(4, 3, 12, 12))
    return model.eval()


def copy_channel(model: nn.Module, old: int, new: int, filters: float, output: float) -> None:
    """Make channel ``new`` the same function as ``old`` times ``output``, its filter ``filters`` times as long."""
    with torch.no_grad():
        conv, norm = model[0], model[1]
        for tensor, factor in ((conv.weight, filters), (conv.bias, filters), (norm.running_mean, filters)):
            tensor[new] = factor * tensor[old]
        norm.running_var[new] = filters**2 * (norm.running_var[old] + norm.eps) - norm.eps
        for tensor in (norm.weight, norm.bias):
            tensor[new] = output * tensor[old]


@pytest.mark.parametrize(("filters", "output"), [(1.0, 1.0), (3.0, 1.0), (1.0, 0.25), (0.5, 7.0)])
def test_scaled_copies_are_merged_without_a_change(filters: float, output: float) -> None:
    model = with_norm()
    copy_channel(model, 2, 5, filters, output)
    copy_channel(model, 2, 6, 1.0, 2.0)
    before = copy.deepcopy(model.state_dict())
    network, report = merge_twins(model, IMAGES, threshold=0.999)
    assert network[0].out_channels == 6
    assert (report.channels_before, report.channels_after) == (8, 6)
    assert report.projection <= 1e-6
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_scales_count_where_they_cannot_be_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 2 * model[0].weight[2], 2 * model[0].bias[2]
    with pytest.raises(NoTwinsError, match="the most alike have"):
        merge_twins(model, IMAGES)
    with torch.no_grad():
        model[0].weight[6], model[0].bias[6] = model[0].weight[2], model[0].bias[2]
    assert merge_twins(model, IMAGES).network[0].out_channels == 7
    model[1] = nn.ReLU()
    assert merge_twins(model, IMAGES).network[0].out_channels == 6


def test_a_negative_scale_is_no_twin() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = -model[0].weight[2], -model[0].bias[2]
    with pytest.raises(NoTwinsError):
        merge_twins(model, IMAGES)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_y_400mf"])
def test_rescaling_changes_nothing_and_random_networks_merge(name: str) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, num_classes=4)
    model(torch.randn(4, 3, 32, 32))
    model = model.eval().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = ChannelGraph.trace(model, x)
    rescaled = rescale_channels(model, graph, graph.groups)
    assert float((rescaled(x) - model(x)).abs().max() / model(x).abs().max()) <= 1e-9
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), rescaled.parameters(), strict=True))
    network, report = merge_twins(model, x, threshold=0.1)
    assert report.parameters_after < report.parameters_before
    assert report.trim <= 1e-9
    assert network(x).shape == (2, 4)


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_bad_thresholds(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        merge_twins(with_norm(), IMAGES, threshold=threshold)
