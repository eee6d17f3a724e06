"""Checksums tell tensors apart by their bits. Comparing them between processes is tested with the DDP tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_filterdiv.tensors.rank_check import bit_checksums, check_ranks_agree

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> list[int]:
    return bit_checksums({"tensor": tensor})[0].tolist()


def flip(tensor: Tensor, position: int, bit: int) -> Tensor:
    """A copy of a real tensor with one bit of one entry inverted."""
    copy = tensor.clone()
    bits = copy.view(INTEGER[tensor.element_size()])
    width = 8 * tensor.element_size()
    bits[position] ^= 1 << bit if bit < width - 1 or width == 8 else -(1 << bit)
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4), (0,)])
def test_equal_tensors_agree_for_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.rand(shape).mul(7).to(dtype)
    sums = bit_checksums({"a": tensor, "b": tensor.clone()})
    assert (sums.shape, sums.dtype) == ((2, 2), torch.int64)
    assert torch.equal(sums[0], sums[1])


@PROPERTY
@given(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(0, 999), st.data())
def test_every_flipped_bit_shows(dtype: torch.dtype, seed: int, data: st.DataObject) -> None:
    tensor = torch.randn(9, generator=torch.Generator().manual_seed(seed)).to(dtype)
    position = data.draw(st.integers(0, 8))
    bit = data.draw(st.integers(0, 8 * tensor.element_size() - 1))
    assert checksum(flip(tensor, position, bit))[0] != checksum(tensor)[0]


@PROPERTY
@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 3.0]), min_size=2, max_size=6),
    st.data(),
)
def test_exchanged_entries_show(dtype: torch.dtype, values: list[float], data: st.DataObject) -> None:
    i, j = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=2, max_size=2, unique=True))
    tensor = torch.tensor(values, dtype=dtype)
    other = tensor.clone()
    other[[i, j]] = tensor[[j, i]]
    same_bits = torch.equal(tensor.view(INTEGER[tensor.element_size()]), other.view(INTEGER[tensor.element_size()]))
    assert (checksum(tensor) == checksum(other)) == same_bits


def test_exchanged_signs_of_double_precision_entries_show() -> None:
    # The sign is the top bit: weighted by an even distance it would be carried out of a 64-bit sum.
    one, other = torch.tensor([1.0, 0.0, -1.0]).double(), torch.tensor([-1.0, 0.0, 1.0]).double()
    assert checksum(one) != checksum(other)


def test_negative_zero_is_not_zero() -> None:
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


def test_equal_nans_agree() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert checksum(nan) == checksum(nan.clone())


def test_memory_format_does_not_matter() -> None:
    tensor = torch.randn(2, 3, 4, 5)
    assert checksum(tensor.to(memory_format=torch.channels_last)) == checksum(tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_with_gaps_are_read_entry_by_entry(dtype: torch.dtype) -> None:
    wide = torch.randn(6, 2).to(dtype)
    assert checksum(wide[:, 0]) == checksum(wide[:, 0].contiguous())
    assert checksum(wide[0].expand(4, 2)) == checksum(wide[:1].repeat(4, 1))


def test_one_row_per_tensor_in_order() -> None:
    a, b = torch.ones(3), torch.zeros(2)
    assert bit_checksums({"a": a, "b": b}).tolist() == [checksum(a), checksum(b)]


def test_parameters_are_read_without_a_graph() -> None:
    assert not bit_checksums({"p": torch.nn.Parameter(torch.ones(2))}).requires_grad


def test_without_a_process_group_there_is_nothing_to_compare() -> None:
    check_ranks_agree({"a": torch.ones(2)}, "after step 1")
    check_ranks_agree({}, "after step 1")
