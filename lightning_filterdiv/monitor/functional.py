"""Redundancy of filters as numbers. No Lightning here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_filterdiv.filters import Conv, filter_matrix
from lightning_filterdiv.similarity import expected_abs_cosine
from lightning_filterdiv.tensors.sharing import share

__all__ = ["METRICS", "NEAR_DUPLICATE", "Dropped", "effective_rank_of_gram", "live_filters", "redundancy_metrics"]

#: Scalar name -> meaning, in the order of the columns of :func:`redundancy_metrics`.
METRICS = {
    "cosine_over_chance": "mean |cos| over that of random filters with as many weights",
    "mean_abs_cosine": "mean |cos| between distinct filters",
    "max_abs_cosine": "largest |cos| between two distinct filters",
    "orthogonality_score": "mean RePr score O",
    "effective_rank": "effective rank as a fraction of min(J, d)",
    "near_duplicates": "fraction of filters with another one at |cos| > 0.9",
    "dead_filters": "fraction of filters with a norm below 1e-3 of the layer's median",
}
#: |cos| or |correlation| from which filters or channels count as twins.
NEAR_DUPLICATE = 0.9
_DEAD = 1e-3
_Part = Literal["both", "cosines", "rank"]
_START = 1e7  # cost of starting the operations of a layer, in multiplications of a Gram matrix
_BLOCK = 128  # rows of a Gram matrix in one block, which stays in the cache; the upper half is not computed


class Dropped(NamedTuple):
    """Filters and inputs of a layer that a callback has dropped.

    Attributes:
        filters: indices of filters that are silenced.
        inputs: indices of input channels that are zero because their filters are silenced.
    """

    filters: Sequence[int] = ()
    inputs: Sequence[int] = ()


def live_filters(conv: Conv, dropped: Dropped | None = None) -> Tensor:
    """Return the ``(J', d')`` filters of ``conv`` without dropped filters and inputs.

    Args:
        conv: any convolution.
        dropped: dropped indices. With ``None`` or none, the result is
            :func:`~lightning_filterdiv.filters.filter_matrix`.
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
    layers: Mapping[str, Conv], dropped: Mapping[str, Dropped] | None = None, *, among_ranks: bool = False
) -> dict[str, dict[str, float]]:
    """Measure how redundant the filters of each layer are.

    Args:
        layers: name -> convolution.
        dropped: name -> filters and input channels that do not count. The numbers are those of the network without
            them.
        among_ranks: divide the layers among the ranks of the default process group, all of which must call this.

    Returns:
        name -> metric -> value, with the metrics of :data:`METRICS`. A layer of one filter has cosine 0. Every layer is
        measured by itself, so its numbers depend neither on other layers nor on the number of ranks.
    """
    gone = dropped or {}
    shapes = {name: _live_shape(conv, gone.get(name)) for name, conv in layers.items()}
    costs = {(name, part): cost for name, shape in shapes.items() for part, cost in _costs(*shape).items()}

    def measure(item: tuple[str, _Part]) -> dict[str, float]:
        name, part = item
        return _measure(live_filters(layers[name], gone.get(name)), part)

    measured = share(costs, measure, among_ranks=among_ranks)
    values: dict[str, dict[str, float]] = {}
    for name, (_, fan_in) in shapes.items():
        found = {metric: value for part in _costs(*shapes[name]) for metric, value in measured[name, part].items()}
        found["cosine_over_chance"] = found["mean_abs_cosine"] / expected_abs_cosine(max(1, fan_in))
        values[name] = {metric: found[metric] for metric in METRICS}
    return values


def _live_shape(conv: Conv, dropped: Dropped | None) -> tuple[int, int]:
    """Return the shape of :func:`live_filters`."""
    count, fan_in = filter_matrix(conv).shape
    gone = dropped or Dropped()
    return count - len(set(gone.filters)), fan_in - _positions(conv) * len(set(gone.inputs))


def _costs(count: int, fan_in: int) -> dict[_Part, float]:
    """Return the costs of parts that are measured separately. Cosines and rank of many short filters share no
    product."""
    short, long = sorted((count, fan_in))
    of_rank = short**2 * long + 4.0 * short**3 + _START
    return {"both": of_rank} if count <= fan_in else {"cosines": count**2 * fan_in / 3 + _START, "rank": of_rank}


