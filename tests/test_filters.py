"""A filter is a row of the matrix of its layer: reading, writing, masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_filterdiv.filters import (
    Conv,
    filter_count,
    filter_matrix,
    find_prefix,
    mask_layout,
    write_filters,
)
from tests.support.convolutions import (
    CLASSES,
    PROPERTY,
    TRANSPOSED,
    build,
    convolutions,
    inputs,
    spatial_dims,
    weights_behind_input,
    weights_behind_output,
)

# --- filter_matrix and write_filters -----------------------------------------------------------------------------


@PROPERTY
@given(convolutions())
def test_row_j_holds_the_weights_that_output_channel_j_depends_on(conv: Conv) -> None:
    matrix = filter_matrix(conv)
    assert matrix.shape == (conv.out_channels, conv.weight.numel() // conv.out_channels)
    assert filter_count(conv) == conv.out_channels
    for j in range(conv.out_channels):
        # Boolean indexing walks in (input channel, kernel position) order for a fixed filter.
        assert torch.equal(matrix[j], conv.weight.detach()[weights_behind_output(conv, j)])


@PROPERTY
@given(convolutions(), st.data())
def test_writing_one_filter_changes_its_output_channel_and_no_other(conv: Conv, data: st.DataObject) -> None:
    j = data.draw(st.integers(0, conv.out_channels - 1))
    image = inputs(conv)
    pointer, strides, parameter = conv.weight.data_ptr(), conv.weight.stride(), conv.weight
    with torch.no_grad():
        before, weight = conv(image), conv.weight.clone()
        write_filters(conv, [j], filter_matrix(conv)[[j]] + 1.0)
        after = conv(image)
    others = [i for i in range(conv.out_channels) if i != j]
    assert torch.equal(after[:, others], before[:, others])
    assert (after[:, j] != before[:, j]).all()
    assert torch.equal(conv.weight.detach() != weight, weights_behind_output(conv, j))
    assert conv.weight is parameter
    assert (conv.weight.data_ptr(), conv.weight.stride()) == (pointer, strides)


@PROPERTY
@given(convolutions(), st.data())
def test_write_filters_is_the_inverse_of_filter_matrix(conv: Conv, data: st.DataObject) -> None:
    original = filter_matrix(conv).clone()
    rows = data.draw(st.lists(st.integers(0, conv.out_channels - 1), unique=True))
    values = torch.randn(len(rows), original.shape[1], dtype=torch.float64)
    write_filters(conv, rows, values)
    expected = original.clone()
    expected[rows] = values
    assert torch.equal(filter_matrix(conv), expected)
    write_filters(conv, torch.arange(conv.out_channels), original)
    assert torch.equal(filter_matrix(conv), original)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("channels", "filters", "groups"), [(3, 5, 1), (4, 6, 2), (4, 4, 4), (3, 6, 3)])
def test_permuting_rows_permutes_output_channels(cls: type, channels: int, filters: int, groups: int) -> None:
    if groups > 1:  # filters of different groups see different inputs: exchange inside the first group only
        order = [*reversed(range(filters // groups)), *range(filters // groups, filters)]
    else:
        order = [*range(1, filters), 0]
    conv = build(cls, channels, filters, groups)
    image = inputs(conv)
    with torch.no_grad():
        conv.bias.zero_()
        before = conv(image)
        write_filters(conv, range(filters), filter_matrix(conv)[order].clone())
        torch.testing.assert_close(conv(image), before[:, order])


def test_matrix_of_a_contiguous_convolution_is_a_view_and_detached() -> None:
    conv = build(nn.Conv2d, 3, 4)
    matrix = filter_matrix(conv)
    assert matrix.data_ptr() == conv.weight.data_ptr()
    assert not matrix.requires_grad


@pytest.mark.parametrize("cls", CLASSES)
def test_columns_do_not_depend_on_the_memory_format(cls: type) -> None:
    conv = build(cls, 4, 6, 2)
    matrix = filter_matrix(conv).clone()
    if spatial_dims(cls) > 1:
        conv.to(memory_format=torch.channels_last if spatial_dims(cls) == 2 else torch.channels_last_3d)
        assert not conv.weight.is_contiguous()
    assert torch.equal(filter_matrix(conv), matrix)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_cast_to_the_dtype_of_the_weight(cls: type, dtype: torch.dtype) -> None:
    conv = build(cls, 2, 3).to(dtype)
    values = torch.randn(1, filter_matrix(conv).shape[1], dtype=torch.float64)
    write_filters(conv, [1], values)
    assert filter_matrix(conv).dtype == dtype
    assert torch.equal(filter_matrix(conv)[1], values[0].to(dtype))


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_values_are_moved_to_the_device_of_the_weight(cls: type) -> None:
    conv = cls(2, 3, 3, device="meta")
    matrix = filter_matrix(conv)
    assert (matrix.shape, matrix.device.type) == ((3, 18), "meta")
    write_filters(conv, [0, 2], torch.zeros(2, 18))


def test_values_that_require_grad_leave_no_graph_behind() -> None:
    conv = build(nn.Conv2d, 2, 3)
    write_filters(conv, [0], torch.ones(1, filter_matrix(conv).shape[1], dtype=torch.float64, requires_grad=True))
    assert conv.weight.is_leaf
    assert conv.weight.requires_grad
    assert conv.weight.grad_fn is None


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(
    ("rows", "shape", "error", "message"),
    [
        ([3], (1, 12), IndexError, r"rows must be in 0\.\.2 for a layer of 3 filters, got \[3\]"),
        ([-1], (1, 12), IndexError, r"rows must be in 0\.\.2 for a layer of 3 filters, got \[-1\]"),
        ([1, 1], (2, 12), IndexError, r"rows must name each filter once, got \[1, 1\]"),
        ([0, 1], (1, 12), ValueError, r"values must have shape \(2, 12\).*fan-in 12.*got \(1, 12\)"),
        ([0], (1, 11), ValueError, r"values must have shape \(1, 12\).*got \(1, 11\)"),
        ([0], (12,), ValueError, r"values must have shape \(1, 12\).*got \(12,\)"),
        # A mask is not a list of indices: read as one, it would name filters 0 and 1.
        (torch.tensor([False, True, False]), (3, 12), TypeError, r"rows must be integers.*bool"),
        (torch.tensor([0.0, 1.5]), (2, 12), TypeError, r"rows must be integers.*float32"),
    ],
)
def test_a_bad_write_is_refused_and_changes_nothing(
    cls: type, rows: list[int] | Tensor, shape: tuple[int, ...], error: type[Exception], message: str
) -> None:
    conv = cls(2, 3, (3, 2))
    before = conv.weight.detach().clone()
    with pytest.raises(error, match=message):
        write_filters(conv, rows, torch.zeros(shape))
    assert torch.equal(conv.weight.detach(), before)


def test_writing_no_rows_changes_nothing() -> None:
    conv = build(nn.Conv2d, 2, 3)
    before = conv.weight.detach().clone()
    write_filters(conv, [], torch.zeros(0, filter_matrix(conv).shape[1]))
    assert torch.equal(conv.weight.detach(), before)


# --- mask_layout -------------------------------------------------------------------------------------------------


def broadcast(conv: Conv, axis: str, vector: Tensor) -> Tensor:
    weight_view, mask_view = mask_layout(conv, axis)
    return vector.view(mask_view).expand(weight_view).reshape(conv.weight.shape)


@PROPERTY
@given(convolutions())
def test_a_one_hot_vector_selects_exactly_one_filter(conv: Conv) -> None:
    for j in range(conv.out_channels):
        one_hot = torch.arange(conv.out_channels) == j
        assert torch.equal(broadcast(conv, "out", one_hot), weights_behind_output(conv, j))


@PROPERTY
@given(convolutions())
def test_a_one_hot_vector_selects_exactly_one_input_slice(conv: Conv) -> None:
    transposed = isinstance(conv, TRANSPOSED)
    slices = conv.in_channels if transposed else conv.in_channels // conv.groups
    assert math.prod(mask_layout(conv, "in")[1]) == slices
    for s in range(slices):
        # Slice s of an ordinary convolution is the s-th input channel of every group.
        seen = [weights_behind_input(conv, c) for c in ([s] if transposed else range(s, conv.in_channels, slices))]
        assert torch.equal(broadcast(conv, "in", torch.arange(slices) == s), torch.stack(seen).any(0))


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        (["a.w", "b"], ["a.w", "b", "c"], ("", "")),
        (["net.a", "net.b.c"], ["a", "b.c", "d"], ("net.", "")),
        (["outer.net.a"], ["a"], ("outer.net.", "")),
        (["a", "b.c"], ["net.a", "net.b.c", "head"], ("", "net.")),
        (["a", "b"], ["head", "outer.net.a", "outer.net.b"], ("", "outer.net.")),
        (["net.a", "b"], ["a", "b"], None),
        (["a", "b"], ["x.a", "y.b"], None),
    ],
)
def test_the_prefix_between_a_network_and_the_one_around_it(
    names: list[str], known: list[str], expected: tuple[str, str] | None
) -> None:
    assert find_prefix(names, known) == expected
