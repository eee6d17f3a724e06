"""Choice of filters: statistics over steps, sizes of subsets, seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_filterdiv.async_update.functional import (
    AsynchronousUpdate,
    Sampling,
    draw_subsets,
    effective_fraction,
    subset_size,
)
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.tensors.randomness import keyed_generator
from tests.async_update.networks import OPTIMIZERS, PROPERTY, STEPS, give_gradients, net

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


@pytest.mark.parametrize("sampling", ["without_replacement", "with_replacement"])
def test_draws_for_many_steps_are_those_of_single_steps(sampling: Sampling) -> None:
    """Whatever step a run begins, skips or repeats: the subsets are a function of the key."""
    model = nn.ModuleDict({"a": nn.Conv2d(5, 8, 1), "b": nn.Conv2d(6, 8, 1), "c": nn.Conv2d(7, 13, 1)})

    def made() -> AsynchronousUpdate:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return AsynchronousUpdate(select_filters(model), optimizer, sampling=sampling, hold="gradient", seed=4)

    def alone(step: int, fraction: float) -> Tensor:
        generator = keyed_generator(4, "", step)
        parts = [draw_subsets(count, slices, fraction, sampling, generator) for slices, count in ((8, 2), (13, 1))]
        return torch.cat([part.flatten() for part in parts])

    update = made()
    steps = [*range(40), 40, 40, 41, 45, 44, 100, 101, 102, 7]
    fractions = [0.25 if 20 <= i < 24 else 0.75 if i == 30 else 0.5 for i in range(len(steps))]
    for step, fraction in zip(steps, fractions, strict=True):
        update.before_step(step, fraction)
        drawn = torch.cat(list(update.last_subsets.values()))
        assert torch.equal(drawn, alone(step, fraction))
        fresh = made()
        fresh.before_step(step, fraction)
        assert torch.equal(drawn, torch.cat(list(fresh.last_subsets.values())))
