"""Redundancy of filters as numbers, batched over layers of one shape. No Lightning here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_filterdiv.filters import Conv, filter_matrix
from lightning_filterdiv.similarity import expected_abs_cosine
from lightning_filterdiv.tensors.stacking import group_by

__all__ = ["METRICS", "NEAR_DUPLICATE", "Dropped", "effective_rank_of_gram", "live_filters", "redundancy_metrics"]

#: Scalar name -> what it says, in the order of the columns of :func:`redundancy_metrics`.
METRICS = {
    "cosine_over_chance": "mean |cos| over that of random filters with as many weights",
    "mean_abs_cosine": "mean |cos| between distinct filters",
    "max_abs_cosine": "largest |cos| between two distinct filters",
    "orthogonality_score": "mean RePr score O",
    "effective_rank": "effective rank as a fraction of min(J, d)",
    "near_duplicates": "fraction of filters with another one at |cos| > 0.9",
    "dead_filters": "fraction of filters with a norm below 1e-3 of the layer's median",
}
#: Filters or channels count as twins from this |cos| or |correlation| on.
NEAR_DUPLICATE = 0.9
_DEAD = 1e-3
_BLOCK = 128  # rows of a Gram matrix at a time: it stays in the cache, and its upper half is not computed


class Dropped(NamedTuple):
    """Filters and inputs of a layer that a callback has dropped for a time.

    Attributes:
        filters: indices of filters that are silenced.
        inputs: indices of input channels that are zero, since the filters that make them are silenced.
    """

    filters: Sequence[int] = ()
    inputs: Sequence[int] = ()


def live_filters(conv: Conv, dropped: Dropped | None = None) -> Tensor:
    """Return the ``(J', d')`` filters of ``conv`` without what is dropped: those of the layer with it removed.

    Args:
        conv: any convolution.
        dropped: its indices; ``None`` or empty ones for :func:`~lightning_filterdiv.filters.filter_matrix` itself.
    """
    matrix = filter_matrix(conv)
    if dropped is None:
        return matrix
    if dropped.inputs:
        channels = matrix.shape[1] // _positions(conv)
        kept = _kept(channels, dropped.inputs, matrix)
        matrix = matrix.unflatten(1, (channels, -1)).index_select(1, kept).flatten(1)
    if dropped.filters:
        matrix = matrix.index_select(0, _kept(matrix.shape[0], dropped.filters, matrix))
    return matrix


def _positions(conv: Conv) -> int:
    count = 1
    for size in conv.kernel_size:
        count *= size
    return count


def _kept(count: int, gone: Sequence[int], like: Tensor) -> Tensor:
    out = set(gone)
    return torch.tensor([index for index in range(count) if index not in out], dtype=torch.int64, device=like.device)


@torch.no_grad()
def redundancy_metrics(
    layers: Mapping[str, Conv], dropped: Mapping[str, Dropped] | None = None
) -> dict[str, dict[str, float]]:
    """Measure how redundant the filters of each layer are.

    Args:
        layers: name -> convolution.
        dropped: name -> filters and input channels that do not count; the numbers are those of the network without
            them.

    Returns:
        name -> metric -> value, metrics as in :data:`METRICS`. A layer of one filter has cosine 0. Layers of equal
        ``(J, d)`` are one batch and come to the host in one copy.
    """
    gone = dropped or {}
    matrices = {name: live_filters(conv, gone.get(name)) for name, conv in layers.items()}
    values: dict[str, dict[str, float]] = {}
    for batch in group_by(matrices.items(), lambda item: (item[1].shape, item[1].dtype, item[1].device)):
        measured = _measure([matrix for _, matrix in batch]).tolist()
        for (name, matrix), row in zip(batch, measured, strict=True):
            values[name] = {"cosine_over_chance": row[0] / expected_abs_cosine(max(1, matrix.shape[1]))}
            values[name] |= dict(zip(list(METRICS)[1:], row, strict=True))
    return {name: values[name] for name in layers}


def _measure(matrices: Sequence[Tensor]) -> Tensor:
    """``B`` matrices ``(J, d)`` -> ``(B, len(METRICS) - 1)`` in float64, without the quotient of the first two."""
    count, fan_in = matrices[0].shape
    if count == 0 or fan_in == 0:
        return torch.zeros(len(matrices), len(METRICS) - 1, dtype=torch.float64)
    with torch.autocast(matrices[0].device.type, enabled=False):
        # In float64 squares of float32 neither under- nor overflow, and singular values can come from Gram matrices.
        filters = matrices[0].new_empty((len(matrices), count, fan_in), dtype=torch.float64)
        torch._foreach_copy_(list(filters.unbind()), list(matrices))
        if matrices[0].dtype == torch.float64:
            peak = filters.abs().amax(dim=(-2, -1), keepdim=True)
            filters /= torch.where(peak > 0, peak, 1.0)
        return _of_wide(filters)


def _of_wide(filters: Tensor) -> Tensor:
    count, fan_in = filters.shape[-2:]
    gram = _lower_gram(filters if count <= fan_in else filters.mT)
    if count <= fan_in:
        norm = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    else:
        norm = torch.linalg.vector_norm(filters, dim=-1)
    finite = norm.isfinite().all(dim=-1)
    if not bool(finite.all()):
        # LAPACK raises on NaN: a diverged layer is measured as zeros and answered with NaN; the other layers stay.
        gram[~finite], norm[~finite], filters[~finite] = 0.0, 0.0, 0.0
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    # The Gram matrix of few filters holds their cosines; that of many is one of weights, and single precision will do.
    unit = None if count <= fan_in else (filters * inverse[..., None]).float()
    total = filters.new_zeros(len(filters))
    nearest = filters.new_zeros(filters.shape[:2])
    for start in range(0, count, _BLOCK):
        rows, before = slice(start, start + _BLOCK), slice(0, min(start + _BLOCK, count))
        if unit is None:
            overlap = (gram[:, rows, before] * inverse[:, rows, None] * inverse[:, None, before]).abs_()
        else:
            overlap = (unit[:, rows] @ unit[:, before].mT).abs_()
        overlap = overlap.clamp_max_(1.0).tril_(start - 1)
        total += 2 * overlap.sum(dim=(-2, -1))
        torch.maximum(nearest[:, rows], overlap.amax(dim=-1), out=nearest[:, rows])
        torch.maximum(nearest[:, before], overlap.amax(dim=-2), out=nearest[:, before])
    own = (norm <= 0).sum(dim=-1)  # |0 - 1| for a zero filter, whose own cosine is 0
    measured = torch.stack(
        [
            total / max(1, count * (count - 1)),
            nearest.amax(dim=-1),
            (total + own) / count**2,
            effective_rank_of_gram(gram) / min(count, fan_in),
            (nearest > NEAR_DUPLICATE).double().mean(dim=-1),
            (norm <= _DEAD * norm.median(dim=-1, keepdim=True).values).double().mean(dim=-1),
        ],
        dim=-1,
    )
    return measured.masked_fill(~finite[:, None], torch.nan)


def _lower_gram(rows: Tensor) -> Tensor:
    """``(B, n, m) -> (B, n, n)``: ``rows rows^T`` in blocks; of blocks above the diagonal, zeros."""
    count = rows.shape[-2]
    gram = rows.new_zeros((*rows.shape[:-1], count))
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        gram[:, start:stop, :stop] = rows[:, start:stop] @ rows[:, :stop].mT
    return gram


def effective_rank_of_gram(gram: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values of ``W``, from ``W W^T`` (Roy and Vetterli 2007).

    Args:
        gram: ``(B, n, n)`` float64, finite; only the lower triangle is read.

    Returns:
        ``(B,)`` in ``[1, n]``, and 0 for a zero matrix. It is exact to 1e-8 of the largest singular value.
    """
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    total = values.sum(dim=-1, keepdim=True)
    share = values / torch.where(total > 0, total, 1.0)
    rank = torch.exp(torch.special.entr(share).sum(dim=-1))
    return torch.where(total.squeeze(-1) > 0, rank, 0.0)
