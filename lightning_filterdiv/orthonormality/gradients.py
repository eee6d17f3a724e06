"""Gradients of the six penalties in closed form: a few batched products without autograd graph or synchronisation.

Shapes are those of :mod:`~lightning_filterdiv.orthonormality.functional`, always batched: ``W`` is ``(B, J, d)`` in
float32 or wider, and every result has its shape. Call the functions under ``torch.no_grad`` with autocast off.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_filterdiv.orthonormality.functional import EPSILON, off_identity, self_padding, smaller_side

__all__ = [
    "GramMatrices",
    "PowerIteration",
    "Spectrum",
    "convolutional_gradient",
    "masked_gradient",
    "mutual_coherence_gradient",
    "soft_gradient",
    "spectral_gradient",
    "spectrum",
]


class GramMatrices:
    """``W W^T - I`` of several batches in one buffer: one product per batch, and one operation for all identities.

    Args:
        sizes: ``(B_i, n_i)`` of each batch.
        dtype: dtype of the filters.
        device: device of the filters.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        entries = [count * n * n for count, n in sizes]
        self._flat = torch.empty(sum(entries), dtype=dtype, device=device)
        #: ``(B_i, n_i, n_i)`` each. Gradients may overwrite them.
        self.matrices = [
            part.view(count, n, n) for part, (count, n) in zip(self._flat.split(entries), sizes, strict=True)
        ]
        places = [np.empty(0, np.int64)]
        for first, (count, n) in zip(np.cumsum([0, *entries]), sizes, strict=False):
            places.append(first + np.add.outer(np.arange(count) * n * n, np.arange(n) * (n + 1)).ravel())
        self._diagonal = torch.tensor(np.concatenate(places), device="cpu").to(device)
        self._minus_one = torch.full(self._diagonal.shape, -1, dtype=dtype, device=device)

    def compute(self, filters: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Compute the matrices of ``(B_i, n_i, d_i)``, which come with their transposes."""
        for (rows, columns), matrix in zip(filters, self.matrices, strict=True):
            torch.bmm(rows, columns, out=matrix)
        self._flat.index_add_(0, self._diagonal, self._minus_one)


def soft_gradient(filters: Tensor, off: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return the gradient ``4 (W W^T - I) W = 4 W (W^T W - I)`` of ``|G - I|_F^2``.

    Args:
        filters: ``(B, J, d)``.
        off: ``G - I``; ``None``: made here.
        out: tensor for the result, here and below.
    """
    off = off_identity(smaller_side(filters)) if off is None else off
    out = torch.empty_like(filters) if out is None else out
    left, right = (off, filters) if off.size(1) == filters.size(1) else (filters, off)
    return out.baddbmm_(left, right, beta=0, alpha=4)


def masked_gradient(filters: Tensor, mask: Tensor, off: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return the gradient ``2 ((M + M^T) o (W W^T - I)) W`` of ``sum_ij M_ij (W W^T - I)_ij^2``.

    Args:
        filters: ``(B, J, d)``.
        mask: ``M + M^T``, ``(J, J)`` or ``(B, J, J)``, as numbers; the factor 4 holds for a mask of ones only.
        off: ``W W^T - I``, overwritten; ``None``: made here.
    """
    off = off_identity(filters) if off is None else off
    out = torch.empty_like(filters) if out is None else out
    return out.baddbmm_(off.mul_(mask), filters, beta=0, alpha=2)


def mutual_coherence_gradient(filters: Tensor, off: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return the gradient of ``max_ij |W W^T - I|_ij``, divided evenly among equal maxima as in autograd.

    Args:
        filters: ``(B, J, d)``.
        off: as in :func:`masked_gradient`.
    """
    off = off_identity(filters) if off is None else off
    size = off.abs()
    worst = (size == size.amax(dim=(1, 2), keepdim=True)).to(off.dtype)
    worst = worst / worst.sum(dim=(1, 2), keepdim=True)
    # Off is symmetric, so both (i, j) and (j, i) are among the worst.
    return torch.bmm(off.sign_().mul_(worst).mul_(2), filters, out=out)


def spectral_gradient(filters: Tensor, start: Tensor, *, squared: bool = False, out: Tensor | None = None) -> Tensor:
    """Return the gradient of two-step power iteration, through both steps.

    Args:
        filters: ``(B, J, d)``.
        start: ``(B, min(J, d))``.
        squared: differentiate the square of the value.
    """
    iteration = PowerIteration([filters.shape], filters.dtype, filters.device)
    return iteration.gradients([filters], start, squared=squared, outs=[out])[0]


class PowerIteration:
    """Compute :func:`spectral_gradient` of several batches, which share all operations on vectors. Memory is allocated
    once.

    With ``a = A start``, ``v = a / |a|``, ``b = A v``, ``u = b / |b|`` the value is ``|b|`` and
    ``d value / d A = u v^T + g start^T``, ``g = (A u - |b| v) / |a|``. ``A`` is formed once: three products with it
    cost less than three products with ``W`` and ``W^T``.

    Args:
        shapes: ``(B_i, J_i, d_i)`` of each batch.
        dtype: dtype of the filters.
        device: device of the filters.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> None:
        #: ``m``, the largest ``n_i = min(J_i, d_i)``.
        self.widest = max(min(j, d) for _, j, d in shapes)
        sizes = [(count, min(j, d)) for count, j, d in shapes]
        counts = [count for count, _ in sizes]
        self._vectors = torch.zeros(sum(counts), self.widest, 4, dtype=dtype, device=device)
        self._partners = torch.zeros_like(self._vectors)
        self._columns = self._vectors.split(1, dim=2)  # u, g, start, v; what lies behind n_i stays 0
        self._grams = GramMatrices(sizes, dtype, device)
        parts = zip(self._vectors.split(counts), self._partners.split(counts), sizes, strict=True)
        self._parts = [(left[:, :n], right[:, :n].mT) for left, right, (_, n) in parts]
        self._steps = [
            [
                (gram, left[..., source : source + 1], left[..., target : target + 1])
                for gram, (left, _) in zip(self._grams.matrices, self._parts, strict=True)
            ]
            for source, target in ((2, 3), (3, 0), (0, 1))
        ]

    def gradients(
        self,
        filters: Sequence[Tensor],
        starts: Tensor,
        *,
        squared: bool = False,
        outs: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]:
        """Return the gradient of each batch.

        Args:
            filters: ``(B_i, J_i, d_i)`` each.
            starts: ``(sum of B_i, m)``, 0 behind ``n_i``.
            squared: differentiate the square of the value.
            outs: tensors for the results.
        """
        self._grams.compute((side, side.mT) for side in map(smaller_side, filters))
        u, g, start, v = self._columns
        start.copy_(starts[..., None])
        first, second, third = self._steps
        for step in first:
            torch.bmm(step[0], step[1], out=step[2])
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min_(EPSILON)
        v.div_(norm)
        for step in second:
            torch.bmm(step[0], step[1], out=step[2])
        sigma = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        u.div_(sigma.clamp_min(EPSILON))
        for step in third:
            torch.bmm(step[0], step[1], out=step[2])
        g.addcmul_(sigma, v, value=-1).div_(norm)
        # (D + D^T) W with D = u v^T + g start^T. D is never formed: reversing the order pairs u with v and g with
        # start.
        partners = self._vectors.flip(2)
        torch.mul(partners, 2 * sigma, out=self._partners) if squared else self._partners.copy_(partners)
        gradients: list[Tensor] = []
        for one, (left, right), out in zip(filters, self._parts, outs or [None] * len(filters), strict=True):
            if one.shape[1] <= one.shape[2]:
                gradients.append(torch.bmm(left, torch.bmm(right, one), out=out))
            else:
                gradients.append(torch.bmm(torch.bmm(one, left), right, out=out))
        return gradients


Floats = npt.NDArray[np.float64]


class Spectrum(NamedTuple):
    """Fourier transform of kernels of one shape, as real matrices; from :func:`spectrum`.

    ``F`` is the number of frequencies without complex conjugates and 0. ``P`` is the number of phases of the stride.

    Attributes:
        forward: ``((3 F + 1) P, taps)``: real + imaginary part, real - imaginary part, sqrt(2) times the imaginary
            part, frequency 0.
        backward: ``(taps, (3 F + 1) P)``: its transpose, weighted.
        frequencies: ``F``.
        phases: ``P``.
    """

    forward: Tensor
    backward: Tensor
    frequencies: int
    phases: int


@lru_cache
def _spectrum(kernel: tuple[int, ...], stride: tuple[int, ...]) -> tuple[Floats, Floats, int, int]:
    # An odd number of frequencies per dimension, one for each shift, so that nothing wraps around. They are not
    # tensors, because tensors made under a mode of torch must not be cached.
    sizes = [2 * (p // s) + 1 for p, s in zip(self_padding(kernel, stride), stride, strict=True)]
    taps = list(itertools.product(*map(range, kernel)))
    offsets = list(itertools.product(*(range(min(s, k)) for s, k in zip(stride, kernel, strict=True))))
    every = itertools.product(*map(range, sizes))
    chosen = [f for f in every if f > tuple(-i % n for i, n in zip(f, sizes, strict=True))]
    phase, angle = np.zeros((len(offsets), len(taps))), np.zeros((len(chosen), len(taps)))
    for at, tap in enumerate(taps):
        phase[offsets.index(tuple(t % s for t, s in zip(tap, stride, strict=True))), at] = 1
        steps = [(t // s) / n for t, s, n in zip(tap, stride, sizes, strict=True)]
        angle[:, at] = [2 * math.pi * sum(a * b for a, b in zip(f, steps, strict=True)) for f in chosen]
    real, imaginary = np.cos(angle), np.sin(angle)
    transform = np.concatenate([real + imaginary, real - imaginary, 2**0.5 * imaginary, np.ones((1, len(taps)))])
    weights = np.repeat([4.0, 2.0], [3 * len(chosen), 1]) / math.prod(sizes)
    forward = (transform[:, None] * phase).reshape(-1, len(taps))
    backward = ((weights[:, None] * transform)[:, None] * phase).reshape(-1, len(taps)).T
    return forward, np.ascontiguousarray(backward), len(chosen), len(offsets)


def spectrum(kernel: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Spectrum:
    """Return the constants of :func:`convolutional_gradient` for a kernel's shape. It copies to the device."""
    *matrices, frequencies, phases = _spectrum(tuple(kernel), tuple(stride))
    forward, backward = (torch.tensor(matrix, device="cpu").to(device, dtype) for matrix in matrices)
    return Spectrum(forward, backward, frequencies, phases)


def convolutional_gradient(
    kernels: Tensor, stride: Sequence[int], transform: Spectrum | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Return the gradient of ``|conv(K, K) - I_r0|^2``, computed by frequencies, where self-convolution is a Gram
    matrix.

    By Parseval's equation the value is the mean over frequencies of ``|K K^H - I|^2``, ``K = A + iB`` the transform of
    the kernels at one of them. Real arithmetic with the fewest products: ``H = (A + B)(A - B)^T + 2 B B^T - I`` is the
    sum of real and imaginary part of ``K K^H - I``, one symmetric, the other antisymmetric, so that ``|H|^2`` is the
    value. For 3 x 3 taps this takes a seventh of the multiplications of the two convolutions.

    Args:
        kernels: ``(B, J, C, *k)``.
        stride: per kernel dimension, in taps.
        transform: transform of the kernels' shape, made once; ``None``: made here.
        out: ``(B, J, C * taps)``.

    Returns:
        ``(B, J, C, *k)``. It temporarily needs six to nine times the kernels' memory.
    """
    if transform is None:
        transform = spectrum(kernels.shape[3:], stride, kernels.dtype, kernels.device)
    batch, filters, channels = kernels.shape[:3]
    phases, pairs = transform.phases, transform.frequencies * batch
    taps = math.prod(kernels.shape[3:])
    x = torch.mm(transform.forward, kernels.reshape(-1, taps).mT)
    if phases > 1:
        x = x.view(-1, phases, batch * filters, channels).transpose(1, 2)
    x = x.reshape(-1, filters, phases * channels)
    plus, minus, rest = x.split([pairs, pairs, pairs + batch])  # A + B, A - B, sqrt(2) B and frequency 0
    off = torch.bmm(rest, rest.mT)
    off[:pairs].baddbmm_(plus, minus.mT)
    off.diagonal(dim1=1, dim2=2).sub_(1)
    y = torch.empty_like(x)
    torch.bmm(off[:pairs], minus, out=y[:pairs])
    torch.bmm(off[:pairs].mT, plus, out=y[pairs : 2 * pairs])
    torch.bmm(off + off.mT, rest, out=y[2 * pairs :])
    if phases > 1:
        y = y.view(-1, batch * filters, phases, channels).transpose(1, 2)
    y = y.reshape(transform.backward.shape[1], -1)
    gradient = torch.mm(y.mT, transform.backward.mT, out=None if out is None else out.view(-1, taps))
    return gradient.view(kernels.shape)
