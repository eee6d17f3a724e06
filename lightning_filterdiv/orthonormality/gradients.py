"""The gradients of the six penalties in closed form: a few batched products, no autograd graph, no synchronisation.

Shapes as in :mod:`~lightning_filterdiv.orthonormality.functional`, always batched: ``W`` is ``(B, J, d)`` in float32 or
wider, every result has its shape. Call them under ``torch.no_grad`` with autocast off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_filterdiv.orthonormality.functional import EPSILON, self_convolution, self_padding, smaller_side

__all__ = [
    "convolutional_gradient",
    "masked_gradient",
    "mutual_coherence_gradient",
    "soft_gradient",
    "spectral_gradient",
]

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _off_identity(rows: Tensor, identity: Tensor | None, factor: int = 1) -> Tensor:
    """``factor (rows rows^T - I)``, ``(B, n, d)`` to ``(B, n, n)``, in one kernel."""
    if identity is None:
        identity = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.baddbmm(identity, rows, rows.mT, beta=-factor, alpha=factor)


def soft_gradient(filters: Tensor, identity: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """``4 (W W^T - I) W = 4 W (W^T W - I)``, of ``|G - I|_F^2``, in two kernels.

    Args:
        filters: ``(B, J, d)``.
        identity: ``(n, n)``, made once; ``None``: made here.
        out: where to put it; likewise below.
    """
    off = _off_identity(smaller_side(filters), identity, 4)
    left, right = (off, filters) if filters.shape[1] <= filters.shape[2] else (filters, off)
    return torch.bmm(left, right, out=out)


def masked_gradient(
    filters: Tensor, mask: Tensor, identity: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``2 ((M + M^T) o (W W^T - I)) W``, of ``sum_ij M_ij (W W^T - I)_ij^2``.

    Args:
        filters: ``(B, J, d)``.
        mask: ``M + M^T``, ``(J, J)`` or ``(B, J, J)``, as numbers; the factor 4 holds for a mask of ones only.
        identity: as in :func:`soft_gradient`.
    """
    return torch.bmm(_off_identity(filters, identity, 2).mul_(mask), filters, out=out)


def mutual_coherence_gradient(filters: Tensor, identity: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Of ``max_ij |W W^T - I|_ij``, shared evenly between pairs that are equally far off, as autograd does.

    Args:
        filters: ``(B, J, d)``.
        identity: as in :func:`soft_gradient`.
    """
    off = _off_identity(filters, identity)
    size = off.abs()
    worst = (size == size.amax(dim=(1, 2), keepdim=True)).to(off.dtype)
    worst = worst / worst.sum(dim=(1, 2), keepdim=True)
    # Off is symmetric, so both (i, j) and (j, i) are among the worst.
    return torch.bmm(off.sign_().mul_(worst).mul_(2), filters, out=out)


def spectral_gradient(filters: Tensor, start: Tensor, *, squared: bool = False, out: Tensor | None = None) -> Tensor:
    """Of two-step power iteration, differentiated through both steps, in products of matrices with four vectors.

    With ``a = A start``, ``v = a / |a|``, ``b = A v``, ``u = b / |b|`` the value is ``|b|`` and
    ``d value / d A = u v^T + g start^T``, ``g = (A u - |b| v) / |a|``.

    Args:
        filters: ``(B, J, d)``.
        start: ``(B, min(J, d))``.
        squared: of the square of the value.
    """
    rows = smaller_side(filters)
    start = start[..., None]

    def apply(x: Tensor) -> Tensor:
        return torch.baddbmm(x, rows, torch.bmm(rows.mT, x), beta=-1)

    first = apply(start)
    norm = torch.linalg.vector_norm(first, dim=1, keepdim=True).clamp_min_(EPSILON)
    v = first / norm
    moved = apply(v)
    sigma = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    u = moved / sigma.clamp_min(EPSILON)
    g = torch.addcmul(apply(u), sigma, v, value=-1).div_(norm)
    # (D + D^T) W with D = u v^T + g start^T, never formed: u meets v and g meets start when the order is reversed.
    vectors = torch.cat([u, g, start, v], dim=2)
    partners = vectors.flip(2)
    if squared:
        vectors = vectors * (2 * sigma)
    if rows is filters:
        return torch.bmm(vectors, torch.bmm(partners.mT, filters), out=out)
    return torch.bmm(torch.bmm(filters, vectors), partners.mT, out=out)


def convolutional_gradient(kernels: Tensor, stride: Sequence[int]) -> Tensor:
    """``4 conv^T(conv(K, K) - I_r0, K)``: shifts are symmetric, so both factors contribute alike.

    Args:
        kernels: ``(B, J, C, *k)``.
        stride: per kernel dimension, in taps.

    Returns:
        ``(B, J, C, *k)``.
    """
    batch, count = kernels.shape[:2]
    off = self_convolution(kernels, stride)
    padding = self_padding(kernels.shape[3:], stride)
    gradient = _TRANSPOSED[len(stride)](
        off.flatten(1, 2), kernels.flatten(0, 1), stride=list(stride), padding=padding, groups=batch
    )
    return gradient.mul_(4).view(count, batch, *kernels.shape[2:]).transpose(0, 1)
