"""The gradients of "srip" and "convolutional" against the direct formulas, to the last digits.

The formulas here are those of version 0.1: power iteration in products with the filters, and two convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lightning_filterdiv.orthonormality.functional import self_convolution, self_padding
from lightning_filterdiv.orthonormality.gradients import PowerIteration, convolutional_gradient, spectral_gradient

BOUNDS = [(torch.float64, 1e-12), (torch.float32, 1e-6)]
EPSILON = 1e-12


def _by_products(filters: Tensor, start: Tensor, squared: bool) -> Tensor:
    rows = filters if filters.shape[1] <= filters.shape[2] else filters.mT

    def apply(x: Tensor) -> Tensor:
        return rows @ (rows.mT @ x) - x

    start = start[..., None]
    first = apply(start)
    norm = first.norm(dim=1, keepdim=True).clamp_min(EPSILON)
    v = first / norm
    moved = apply(v)
    sigma = moved.norm(dim=1, keepdim=True)
    u = moved / sigma.clamp_min(EPSILON)
    g = (apply(u) - sigma * v) / norm
    outer = u @ v.mT + g @ start.mT
    if squared:
        outer = outer * (2 * sigma)
    outer = outer + outer.mT
    return outer @ filters if rows is filters else filters @ outer


def _by_convolutions(kernels: Tensor, stride: Sequence[int]) -> Tensor:
    batch, count = kernels.shape[:2]
    off = self_convolution(kernels, stride)
    transposed = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(stride)]
    padding = self_padding(kernels.shape[3:], stride)
    options = {"stride": list(stride), "padding": padding, "groups": batch}
    gradient: Tensor = transposed(off.flatten(1, 2), kernels.flatten(0, 1), **options)
    return 4 * gradient.view(count, batch, *kernels.shape[2:]).transpose(0, 1)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 27), (5, 64, 576), (3, 40, 9), (1, 1, 1)])
def test_srip(shape: tuple[int, int, int], squared: bool, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    filters = torch.randn(shape, dtype=torch.float64) * 0.2
    start = torch.randn(shape[0], min(shape[1:]), dtype=torch.float64)
    expected = _by_products(filters, start, squared)
    found = spectral_gradient(filters.to(dtype), start.to(dtype), squared=squared)
    assert _distance(found, expected) <= bound


def test_batches_of_different_widths_share_a_power_iteration() -> None:
    torch.manual_seed(0)
    shapes = [(2, 16, 27), (1, 3, 8), (4, 30, 9)]
    filters = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    iteration = PowerIteration(shapes, torch.float64, torch.device("cpu"))
    for _ in range(2):  # nothing of one step is left in the next
        starts = [torch.randn(b, min(j, d), dtype=torch.float64) for b, j, d in shapes]
        padded = torch.cat([F.pad(start, (0, iteration.widest - start.shape[1])) for start in starts])
        for found, one, start in zip(iteration.gradients(filters, padded), filters, starts, strict=True):
            assert _distance(found, _by_products(one, start, False)) <= 1e-12


KERNELS = [
    ((2, 16, 8, 3, 3), (1, 1)), ((5, 64, 64, 3, 3), (1, 1)), ((2, 8, 4, 3, 3), (2, 2)), ((1, 8, 4, 5, 3), (2, 1)),
    ((3, 4, 2, 7), (3,)), ((1, 5, 3, 3, 3, 3), (1, 2, 1)), ((4, 1, 1, 3, 3), (1, 1)), ((1, 8, 3, 7, 7), (2, 2)),
    ((1, 8, 3, 2, 2), (1, 1)), ((2, 4, 3, 1, 3), (1, 1)), ((2, 4, 3, 3, 2), (4, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
@pytest.mark.parametrize(("shape", "stride"), KERNELS)
def test_convolutional(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    kernels = torch.randn(shape, dtype=torch.float64) * 0.2
    expected = _by_convolutions(kernels, stride)
    assert _distance(convolutional_gradient(kernels.to(dtype), stride), expected) <= bound
    out = torch.empty(*shape[:2], expected[0, 0].numel(), dtype=dtype)
    assert convolutional_gradient(kernels.to(dtype), stride, out=out).data_ptr() == out.data_ptr()


def test_what_is_kept_of_a_kernel_shape_is_no_tensor_of_the_mode_it_was_made_in() -> None:
    shape, stride = (1, 3, 2, 4, 5), (1, 3)  # met in no other test
    with FakeTensorMode():
        convolutional_gradient(torch.zeros(shape), stride)
    kernels = torch.randn(shape, dtype=torch.float64)
    assert _distance(convolutional_gradient(kernels, stride), _by_convolutions(kernels, stride)) <= 1e-12
