"""``hold="gradient"`` and ``rescale``."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_filterdiv.async_update.functional import (
    AsynchronousUpdate,
)
from lightning_filterdiv.filters import select_filters
from tests.async_update.networks import LAYERS, OPTIMIZERS, expected_masks, give_gradients, several, values

# --- hold="gradient" ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_outside_the_subset_are_zeroed_in_place(layer: str, axis: str) -> None:
    model = several(LAYERS[layer])
    parameters = list(model.parameters())
    layers = select_filters(model, include=["*"])
    update = AsynchronousUpdate(layers, OPTIMIZERS["sgd"](parameters), axis=axis, hold="gradient")
    give_gradients(parameters, 0)
    objects, pointers = [p.grad for p in parameters], [p.grad.data_ptr() for p in parameters]
    strides = [p.grad.stride() for p in parameters]
    original = [p.grad.clone() for p in parameters]
    update.before_step(0)
    assert all(p.grad is gradient for p, gradient in zip(parameters, objects, strict=True))
    assert [p.grad.data_ptr() for p in parameters] == pointers
    assert [p.grad.stride() for p in parameters] == strides
    masks = expected_masks(model, layers, update, axis)
    for parameter, gradient, mask in zip(parameters, original, masks, strict=True):
        assert torch.equal(parameter.grad, gradient * mask)
    assert any(not mask.all() for mask in masks)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rescale", [False, True])
def test_gradients_that_overflowed_become_zero_outside_the_subset(rescale: bool, bad: float) -> None:
    conv = nn.Conv2d(3, 8, 3)
    update = AsynchronousUpdate({"conv": conv}, OPTIMIZERS["sgd"](list(conv.parameters())), hold="gradient",
                                rescale=rescale)  # fmt: skip
    for parameter in conv.parameters():
        parameter.grad = torch.full_like(parameter, bad)
    update.before_step(0)
    subset = update.last_subsets["conv"]
    for parameter in conv.parameters():
        assert (parameter.grad[~subset] == 0).all()
        assert not parameter.grad[subset].isfinite().any()  # an overflow elsewhere stays visible to the scaler


def test_momentum_and_weight_decay_still_move_filters_under_hold_gradient() -> None:
    """The difference between the two holds, and the equation of this one: SGD with masked gradients."""
    conv = nn.Conv2d(3, 8, 3).double()
    twin = copy.deepcopy(conv)
    optimizer, reference = OPTIMIZERS["sgd"](list(conv.parameters())), OPTIMIZERS["sgd"](list(twin.parameters()))
    update = AsynchronousUpdate({"conv": conv}, optimizer, hold="gradient")
    for step in range(3):
        before = conv.weight.detach().clone()
        give_gradients(list(conv.parameters()), step)
        update.before_step(step)
        optimizer.step()
        update.after_step()
        subset = update.last_subsets["conv"]
        give_gradients(list(twin.parameters()), step)
        for parameter in twin.parameters():
            parameter.grad[~subset] = 0
        reference.step()
        assert torch.equal(conv.weight, twin.weight)
        assert torch.equal(conv.bias, twin.bias)
        assert not (conv.weight[~subset] == before[~subset]).any()


# --- rescale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["with_replacement", "without_replacement"])
@pytest.mark.parametrize("layer", LAYERS)
def test_rescaled_updates(layer: str, sampling: str) -> None:
    model = several(LAYERS[layer])
    dense = copy.deepcopy(model)
    mine, theirs = list(model.parameters()), list(dense.parameters())
    optimizer, reference = OPTIMIZERS["nesterov"](mine), OPTIMIZERS["nesterov"](theirs)
    layers = select_filters(model, include=["*"])
    update = AsynchronousUpdate(layers, optimizer, update_fraction=0.3, sampling=sampling, rescale=True)
    old = values(theirs)
    give_gradients(mine, 0)
    give_gradients(theirs, 0)
    update.before_step(0)
    optimizer.step()
    update.after_step()
    reference.step()
    gains = {id(p): 1.0 for p in mine}
    for name, conv in layers.items():
        count = conv.out_channels
        draws = max(1, round(0.3 * count) if sampling == "without_replacement" else math.floor(0.3 * count))
        share = draws / count if sampling == "without_replacement" else 1 - (1 - 1 / count) ** draws
        assert share < 0.5, name
        for parameter in conv.parameters():
            gains[id(parameter)] = 1 / share
    masks = expected_masks(model, layers, update, "out")
    for parameter, new, before, mask in zip(mine, theirs, old, masks, strict=True):
        moved = before + gains[id(parameter)] * (new.detach() - before)
        torch.testing.assert_close(parameter.detach()[mask], moved[mask], rtol=1e-13, atol=1e-13)
        assert torch.equal(parameter.detach()[~mask], before[~mask])


@pytest.mark.parametrize("sampling", ["with_replacement", "without_replacement"])
def test_rescaled_gradients(sampling: str) -> None:
    model = several(LAYERS["conv2d"])
    parameters = list(model.parameters())
    layers = select_filters(model)
    update = AsynchronousUpdate(
        layers, OPTIMIZERS["sgd"](parameters), update_fraction=0.3, sampling=sampling, hold="gradient", rescale=True
    )
    give_gradients(parameters, 0)
    original = {id(p): p.grad.clone() for p in parameters}
    update.before_step(0)
    for name, subset in update.last_subsets.items():
        n = len(subset)
        share = max(1, round(0.3 * n)) / n if sampling == "without_replacement" else 1 - (1 - 1 / n) ** int(0.3 * n)
        for parameter in layers[name].parameters():
            torch.testing.assert_close(parameter.grad[subset], original[id(parameter)][subset] / share)
            assert (parameter.grad[~subset] == 0).all()
    for parameter in model["norm"].parameters():
        assert torch.equal(parameter.grad, original[id(parameter)])


def test_rescaled_updates_have_the_size_of_dense_ones_on_average() -> None:
    conv = nn.Conv2d(3, 8, 1, bias=False).double()
    optimizer = torch.optim.SGD(conv.parameters(), 1.0)
    update = AsynchronousUpdate({"conv": conv}, optimizer, update_fraction=0.25, rescale=True)
    start = conv.weight.detach().clone()
    steps = 2000
    for step in range(steps):
        conv.weight.grad = torch.ones_like(conv.weight)
        update.before_step(step)
        optimizer.step()
        update.after_step()
    mean = (start - conv.weight.detach()) / steps
    assert (mean - 1).abs().max() < 4 * math.sqrt(0.75 / 0.25 / steps)
