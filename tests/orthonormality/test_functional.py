"""The six penalties: their definitions, what is known about them, and their gradients in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lightning_filterdiv.orthonormality import (
    basis_penalty,
    convolutional_orthogonality,
    double_soft_orthogonality,
    mutual_coherence_penalty,
    soft_orthogonality,
    spectral_restricted_isometry,
)
from lightning_filterdiv.orthonormality.functional import tap_stride
from lightning_filterdiv.orthonormality.gradients import (
    convolutional_gradient,
    masked_gradient,
    mutual_coherence_gradient,
    soft_gradient,
    spectral_gradient,
)

PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)
SHAPES = [(3, 5, 8), (2, 9, 4), (1, 6, 6), (4, 1, 7)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mask(filters: Tensor) -> Tensor:
    return drawn(*filters.shape[:2], filters.shape[1], seed=5) > 0


def _start(filters: Tensor) -> Tensor:
    return drawn(len(filters), min(filters.shape[1:]), seed=7)


# form -> (value of a batch, gradient in closed form)
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "basis": (
        lambda w: torch.stack([basis_penalty(one) for one in w]),
        lambda w: soft_gradient(w) / w.shape[1] ** 2,
    ),
    "basis masked": (
        lambda w: torch.stack([basis_penalty(one, [mask]) for one, mask in zip(w, _mask(w), strict=True)]),
        lambda w: (
            masked_gradient(w, _mask(w).double() + _mask(w).mT.double())
            / _mask(w).sum((1, 2)).clamp_min(1)[:, None, None]
        ),
    ),
    "soft": (soft_orthogonality, soft_gradient),
    "double_soft": (double_soft_orthogonality, lambda w: 2 * soft_gradient(w)),
    "mutual_coherence": (mutual_coherence_penalty, mutual_coherence_gradient),
    "srip": (
        lambda w: spectral_restricted_isometry(w, _start(w)),
        lambda w: spectral_gradient(w, _start(w)),
    ),
    "srip squared": (
        lambda w: spectral_restricted_isometry(w, _start(w), squared=True),
        lambda w: spectral_gradient(w, _start(w), squared=True),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", PAIRS)
def test_gradients(form: str, shape: tuple[int, int, int]) -> None:
    """Autograd agrees with finite differences, and the closed form with autograd."""
    value, closed_form = PAIRS[form]
    filters = drawn(*shape).requires_grad_()
    assert torch.autograd.gradcheck(value, (filters,))
    (expected,) = torch.autograd.grad(value(filters).sum(), filters)
    with torch.no_grad():
        torch.testing.assert_close(closed_form(filters.detach()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((2, 4, 3, 3, 3), (1, 1)),
        ((2, 4, 3, 5, 4), (2, 1)),
        ((1, 3, 2, 3, 3), (2, 2)),
        ((2, 4, 3, 3, 3), (3, 3)),
        ((2, 4, 3, 1, 1), (1, 1)),
        ((2, 9, 2, 2, 1), (1, 1)),
        ((3, 4, 2, 5), (2,)),
        ((2, 3, 2, 3, 2, 2), (2, 1, 1)),
    ],
)
def test_gradients_of_the_convolutional_form(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    kernels = drawn(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda k: convolutional_orthogonality(k, stride), (kernels,))
    (expected,) = torch.autograd.grad(convolutional_orthogonality(kernels, stride).sum(), kernels)
    with torch.no_grad():
        torch.testing.assert_close(convolutional_gradient(kernels.detach(), stride), expected, rtol=1e-11, atol=1e-11)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
@PROPERTY
def test_the_side_of_the_gram_matrix_is_a_constant(rows: int, columns: int, seed: int) -> None:
    w = drawn(rows, columns, seed=seed)
    eye = torch.eye
    left = (w @ w.T - eye(rows).double()).square().sum()
    right = (w.T @ w - eye(columns).double()).square().sum()
    torch.testing.assert_close(left - right, torch.tensor(float(rows - columns)).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(soft_orthogonality(w), torch.minimum(left, right))
    torch.testing.assert_close(double_soft_orthogonality(w), 2 * soft_orthogonality(w) + abs(rows - columns))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_orthonormal_filters_score_zero(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)  # the bounds below are those of exact sums, which rounding misses for one draw in four
    w = torch.nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64))
    start = drawn(min(shape))
    unreachable = max(0, shape[0] - shape[1])
    assert float(soft_orthogonality(w)) < 1e-24
    assert float(double_soft_orthogonality(w)) == pytest.approx(abs(shape[0] - shape[1]))
    assert float(basis_penalty(w)) == pytest.approx(unreachable / shape[0] ** 2, abs=1e-24)
    assert float(spectral_restricted_isometry(w, start)) < 1e-10
    assert bool(spectral_gradient(w[None], start[None]).isfinite().all())
    if unreachable == 0:
        assert float(mutual_coherence_penalty(w)) < 1e-12


def test_basis_is_a_mean_over_entries_pooled_over_stages() -> None:
    stages = [drawn(3, 7), drawn(5, 9, seed=1)]
    total = sum(float((w @ w.T - torch.eye(len(w))).square().sum()) for w in stages)
    assert float(basis_penalty(stages)) == pytest.approx(total / (9 + 25))
    assert float(basis_penalty(stages)) != pytest.approx(float(basis_penalty(stages[0]) + basis_penalty(stages[1])))


def test_the_mask_of_the_cifar10_experiments() -> None:
    """Shared with everything, unique with unique of the same layer; a mixed pair counts once."""
    shared, first, second = drawn(3, 9), drawn(1, 9, seed=1), drawn(1, 9, seed=2)
    rows = torch.cat([shared, first, second])
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[:3] = True
    mask[3, 3] = mask[4, 4] = True
    total = float((shared @ shared.T - torch.eye(3)).square().sum())
    total += float((shared @ first.T).square().sum() + (shared @ second.T).square().sum())
    total += float((first @ first.T - 1).square().sum() + (second @ second.T - 1).square().sum())
    assert float(basis_penalty(rows, [mask])) == pytest.approx(total / (9 + 3 + 3 + 1 + 1))


def test_mutual_coherence_is_the_worst_entry() -> None:
    w = drawn(4, 6)
    worst = max(abs(float(w[i] @ w[j]) - (i == j)) for i in range(4) for j in range(4))
    assert float(mutual_coherence_penalty(w)) == pytest.approx(worst)


def test_srip_is_the_released_formula() -> None:
    w, start = drawn(5, 8), drawn(5, seed=3)
    a = w @ w.T - torch.eye(5).double()
    v = F.normalize(a.T @ start, dim=0, eps=1e-12)
    u = F.normalize(a @ v, dim=0, eps=1e-12)
    sigma = u @ (a @ v)
    torch.testing.assert_close(spectral_restricted_isometry(w, start), sigma)
    torch.testing.assert_close(spectral_restricted_isometry(w, start, squared=True), sigma**2)
    assert float(sigma) <= float(torch.linalg.matrix_norm(a, 2)) + 1e-12


def test_two_steps_underestimate_the_spectral_norm() -> None:
    """So the two-step formula is the definition, and the true norm no oracle."""
    ratios = []
    for seed in range(20):
        w = drawn(64, 288, seed=seed) / math.sqrt(288)
        true = torch.linalg.matrix_norm(w @ w.T - torch.eye(64), 2)
        ratios.append(float(spectral_restricted_isometry(w, drawn(64, seed=100 + seed)) / true))
    assert max(ratios) < 1
    assert sorted(ratios)[10] < 0.7


def test_srip_wants_one_number_per_row_of_the_smaller_side() -> None:
    with pytest.raises(ValueError, match=r"start must have shape \(4,\)"):
        spectral_restricted_isometry(drawn(9, 4), drawn(9))


def _operator(kernels: Tensor, stride: int, size: int) -> Tensor:
    """The convolution of length ``size`` without padding as a matrix: rows are (filter, position)."""
    channels = kernels.shape[1]
    basis = torch.eye(channels * size, dtype=kernels.dtype).view(-1, channels, size)
    return F.conv1d(basis, kernels, stride=stride).flatten(1).T.reshape(-1, channels * size)


@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (5, 2), (4, 3), (2, 2), (3, 4)])
def test_the_convolutional_form_is_row_orthogonality_of_the_operator(k: int, stride: int) -> None:
    kernels = drawn(4, 2, k)
    size = k + 8 * stride
    gram = _operator(kernels, stride, size)
    gram = gram @ gram.T
    positions = len(gram) // 4
    middle = positions // 2
    # All inner products of the filters at one position with the filters at every position.
    block = gram.view(4, positions, 4, positions)[:, middle].clone()
    for j in range(4):
        block[j, j, middle] -= 1
    torch.testing.assert_close(convolutional_orthogonality(kernels, stride), block.square().sum())


def test_where_no_shifts_overlap_it_is_soft_orthogonality() -> None:
    for kernels, stride in ((drawn(4, 6, 1, 1), 1), (drawn(4, 3, 2, 2), 2), (drawn(4, 3, 2, 2), 5)):
        expected = soft_orthogonality(kernels.flatten(1))
        torch.testing.assert_close(convolutional_orthogonality(kernels, stride), expected)


def test_an_orthogonal_delta_kernel_scores_zero_at_stride_two() -> None:
    """With the released code's padding of 1 it scores 2.0 instead."""
    kernels = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    kernels[0, 0, 0, 0] = kernels[1, 0, 0, 1] = 1
    assert float(convolutional_orthogonality(kernels, 2)) == 0


