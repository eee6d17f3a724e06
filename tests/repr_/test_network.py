"""Silencing, holding and regrowing filters in a network."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import filter_matrix
from lightning_filterdiv.repr_.functional import regrow_filters
from lightning_filterdiv.repr_.network import DroppedFilters
from lightning_filterdiv.tensors.randomness import keyed_generator
from tests.repr_.networks import NETWORKS, Reference, randomized

DROP = torch.tensor([1, 3])
EXAMPLE = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


def _dropped(net: Reference, layers: int | None = None) -> DroppedFilters:
    graph = ChannelGraph.trace(net, EXAMPLE)
    return DroppedFilters.drop(net, graph, dict.fromkeys(net.dropped[:layers], DROP))


def _images(seed: int = 1) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_sub_network_is_the_physically_smaller_one(name: str, mode: str) -> None:
    net = randomized(NETWORKS[name]).train(mode == "train")
    before = copy.deepcopy(net)
    dropped = _dropped(net)
    kept = {
        layer: torch.tensor([j for j in range(net.get_submodule(layer).out_channels) if j not in DROP])
        for layer in net.dropped
    }
    assert dropped.count == 2 * len(net.dropped)
    expected = before.smaller(_images(), kept)
    torch.testing.assert_close(net(_images()), expected, rtol=1e-12, atol=1e-12)
    assert float((before(_images()) - expected).abs().max()) > 1e-3, "dropping these filters must matter"


@pytest.mark.parametrize("name", NETWORKS)
def test_restore_undoes_the_drop(name: str) -> None:
    net = randomized(NETWORKS[name])
    before = copy.deepcopy(net.state_dict())
    dropped = _dropped(net)
    assert any(not torch.equal(before[key], value) for key, value in net.state_dict().items())
    dropped.restore()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_masking_the_convolution_alone_would_leak() -> None:
    """What the private region is for: relu of the norm's bias, and depthwise biases, pass on."""
    for name in ("plain", "mobile", "dense"):
        net = randomized(NETWORKS[name]).eval()
        exact = copy.deepcopy(net)
        _dropped(exact)
        with torch.no_grad():
            for layer in net.dropped:
                net.get_submodule(layer).weight[DROP] = 0
        assert float((net(_images()) - exact(_images())).abs().max()) > 1e-3


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, hold: Any = None) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        net(_images(step)).square().mean().backward()
        if hold is not None:
            hold.before_step(optimizer)
        optimizer.step()
        if hold is not None:
            hold.after_step(optimizer)


def _private_rows(dropped: DroppedFilters) -> list[Tensor]:
    named = {**dict(dropped.model.named_parameters()), **dict(dropped.model.named_buffers())}
    parts = [part for parts in dropped._private.values() for part in parts]
    return [part.of(named) for part in parts if isinstance(named[part.tensor], nn.Parameter)]


def _consumer_columns(dropped: DroppedFilters) -> list[Tensor]:
    named = dict(dropped.model.named_parameters())
    return [part.of(named) for parts in dropped._consumers.values() for part in parts]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_dropped_rows_and_their_state_are_bit_still(name: str, optimizer: str) -> None:
    net = randomized(NETWORKS[name])
    made = OPTIMIZERS[optimizer](net.parameters())
    _train(net, made, 3)
    dropped = _dropped(net)
    states = [
        (parameter, key, value.clone())
        for parameter in net.parameters()
        for key, value in made.state[parameter].items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    ]
    columns = _consumer_columns(dropped)
    assert columns
    hold = dropped.hold(consumers=True)
    _train(net, made, 5, hold)
    assert all(not bool(rows.any()) for rows in _private_rows(dropped))
    assert all(torch.equal(a, b) for a, b in zip(columns, _consumer_columns(dropped), strict=True))
    for layer in net.dropped:
        weight = net.get_submodule(layer).weight
        held = [(key, value) for parameter, key, value in states if parameter is weight]
        assert held
        for key, value in held:
            assert torch.equal(made.state[weight][key][DROP], value[DROP])
            assert not torch.equal(made.state[weight][key], value)


def test_consumers_shrink_unless_held() -> None:
    net = randomized(NETWORKS["plain"])
    made = OPTIMIZERS["sgd"](net.parameters())
    dropped = _dropped(net)
    columns = _consumer_columns(dropped)
    _train(net, made, 20, dropped.hold(consumers=False))
    after = _consumer_columns(dropped)
    assert all(float(b.norm()) < 0.95 * float(a.norm()) for a, b in zip(columns, after, strict=True))
    assert all(not bool(rows.any()) for rows in _private_rows(dropped))


