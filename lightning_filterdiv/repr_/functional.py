"""RePr as tensor functions: rank filters by overlap, choose those to drop, and draw their replacements.

Prakash, Storer, Florencio, Zhang: "RePr: Improved Training of Convolutional Filters", CVPR 2019. Layers are
``(J, d)`` matrices of flattened filters, as ``filter_matrix(conv)`` returns them. Everything is computed in float64 on
the CPU, so that a ranking or a regrown filter does not depend on precision or device type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_filterdiv.similarity import expected_abs_cosine, normalize_rows, orthogonality_score
from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer, check_number, check_tensor
from lightning_filterdiv.tensors.randomness import keyed_generator
from lightning_filterdiv.tensors.sharing import share

__all__ = [
    "Criterion",
    "Scope",
    "null_space_dimension",
    "orthogonal_directions",
    "overdrawn_layers",
    "rank_filters",
    "regrow_filters",
    "select_dropped",
]

Criterion = Literal["orthogonality", "norm", "random"]
Scope = Literal["global", "layer"]
# Far above the rounding of a sum of cosines, and far below any relevant difference.
_TIE_DECIMALS = 12
# Cost of a copy to float64, a norm and a quotient, in multiplications per entry.
_PASSES = 50
# Norm of a filter under torch's default initialisation, U(-1/sqrt(d), 1/sqrt(d)), for every fan-in.
_DEFAULT_INIT_NORM = 3**-0.5


def _on_host(filters: Tensor, name: str) -> Tensor:
    """Return a float64 copy on the CPU of a finite ``(..., J, d)``. The transfer happens in the narrow dtype."""
    host = filters.detach().to("cpu").to(torch.float64)
    if not host.isfinite().all():
        broken = int((~host.isfinite()).any(dim=-1).sum())
        raise ValueError(f"{name}: {broken} of {host.shape[0]} filters contain NaN or inf; has the training diverged?")
    return host


def _check_layers(argument: str, layers: object) -> None:
    if not isinstance(layers, Mapping):
        raise TypeError(f"{argument} must be a dict of layer name -> tensor, got {type(layers).__name__}")
    for name, tensor in layers.items():
        check_tensor(f"{argument}[{name!r}]", tensor)


def _check_matrix(filters: Tensor, name: str) -> None:
    if filters.dim() != 2 or filters.shape[1] < 1:
        raise ValueError(
            f"{name}: filters must be a (J, d) matrix with d >= 1, got shape {tuple(filters.shape)}; "
            f"filter_matrix(conv) makes one"
        )


# --- ranking -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def rank_filters(
    filters: Mapping[str, Tensor],
    criterion: Criterion = "orthogonality",
    *,
    dim_correct: bool = False,
    generator_key: tuple[int | str, ...] = (),
    among_ranks: bool = False,
) -> dict[str, Tensor]:
    """Score the filters of several layers. Filters with the largest scores are dropped first (section 4).

    Args:
        filters: layer name -> ``(J, d)``.
        criterion: ``"orthogonality"``: ``O[f] = (1/J) sum_g |W_hat W_hat^T - I|[f, g]``, in [0, 1), rounded to
            1e-12 so that equal filters tie; ``"norm"``: minus the L2 norm; ``"random"``: uniform in [0, 1), a
            function of ``generator_key``, for example ``(seed, cycle)``, and the layer's name alone.
        dim_correct: divide ``O`` by its expectation ``(J-1)/J E|cos|`` for random filters, which is larger in layers
            of small ``d``. The other criteria have no such bias and are left as they are.
        among_ranks: divide the layers among the ranks of the default process group, all of which must call this.

    Returns:
        name -> ``(J,)`` float64 on the CPU, in the order of ``filters``. A zero filter scores +inf by orthogonality
        (the formula would call it the most orthogonal of all) and by norm; a layer of one filter has ``O = 0``.

    Raises:
        TypeError: not a dict of tensors.
        ValueError: unknown criterion, something that is not a ``(J, d)`` matrix, or NaN or inf in a layer, by name.
    """
    criterion = check_choice("criterion", criterion, Criterion)
    check_flag("dim_correct", dim_correct)
    _check_layers("filters", filters)
    for name, matrix in filters.items():
        _check_matrix(matrix, name)

    def score(name: str) -> Tensor:
        host = _on_host(filters[name], name)
        if criterion == "random":
            generator = keyed_generator(*generator_key, name)
            return torch.rand(host.shape[0], generator=generator, dtype=torch.float64, device="cpu")
        return _score(host, criterion, dim_correct)

    costs = {name: (count + _PASSES) * count * d for name, (count, d) in ((n, m.shape) for n, m in filters.items())}
    return share(costs, score, among_ranks=among_ranks)


def _score(filters: Tensor, criterion: Criterion, dim_correct: bool) -> Tensor:
    count, fan_in = filters.shape
    silent = torch.linalg.vector_norm(filters, ord=math.inf, dim=-1) == 0
    if criterion == "norm":
        score = -torch.linalg.vector_norm(filters, dim=-1)
    else:
        score = orthogonality_score(filters).round(decimals=_TIE_DECIMALS)
        if dim_correct and count > 1:
            score = score / ((count - 1) / count * expected_abs_cosine(fan_in))
    return torch.where(silent, math.inf, score)


def select_dropped(
    scores: Mapping[str, Tensor],
    prune_fraction: float,
    *,
    scope: Scope = "global",
    max_layer_fraction: float | None = None,
) -> dict[str, Tensor]:
    """Choose the ``int(n p + 1e-9)`` filters of largest score, to be dropped (Algorithm 1, F-hat).

    A layer loses at most ``min(J - 1, int(J max_layer_fraction + 1e-9))``. Under the global scope the next worst
    filters of other layers take the places of those that this limit keeps. The number is smaller only if every layer is
    at its limit. Equal scores are taken in the order of layers, then of filters.

    Args:
        scores: layer name -> ``(J,)``; larger ones are dropped first; +-inf is allowed.
        prune_fraction: ``p`` in (0, 1).
        scope: ``"global"``: ``n`` counts the filters of all layers, ranked together; ``"layer"``: each layer alone.
        max_layer_fraction: in (0, 1], or ``None`` for ``J - 1``.

    Returns:
        name -> sorted int64 indices on the CPU, empty where a layer loses none.

    Raises:
        TypeError, ValueError: a bad argument, by name; NaN scores, by layer.
    """
    if check_number("prune_fraction", prune_fraction, above=0.0, high=1.0) == 1.0:
        raise ValueError("prune_fraction must be a finite number with 0 < prune_fraction < 1, got 1")
    scope = check_choice("scope", scope, Scope)
    largest_share = 1.0
    if max_layer_fraction is not None:
        largest_share = check_number("max_layer_fraction", max_layer_fraction, above=0.0, high=1.0)
    _check_layers("scores", scores)
    worst: dict[str, Tensor] = {}  # per layer: the filters it may lose, worst first
    worst_scores: list[Tensor] = []
    for name, score in scores.items():
        score = score.detach().to("cpu").to(torch.float64)
        if score.dim() != 1 or score.isnan().any():
            raise ValueError(f"{name}: scores must be a (J,) vector without NaN, got shape {tuple(score.shape)}")
        size = score.numel()
        limit = max(0, min(size - 1, int(size * largest_share + 1e-9)))
        if scope == "layer":
            limit = min(limit, int(size * prune_fraction + 1e-9))
        worst[name] = score.argsort(descending=True, stable=True)[:limit]
        worst_scores.append(score[worst[name]])
    if scope == "global" and worst:
        total = int(sum(score.numel() for score in scores.values()) * prune_fraction + 1e-9)
        order = torch.cat(worst_scores).argsort(descending=True, stable=True)
        taken = torch.zeros(order.numel(), dtype=torch.bool, device="cpu")
        taken[order[:total]] = True
        parts = taken.split([rows.numel() for rows in worst.values()])
        worst = {name: rows[part] for (name, rows), part in zip(worst.items(), parts, strict=True)}
    return {name: rows.sort().values for name, rows in worst.items()}


def overdrawn_layers(dropped: Mapping[str, Tensor], scores: Mapping[str, Tensor], threshold: float = 0.5) -> list[str]:
    """Return the names of layers that lose more than ``threshold`` of their filters, in the order of ``dropped``."""
    return [name for name, rows in dropped.items() if rows.numel() > threshold * scores[name].numel()]


# --- re-initialisation -------------------------------------------------------------------------------------------


def _row_space(*matrices: Tensor) -> Tensor:
    """Return an orthonormal basis ``(r, d)`` of the row space of the row-normalised stack, ``r`` its rank.

    The rows are right-singular directions, largest singular value first. All directions orthogonal to them are the null
    space. (Eigenvalues of ``A A^T`` would square the condition number and lose the rank.)
    """
    for matrix in matrices:
        _check_matrix(matrix, "re-initialisation")
    if len({matrix.shape[1] for matrix in matrices}) != 1:
        raise ValueError(f"filters of one layer have one fan-in, got {[tuple(matrix.shape) for matrix in matrices]}")
    hosts = [_on_host(matrix, "re-initialisation") for matrix in matrices]
    rows = torch.cat([normalize_rows(host) if host.shape[0] else host for host in hosts])
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    tolerance = max(rows.shape) * torch.finfo(rows.dtype).eps * values[:1]  # empty for a stack without rows
    rank = int((values > tolerance).sum())
    basis: Tensor = directions[:rank]
    return basis


def _random_null_directions(row_space: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count <= d - r`` orthonormal rows, uniformly distributed in the null space."""
    draw = torch.randn(row_space.shape[1], count, generator=generator, dtype=torch.float64, device="cpu")
    # Project twice: orthonormalising many draws of a small space amplifies the error of the first projection.
    for _ in range(2):
        draw = _orthonormal_columns(draw - row_space.mT @ (row_space @ draw))
    return draw.mT


