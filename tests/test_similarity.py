"""Similarity of rows: exact cases, invariances, number formats and the value expected of random directions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_filterdiv.similarity import (
    cosine_similarity,
    effective_rank,
    expected_abs_cosine,
    mutual_coherence,
    normalize_rows,
    orthogonality_score,
)

FUNCTIONS = [normalize_rows, cosine_similarity, orthogonality_score, mutual_coherence, effective_rank]
PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Matrices of any finite magnitude, with zero, repeated and subnormal rows."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    # Half precision keeps its own range; casting 1e30 to float16 would give inf, which is not a finite weight.
    exponent = draw(st.integers(-4, 3) if dtype == torch.float16 else st.integers(-40, 30))
    values = randn(rows, columns, seed=draw(st.integers(0, 99))) * 10.0**exponent
    for row in range(rows):
        kind = draw(st.sampled_from(["keep", "keep", "zero", "copy", "opposite"]))
        if kind == "zero":
            values[row] = 0
        elif kind != "keep":
            values[row] = values[0] if kind == "copy" else -values[0]
    return values.to(dtype)


# --- exact cases -------------------------------------------------------------------------------------------------


def test_duplicate_rows() -> None:
    filters = randn(1, 7).repeat(4, 1)
    torch.testing.assert_close(cosine_similarity(filters), torch.ones(4, 4, dtype=torch.float64))
    torch.testing.assert_close(orthogonality_score(filters), torch.full((4,), 3 / 4, dtype=torch.float64))
    assert mutual_coherence(filters).item() == pytest.approx(1)
    assert effective_rank(filters).item() == pytest.approx(1)


def test_opposite_rows_are_redundant_and_do_not_cancel() -> None:
    row = randn(1, 7)
    filters = torch.cat([row, -row, row, -row])
    assert cosine_similarity(filters)[0].tolist() == pytest.approx([1, -1, 1, -1])
    torch.testing.assert_close(orthogonality_score(filters), torch.full((4,), 3 / 4, dtype=torch.float64))
    assert mutual_coherence(filters).item() == pytest.approx(1)
    assert effective_rank(filters).item() == pytest.approx(1)


def test_orthogonal_rows() -> None:
    filters = torch.linalg.qr(randn(6, 6)).Q[:4] * 3
    torch.testing.assert_close(cosine_similarity(filters), torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert orthogonality_score(filters).abs().max() < 1e-12
    assert mutual_coherence(filters) < 1e-12
    assert effective_rank(filters).item() == pytest.approx(4)


def test_a_known_pair() -> None:
    filters = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, 0], [half, 1, -half], [0, -half, 1]])
    torch.testing.assert_close(cosine_similarity(filters), expected)
    torch.testing.assert_close(orthogonality_score(filters), torch.tensor([half, 2 * half, half]) / 3)
    assert mutual_coherence(filters).item() == pytest.approx(half)


def test_a_zero_row_has_cosine_zero_with_everything() -> None:
    filters = torch.cat([randn(2, 5), torch.zeros(1, 5)])
    cosine = cosine_similarity(filters)
    assert cosine[2].tolist() == [0, 0, 0]
    assert cosine[:, 2].tolist() == [0, 0, 0]
    assert cosine[0, 0].item() == pytest.approx(1)
    assert orthogonality_score(filters)[2].item() == pytest.approx(1 / 3)  # its own missing diagonal entry
    assert normalize_rows(filters)[2].tolist() == [0] * 5


def test_all_zero_rows() -> None:
    zeros = torch.zeros(3, 5)
    assert cosine_similarity(zeros).abs().max() == 0
    assert mutual_coherence(zeros) == 0
    assert effective_rank(zeros) == 0
    assert effective_rank(torch.stack([zeros, torch.eye(3, 5)])).tolist() == pytest.approx([0, 3])


def test_a_single_row_has_no_partner() -> None:
    row = randn(1, 5)
    assert mutual_coherence(row) == 0
    assert orthogonality_score(row).item() == pytest.approx(0)
    assert effective_rank(row).item() == pytest.approx(1)


def test_effective_rank_of_known_singular_values() -> None:
    share = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    left, right = torch.linalg.qr(randn(3, 3)).Q, torch.linalg.qr(randn(5, 5, seed=1)).Q[:3]
    expected = math.exp(-sum(p * math.log(p) for p in share.tolist()))
    assert effective_rank(left @ (17 * share).diag() @ right).item() == pytest.approx(expected)


# --- number formats ----------------------------------------------------------------------------------------------


@PROPERTY
@given(matrices())
def test_finite_weights_never_give_nan_and_stay_in_range(filters: Tensor) -> None:
    rows, columns = filters.shape
    for function in FUNCTIONS:
        assert function(filters).isfinite().all(), function.__name__
    zero = (filters == 0).all(dim=1)
    norm = torch.linalg.vector_norm(normalize_rows(filters), dim=1)
    torch.testing.assert_close(norm, (~zero).to(norm.dtype))
    cosine = cosine_similarity(filters)
    assert cosine.abs().max() <= 1
    torch.testing.assert_close(cosine, cosine.mT)
    torch.testing.assert_close(cosine.diagonal(), (~zero).to(cosine.dtype))
    score = orthogonality_score(filters)
    assert score.min() >= 0
    assert score[~zero].numel() == 0 or score[~zero].max() <= (rows - 1) / rows + 1e-6
    assert 0 <= mutual_coherence(filters) <= 1
    rank = effective_rank(filters).item()
    assert rank == 0 if zero.all() else 1 - 1e-6 <= rank <= min(rows, columns) + 1e-5


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-20, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("function", [cosine_similarity, orthogonality_score, mutual_coherence])
def test_tiny_and_huge_float32_weights_are_not_squared_away(function: Callable[[Tensor], Tensor], scale: float) -> None:
    # Powers of two of integers stay exact even where float32 is subnormal.
    filters = torch.tensor([[1.0, 2.0, -1.0], [3.0, 0.0, 1.0], [-2.0, 1.0, 1.0]])
    power = 2.0 ** round(math.log2(scale))
    torch.testing.assert_close(function(filters * power), function(filters))
    assert effective_rank(filters * power).item() == pytest.approx(effective_rank(filters).item(), rel=1e-5)


def test_rows_of_very_different_scale() -> None:
    filters = randn(3, 9, dtype=torch.float32)
    scaled = filters * torch.tensor([1e-30, 1.0, 1e30])[:, None]
    torch.testing.assert_close(cosine_similarity(scaled), cosine_similarity(filters))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_wide(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    filters = randn(12, 300, dtype=dtype)
    assert function(filters).dtype == torch.float32
    torch.testing.assert_close(function(filters), function(filters.double()).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_keeps_its_dtype(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    assert function(randn(3, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    filters = randn(8, 40, dtype=dtype)
    expected = function(filters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is on here
        inside = function(filters)
    assert inside.dtype == expected.dtype
    assert torch.equal(inside, expected)


# --- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_batch_is_a_loop_over_its_matrices(function: Callable[[Tensor], Tensor]) -> None:
    batch = torch.stack([randn(5, 7), torch.zeros(5, 7, dtype=torch.float64), randn(1, 7).repeat(5, 1)])
    torch.testing.assert_close(function(batch), torch.stack([function(one) for one in batch]))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 3, 3)])
def test_other_shapes_are_refused(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(J, d\) matrix or a \(B, J, d\) batch.*use filter_matrix\(conv\)"):
        function(torch.zeros(shape))


def test_the_input_is_not_modified() -> None:
    filters = randn(4, 6)
    copy = filters.clone()
    for function in FUNCTIONS:
        function(filters)
    assert torch.equal(filters, copy)


# --- invariances -------------------------------------------------------------------------------------------------


@PROPERTY
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6), st.data())
def test_invariances(seed: int, rows: int, columns: int, data: st.DataObject) -> None:
    filters = randn(rows, columns, seed=seed)
    order = data.draw(st.permutations(range(rows)))
    exponents = data.draw(st.lists(st.integers(-60, 60), min_size=rows, max_size=rows))
    flips = data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=rows, max_size=rows))
    scale = torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float64)[:, None]
    sign = torch.tensor(flips, dtype=torch.float64)[:, None]
    cosine, score = cosine_similarity(filters), orthogonality_score(filters)
    torch.testing.assert_close(cosine_similarity(filters * scale), cosine)
    torch.testing.assert_close(cosine_similarity(filters * sign), cosine * sign * sign.mT)
    torch.testing.assert_close(orthogonality_score(filters * scale * sign), score)
    torch.testing.assert_close(mutual_coherence(filters * scale * sign), mutual_coherence(filters))
    torch.testing.assert_close(cosine_similarity(filters[order]), cosine[order][:, order])
    torch.testing.assert_close(orthogonality_score(filters[order]), score[order])
    torch.testing.assert_close(effective_rank(filters[order] * sign), effective_rank(filters))
    rotation = torch.linalg.qr(randn(columns, columns, seed=seed + 1)).Q
    torch.testing.assert_close(cosine_similarity(filters @ rotation), cosine)
    torch.testing.assert_close(effective_rank(filters @ rotation * 1e-9), effective_rank(filters))


# --- the expected value for random directions --------------------------------------------------------------------


@pytest.mark.parametrize(("fan_in", "exact"), [(1, 1.0), (2, 2 / math.pi), (3, 0.5), (4, 4 / (3 * math.pi))])
def test_expected_abs_cosine_in_closed_form(fan_in: int, exact: float) -> None:
    assert expected_abs_cosine(fan_in) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("fan_in", [2, 5, 27, 288])
def test_expected_abs_cosine_matches_random_filters(fan_in: int) -> None:
    unit = normalize_rows(randn(20_000, fan_in, seed=fan_in))
    cosine = (unit[::2] * unit[1::2]).sum(dim=1).abs()
    assert abs(cosine.mean() - expected_abs_cosine(fan_in)) < 4 * cosine.std() / math.sqrt(len(cosine))


def test_expected_abs_cosine_for_large_fan_in() -> None:
    assert expected_abs_cosine(27) == pytest.approx(0.155, abs=5e-4)
    assert expected_abs_cosine(288) == pytest.approx(0.047, abs=5e-4)
    for fan_in in (100, 4608, 10**6):
        approximation = math.sqrt(2 / (math.pi * fan_in))
        assert expected_abs_cosine(fan_in) == pytest.approx(approximation * (1 + 1 / (4 * fan_in)), rel=1 / fan_in**1.5)


@pytest.mark.parametrize("fan_in", [0, -3])
def test_expected_abs_cosine_needs_a_dimension(fan_in: int) -> None:
    with pytest.raises(ValueError, match=f"fan_in must be at least 1, got {fan_in}"):
        expected_abs_cosine(fan_in)
