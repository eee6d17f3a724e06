"""Copies of tensors side by side: nothing is lost between reading and writing, whatever the layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.cost.fake_device import profiled_operations
from lightning_filterdiv.tensors.flat_buffer import FlatBuffer

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """Tensors of any shapes, some of them twice in a row, some with dims in another order in memory."""
    found: list[Tensor] = []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=4))
        order = draw(st.permutations(range(len(shape))))
        inverse = sorted(range(len(order)), key=order.__getitem__)
        sizes = [shape[dim] for dim in order]
        found += [torch.randn(sizes).permute(inverse) for _ in range(draw(st.integers(1, 3)))]
    return found


@PROPERTY
@given(tensors(), st.data())
def test_what_is_read_is_written(originals: list[Tensor], data: st.DataObject) -> None:
    buffer = FlatBuffer(originals)
    everyone = list(range(len(originals)))
    members = data.draw(st.lists(st.sampled_from(everyone), unique=True, min_size=1).map(sorted))
    buffer.read(originals, everyone)
    assert all(torch.equal(view, tensor) for view, tensor in zip(buffer.views, originals, strict=True))
    assert [view.stride() for view in buffer.views] == [tensor.stride() for tensor in originals]
    buffer.flat.mul_(2)
    targets = [torch.zeros_like(originals[i]) for i in members]
    buffer.write(targets, members)
    assert all(torch.equal(target, 2 * originals[i]) for target, i in zip(targets, members, strict=True))
    before = [view.clone() for view in buffer.views]
    buffer.read([tensor + 1 for tensor in targets], members)
    for i in everyone:
        expected = before[i] + 1 if i in members else before[i]
        assert torch.equal(buffer.views[i], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_share_no_entry_and_begin_at_aligned_places(dtype: torch.dtype) -> None:
    shapes = [(3,), (5, 3, 3, 3), (5, 3, 3, 3), (2, 2), (1,)]
    buffer = FlatBuffer([torch.zeros(shape, dtype=dtype) for shape in shapes])
    for number, view in enumerate(buffer.views):
        view.fill_(number + 1)
    assert [set(view.flatten().tolist()) for view in buffer.views] == [{number + 1} for number in range(5)]
    places = [view.storage_offset() * dtype.itemsize for view in buffer.views]
    assert all(place % 64 == 0 for i, place in enumerate(places) if i != 2)
    assert buffer.stack(1, 2).shape == (2, 5, 3, 3, 3)
    assert [set(row.flatten().tolist()) for row in buffer.stack(1, 2)] == [{2}, {3}]
    assert [buffer.start(i) for i in range(5)] == [view.storage_offset() for view in buffer.views]
    assert buffer.start(5) == buffer.flat.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_the_same_memory(dtype: torch.dtype) -> None:
    buffer = FlatBuffer([torch.full((7,), 1.5, dtype=dtype)])
    assert buffer.bits.data_ptr() == buffer.flat.data_ptr()
    assert buffer.bits.numel() * buffer.bits.element_size() == 7 * dtype.itemsize
    buffer.read([torch.full((7,), 1.5, dtype=dtype)], [0])
    buffer.bits.bitwise_and_(-1)
    assert (buffer.flat == 1.5).all()
    buffer.bits.bitwise_and_(0)
    assert (buffer.flat == 0).all()


def test_gaps_and_repeated_entries_get_a_room_of_their_own() -> None:
    gaps, repeated = torch.randn(3, 4)[:, ::2], torch.randn(1, 4).expand(3, 4)
    buffer = FlatBuffer([gaps, repeated])
    buffer.read([gaps, repeated], [0, 1])
    assert torch.equal(buffer.views[0], gaps)
    assert torch.equal(buffer.views[1], repeated)
    assert all(view.is_contiguous() for view in buffer.views)


def test_copies_convert_and_keep_parameters_leaves() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    buffer = FlatBuffer([parameter], torch.float32)
    buffer.read([parameter], [0])
    assert buffer.flat.dtype == torch.float32
    assert not buffer.flat.requires_grad
    buffer.flat.mul_(3)
    buffer.write([parameter], [0])
    assert parameter.tolist() == [3, 3, 3]
    assert parameter.is_leaf
    assert parameter.requires_grad


def test_one_operation_reads_all() -> None:
    """Apart from the copies themselves, which a GPU makes in one kernel, nothing grows with the number of tensors."""

    def operations(count: int) -> dict[str, int]:
        originals = [torch.randn(4, 3) for _ in range(count)]
        buffer = FlatBuffer(originals)
        return dict(profiled_operations(lambda: buffer.read(originals, range(len(originals)))))

    few, many = operations(3), operations(30)
    assert few.pop("aten::stack") == many.pop("aten::stack") == 1
    assert few == many

    def some(count: int) -> dict[str, int]:
        originals = [torch.randn(4, 3) for _ in range(count)]
        buffer = FlatBuffer([*originals, torch.randn(2)])
        return dict(profiled_operations(lambda: buffer.read(originals, range(len(originals)))))

    assert some(3) == {"aten::_foreach_copy_": 1, "aten::copy_": 3}
    assert some(30) == {"aten::_foreach_copy_": 1, "aten::copy_": 30}
