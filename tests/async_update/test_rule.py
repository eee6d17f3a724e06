"""A step of any optimizer, kept inside the subset: the rule of the official optimizer, and its limits."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_filterdiv.async_update.functional import (
    AsynchronousUpdate,
    subset_size,
)
from lightning_filterdiv.filters import select_filters
from tests.async_update.networks import (
    LAYERS,
    OPTIMIZERS,
    PROPERTY,
    expected_masks,
    give_gradients,
    net,
    several,
    train,
    values,
    weight_mask,
)

# --- the rule of the official optimizer --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_is_the_dense_step_kept_inside_the_subset(layer: str, axis: str, optimizer_name: str) -> None:
    """Torch's own dense step, then ``where(subset, new, old)``: 0 ulp in float64, momentum sees every slice."""
    model = several(LAYERS[layer])
    dense = copy.deepcopy(model)
    mine, theirs = list(model.parameters()), list(dense.parameters())
    optimizer, reference = OPTIMIZERS[optimizer_name](mine), OPTIMIZERS[optimizer_name](theirs)
    layers = select_filters(model, include=["*"])
    update = AsynchronousUpdate(layers, optimizer, axis=axis, sampling="with_replacement", seed=3)
    strides = [p.stride() for p in mine]
    for step in range(5):
        old = values(theirs)
        give_gradients(mine, step)
        give_gradients(theirs, step)
        update.before_step(step)
        optimizer.step()
        update.after_step()
        reference.step()
        masks = expected_masks(model, layers, update, axis)
        assert all(0 < subset.sum() < len(subset) for subset in update.last_subsets.values() if len(subset) > 1)
        with torch.no_grad():
            for parameter, before, mask in zip(theirs, old, masks, strict=True):
                parameter.copy_(torch.where(mask, parameter, before))
        for parameter, other, before, mask in zip(mine, theirs, old, masks, strict=True):
            assert torch.equal(parameter, other)
            assert not (parameter[mask] == before[mask]).any()
            for key, state in optimizer.state[parameter].items():
                assert torch.equal(state, reference.state[other][key])
    assert [p.stride() for p in mine] == strides


