"""Redundancy of filters as numbers, batched over layers of one shape. No Lightning here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_filterdiv.filters import Conv, filter_matrix
from lightning_filterdiv.similarity import cosine_similarity, effective_rank
from lightning_filterdiv.tensors.stacking import group_by

__all__ = ["METRICS", "redundancy_metrics"]

#: Scalar name -> what it says, in the order of the columns of :func:`redundancy_metrics`.
METRICS = {
    "mean_abs_cosine": "mean |cos| between distinct filters",
    "max_abs_cosine": "largest |cos| between two distinct filters",
    "orthogonality_score": "mean RePr score O",
    "effective_rank": "effective rank as a fraction of min(J, d)",
    "near_duplicates": "fraction of filters with another one at |cos| > 0.9",
    "dead_filters": "fraction of filters with a norm below 1e-3 of the layer's median",
}
_NEAR_DUPLICATE = 0.9
_DEAD = 1e-3


@torch.no_grad()
def redundancy_metrics(layers: Mapping[str, Conv]) -> dict[str, dict[str, float]]:
    """Measure how redundant the filters of each layer are.

    Args:
        layers: name -> convolution.

    Returns:
        name -> metric -> value, metrics as in :data:`METRICS`. A layer of one filter has cosine 0. Layers of equal
        ``(J, d)`` are one batch and come to the host in one copy.
    """
    matrices = {name: filter_matrix(conv) for name, conv in layers.items()}
    values: dict[str, dict[str, float]] = {}
    for batch in group_by(matrices.items(), lambda item: (item[1].shape, item[1].dtype, item[1].device)):
        measured = _measure(torch.stack([matrix for _, matrix in batch])).tolist()
        for (name, _), row in zip(batch, measured, strict=True):
            values[name] = dict(zip(METRICS, row, strict=True))
    return {name: values[name] for name in layers}


def _measure(filters: Tensor) -> Tensor:
    """``(B, J, d)`` -> ``(B, len(METRICS))``."""
    _, count, fan_in = filters.shape
    overlap = cosine_similarity(filters).abs_()
    diagonal = overlap.diagonal(dim1=-2, dim2=-1)
    own = (diagonal - 1).abs().sum(dim=-1)  # 1 for a zero filter, whose own cosine is 0
    diagonal.zero_()
    total = overlap.sum(dim=(-2, -1))
    wide = filters.to(overlap.dtype)
    # Of the layer's largest entry: squares of 1e-30 and 1e+30 under- and overflow.
    peak = wide.abs().amax(dim=(-2, -1), keepdim=True)
    norm = torch.linalg.vector_norm(wide / torch.where(peak > 0, peak, torch.ones_like(peak)), dim=-1)
    return torch.stack(
        [
            total / max(1, count * (count - 1)),
            overlap.amax(dim=(-2, -1)),
            (total + own) / count**2,
            effective_rank(wide) / min(count, fan_in),
            (overlap.amax(dim=-1) > _NEAR_DUPLICATE).to(overlap.dtype).mean(dim=-1),
            (norm <= _DEAD * norm.median(dim=-1, keepdim=True).values).to(overlap.dtype).mean(dim=-1),
        ],
        dim=-1,
    )
