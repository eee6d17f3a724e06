"""Compose kernels and biases of chains of linear layers, and find factors that compose to a given kernel.

Guo, Alvarez, Salzmann: "ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks", NeurIPS
2020, section 3. Weights are those of convolutions, ``(out, in/groups, *kernel)``; a linear layer is a 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "IMAGE_CHANNELS", "Kind", "UnreachableKernelError", "compose", "compose_bias", "compose_biases", "compose_chain",
    "draw_factors", "factor_shapes", "reads_image",
]  # fmt: skip

Kind = Literal["CL", "CK", "FC"]
Shape = tuple[int, int, int, int]
#: Channels of an image. A layer that reads at most so many keeps their number in its first factor (official code).
IMAGE_CHANNELS = 3


class UnreachableKernelError(ValueError):
    """Factors of the given sizes cannot compose to a kernel."""


def compose(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """Return the kernel of ``first`` followed by ``second``.

    Args:
        first: ``(H, I/groups, a, b)``.
        second: ``(O, H/groups, p, q)``. The stride of the first layer is 1.
        groups: number of groups of both layers.

    Returns:
        ``(O, I/groups, a+p-1, b+q-1)``: ``W[o, i] = sum_h second[o, h] * first[h, i]``, ``*`` the full convolution of
        two kernels. It is one batched matrix product, so that TF32 convolutions on a GPU do not affect it.
    """
    hidden, inputs, a, b = first.shape
    outputs, _, p, q = second.shape
    left = first.reshape(groups, hidden // groups, inputs * a * b)
    right = second.reshape(groups, outputs // groups, hidden // groups, p * q)
    pairs = torch.einsum("ghx,gohy->goxy", left, right)
    if a * b == 1:
        return pairs.reshape(outputs, inputs, p, q)
    if p * q == 1:
        return pairs.reshape(outputs, inputs, a, b)
    return F.fold(pairs.flatten(0, 1), (a + p - 1, b + q - 1), (a, b))


def compose_bias(first: Tensor, second: Tensor, bias: Tensor, groups: int = 1) -> Tensor:
    """Return the bias of a layer with bias ``first``, followed by ``second`` with ``bias``.

    Args:
        first: ``(H,)``.
        second: ``(O, H/groups, p, q)``.
        bias: ``(O,)``.
        groups: number of groups of the second layer.

    Returns:
        ``(O,)``: ``sum_{h, kernel} second[o, h] first[h] + bias[o]``. It is exact at the borders too if all padding is
        on the input of the first layer.
    """
    outputs, hidden = second.shape[:2]
    summed = second.sum((2, 3)).reshape(groups, outputs // groups, hidden)
    return torch.einsum("goh,gh->go", summed, first.reshape(groups, hidden)).reshape(outputs) + bias


def compose_chain(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, groups: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Return kernel and bias of a chain of layers, given in order of application.

    Args:
        weights: ``(H_i, H_{i-1}/groups, *k_i)``.
        biases: ``(H_i,)`` each; ``None`` if the layers have none.
        groups: number of groups of all of them.

    Returns:
        ``(out, in/groups, *k)`` with ``k = 1 + sum (k_i - 1)``, and ``(out,)`` or ``None``.
    """
    # Compose from the narrower end. A classifier has few outputs, so they come first.
    if weights[-1].shape[0] <= weights[0].shape[1] * groups:
        weight = weights[-1]
        for first in reversed(weights[:-1]):
            weight = compose(first, weight, groups)
    else:
        weight = weights[0]
        for second in weights[1:]:
            weight = compose(weight, second, groups)
    return weight, None if biases is None else compose_biases(weights, biases, groups)


def compose_biases(weights: Sequence[Tensor], biases: Sequence[Tensor], groups: int = 1) -> Tensor:
    """Return the bias ``(out,)`` of a chain of layers; arguments as in :func:`compose_chain`."""
    bias = biases[0]
    for second, own in zip(weights[1:], biases[1:], strict=True):
        bias = compose_bias(bias, second, own, groups)
    return bias


def reads_image(shape: Shape, groups: int) -> bool:
    """Return whether a layer of compact ``shape`` reads at most as many channels as an image has."""
    return groups == 1 and shape[1] <= IMAGE_CHANNELS