@pytest.mark.parametrize("axis", ["out", "in"])
def test_layers_that_look_alike_are_told_apart(axis: str) -> None:
    """Weights of one shape and as many slices, but other strides, or filters along another dim."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "ordinary": nn.Conv2d(4, 4, 3),
            "channels_last": nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
        }
    ).double()
    parameters = list(model.parameters())
    layers = select_filters(model, include=["*"])
    optimizer = OPTIMIZERS["adamw"](parameters)
    update = AsynchronousUpdate(layers, optimizer, axis=axis)
    for step in range(3):
        before = values(parameters)
        give_gradients(parameters, step)
        update.before_step(step)
        optimizer.step()
        update.after_step()
        for parameter, old, mask in zip(parameters, before, expected_masks(model, layers, update, axis), strict=True):
            assert torch.equal(parameter != old, mask)


@st.composite
def mixtures(draw: st.DrawFn) -> nn.ModuleDict:
    """Layers of random kinds, some equal, some frozen, some biases frozen."""
    kinds = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5))
    model = nn.ModuleDict({f"{i}": LAYERS[kind]() for i, kind in enumerate(kinds)}).double()
    for conv in model.values():
        conv.weight.requires_grad_(draw(st.integers(0, 4)) > 0)
        if conv.bias is not None:
            conv.bias.requires_grad_(draw(st.integers(0, 4)) > 0)
    model["0"].weight.requires_grad_(True)  # at least one
    return model


@PROPERTY
@given(
    mixtures(),
    st.sampled_from(["out", "in"]),
    st.sampled_from(["with_replacement", "without_replacement"]),
    st.sampled_from(["nesterov", "adamw"]),
    st.floats(0.01, 1.0),
    st.data(),
)
def test_any_mixture_of_layers(
    model: nn.ModuleDict, axis: str, sampling: str, name: str, fraction: float, data: st.DataObject
) -> None:
    dense = copy.deepcopy(model)
    mine, theirs = list(model.parameters()), list(dense.parameters())
    optimizer, reference = OPTIMIZERS[name](mine), OPTIMIZERS[name](theirs)
    layers = select_filters(model, include=["*"])
    update = AsynchronousUpdate(layers, optimizer, update_fraction=fraction, axis=axis, sampling=sampling)
    assert set(update.layer_names) == {key for key, conv in layers.items() if conv.weight.requires_grad}
    for step in range(2):
        old = values(theirs)
        give_gradients(mine, step)
        give_gradients(theirs, step)
        for i, (parameter, other) in enumerate(zip(mine, theirs, strict=True)):
            if not parameter.requires_grad or data.draw(st.integers(0, 4), label=f"gradient {i}") == 0:
                parameter.grad = other.grad = None
        update.before_step(step)
        optimizer.step()
        update.after_step()
        reference.step()
        masks = {id(p): torch.ones(p.shape, dtype=torch.bool) for p in mine}
        for key, subset in update.last_subsets.items():
            expected = subset_size(len(subset), fraction, sampling)
            assert subset.sum() == expected if sampling == "without_replacement" else 1 <= subset.sum() <= expected
            masks[id(layers[key].weight)] = weight_mask(layers[key], axis, subset)
            if axis == "out" and layers[key].bias is not None:
                masks[id(layers[key].bias)] = subset
        with torch.no_grad():
            for parameter, before, own in zip(theirs, old, mine, strict=True):
                parameter.copy_(torch.where(masks[id(own)], parameter, before))
        assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))
    update.release()
    assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))


# --- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["update", "gradient"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "fused"])
def test_updating_everything_is_training_without_it(name: str, axis: str, rescale: bool, hold: str) -> None:
    plain, updated = net(), net()
    optimizer = OPTIMIZERS[name](list(updated.parameters()))
    update = AsynchronousUpdate(
        select_filters(updated), optimizer, update_fraction=1.0, axis=axis, rescale=rescale, hold=hold
    )
    train(plain, OPTIMIZERS[name](list(plain.parameters())), None)
    train(updated, optimizer, update)
    for one, two in zip(plain.state_dict().values(), updated.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    half = net()
    optimizer = OPTIMIZERS[name](list(half.parameters()))
    train(half, optimizer, AsynchronousUpdate(select_filters(half), optimizer, axis=axis, hold=hold))
    assert not torch.equal(half[0].weight, plain[0].weight)  # so the comparison above can fail


@pytest.mark.parametrize("sampling", ["with_replacement", "without_replacement"])
@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_a_layer_of_one_slice_is_never_frozen(hold: str, sampling: str) -> None:
    """Grey input and depthwise layers with ``axis="in"``: the official code freezes them for good."""
    model = nn.ModuleDict({"grey": nn.Conv2d(1, 4, 3), "depthwise": nn.Conv2d(4, 4, 3, groups=4)}).double()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    update = AsynchronousUpdate(
        select_filters(model), optimizer, update_fraction=0.1, axis="in", sampling=sampling, hold=hold
    )
    for step in range(5):
        before = values(list(model.parameters()))
        give_gradients(list(model.parameters()), step)
        update.before_step(step)
        assert all(parameter.grad.all() for parameter in model.parameters())
        optimizer.step()
        update.after_step()
        assert all(subset.tolist() == [True] for subset in update.last_subsets.values())
        assert not any((p == old).any() for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_filters_are_bit_still_under_decoupled_weight_decay(name: str) -> None:
    model = several(LAYERS["conv2d"])
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    layers = select_filters(model)
    update = AsynchronousUpdate(layers, optimizer)
    for step in range(6):
        before = values(list(model.parameters()))
        give_gradients(list(model.parameters()), step)
        update.before_step(step)
        optimizer.step()
        moved_by_optimizer = values(list(model.parameters()))
        update.after_step()
        masks = expected_masks(model, layers, update, "out")
        for p, old, moved, mask in zip(model.parameters(), before, moved_by_optimizer, masks, strict=True):
            assert not (moved == old).any()
            assert torch.equal(p[~mask].view(torch.int64), old[~mask].view(torch.int64))


def test_skipped_filters_keep_their_value_when_the_step_breaks() -> None:
    conv = nn.Conv2d(3, 8, 3)
    optimizer = OPTIMIZERS["adamw"](list(conv.parameters()))
    update = AsynchronousUpdate({"conv": conv}, optimizer)
    before = conv.weight.detach().clone()
    conv.weight.grad = torch.full_like(conv.weight, float("nan"))
    update.before_step(0)
    optimizer.step()
    update.after_step()
    subset = update.last_subsets["conv"]
    assert torch.equal(conv.weight[~subset], before[~subset])
    assert conv.weight[subset].isnan().all()