@pytest.mark.parametrize("next_layer", ["keep", "zero", "small_random"])
@pytest.mark.parametrize("name", NETWORKS)
def test_regrowth(name: str, next_layer: Any) -> None:
    net = randomized(NETWORKS[name])
    made = OPTIMIZERS["sgd"](net.parameters())
    _train(net, made, 2)
    dropped = _dropped(net, layers=1)  # a second one would be a reader with regrown filters of its own
    hold = dropped.hold(consumers=True)
    _train(net, made, 2, hold)
    layer = net.dropped[0]
    survivors = filter_matrix(net.get_submodule(layer)).clone()
    columns = _consumer_columns(dropped)
    values = {layer: torch.randn(2, survivors.shape[1], dtype=torch.float64)}
    dropped.regrow(values, [made], next_layer=next_layer, key=(0, "test"))
    conv = net.get_submodule(layer)
    matrix = filter_matrix(conv)
    others = [j for j in range(len(matrix)) if j not in DROP]
    assert torch.equal(matrix[DROP], values[layer])
    assert torch.equal(matrix[others], survivors[others]), "survivors must not change"
    if conv.bias is not None:
        assert not bool(conv.bias[DROP].any())
        assert bool(conv.bias[others].all())
    assert not bool(made.state[conv.weight]["momentum_buffer"][DROP].any())
    assert bool(made.state[conv.weight]["momentum_buffer"][others].any())
    for part, module in ((p, net.get_submodule(p.tensor.rpartition(".")[0])) for p in dropped._private[net.dropped[0]]):
        if isinstance(module, nn.BatchNorm2d):
            assert not bool(module.running_mean[part.rows].any())
            assert bool((module.running_var[part.rows] == 1).all())
            if module.affine:
                assert bool((module.weight[part.rows] == 1).all())
                assert not bool(module.bias[part.rows].any())
    if name == "mobile":
        assert bool(net.depthwise.weight[DROP].any()), "a regrown filter must not stay silent behind a zero depthwise"
    after = _consumer_columns(dropped)
    if next_layer == "keep":
        assert all(torch.equal(a, b) for a, b in zip(columns, after, strict=True))
    elif next_layer == "zero":
        assert all(not bool(b.any()) for b in after)
    else:
        assert all(0 < float(b.abs().max()) < 1 for b in after)
        assert all(not torch.equal(a, b) for a, b in zip(columns, after, strict=True))


def test_new_filters_are_those_of_the_rule_for_every_layer() -> None:
    """Old values from before the drop, survivors as they are now, a draw of its own for each layer."""
    net = randomized(NETWORKS["plain"])
    old = {layer: filter_matrix(net.get_submodule(layer))[DROP].clone() for layer in net.dropped}
    dropped = _dropped(net)
    _train(net, OPTIMIZERS["sgd"](net.parameters()), 2, dropped.hold(consumers=True))
    values, spaces = dropped.new_filters(0.5, (7, "regrow"))
    for layer in net.dropped:
        matrix = filter_matrix(net.get_submodule(layer))
        survivors = matrix[[j for j in range(len(matrix)) if j not in DROP]]
        expected, space = regrow_filters(old[layer], survivors, 0.5, keyed_generator(7, "regrow", layer))
        assert torch.equal(values[layer], expected)
        assert spaces[layer] == space == matrix.shape[1] - len(matrix)
    with torch.no_grad():
        net.conv2.weight[2, 0, 1, 1] = math.nan
    with pytest.raises(ValueError, match=r"RePr cannot regrow filters of 'conv2' .*1 of 3 filters contain NaN or inf"):
        dropped.new_filters(0.5, (7, "regrow"))


def test_state_round_trip_needs_no_pickle() -> None:
    net = randomized(NETWORKS["mobile"])
    before = copy.deepcopy(net.state_dict())
    dropped = _dropped(net)
    file = io.BytesIO()
    torch.save(dropped.state(), file)
    file.seek(0)
    again = DroppedFilters.from_state(net, torch.load(file, weights_only=True))
    assert again.count == dropped.count
    assert torch.equal(again.old_filters("expand"), before["expand.weight"].flatten(1)[DROP])
    again.restore()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    with pytest.raises(ValueError, match=r"has no tensor 'expand\.weight'"):
        DroppedFilters.from_state(randomized(NETWORKS["plain"]), dropped.state())


def test_what_cannot_be_silenced_is_refused_and_nothing_changes() -> None:
    """f(0) of the activation is 0.5, and no norm stands between."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3)).double()
    before = copy.deepcopy(net.state_dict())
    graph = ChannelGraph.trace(net, EXAMPLE)
    with pytest.raises(ValueError, match="filters of '0' cannot be silenced exactly"):
        DroppedFilters.drop(net, graph, {"0": torch.tensor([1])})
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_regrown_filters_of_a_reader_are_written_as_given() -> None:
    """conv2 reads conv1: zeroing conv2's columns must not touch the new directions of conv2's own filters."""
    net = randomized(NETWORKS["plain"])
    dropped = _dropped(net)
    values = {layer: torch.randn(2, filter_matrix(net.get_submodule(layer)).shape[1]) for layer in net.dropped}
    dropped.regrow(values, [], next_layer="zero")
    for layer in net.dropped:
        assert torch.equal(filter_matrix(net.get_submodule(layer))[DROP], values[layer].double())
    assert not bool(net.conv2.weight[[0, 2, 4]][:, DROP].any())