def factor_shapes(kind: Kind, shape: Shape, groups: int, rate: int, expand_image: bool = False) -> list[Shape]:
    """Return the shapes of the factors' weights in order of application.

    Args:
        kind: ``CL``: 1x1, k x k, 1x1; ``CK``: (k-1)/2 times 3x3; ``FC``: three linear layers.
        shape: ``(out, in/groups, k, k)`` of the compact layer.
        groups: number of groups of the compact layer and of all factors.
        rate: ``r``; hidden layers have ``r * in`` and ``r * out`` channels.
        expand_image: also give ``r * in`` channels to the first factor of a convolution that reads at most 3 channels.
            Otherwise that factor keeps the number of channels.
    """
    outputs, per_group, height, width = shape
    inputs = per_group * groups
    narrow = inputs if reads_image(shape, groups) and kind != "FC" and not expand_image else rate * inputs
    wide = rate * outputs
    if kind == "CK":
        count = (height - 1) // 2
        widths = [wide] if count == 2 else [narrow, *[wide] * (count - 2)]
        kernels = [(3, 3)] * count
    else:
        widths, kernels = [narrow, wide], [(1, 1), (height, width), (1, 1)]
    channels = [inputs, *widths, outputs]
    return [(after, before // groups, *k) for before, after, k in zip(channels, channels[1:], kernels, strict=False)]


def _orthonormal(groups: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a ``(groups, rows, columns)`` tensor in float64, orthonormal along the shorter side."""
    long, short = max(rows, columns), min(rows, columns)
    drawn = torch.randn(groups, long, short, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis if rows >= columns else basis.transpose(1, 2)


def _uniform(shape: Shape, bound: float, generator: torch.Generator) -> Tensor:
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * bound


def draw_factors(
    kind: Kind,
    shape: Shape,
    groups: int,
    rate: int,
    generator: torch.Generator,
    target: Tensor | None = None,
    expand_image: bool = False,
) -> list[Tensor]:
    """Draw factors whose composition has the variance of torch's default initialisation, or is ``target``.

    ``CL``, ``FC``: the outer factors ``A``, ``C`` are orthonormal and the inner one ``B`` is drawn as the compact layer
    would be, so that the gradient of ``B`` has the size that the compact layer's has. With a target, ``B <- B + C^T
    (target - C B A) A^T``. With ``C^T target A^T`` alone, the added directions would never get a gradient. ``CK``:
    variance-preserving factors; with a target the last one moves to the nearest solution.

    Args:
        kind, shape, groups, rate, expand_image: see :func:`factor_shapes`.
        generator: a generator on the CPU.
        target: tensor of ``shape``, float64, on the CPU.

    Returns:
        Factors in float64 on the CPU, in order of application.

    Raises:
        UnreachableKernelError: ``CK`` factors of these sizes cannot compose to ``target``.
        ValueError: ``target`` is not finite.
    """
    shapes = factor_shapes(kind, shape, groups, rate, expand_image)
    fan_in = shape[1] * shape[2] * shape[3]
    if kind == "CK":
        factors = [
            _uniform(s, ((1.0 if s is shapes[-1] else 3.0) / (s[1] * s[2] * s[3])) ** 0.5, generator) for s in shapes
        ]
    else:
        (first, *_), (last, last_in, *_) = shapes[0], shapes[-1]
        factors = [
            _orthonormal(groups, first // groups, shapes[0][1], generator).reshape(shapes[0]),
            _uniform(shapes[1], fan_in**-0.5, generator),
            _orthonormal(groups, last // groups, last_in, generator).reshape(shapes[2]),
        ]
    if target is None:
        return factors
    if not bool(target.isfinite().all()):
        raise ValueError("it contains NaN or inf. Load weights that are finite, or take initial='fresh'")
    drawn = compose_chain(factors, groups=groups)[0]
    missing = target - drawn
    if kind == "CK":
        factors[-1] = factors[-1] + _last_factor(factors[:-1], shapes[-1], missing, groups)
    else:
        back = [_transposed(factors[0], groups), missing, _transposed(factors[2], groups)]
        factors[1] = factors[1] + compose_chain(back, groups=groups)[0]
    left = target - compose_chain(factors, groups=groups)[0]
    # Solve for the difference, so that a target of zeros is reached up to the rounding of the drawn factors.
    if left.abs().max() > 1e-9 * torch.maximum(target.abs().max(), drawn.abs().max()):
        raise UnreachableKernelError(
            f"no 3x3 kernels of these widths compose to the given {shape[2]}x{shape[3]} kernel "
            f"({shapes[-1][1]} hidden channels for {fan_in} numbers of a filter)"
        )
    return factors


def _transposed(weight: Tensor, groups: int) -> Tensor:
    """Transpose a 1x1 weight ``(O, I/groups, 1, 1)`` to ``(I, O/groups, 1, 1)``."""
    outputs, inputs = weight.shape[:2]
    return weight.reshape(groups, outputs // groups, inputs).transpose(1, 2).reshape(-1, outputs // groups, 1, 1)


def _last_factor(earlier: Sequence[Tensor], shape: Shape, target: Tensor, groups: int) -> Tensor:
    """Return the last factor that composes with the earlier ones to ``target``: the least-squares solution of least
    norm."""
    prefix, _ = compose_chain(earlier, groups=groups)
    numbers = shape[1] * shape[2] * shape[3]
    # Contribution of each entry of the factor: the rows are the linear map from factor to kernel.
    single = torch.eye(numbers, dtype=target.dtype).reshape(numbers, *shape[1:]).repeat(groups, 1, 1, 1)
    effect = compose(prefix, single, groups).reshape(groups, numbers, -1)
    wanted = target.reshape(groups, shape[0] // groups, -1)
    solution: Tensor = torch.linalg.lstsq(effect.transpose(1, 2), wanted.transpose(1, 2), driver="gelsd").solution
    return solution.transpose(1, 2).reshape(shape)