@pytest.mark.parametrize(
    ("stride", "dilation", "taps"), [(1, 1, 1), (2, 1, 2), (1, 2, 1), (2, 2, 1), (4, 2, 2), (3, 2, 3)]
)
def test_tap_stride(stride: int, dilation: int, taps: int) -> None:
    """Positions whose windows have taps on one pixel, counted one by one."""
    shared = [n for n in range(1, 20) if any(n * stride == t * dilation for t in range(1, 20))]
    assert shared[0] * stride // dilation == taps == tap_stride(stride, dilation)


def test_low_precision_is_accumulated_in_float32() -> None:
    w = drawn(40, 300).float() / 17
    for dtype in (torch.bfloat16, torch.float16):
        low = w.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = soft_orthogonality(low)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, soft_orthogonality(low.float()))


@pytest.mark.parametrize("function", [soft_orthogonality, double_soft_orthogonality, mutual_coherence_penalty])
def test_wrong_shapes(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="use filter_matrix"):
        function(drawn(2, 3, 4, 5))


def test_wrong_convolutional_input() -> None:
    with pytest.raises(ValueError, match="one stride per kernel dimension"):
        convolutional_orthogonality(drawn(2, 3), 1)
    with pytest.raises(ValueError, match="one stride per kernel dimension"):
        convolutional_orthogonality(drawn(2, 3, 3, 3), (1, 1, 1))
    with pytest.raises(
        ValueError, match=r"at least one matrix and one mask \(or None\) for each, got 1 matrices and 2 masks"
    ):
        basis_penalty([drawn(2, 3)], [None, None])