def _measure(matrix: Tensor, part: _Part) -> dict[str, float]:
    """Measure the metrics of one part for filters ``(J, d)``."""
    measured = list(METRICS)[1:]
    names = [name for name in measured if part == "both" or (name == "effective_rank") == (part == "rank")]
    if 0 in matrix.shape:
        return dict.fromkeys(names, 0.0)
    with torch.autocast(matrix.device.type, enabled=False):
        # In float64 squares of float32 neither under- nor overflow, and Gram matrices give exact singular values.
        filters = matrix.double()
        if matrix.dtype == torch.float64:
            peak = filters.abs().max()
            filters = filters / torch.where(peak > 0, peak, 1.0)
        count, fan_in = filters.shape
        gram = None if part == "cosines" else _lower_gram(filters if count <= fan_in else filters.mT)
        norm = torch.linalg.vector_norm(filters, dim=-1) if gram is None else gram.diagonal().clamp_min(0.0).sqrt()
        if not bool(norm.isfinite().all()):  # LAPACK raises on NaN
            return dict.fromkeys(names, torch.nan)
        found = {} if part == "rank" else _cosines(filters, norm, gram if part == "both" else None)
        if gram is not None:
            found["effective_rank"] = effective_rank_of_gram(gram) / min(count, fan_in)
        return dict(zip(names, torch.stack([found[name] for name in names]).tolist(), strict=True))


def _cosines(filters: Tensor, norm: Tensor, gram: Tensor | None) -> dict[str, Tensor]:
    """Return the metrics of cosines and norms. ``gram`` is ``W W^T`` if the filters are few."""
    count = len(filters)
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    # The Gram matrix of few filters holds their cosines. That of many filters is one of weights, and single precision
    # suffices.
    unit = None if gram is not None else (filters * inverse[:, None]).float()
    total = filters.new_zeros(())
    nearest = filters.new_zeros(count)
    for start in range(0, count, _BLOCK):
        rows, before = slice(start, start + _BLOCK), slice(0, min(start + _BLOCK, count))
        if unit is None:
            assert gram is not None
            overlap = (gram[rows, before] * inverse[rows, None] * inverse[None, before]).abs_()
        else:
            overlap = (unit[rows] @ unit[before].mT).abs_()
        overlap = overlap.clamp_max_(1.0).tril_(start - 1)
        total += 2 * overlap.sum()
        torch.maximum(nearest[rows], overlap.amax(dim=-1), out=nearest[rows])
        torch.maximum(nearest[before], overlap.amax(dim=-2), out=nearest[before])
    own = (norm <= 0).sum()  # |0 - 1| for a zero filter, whose own cosine is 0
    return {
        "mean_abs_cosine": total / max(1, count * (count - 1)),
        "max_abs_cosine": nearest.amax(),
        "orthogonality_score": (total + own) / count**2,
        "near_duplicates": (nearest > NEAR_DUPLICATE).double().mean(),
        "dead_filters": (norm <= _DEAD * norm.median()).double().mean(),
    }


def _lower_gram(rows: Tensor) -> Tensor:
    """Return ``rows rows^T``, ``(n, m)`` to ``(n, n)``, in blocks. Blocks above the diagonal are zeros."""
    count = len(rows)
    gram = rows.new_zeros((count, count))
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        gram[start:stop, :stop] = rows[start:stop] @ rows[:stop].mT
    return gram


def effective_rank_of_gram(gram: Tensor) -> Tensor:
    """Return the exponential of the entropy of the normalised singular values of ``W``, from ``W W^T`` (Roy, Vetterli
    2007).

    Args:
        gram: ``(B, n, n)`` float64, finite; only the lower triangle is read.

    Returns:
        ``(B,)`` in ``[1, n]``, and 0 for a zero matrix. Singular values are exact to 1e-8 of the largest one.
    """
    values = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt()
    total = values.sum(dim=-1, keepdim=True)
    share = values / torch.where(total > 0, total, 1.0)
    rank = torch.exp(torch.special.entr(share).sum(dim=-1))
    return torch.where(total.squeeze(-1) > 0, rank, 0.0)
