"""Six published penalties on the overlap of filters, as differentiable functions. No Lightning here.

``W`` is ``(J, d)``, one row per filter, or ``(B, J, d)``, a batch of layers. ``G`` is the Gram matrix of the smaller
side, ``W W^T`` or ``W^T W``, ``I`` the identity. Everything is computed in float32 or wider with autocast off.

The closed-form gradients that training uses are in :mod:`~lightning_filterdiv.orthonormality.gradients`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_filterdiv.similarity import as_wide
from lightning_filterdiv.tensors.arguments import check_integer, check_tensor

__all__ = [
    "basis_penalty",
    "convolutional_orthogonality",
    "double_soft_orthogonality",
    "mutual_coherence_penalty",
    "soft_orthogonality",
    "spectral_restricted_isometry",
    "tap_stride",
]

EPSILON = 1e-12  # of torch's normalize, which the released SRIP code uses
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def off_identity(rows: Tensor) -> Tensor:
    """Return ``rows rows^T - I``, ``(..., n, d)`` to ``(..., n, n)``."""
    gram = rows @ rows.mT
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def smaller_side(filters: Tensor) -> Tensor:
    """Return ``W`` or ``W^T``, whichever has fewer rows."""
    return filters if filters.shape[-2] <= filters.shape[-1] else filters.mT


def basis_penalty(filters: Tensor | Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Tensor:
    """``sum_g sum_(ij in mask_g) (B_g B_g^T - I)_ij^2 / sum_g |mask_g|``, the penalty of DSFB.

    Kang, Kim, NeurIPS 2021, with weight 10. It is a *mean over entries*, pooled over the stages ``g``, not a Frobenius
    sum.

    Args:
        filters: ``(n, d)``, or several such matrices, one per stage, of any shapes.
        masks: ``(n, n)`` bool per stage, true for pairs that count; ``None`` for all. A pair counts once for each of
            ``ij`` and ``ji`` that is true.

    Returns:
        Scalar. Its smallest possible value is not 0 where ``n > d``: ``n - d`` over the number of entries.

    Raises:
        ValueError: a wrong shape, or another number of masks than of matrices.
    """
    stages = [filters] if isinstance(filters, Tensor) else list(filters)
    chosen = [None] * len(stages) if masks is None else list(masks)
    if not stages or len(chosen) != len(stages):
        raise ValueError(
            f"basis_penalty needs at least one matrix and one mask (or None) for each, got {len(stages)} matrices and "
            f"{len(chosen)} masks"
        )
    for stage, mask in zip(stages, chosen, strict=True):
        check_tensor("filters", stage)
        if mask is not None and mask.shape != (stage.shape[0], stage.shape[0]):
            raise ValueError(
                f"masks must have one row and one column per filter, {(stage.shape[0], stage.shape[0])} for filters "
                f"{tuple(stage.shape)}, got {tuple(mask.shape)}"
            )
    total, entries = torch.zeros((), device=stages[0].device), 0
    with torch.autocast(stages[0].device.type, enabled=False):
        for stage, mask in zip(stages, chosen, strict=True):
            squares = off_identity(as_wide(stage)).square()
            total = total + (squares if mask is None else squares * mask).sum()
            entries += squares.numel() if mask is None else int(mask.sum())
    return total / max(1, entries)


def soft_orthogonality(filters: Tensor) -> Tensor:
    """``|G - I|_F^2`` with the Gram matrix of the smaller side (SO, Bansal et al., NeurIPS 2018).

    ``|W W^T - I|^2 - |W^T W - I|^2 = J - d`` exactly, so the side changes the value by a constant and not the gradient.

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.

    Returns:
        Scalar or ``(B,)``, 0 exactly where the filters (for ``J > d``: the columns) are orthonormal.
    """
    check_tensor("filters", filters)
    with torch.autocast(filters.device.type, enabled=False):
        return off_identity(smaller_side(as_wide(filters))).square().sum(dim=(-2, -1))


def double_soft_orthogonality(filters: Tensor) -> Tensor:
    """``|W W^T - I|_F^2 + |W^T W - I|_F^2`` (DSO, Bansal et al.).

    It equals ``2 SO + |J - d|``: the same training as SO at twice the weight.

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.

    Returns:
        Scalar or ``(B,)``, at least ``|J - d|``.
    """
    check_tensor("filters", filters)
    with torch.autocast(filters.device.type, enabled=False):
        wide = as_wide(filters)
        sides = [off_identity(side).square().sum(dim=(-2, -1)) for side in (wide, wide.mT)]
        return sides[0] + sides[1]


def mutual_coherence_penalty(filters: Tensor) -> Tensor:
    """``max_ij |W W^T - I|_ij`` (MC, Bansal et al.): the worst pair, or the norm furthest from 1.

    Not to be confused with :func:`lightning_filterdiv.similarity.mutual_coherence`, which is about directions only.

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.

    Returns:
        Scalar or ``(B,)``.
    """
    check_tensor("filters", filters)
    with torch.autocast(filters.device.type, enabled=False):
        return off_identity(as_wide(filters)).abs().amax(dim=(-2, -1))


def spectral_restricted_isometry(filters: Tensor, start: Tensor, *, squared: bool = False) -> Tensor:
    """``sigma_max(G - I)`` by two steps of power iteration from ``start`` (SRIP, Bansal et al.).

    ``v = A start / |A start|``, ``u = A v / |A v|``, value ``u^T A v`` with ``A = G - I``, the released code's formula.
    Two steps underestimate the true norm badly (0.63 for 1.20 on random filters): do not read it as one. The released
    code draws ``start`` anew at every call, uniform in [0, 1); the callback's starts are normal, a function of (seed,
    step). The released script for WRN-28-10 on CIFAR uses the smaller side, as here, and penalises the classifier too;
    those for SVHN and ImageNet use the ``d x d`` side, where every missing direction counts 1.

    Args:
        filters: ``(J, d)`` or ``(B, J, d)``.
        start: ``(n,)`` or ``(B, n)`` with ``n = min(J, d)``, any non-zero vectors.
        squared: the square, as in the released PyTorch code (its weight of 1e-2 belongs to it); the paper has none.

    Returns:
        Scalar or ``(B,)``.

    Raises:
        ValueError: ``start`` has another shape.
    """
    check_tensor("filters", filters)
    with torch.autocast(filters.device.type, enabled=False):
        rows = smaller_side(as_wide(filters))
        if start.shape != rows.shape[:-1]:
            raise ValueError(
                f"start must have shape {tuple(rows.shape[:-1])}, one entry per row of the smaller side of filters "
                f"{tuple(filters.shape)}, got {tuple(start.shape)}"
            )

        def apply(x: Tensor) -> Tensor:  # A x without forming A
            return (rows @ (rows.mT @ x[..., None])).squeeze(-1) - x

        v = F.normalize(apply(start.to(rows.dtype)), dim=-1, eps=EPSILON)
        moved = apply(v)
        u = F.normalize(moved, dim=-1, eps=EPSILON)
        sigma = (u * moved).sum(dim=-1)
        return sigma.square() if squared else sigma


def tap_stride(stride: int, dilation: int) -> int:
    """Return the distance of neighbouring output positions in taps, for windows that share taps.

    Windows start ``stride`` pixels apart and taps lie ``dilation`` pixels apart. Two windows have taps on the same
    pixel only if their distance is a multiple of both.
    """
    step = stride
    while step % dilation:
        step += stride
    return step // dilation


def self_padding(kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return ``floor((k - 1) / S) S`` per dimension, the padding that covers every shift at which two windows
    overlap."""
    return [(k - 1) // s * s for k, s in zip(kernel, stride, strict=True)]


def _around(centre: Sequence[int]) -> list[int]:
    """Return the padding that centres one number, in the order of ``F.pad``: last dimension first."""
    return [side for shifts in reversed(centre) for side in (shifts, shifts)]


def self_convolution(kernels: Tensor, stride: Sequence[int]) -> Tensor:
    """``conv(K, K) - I_r0`` of a batch: ``(B, J, C, *k)`` to ``(J, B, J, *shifts)``, one kernel for all layers."""
    batch, count = kernels.shape[:2]
    padding = self_padding(kernels.shape[3:], stride)
    images = kernels.transpose(0, 1).flatten(1, 2)
    overlap: Tensor = _CONVOLUTIONS[kernels.dim() - 3](
        images, kernels.flatten(0, 1), stride=list(stride), padding=padding, groups=batch
    )
    overlap = overlap.view(count, batch, count, *overlap.shape[2:])
    centre = [p // s for p, s in zip(padding, stride, strict=True)]
    identity = torch.eye(count, dtype=kernels.dtype, device=kernels.device)
    return overlap - F.pad(identity.view(count, 1, count, *(1 for _ in stride)), _around(centre))


def convolutional_orthogonality(kernels: Tensor, stride: int | Sequence[int] = 1) -> Tensor:
    """``|conv(K, K, padding=P, stride=S) - I_r0|_F^2``: filters orthogonal to each other's shifts (OCNN).

    Wang, Chen, Chakraborty, Yu, CVPR 2020: row orthogonality of the convolution as a matrix.
    ``P = floor((k - 1) / S) S``, ``I_r0`` is 1 where a filter meets itself unshifted. Where no shifts overlap (1x1, or
    ``S >= k``) it is
    :func:`soft_orthogonality` of the filter matrix, up to the constant ``J - d`` if ``J > d``. The released code takes
    the norm without the square, with padding 1, on selected layers: its weights of 0.1 to 0.5 do not transfer.

    Args:
        kernels: ``(J, C, *k)`` or ``(B, J, C, *k)`` with one to three kernel dimensions; of a dilated layer as they are
            stored.
        stride: in taps, see :func:`tap_stride`; one per kernel dimension, or one number for all of a single layer.

    Returns:
        Scalar or ``(B,)``.

    Raises:
        ValueError: a wrong number of dimensions or strides.
    """
    check_tensor("kernels", kernels)
    strides = [stride] * (kernels.dim() - 2) if isinstance(stride, int) else list(stride)
    for one in strides:
        check_integer("stride", one, low=1)
    if len(strides) not in _CONVOLUTIONS or kernels.dim() - len(strides) not in (2, 3):
        raise ValueError(
            f"kernels must be (J, C, *k), or (B, J, C, *k) with one stride per kernel dimension, got shape "
            f"{tuple(kernels.shape)} and stride {stride!r}"
        )
    batched = kernels.dim() - len(strides) == 3
    with torch.autocast(kernels.device.type, enabled=False):
        wide = kernels.to(torch.promote_types(kernels.dtype, torch.float32))
        off = self_convolution(wide if batched else wide[None], strides)
        values = off.square().sum(dim=[dim for dim in range(off.dim()) if dim != 1])
        return values if batched else values.squeeze(0)
