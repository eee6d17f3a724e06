"""Weight asynchronous update against the rule of the official optimizer, and the statistics of its draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from lightning_filterdiv.async_update.functional import (
    AsynchronousUpdate,
    draw_subsets,
    effective_fraction,
    subset_size,
)
from lightning_filterdiv.filters import Conv, select_filters

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
Make = Callable[[Sequence[nn.Parameter]], Optimizer]
STEPS = 10_000

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, dampening=0.3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5, fused=True),
}

LAYERS: dict[str, Callable[[], Conv]] = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2)),
    "conv3d": lambda: nn.Conv3d(6, 8, (3, 2, 1)),
    "grouped": lambda: nn.Conv2d(6, 9, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "no bias": lambda: nn.Conv2d(6, 8, 3, bias=False),
    "channels_last": lambda: nn.Conv2d(6, 8, (3, 2)).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, (3, 2)),
    "transposed grouped": lambda: nn.ConvTranspose2d(6, 8, (3, 2), groups=2),
    "transposed channels_last": lambda: nn.ConvTranspose2d(6, 8, 3, groups=2).to(memory_format=torch.channels_last),
    "transposed 1d": lambda: nn.ConvTranspose1d(6, 9, 3, groups=3),
    "transposed 3d": lambda: nn.ConvTranspose3d(6, 8, 2, groups=2),
}


def weight_mask(conv: Conv, axis: str, subset: Tensor) -> Tensor:
    """Entries of the weight in the subset, slice by slice, written independently of ``mask_layout``."""
    mask = torch.zeros(conv.weight.shape, dtype=torch.bool)
    transposed = isinstance(conv, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    for s in subset.nonzero().flatten().tolist():
        if axis == "in":
            mask[s if transposed else (slice(None), s)] = True
        elif transposed:
            group, local = divmod(s, conv.out_channels // conv.groups)
            fan_in = conv.in_channels // conv.groups
            mask[group * fan_in : (group + 1) * fan_in, local] = True
        else:
            mask[s] = True
    return mask


def give_gradients(parameters: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def several(make: Callable[[], Conv]) -> nn.ModuleDict:
    """Two layers of one layout, one of another, and a norm that no subset touches."""
    torch.manual_seed(0)
    layers = {"a": make(), "b": make(), "c": nn.Conv2d(4, 5, 3), "norm": nn.BatchNorm2d(3)}
    return nn.ModuleDict(layers).double()


def expected_masks(model: nn.Module, layers: Mapping[str, Conv], update: AsynchronousUpdate, axis: str) -> list[Tensor]:
    """For every parameter of ``model``, which entries the last draw lets move."""
    masks = {id(p): torch.ones(p.shape, dtype=torch.bool) for p in model.parameters()}
    for name, subset in update.last_subsets.items():
        conv = layers[name]
        masks[id(conv.weight)] = weight_mask(conv, axis, subset)
        if axis == "out" and conv.bias is not None:
            masks[id(conv.bias)] = subset
    return [masks[id(p)] for p in model.parameters()]


def net(channels: int = 4) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 5, 3), nn.Flatten(1),
        nn.Linear(20, 2),
    )  # fmt: skip


def train(model: nn.Module, optimizer: Optimizer, update: AsynchronousUpdate | None, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(11)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean().backward()
        if update is not None:
            update.before_step(step)
        optimizer.step()
        if update is not None:
            update.after_step()


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


# --- statistics of the draws -------------------------------------------------------------------------------------


def subsets_over_steps(sampling: str, fraction: float, axis: str = "out") -> dict[str, Tensor]:
    """Name -> ``(STEPS, J)`` float64: what the object itself draws, step after step."""
    model = nn.ModuleDict({"a": nn.Conv2d(5, 8, 1), "b": nn.Conv2d(6, 8, 1), "c": nn.Conv2d(7, 13, 1)})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    update = AsynchronousUpdate(
        select_filters(model), optimizer, update_fraction=fraction, sampling=sampling, axis=axis, hold="gradient"
    )
    drawn: dict[str, list[Tensor]] = {name: [] for name in update.layer_names}
    for step in range(STEPS):
        update.before_step(step)  # without gradients only the draw happens
        for name, subset in update.last_subsets.items():
            drawn[name].append(subset)
    return {name: torch.stack(subsets).double() for name, subsets in drawn.items()}


@pytest.fixture(scope="module")
def drawn_without() -> dict[str, Tensor]:
    return subsets_over_steps("without_replacement", 0.4)


@pytest.fixture(scope="module")
def drawn_with() -> dict[str, Tensor]:
    return subsets_over_steps("with_replacement", 0.5, axis="in")


def correlations(one: Tensor, two: Tensor) -> Tensor:
    """``(J1, J2)`` correlations of indicators, in units of their standard error."""
    one, two = ((x - x.mean(0)) / x.std(0) for x in (one, two))
    return one.T @ two / len(one) ** 0.5


def assert_uncorrelated(one: Tensor, two: Tensor) -> None:
    z = correlations(one, two)
    assert z.abs().max() < 4.5
    assert z.square().mean() < 1.5  # many small correlations would show here


def test_every_filter_is_updated_equally_often(drawn_without: dict[str, Tensor]) -> None:
    assert {name: subsets.shape[1] for name, subsets in drawn_without.items()} == {"a": 8, "b": 8, "c": 13}
    for subsets in drawn_without.values():
        filters = subsets.shape[1]
        k = max(1, round(0.4 * filters))
        assert (subsets.sum(1) == k).all()
        share = k / filters
        sigma = math.sqrt(share * (1 - share) / STEPS)
        assert (subsets.mean(0) - share).abs().max() < 4 * sigma


def test_every_pair_of_filters_is_updated_together_equally_often(drawn_without: dict[str, Tensor]) -> None:
    """Not implied by the frequencies: neighbouring blocks of filters would have the right ones too."""
    subsets = drawn_without["a"]
    k, filters = 3, 8
    share = k * (k - 1) / (filters * (filters - 1))
    for i, j in combinations(range(filters), 2):
        together = (subsets[:, i] * subsets[:, j]).mean()
        assert abs(together - share) < 4 * math.sqrt(share * (1 - share) / STEPS)


@pytest.mark.parametrize("which", ["drawn_without", "drawn_with"])
def test_layers_are_drawn_independently(which: str, request: pytest.FixtureRequest) -> None:
    drawn = request.getfixturevalue(which)
    for one, two in combinations(drawn, 2):
        assert_uncorrelated(drawn[one], drawn[two])


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("which", ["drawn_without", "drawn_with"])
def test_steps_are_drawn_independently(which: str, lag: int, request: pytest.FixtureRequest) -> None:
    drawn = request.getfixturevalue(which)
    for one in drawn.values():
        for two in drawn.values():
            assert_uncorrelated(one[lag:], two[:-lag])


def test_the_correlation_test_sees_a_shared_draw(drawn_without: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError):
        assert_uncorrelated(drawn_without["a"], drawn_without["a"])
    mixed = torch.where((torch.arange(STEPS) % 10 == 0)[:, None], drawn_without["a"], drawn_without["b"])
    with pytest.raises(AssertionError):
        assert_uncorrelated(drawn_without["a"], mixed)


def test_draws_with_replacement_update_the_published_share(drawn_with: dict[str, Tensor]) -> None:
    for subsets in drawn_with.values():
        n = subsets.shape[1]
        share = 1 - (1 - 1 / n) ** math.floor(0.5 * n)
        assert effective_fraction(n, 0.5, "with_replacement") == pytest.approx(share)
        per_step = subsets.mean(1)
        assert abs(per_step.mean() - share) < 4 * per_step.std() / STEPS**0.5
        sigma = math.sqrt(share * (1 - share) / STEPS)
        assert (subsets.mean(0) - share).abs().max() < 4 * sigma


@pytest.mark.parametrize(("n", "low", "high"), [(3, 0.333, 0.334), (32, 0.39, 0.40), (512, 0.39, 0.40)])
def test_effective_fraction_of_the_official_recipe(n: int, low: float, high: float) -> None:
    assert low <= effective_fraction(n, 0.5, "with_replacement") <= high


# --- subset sizes ------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(1, 600), st.floats(1e-6, 1.0), st.sampled_from(["with_replacement", "without_replacement"]))
def test_subset_sizes(slices: int, fraction: float, sampling: str) -> None:
    size = subset_size(slices, fraction, sampling)
    assert 1 <= size <= slices
    assert abs(size - fraction * slices) <= 1
    assert 0 < effective_fraction(slices, fraction, sampling) <= size / slices + 1e-12
    drawn = draw_subsets(3, slices, fraction, sampling, torch.Generator().manual_seed(0))
    assert (drawn.shape, drawn.dtype) == ((3, slices), torch.bool)
    counts = drawn.sum(1)
    assert (counts == size).all() if sampling == "without_replacement" else ((counts >= 1) & (counts <= size)).all()


@pytest.mark.parametrize(
    ("slices", "fraction", "sampling", "size"),
    [
        (10, 0.25, "without_replacement", 2),  # 2.5: halves go to even
        (14, 0.25, "without_replacement", 4),
        (10, 0.29, "with_replacement", 2),  # floor
        (100, 0.29, "with_replacement", 29),  # 0.29 * 100 is 28.999999999999996
        (3, 0.3, "with_replacement", 1),  # the official code draws none and freezes the layer
        (1, 0.5, "without_replacement", 1),
        (7, 1.0, "without_replacement", 7),
    ],
)
def test_known_subset_sizes(slices: int, fraction: float, sampling: str, size: int) -> None:
    assert subset_size(slices, fraction, sampling) == size


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


# --- randomness --------------------------------------------------------------------------------------------------


def draws(seed: int = 0, stream: str = "", steps: Sequence[int] = range(4), disturb: bool = False) -> list[Tensor]:
    model = net(16)
    update = AsynchronousUpdate(
        select_filters(model), torch.optim.SGD(model.parameters(), 0.1), seed=seed, stream=stream, hold="gradient"
    )
    drawn = []
    for step in steps:
        if disturb:
            torch.manual_seed(step + 100)
            torch.rand(step)
        update.before_step(step)
        drawn.append(torch.cat(list(update.last_subsets.values())))
    return drawn


def test_draws_are_a_function_of_seed_stream_and_step() -> None:
    first = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, draws(disturb=True), strict=True))
    assert torch.equal(draws(steps=[2])[0], first[2])  # a resumed run need not repeat the steps before
    assert all(not torch.equal(a, b) for a, b in combinations(first, 2))
    assert not torch.equal(draws(seed=1)[0], first[0])
    assert not torch.equal(draws(stream="other")[0], first[0])


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_the_global_generator_is_untouched(hold: str) -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    give_gradients(list(model.parameters()), 0)
    state = torch.get_rng_state()
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    for step in range(3):
        update.before_step(step)
        optimizer.step()
        update.after_step()
    update.release()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_fraction_of_one_step_can_be_overridden() -> None:
    conv = nn.Conv2d(3, 8, 1).double()
    update = AsynchronousUpdate(
        {"conv": conv}, torch.optim.SGD(conv.parameters(), 0.1), hold="gradient", rescale=True, update_fraction=0.5
    )
    for step, (fraction, size) in enumerate([(0.25, 2), (None, 4), (1.0, 8)]):
        conv.weight.grad = torch.ones_like(conv.weight)
        update.before_step(step, fraction)
        assert update.last_subsets["conv"].sum() == size
        assert sorted(set(conv.weight.grad.flatten().tolist())) == ([1] if size == 8 else [0, 8 / size])


def test_before_the_first_step_there_is_no_subset() -> None:
    model = net()
    update = AsynchronousUpdate(select_filters(model), torch.optim.SGD(model.parameters(), 0.1))
    assert update.last_subsets == {}
    assert update.layer_names == ["0", "3"]


# --- what is left alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_parameters_without_gradient_get_none_and_keep_their_value(hold: str) -> None:
    model = several(LAYERS["conv2d"])
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    before = values(list(model.parameters()))
    give_gradients(list(model.parameters()), 0)
    silent = [model["a"].weight, model["b"].bias, model["c"].weight, model["c"].bias]
    original = model["b"].weight.grad.clone()
    for parameter in silent:
        parameter.grad = None
    update.before_step(0)
    if hold == "gradient":  # the mask of b, not of its neighbour a that has no gradient
        subset = update.last_subsets["b"]
        assert torch.equal(model["b"].weight.grad, original * subset.view(-1, 1, 1, 1))
        assert not torch.equal(subset, update.last_subsets["a"])
    optimizer.step()
    update.after_step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        if any(parameter is p for p in silent):
            assert parameter.grad is None
            assert torch.equal(parameter, old)
            assert not optimizer.state.get(parameter)
        else:
            assert not torch.equal(parameter, old)


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_no_gradients_at_all(hold: str) -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    before = values(list(model.parameters()))
    update.before_step(0)
    optimizer.step()
    update.after_step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_parameters_of_another_optimizer_are_left_alone(hold: str) -> None:
    model = several(LAYERS["conv2d"])
    mine = [*model["a"].parameters(), model["b"].weight]
    theirs = [p for p in model.parameters() if not any(p is q for q in mine)]
    optimizer, other = OPTIMIZERS["sgd"](mine), OPTIMIZERS["sgd"](theirs)
    pointers = [p.data_ptr() for p in theirs]
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    assert update.layer_names == ["a", "b"]
    assert [p.data_ptr() for p in theirs] == pointers
    give_gradients(list(model.parameters()), 0)
    before, gradients = values(theirs), [p.grad.clone() for p in theirs]
    update.before_step(0)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(theirs, gradients, strict=True))
    other.step()  # between the two: its update must survive
    optimizer.step()
    moved = values(theirs)
    update.after_step()
    for parameter, new, old in zip(theirs, moved, before, strict=True):
        assert torch.equal(parameter, new)
        assert not (new == old).any()  # the bias of b too, whose weight is held


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_frozen_layers_are_left_alone(hold: str) -> None:
    model = several(LAYERS["conv2d"])
    model["a"].requires_grad_(False)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    pointer, before = model["a"].weight.data_ptr(), model["a"].weight.clone()
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    assert update.layer_names == ["b", "c"]
    give_gradients([p for p in model.parameters() if p.requires_grad], 0)
    update.before_step(0)
    optimizer.step()
    update.after_step()
    assert model["a"].weight.grad is None
    assert model["a"].weight.data_ptr() == pointer
    assert torch.equal(model["a"].weight, before)


# --- protocol and errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_a_step_that_was_not_announced_is_an_error(hold: str) -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    message = r"optimizer\.step\(\) ran without AsynchronousUpdate\.before_step"
    with pytest.raises(RuntimeError, match=message):
        update.after_step()
    update.before_step(0)
    update.after_step()
    with pytest.raises(RuntimeError, match=message):
        update.after_step()
    update.before_step(1)
    update.release()
    with pytest.raises(RuntimeError, match=message):
        update.after_step()


def test_a_step_that_never_happened_leaves_no_trace() -> None:
    conv = nn.Conv2d(3, 8, 3).double()
    optimizer = OPTIMIZERS["sgd"](list(conv.parameters()))
    update = AsynchronousUpdate({"conv": conv}, optimizer)
    give_gradients(list(conv.parameters()), 0)
    update.before_step(0)  # overflow: the scaler skips the step
    with torch.no_grad():
        conv.weight.fill_(7)  # the user loads weights
    update.before_step(1)
    optimizer.step()
    update.after_step()
    subset = update.last_subsets["conv"]
    assert (conv.weight[~subset] == 7).all()
    assert not (conv.weight[subset] == 7).any()


def test_an_optimizer_without_any_of_the_layers_is_refused() -> None:
    model = net()
    message = "none of the layers has a trainable weight in this optimizer"
    with pytest.raises(ValueError, match=message):
        AsynchronousUpdate(select_filters(model), torch.optim.SGD(model[5].parameters(), 0.1))
    with pytest.raises(ValueError, match=message):
        AsynchronousUpdate({}, torch.optim.SGD(model.parameters(), 0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for conv in select_filters(model).values():
        conv.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        AsynchronousUpdate(select_filters(model), optimizer)


def test_layers_on_several_devices_are_refused() -> None:
    layers = {"a": nn.Conv2d(1, 2, 1), "b": nn.Conv2d(1, 2, 1, device="meta")}
    optimizer = torch.optim.SGD([conv.weight for conv in layers.values()], 0.1)
    with pytest.raises(ValueError, match=r"must be on one device, got \['cpu', 'meta'\]"):
        AsynchronousUpdate(layers, optimizer)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("update_fraction", 0.0, ValueError),
        ("update_fraction", 1.5, ValueError),
        ("update_fraction", float("nan"), ValueError),
        ("update_fraction", "half", TypeError),
        ("axis", "output", ValueError),
        ("sampling", "uniform", ValueError),
        ("hold", "weights", ValueError),
    ],
)
def test_a_bad_argument_is_refused_by_name(argument: str, value: object, error: type[Exception]) -> None:
    """Without these checks a typo in ``hold`` would run the other algorithm."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(error, match=f"^{argument} must be .*, got "):
        AsynchronousUpdate(select_filters(model), optimizer, **{argument: value})


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_bad_fraction_for_one_step_is_refused(fraction: float) -> None:
    model = net()
    update = AsynchronousUpdate(select_filters(model), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=f"^fraction must be .*got {fraction}"):
        update.before_step(0, fraction)