def _orthonormal_columns(columns: Tensor) -> Tensor:
    """Orthonormalise by QR. LAPACK's arbitrary signs are undone, so that Gaussian columns become uniform directions."""
    q, r = torch.linalg.qr(columns)
    return torch.mul(q, torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype))


@torch.no_grad()
def null_space_dimension(*matrices: Tensor) -> int:
    """Return ``d - rank`` of the row-normalised stack of ``(n_i, d)`` matrices, such as old values and survivors.

    The rank counts singular values above ``max(n, d) eps`` of the largest, in float64; zero rows do not count.
    """
    row_space = _row_space(*matrices)
    return row_space.shape[1] - row_space.shape[0]


@torch.no_grad()
def orthogonal_directions(old: Tensor, survivors: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Draw directions orthogonal to the dropped filters' old values and to the survivors (section 4, Algorithm 1).

    Let ``A = [old; survivors]`` with rows of length 1. If its null space is large enough, the directions are ``count``
    random orthonormal vectors of it. Otherwise they are a random basis of the null space, completed by the
    right-singular directions of smallest singular value: ``sigma_i`` bounds ``|cos|`` of the i-th with every row of
    ``A``. When ``count > d`` the draw is repeated. Each further round is rotated at random, because equal filters could
    stay equal for good.

    Args:
        old: ``(m, d)``, the dropped filters before they were silenced.
        survivors: ``(s, d)``. Zero rows and the scale of rows do not matter.
        count: number of directions, usually ``m``.
        generator: a CPU generator.

    Returns:
        ``(count, d)`` float64 unit rows on the CPU, orthonormal in blocks of ``d``, and the dimension of the null
        space. If that is at least ``count``, ``|cos|`` with every row of ``A`` is at rounding level (1e-12).

    Raises:
        TypeError, ValueError: a bad count; shapes that do not fit, NaN or inf.
    """
    count = check_integer("count", count, low=0)
    row_space = _row_space(old, survivors)
    rank, width = row_space.shape
    least_overlapping = row_space.flip(0)  # ||A v|| = sigma, smallest first
    rounds: list[Tensor] = []
    for start in range(0, count, width):
        wanted = min(width, count - start)
        free = min(wanted, width - rank)
        block = torch.cat([_random_null_directions(row_space, free, generator), least_overlapping[: wanted - free]])
        if rounds:
            gaussian = torch.randn(wanted, wanted, generator=generator, dtype=torch.float64, device="cpu")
            block = _orthonormal_columns(gaussian) @ block
        rounds.append(block)
    directions = torch.cat(rounds) if rounds else torch.empty(0, width, dtype=torch.float64, device="cpu")
    return directions, width - rank


@torch.no_grad()
def regrow_filters(old: Tensor, survivors: Tensor, gain: float, generator: torch.Generator) -> tuple[Tensor, int]:
    """Draw new values for the dropped filters of one layer: :func:`orthogonal_directions` times one common norm.

    The norm is ``gain`` (above 0) times the mean norm of the survivors. Zero rows do not count. If no survivor is left,
    the old values give the mean. If those are zero too, the norm is ``3^-0.5``, as torch initialises. Large gains with
    a large pruned share destabilise training.

    Returns:
        ``(m, d)`` float64 on the CPU, and the dimension of the null space of ``[old; survivors]``.

    Raises:
        TypeError, ValueError: a bad gain; shapes that do not fit, NaN or inf.
    """
    gain = check_number("gain", gain, above=0.0)
    directions, null_dimension = orthogonal_directions(old, survivors, old.shape[0], generator)
    norm = _mean_norm(survivors) or _mean_norm(old) or _DEFAULT_INIT_NORM
    return directions * (gain * norm), null_dimension


def _mean_norm(matrix: Tensor) -> float:
    norms = torch.linalg.vector_norm(_on_host(matrix, "re-initialisation"), dim=-1)
    return float(norms.sum() / (norms > 0).sum().clamp(min=1))
