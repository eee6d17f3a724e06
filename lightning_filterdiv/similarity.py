"""Similarity of the rows of a filter matrix ``W``.

Every function takes one matrix ``(J, d)`` or a batch ``(B, J, d)`` of layers with the same shape. It computes in
float32 or wider with autocast off. A zero row has cosine 0 with every row, never NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_filterdiv.tensors.arguments import check_tensor

__all__ = [
    "as_wide",
    "cosine_similarity",
    "effective_rank",
    "expected_abs_cosine",
    "mutual_coherence",
    "normalize_rows",
    "orthogonality_score",
]

_BLOCK = 256  # rows of the Gram matrix at a time: it then stays in the cache


def as_wide(filters: Tensor) -> Tensor:
    """Return ``filters`` in float32 or wider.

    Raises:
        ValueError: neither ``(J, d)`` nor ``(B, J, d)``.
    """
    if filters.dim() not in (2, 3):
        raise ValueError(
            f"filters must be a (J, d) matrix or a (B, J, d) batch, got shape {tuple(filters.shape)}; "
            f"use filter_matrix(conv) to get the matrix of a layer"
        )
    return filters.to(torch.promote_types(filters.dtype, torch.float32))


def normalize_rows(filters: Tensor) -> Tensor:
    """Scale every row to Euclidean norm 1; zero rows stay zero.

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.

    Returns:
        Same shape, float32 or wider. Rows are divided by their largest entry first, so that neither 1e-30 nor 1e+30
        weights under- or overflow when they are squared.
    """
    check_tensor("filters", filters)
    with torch.autocast(filters.device.type, enabled=False):
        wide = as_wide(filters)
        peak = wide.abs().amax(dim=-1, keepdim=True)
        unit = wide / torch.where(peak > 0, peak, torch.ones_like(peak))
        norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        return unit / torch.where(norm > 0, norm, torch.ones_like(norm))


def cosine_similarity(filters: Tensor) -> Tensor:
    """Signed cosine between all pairs of rows, ``W_hat W_hat^T``.

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.

    Returns:
        ``(J, J)`` or ``(B, J, J)`` in [-1, 1]; the diagonal is 1, or 0 for a zero row.
    """
    check_tensor("filters", filters)
    with torch.autocast(filters.device.type, enabled=False):
        unit = normalize_rows(filters)
        return (unit @ unit.mT).clamp(-1.0, 1.0)


def orthogonality_score(filters: Tensor) -> Tensor:
    """RePr's per-filter redundancy, ``O[f] = (1/J) sum_g |W_hat W_hat^T - I|[f, g]`` (Prakash et al. 2019, section 4).

    The absolute value is inside the sum: opposite filters count as redundant, they do not cancel.

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.

    Returns:
        ``(J,)`` or ``(B, J)`` in [0, 1]; large means much overlap with the rest of the layer. By the formula a zero
        row scores ``1/J`` (its own diagonal is missing); ranking functions treat such filters separately.
    """
    check_tensor("filters", filters)
    with torch.autocast(filters.device.type, enabled=False):
        unit = normalize_rows(filters)
        count = unit.shape[-2]
        total = unit.new_zeros(unit.shape[:-1])
        # |cos| is symmetric, so each block right of the diagonal counts for its rows and for its columns. This saves
        # half of the products, and no J x J matrix is stored.
        for start in range(0, count, _BLOCK):
            rows = slice(start, min(start + _BLOCK, count))
            overlap = (unit[..., rows, :] @ unit[..., start:, :].mT).abs_()
            width = rows.stop - rows.start
            overlap[..., :width].diagonal(dim1=-2, dim2=-1).sub_(1).abs_()
            total[..., rows] += overlap.sum(dim=-1)
            total[..., rows.stop :] += overlap[..., width:].sum(dim=-2)
        return total / count


def mutual_coherence(filters: Tensor) -> Tensor:
    """Largest absolute cosine between two distinct rows.

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.

    Returns:
        Scalar or ``(B,)`` in [0, 1]; 0 for a single row.
    """
    return cosine_similarity(filters).abs().triu(diagonal=1).amax(dim=(-2, -1))


def effective_rank(filters: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007).

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.

    Returns:
        Scalar or ``(B,)``, between 1 (all rows parallel) and ``min(J, d)`` (orthogonal rows of equal norm); 0 when all
        rows are zero, NaN when an entry is not finite. It is not meant for per-step use: singular values synchronise
        with the device.
    """
    check_tensor("filters", filters)
    with torch.autocast(filters.device.type, enabled=False):
        wide = as_wide(filters)
        finite = wide.isfinite().all(dim=-1).all(dim=-1)
        # LAPACK raises on NaN. A diverged layer is therefore measured as zeros, and its result set to NaN.
        wide = torch.where(finite[..., None, None], wide, torch.zeros_like(wide))
        peak = wide.abs().amax(dim=(-2, -1), keepdim=True)
        values = _singular_values(wide / torch.where(peak > 0, peak, torch.ones_like(peak)))
        total = values.sum(dim=-1, keepdim=True)
        share = values / torch.where(total > 0, total, torch.ones_like(total))
        rank = torch.exp(torch.special.entr(share).sum(dim=-1))
        rank = torch.where(total.squeeze(-1) > 0, rank, torch.zeros_like(rank)).to(wide.dtype)
        return torch.where(finite, rank, torch.full_like(rank, torch.nan))


def _singular_values(matrix: Tensor) -> Tensor:
    """``(..., J, d) -> (..., min(J, d))``, in float64 for long float32 matrices.

    A matrix at least twice as long as wide goes through the float64 eigenvalues of its short Gram matrix: three times
    faster for 512 x 4608, and still more exact (1e-8 of the largest value) than float32 singular values.
    """
    rows, columns = matrix.shape[-2:]
    if matrix.dtype != torch.float32 or max(rows, columns) < 2 * min(rows, columns):
        values: Tensor = torch.linalg.svdvals(matrix)
        return values
    short = (matrix if rows <= columns else matrix.mT).double()
    squares: Tensor = torch.linalg.eigvalsh(short @ short.mT)
    return squares.clamp_min(0.0).sqrt()


def expected_abs_cosine(fan_in: int) -> float:
    """Exact ``E|cos|`` of two random directions in ``R^d``: ``Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2))``.

    Every similarity in a figure is compared with it. It is about ``sqrt(2 / (pi d))``; 0.155 for ``d = 27``, 0.047 for
    ``d = 288``.

    Args:
        fan_in: ``d >= 1``.

    Raises:
        TypeError: ``fan_in`` is no integer.
        ValueError: ``fan_in`` is below 1.
    """
    if not isinstance(fan_in, int):
        raise TypeError(f"fan_in must be an integer >= 1, got {fan_in!r}")
    if fan_in < 1:
        raise ValueError(f"fan_in must be at least 1, got {fan_in}")
    return math.exp(math.lgamma(fan_in / 2) - math.lgamma((fan_in + 1) / 2)) / math.sqrt(math.pi)