# --- storage, memory format, plain loop --------------------------------------------------------------------------


def test_release_gives_the_weights_storages_of_their_own() -> None:
    model = several(LAYERS["channels_last"])
    parameters = list(model.parameters())
    before, strides = values(parameters), [p.stride() for p in parameters]
    update = AsynchronousUpdate(select_filters(model), OPTIMIZERS["sgd"](parameters))
    shared = {p.untyped_storage().data_ptr() for p in parameters}
    assert len(shared) < len(parameters)
    update.release()
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    for parameter, old, stride in zip(parameters, before, strides, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.stride() == stride
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_weights_that_moved_to_another_storage_are_still_held() -> None:
    model = several(LAYERS["conv2d"])
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS["adamw"](parameters)
    layers = select_filters(model)
    update = AsynchronousUpdate(layers, optimizer)
    give_gradients(parameters, 0)
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    before = values(parameters)
    update.before_step(0)
    optimizer.step()
    model["a"].weight.data = model["a"].weight.data.clone()  # and once more, between the two
    update.after_step()
    for parameter, old, mask in zip(parameters, before, expected_masks(model, layers, update, "out"), strict=True):
        assert torch.equal(parameter[~mask], old[~mask])
        assert not (parameter[mask] == old[mask]).any()


def test_the_plain_loop_of_the_docstring() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    parameters, start = list(model.parameters()), values(list(model.parameters()))
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 6, 6, generator=generator), torch.tensor([0, 1, 0, 1])) for _ in range(12)]
    loss = nn.CrossEntropyLoss()

    update = AsynchronousUpdate(select_filters(model), optimizer, update_fraction=0.5, seed=0)
    losses = []
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        losses.append(loss(model(x), y))
        losses[-1].backward()
        update.before_step(step)
        optimizer.step()
        update.after_step()
    update.release()

    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert losses[-1].isfinite()
    for conv, old in ((model[0], start[0]), (model[3], start[4])):
        # In twelve steps every filter has been drawn: none is where it started.
        assert ((conv.weight != old).flatten(1).any(1)).all()
    twin = net()
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_a_bias_of_two_layers_is_always_updated(hold: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].bias = model[0].bias
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)  # type: ignore[arg-type]
    give_gradients(list(model.parameters()), 0)
    before = model[0].bias.detach().clone()
    update.before_step(0)
    optimizer.step()
    update.after_step()
    assert bool((model[0].bias != before).all())
    for conv, mask in zip(model, update.last_subsets.values(), strict=True):
        assert int(mask.sum()) == 2, conv


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_autocast_around_the_calls_changes_nothing(hold: str) -> None:
    results = []
    for enabled in (False, True):
        model = net()
        optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
        update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold, rescale=True)
        give_gradients(list(model.parameters()), 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            update.before_step(0)
            optimizer.step()
            update.after_step()
        results.append(values(list(model.parameters())))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_the_number_of_kernels_does_not_grow_with_depth() -> None:
    def kernels(depth: int) -> int:
        model = nn.Sequential(*[nn.Conv2d(4, 4, 3) for _ in range(depth)])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        update = AsynchronousUpdate(select_filters(model), optimizer)
        give_gradients(list(model.parameters()), 0)
        update.before_step(0)  # allocates the snapshots
        update.after_step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            update.before_step(1)
            update.after_step()
        return sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))

    assert kernels(2) == kernels(20) > 0
