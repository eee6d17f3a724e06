"""The mathematics of RePr against hand-made matrices, a literal loop, and the definition of orthogonality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_filterdiv.repr_.functional import (
    null_space_dimension,
    orthogonal_directions,
    overdrawn_layers,
    rank_filters,
    regrow_filters,
    select_dropped,
)
from lightning_filterdiv.similarity import cosine_similarity, expected_abs_cosine
from lightning_filterdiv.tensors.randomness import keyed_generator


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal_score(filters: Tensor) -> Tensor:
    """O[f] = (1/J) sum_g |W_hat W_hat^T - I|[f, g], number by number."""
    rows = filters.double().tolist()
    unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    count = len(rows)
    scores = []
    for f in range(count):
        products = [sum(a * b for a, b in zip(unit[f], unit[g], strict=True)) for g in range(count)]
        scores.append(sum(abs(p - (f == g)) for g, p in enumerate(products)) / count)
    return torch.tensor(scores, dtype=torch.float64)


# --------------------------------------------------------------------------- ranking


def test_hand_made_scores() -> None:
    """Rows 0 and 1 equal in direction, row 2 opposite, row 3 orthogonal to all: O is 2/4, 2/4, 2/4, 0."""
    filters = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-2.0, 0.0], [0.0, 0.5]])
    assert rank_filters({"a": filters})["a"].tolist() == [0.5, 0.5, 0.5, 0.0]


def test_opposite_filters_do_not_cancel() -> None:
    filters = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert rank_filters({"a": filters})["a"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("criterion", ["orthogonality", "norm"])
def test_a_zero_filter_ranks_worst(criterion: str) -> None:
    filters = gaussian(5, 9)
    filters[3] = 0
    scores = rank_filters({"a": filters}, criterion)["a"]  # type: ignore[arg-type]
    assert scores.argmax() == 3
    assert scores[3] == math.inf
    assert bool(scores[[0, 1, 2, 4]].isfinite().all())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_scores_are_the_formula(count: int, fan_in: int, seed: int) -> None:
    filters = gaussian(count, fan_in, seed=seed)
    assert torch.allclose(rank_filters({"a": filters})["a"], literal_score(filters), rtol=0, atol=1e-12)


def test_scores_of_a_layer_larger_than_a_block() -> None:
    """600 filters cross two block borders; the reference forms the whole Gram matrix."""
    filters = gaussian(600, 40)
    expected = (cosine_similarity(filters) - torch.eye(600, dtype=torch.float64)).abs().mean(dim=1)
    assert torch.allclose(rank_filters({"a": filters})["a"], expected, rtol=0, atol=1e-12)


def test_equal_filters_tie_wherever_they_stand() -> None:
    filters = gaussian(600, 40)
    filters[[10, 300, 599]] = gaussian(1, 40, seed=1)
    scores = rank_filters({"a": filters})["a"]
    assert len(set(scores[[10, 300, 599]].tolist())) == 1


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_scores_do_not_depend_on_scale(scale: float) -> None:
    filters = gaussian(6, 20)
    assert torch.allclose(rank_filters({"a": filters * scale})["a"], rank_filters({"a": filters})["a"], atol=1e-12)


def test_a_score_does_not_depend_on_its_company() -> None:
    layers = {name: gaussian(40, 30, seed=seed).float() for seed, name in enumerate("abc")}
    together = rank_filters(layers)
    assert list(together) == ["a", "b", "c"]
    for name, filters in layers.items():
        assert torch.equal(rank_filters({name: filters})[name], together[name])


def test_dimension_correction_makes_random_layers_comparable() -> None:
    """Uncorrected, small fan-in looks redundant by chance; corrected, random filters score 1 on average everywhere."""
    layers = {"small": gaussian(400, 9), "large": gaussian(400, 576, seed=1)}
    raw = {name: float(score.mean()) for name, score in rank_filters(layers).items()}
    assert raw["small"] > 5 * raw["large"]
    for name, score in rank_filters(layers, dim_correct=True).items():
        assert float(score.mean()) == pytest.approx(1.0, abs=0.02), name
        fan_in = layers[name].shape[1]
        assert float(score.mean()) == pytest.approx(raw[name] / (399 / 400 * expected_abs_cosine(fan_in)))


def test_norm_drops_the_smallest() -> None:
    filters = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    assert rank_filters({"a": filters}, "norm")["a"].tolist() == [-3.0, -1.0, -2.0]


def test_random_is_a_function_of_key_and_layer() -> None:
    layers = {"a": gaussian(50, 4), "b": gaussian(50, 4)}
    torch.manual_seed(1)
    first = rank_filters(layers, "random", generator_key=(0, 1))
    torch.manual_seed(2)
    again = rank_filters(dict(reversed(layers.items())), "random", generator_key=(0, 1))
    other = rank_filters(layers, "random", generator_key=(0, 2))
    assert all(torch.equal(first[name], again[name]) for name in layers)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], other["a"])
    assert bool(((first["a"] >= 0) & (first["a"] < 1)).all())


def test_a_layer_of_one_filter_has_no_overlap() -> None:
    for correct in (False, True):
        assert rank_filters({"a": gaussian(1, 5)}, dim_correct=correct)["a"].tolist() == [0.0]


@pytest.mark.parametrize("criterion", ["orthogonality", "norm", "random"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused_by_layer(criterion: str, value: float) -> None:
    filters = gaussian(4, 3)
    filters[1, 2] = value
    with pytest.raises(ValueError, match="conv7: 1 of 4 filters contain NaN or inf; has the training diverged"):
        rank_filters({"fine": gaussian(4, 3), "conv7": filters}, criterion)  # type: ignore[arg-type]


def test_wrong_shapes_and_criteria() -> None:
    with pytest.raises(ValueError, match="conv7: filters must be a"):
        rank_filters({"conv7": gaussian(4, 3, 3)})
    with pytest.raises(ValueError, match="criterion must be one of"):
        rank_filters({"a": gaussian(4, 3)}, "taste")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- choosing


def test_the_count_is_truncated_with_a_guard_against_rounding() -> None:
    """int(90 * 0.7) is 62 in floating point."""
    chosen = select_dropped({"a": torch.rand(90)}, 0.7)
    assert chosen["a"].numel() == 63


def test_global_scope_takes_the_worst_of_all_layers() -> None:
    scores = {"a": torch.tensor([0.9, 0.1, 0.8]), "b": torch.tensor([0.2, 0.7, 0.3, 0.4])}
    chosen = select_dropped(scores, 3 / 7)
    assert {name: rows.tolist() for name, rows in chosen.items()} == {"a": [0, 2], "b": [1]}


def test_layer_scope_takes_a_share_of_each() -> None:
    scores = {"a": torch.tensor([0.9, 0.1, 0.8, 0.7]), "b": torch.tensor([0.2, 0.1])}
    chosen = select_dropped(scores, 0.5, scope="layer")
    assert {name: rows.tolist() for name, rows in chosen.items()} == {"a": [0, 2], "b": [0]}


def test_never_all_filters_of_a_layer() -> None:
    scores = {"a": torch.tensor([0.9, 0.8, 0.7]), "b": torch.tensor([0.3, 0.2, 0.1])}
    chosen = select_dropped(scores, 0.6)
    assert {name: rows.tolist() for name, rows in chosen.items()} == {"a": [0, 1], "b": [0]}
    assert overdrawn_layers(chosen, scores) == ["a"]
    assert select_dropped({"a": torch.tensor([1.0])}, 0.9)["a"].tolist() == []


def test_what_the_cap_refuses_goes_to_the_next_worst() -> None:
    scores = {"a": torch.tensor([0.9, 0.8, 0.7, 0.6]), "b": torch.tensor([0.4, 0.3, 0.2, 0.1])}
    chosen = select_dropped(scores, 0.5, max_layer_fraction=0.5)
    assert {name: rows.tolist() for name, rows in chosen.items()} == {"a": [0, 1], "b": [0, 1]}
    assert overdrawn_layers(chosen, scores) == []


def test_ties_are_broken_by_order() -> None:
    chosen = select_dropped({"a": torch.ones(4), "b": torch.ones(4)}, 0.5)
    assert {name: rows.tolist() for name, rows in chosen.items()} == {"a": [0, 1, 2], "b": [0]}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
    st.sampled_from([None, 0.3, 1.0]),
    st.integers(0, 99),
)
def test_selection_is_a_threshold(sizes: list[int], fraction: float, cap: float | None, seed: int) -> None:
    """Nobody who stays is worse than somebody who goes, except where a layer has reached its limit."""
    scores = {str(i): gaussian(size, seed=seed + i) for i, size in enumerate(sizes)}
    chosen = select_dropped(scores, fraction, max_layer_fraction=cap)
    limits = {name: min(s.numel() - 1, int(s.numel() * (cap or 1.0) + 1e-9)) for name, s in scores.items()}
    count = sum(rows.numel() for rows in chosen.values())
    assert count == min(int(sum(sizes) * fraction + 1e-9), sum(limits.values()))
    stays = [
        s[~torch.isin(torch.arange(s.numel()), chosen[n])] for n, s in scores.items() if len(chosen[n]) < limits[n]
    ]
    goes = torch.cat([s[chosen[n]] for n, s in scores.items()])
    if stays and goes.numel():
        assert float(torch.cat(stays).max()) <= float(goes.min())


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, math.nan])
def test_wrong_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match="prune_fraction must be a finite number with 0 < prune_fraction"):
        select_dropped({"a": torch.rand(4)}, fraction)


def test_nan_scores_are_refused_by_layer() -> None:
    with pytest.raises(ValueError, match="conv7: scores must be"):
        select_dropped({"conv7": torch.tensor([1.0, math.nan])}, 0.5)


# --------------------------------------------------------------------------- re-initialisation


@pytest.mark.parametrize(
    ("old", "survivors", "fan_in"),
    [(9, 21, 288), (19, 45, 576), (3, 5, 11), (150, 360, 1024)],
    ids=["C3", "ResNet", "just enough", "wide"],
)
def test_directions_are_orthogonal_wherever_there_is_room(old: int, survivors: int, fan_in: int) -> None:
    dropped, kept = gaussian(old, fan_in), 7 * gaussian(survivors, fan_in, seed=1)
    new, space = orthogonal_directions(dropped, kept, old, keyed_generator(0))
    assert space == fan_in - old - survivors
    assert new.shape == (old, fan_in)
    cosine = cosine_similarity(torch.cat([new, dropped, kept]))[:old]
    cosine[:, :old] -= torch.eye(old, dtype=cosine.dtype)
    assert float(cosine.abs().max()) < 1e-12


def test_float32_filters_are_orthogonal_to_1e_6() -> None:
    dropped, kept = gaussian(19, 576).float(), gaussian(45, 576, seed=1).float()
    new, _ = regrow_filters(dropped, kept, 1.0, keyed_generator(0))
    cosine = cosine_similarity(torch.cat([new.float(), dropped, kept]))[:19, 19:]
    assert float(cosine.abs().max()) < 1e-6


def test_an_empty_null_space_gives_the_least_overlap() -> None:
    """d = 4 is spanned by the rows: the best direction is the right-singular one of smallest singular value."""
    rows = gaussian(6, 4)
    new, space = orthogonal_directions(rows[:2], rows[2:], 1, keyed_generator(0))
    assert space == 0
    unit = rows / rows.norm(dim=1, keepdim=True)
    _, values, directions = torch.linalg.svd(unit)
    assert float((new[0] @ directions[3]).abs()) == pytest.approx(1.0, abs=1e-10)
    assert float((unit @ new[0]).norm()) == pytest.approx(float(values[3]), abs=1e-10)
    others = gaussian(200, 4, seed=3)
    overlap = (unit @ (others / others.norm(dim=1, keepdim=True)).T).norm(dim=0)
    assert float((unit @ new[0]).norm()) <= float(overlap.min()) + 1e-12


def test_a_null_space_that_is_too_small_is_used_up_and_completed() -> None:
    rows = gaussian(5, 7)
    new, space = orthogonal_directions(rows[:4], rows[4:], 4, keyed_generator(0))
    assert space == 2
    unit = rows / rows.norm(dim=1, keepdim=True)
    overlap = (unit @ new.T).norm(dim=0)
    assert float(overlap[:2].max()) < 1e-12
    assert overlap[2:].tolist() == pytest.approx(torch.linalg.svdvals(unit)[-2:].flip(0).tolist(), abs=1e-10)
    assert torch.allclose(new @ new.T, torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_more_directions_than_dimensions() -> None:
    """Each round is an orthonormal basis of its own, and no two filters are equal."""
    rows = gaussian(40, 9)
    new, space = orthogonal_directions(rows[:20], rows[20:], 20, keyed_generator(0))
    assert space == 0
    for start in (0, 9):
        block = new[start : start + 9]
        assert torch.allclose(block @ block.T, torch.eye(9, dtype=torch.float64), atol=1e-12)
    cosine = cosine_similarity(new).abs() - torch.eye(20, dtype=torch.float64)
    assert float(cosine.max()) < 0.999


def test_directions_are_random_but_seeded() -> None:
    old, survivors = gaussian(3, 50), gaussian(5, 50, seed=1)
    first, _ = orthogonal_directions(old, survivors, 3, keyed_generator(0, 1, "conv"))
    again, _ = orthogonal_directions(old, survivors, 3, keyed_generator(0, 1, "conv"))
    other, _ = orthogonal_directions(old, survivors, 3, keyed_generator(0, 2, "conv"))
    assert torch.equal(first, again)
    assert float((first * other).sum(dim=1).abs().max()) < 0.7


def test_null_directions_are_uniform() -> None:
    """In the plane that one row leaves of R^3 the angle is uniform: all four quadrants are hit equally often."""
    row = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    hits = torch.zeros(4)
    for seed in range(400):
        new, _ = orthogonal_directions(row, row, 1, keyed_generator(seed))
        assert abs(float(new[0, 2])) < 1e-12
        hits[int(new[0, 0] > 0) + 2 * int(new[0, 1] > 0)] += 1
    assert float((hits - 100).abs().max()) < 4 * math.sqrt(400 * 0.25 * 0.75)


def test_rank_counts_directions_not_rows() -> None:
    row = gaussian(1, 20)
    assert null_space_dimension(torch.cat([row, -2 * row, torch.zeros(3, 20)])) == 19
    assert null_space_dimension(torch.zeros(3, 20)) == 20
    assert null_space_dimension(gaussian(30, 20)) == 0


def test_length_is_gain_times_the_mean_of_the_survivors() -> None:
    survivors = torch.diag(torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0, 0.0]))[:3]  # norms 1, 3 and 0
    new, _ = regrow_filters(gaussian(2, 6).float(), survivors, 0.5, keyed_generator(0))
    assert new.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
    only_old, _ = regrow_filters(torch.tensor([[0.0, 4.0]]), torch.zeros(1, 2), 1.0, keyed_generator(0))
    assert float(only_old.norm()) == pytest.approx(4.0)
    nothing, _ = regrow_filters(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, keyed_generator(0))
    assert float(nothing.norm()) == pytest.approx(3**-0.5)


def test_wrong_regrowth() -> None:
    with pytest.raises(ValueError, match="0 < gain"):
        regrow_filters(gaussian(1, 4), gaussian(2, 4), 0.0, keyed_generator(0))
    with pytest.raises(ValueError, match="one fan-in"):
        orthogonal_directions(gaussian(1, 4), gaussian(2, 5), 1, keyed_generator(0))
    with pytest.raises(ValueError, match="contain NaN or inf"):
        orthogonal_directions(gaussian(1, 4) / 0, gaussian(2, 4), 1, keyed_generator(0))
