"""Parameters that share a storage: nothing a user can see changes, and one kernel writes them all."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_filterdiv.tensors.flat_buffer import ParameterBuffer
from lightning_filterdiv.tensors.stacking import gather, group_by, scatter

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
PITCH_BYTES = 512


def parameters(count: int, shape: Sequence[int] = (4, 3, 3, 3), channels_last: bool = False) -> list[nn.Parameter]:
    values = [torch.randn(*shape) for _ in range(count)]
    if channels_last:
        values = [value.to(memory_format=torch.channels_last) for value in values]
    return [nn.Parameter(value) for value in values]


def snapshot(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def assert_all_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True))


def own_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def values_of(stack: ParameterBuffer) -> Tensor:
    stack.read()
    return stack.buffer.stack(0, len(stack.parameters))


def overwrite(stack: ParameterBuffer, values: Tensor) -> None:
    values_of(stack).copy_(values)
    stack.write()


class Chain(nn.Sequential):
    """Three convolutions of one shape and a head."""

    def __init__(self, channels_last: bool = False) -> None:
        super().__init__(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], nn.Flatten(), nn.Linear(75, 2))
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @property
    def weights(self) -> list[nn.Parameter]:
        return [module.weight for module in self if isinstance(module, nn.Conv2d)]


def train(model: nn.Module, make: Callable[..., torch.optim.Optimizer], steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(5)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 5, 5, generator=generator)).square().sum().backward()
        optimizer.step()


# --- group_by, gather, scatter -----------------------------------------------------------------------------------


def test_groups_keep_the_order_of_first_appearance() -> None:
    assert group_by(["b1", "a1", "b2", "c1", "a2"], lambda item: item[0]) == [["b1", "b2"], ["a1", "a2"], ["c1"]]
    assert group_by([], lambda item: item) == []


@st.composite
def permuted_tensors(draw: st.DrawFn) -> list[Tensor]:
    """Dense tensors of one shape whose dims lie in memory in any order."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    inverse = sorted(range(len(order)), key=order.__getitem__)
    count = draw(st.integers(1, 4))
    return [torch.randn([shape[dim] for dim in order]).permute(inverse) for _ in range(count)]


@PROPERTY
@given(permuted_tensors())
def test_gather_and_scatter_are_inverse_and_keep_the_memory_format(tensors: list[Tensor]) -> None:
    stacked = gather(tensors)
    assert stacked.shape == (len(tensors), *tensors[0].shape)
    assert_all_equal(stacked.unbind(), tensors)
    for row, tensor in zip(stacked, tensors, strict=True):
        # The stride of a dim of size 1 has no meaning.
        relevant = [(a, b) for a, b, n in zip(row.stride(), tensor.stride(), row.shape, strict=True) if n > 1]
        assert all(a == b for a, b in relevant)
    targets = [torch.empty_like(tensor) for tensor in tensors]
    pointers = [target.data_ptr() for target in targets]
    scatter(targets, stacked * 2)
    assert_all_equal(targets, [tensor * 2 for tensor in tensors])
    assert [target.data_ptr() for target in targets] == pointers


def test_gather_copies_and_detaches() -> None:
    one = parameters(2)
    stacked = gather(one)
    assert not stacked.requires_grad
    before = snapshot(one)
    stacked.zero_()
    assert_all_equal(one, before)


def test_gather_of_tensors_in_different_memory_formats() -> None:
    one, two = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert_all_equal(gather([two, one]).unbind(), [two, one])
    targets = [torch.zeros_like(one), torch.zeros_like(two)]
    scatter(targets, gather([one, two]))
    assert_all_equal(targets, [one, two])


def test_scatter_writes_parameters_in_place() -> None:
    targets = parameters(2)
    scatter(targets, torch.ones(2, 4, 3, 3, 3))
    assert all(target.is_leaf and target.requires_grad and (target == 1).all() for target in targets)


# --- ParameterBuffer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (1, 1, 1, 1), (8, 16, 4, 4), (5, 1, 3, 3)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_parameters_stay_what_they_were(count: int, shape: tuple[int, ...], channels_last: bool) -> None:
    members = parameters(count, shape, channels_last)
    values, strides = snapshot(members), [member.stride() for member in members]
    stack = ParameterBuffer(members)
    assert stack.buffer.shared
    assert all(kept is member for kept, member in zip(stack.parameters, members, strict=True))
    assert all(type(m) is nn.Parameter and m.is_leaf and m.requires_grad for m in members)
    assert_all_equal(members, values)
    assert [member.stride() for member in members] == strides
    assert_all_equal(values_of(stack).unbind(), values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 3, 3, 3), (32, 4)])
def test_every_parameter_starts_at_an_aligned_address(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    members = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(4)]
    alignment = min(member.data_ptr() & -member.data_ptr() for member in members)  # of allocations of their own
    stack = ParameterBuffer(members)
    assert stack.buffer.shared
    offsets = [member.data_ptr() - members[0].data_ptr() for member in members]
    need = -(-members[0].numel() * members[0].element_size() // PITCH_BYTES) * PITCH_BYTES
    assert offsets == [row * need for row in range(4)]
    assert all(member.data_ptr() % min(alignment, 64) == 0 for member in members)


def test_reading_and_writing_are_the_parameters_themselves() -> None:
    members = parameters(3)
    stack = ParameterBuffer(members)
    values = values_of(stack)
    values.mul_(2)
    assert_all_equal(members, values.unbind())
    overwrite(stack, values)  # nothing to do
    new = torch.randn(3, 4, 3, 3, 3)
    overwrite(stack, new)
    assert_all_equal(members, new.unbind())
    with torch.no_grad():
        members[1].zero_()
    assert values_of(stack)[1].abs().max() == 0
    assert torch.equal(values_of(stack)[0], new[0])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.01),
        lambda p: torch.optim.AdamW(p, 0.01, fused=True),
        lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    ],
)
def test_training_is_the_same_bit_for_bit(make: Callable[..., torch.optim.Optimizer], channels_last: bool) -> None:
    torch.manual_seed(0)
    plain = Chain(channels_last)
    stacked = copy.deepcopy(plain)
    start = snapshot(plain.parameters())
    stack = ParameterBuffer(stacked.weights)
    train(plain, make)
    train(stacked, make)
    assert stack.buffer.shared
    assert_all_equal(list(stacked.parameters()), list(plain.parameters()))
    assert not any(torch.equal(now, then) for now, then in zip(stacked.parameters(), start, strict=True))


def test_gradients_flow_to_each_parameter() -> None:
    members = parameters(2)
    ParameterBuffer(members)
    (members[0].sum() + 3 * members[1].sum()).backward()
    assert (members[0].grad == 1).all()
    assert (members[1].grad == 3).all()


def test_an_optimizer_built_before_the_stack_keeps_training() -> None:
    members = parameters(2)
    optimizer = torch.optim.SGD(members, 0.5)
    before = snapshot(members)
    stack = ParameterBuffer(members)
    sum(member.sum() for member in members).backward()
    optimizer.step()
    assert_all_equal(values_of(stack).unbind(), [value - 0.5 for value in before])


@pytest.mark.parametrize("channels_last", [False, True])
def test_state_dict_round_trip_while_shared(channels_last: bool) -> None:
    model, other = Chain(channels_last), Chain(channels_last)
    stack = ParameterBuffer(model.weights)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other_stack = ParameterBuffer(other.weights)
    other.load_state_dict(saved)
    assert other_stack.buffer.shared  # loading copies into the parameters
    assert_all_equal(list(other.parameters()), list(model.parameters()))
    assert_all_equal(values_of(other_stack).unbind(), model.weights)
    with torch.no_grad():
        values_of(stack).zero_()
    assert not any(weight.eq(0).all() for weight in other.weights)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: torch.load(_saved(model), weights_only=False)])
def test_a_copy_of_the_model_is_independent(copy_of: Callable[[Chain], Chain]) -> None:
    model = Chain()
    stack = ParameterBuffer(model.weights)
    twin = copy_of(model)
    assert_all_equal(twin.weights, model.weights)
    values = snapshot(twin.weights)
    values_of(stack).zero_()
    assert_all_equal(twin.weights, values)
    before = values_of(stack).clone()
    train(twin, lambda p: torch.optim.SGD(p, 0.1))
    assert torch.equal(values_of(stack), before)


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def view_of_a_larger_storage(members: list[nn.Parameter]) -> list[nn.Parameter]:
    flat = torch.cat([member.detach().flatten() for member in members])
    pieces = flat.split(members[0].numel())
    return [nn.Parameter(piece.view_as(m)) for piece, m in zip(pieces, members, strict=True)]


def view_with_gaps(members: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.stack([m.detach(), m.detach()], dim=-1)[..., 0]) for m in members]


def repeated_entries(members: list[nn.Parameter]) -> list[nn.Parameter]:
    """``expand`` gives a storage of the right size only by chance; entries that share memory must not be adopted."""
    return [nn.Parameter(member.detach()[:1].expand_as(member)) for member in members]


@pytest.mark.parametrize("make", [view_of_a_larger_storage, view_with_gaps, repeated_entries])
def test_views_of_foreign_storage_are_left_where_they_are(
    make: Callable[[list[nn.Parameter]], list[nn.Parameter]],
) -> None:
    members = make(parameters(3))
    pointers = [member.data_ptr() for member in members]
    stack = ParameterBuffer(members)
    assert not stack.buffer.shared
    assert [member.data_ptr() for member in members] == pointers
    assert_all_equal(values_of(stack).unbind(), members)
    if make is not repeated_entries:  # which nobody can write entry by entry
        new = torch.randn(3, 4, 3, 3, 3)
        overwrite(stack, new)
        assert_all_equal(members, new.unbind())
    stack.release()
    assert [member.data_ptr() for member in members] == pointers


@pytest.mark.parametrize("moved", [[0], [2], [0, 1, 2]])
def test_parameters_whose_data_was_moved_are_followed(moved: list[int]) -> None:
    members = parameters(3)
    stack = ParameterBuffer(members)
    for index in moved:
        members[index].data = torch.randn(4, 3, 3, 3)
    assert not stack.buffer.shared
    assert_all_equal(values_of(stack).unbind(), members)
    new = torch.randn(3, 4, 3, 3, 3)
    overwrite(stack, new)
    assert_all_equal(members, new.unbind())
    stack.release()
    assert all(own_storage(member) for member in members)
    assert_all_equal(members, new.unbind())


def test_exchanged_data_is_noticed() -> None:
    members = parameters(2)
    values = snapshot(members)
    stack = ParameterBuffer(members)
    members[0].data, members[1].data = members[1].data, members[0].data
    assert not stack.buffer.shared
    assert_all_equal(values_of(stack).unbind(), values[::-1])
    stack.release()
    assert all(own_storage(member) for member in members)
    assert_all_equal(members, values[::-1])


@pytest.mark.parametrize("channels_last", [False, True])
def test_release_gives_every_parameter_its_own_storage_again(channels_last: bool) -> None:
    members = parameters(3, channels_last=channels_last)
    values, strides = snapshot(members), [member.stride() for member in members]
    stack = ParameterBuffer(members)
    assert not any(own_storage(member) for member in members)
    stack.release()
    assert not stack.buffer.shared
    assert all(own_storage(member) for member in members)
    assert len({member.data_ptr() for member in members}) == 3
    assert_all_equal(members, values)
    assert [member.stride() for member in members] == strides
    with torch.no_grad():
        members[0].zero_()
    assert_all_equal(members[1:], values[1:])
    stack.release()  # again: nothing to do
    assert ParameterBuffer(members).buffer.shared  # and they can be adopted again


def test_a_second_stack_works_on_copies() -> None:
    members = parameters(2)
    first, second = ParameterBuffer(members), ParameterBuffer(members)
    assert (first.buffer.shared, second.buffer.shared) == (True, False)
    new = torch.randn(2, 4, 3, 3, 3)
    overwrite(second, new)
    assert torch.equal(values_of(first), new)
    second.release()
    assert first.buffer.shared


@pytest.mark.parametrize(
    "other", [torch.zeros(4, 3, 3, 3, dtype=torch.float64), torch.zeros(4, 3, 3, 3, device="meta")]
)
def test_parameters_of_different_kinds_are_refused(other: Tensor) -> None:
    with pytest.raises(ValueError, match="one dtype and device, got "):
        ParameterBuffer([*parameters(1), nn.Parameter(other)])
    with pytest.raises(ValueError, match="one dtype and device, got "):
        ParameterBuffer([])


def test_parameters_of_several_layouts_share_a_storage() -> None:
    members = [*parameters(2), *parameters(2, channels_last=True), *parameters(3, (7,)), *parameters(1, (2, 2))]
    values, strides = snapshot(members), [member.stride() for member in members]
    stack = ParameterBuffer(members)
    assert stack.buffer.shared
    assert len({member.untyped_storage().data_ptr() for member in members}) == 1
    assert all((member.data_ptr() - members[0].data_ptr()) % PITCH_BYTES == 0 for member in members)
    assert_all_equal(members, values)
    assert [member.stride() for member in members] == strides
    stack.buffer.stack(4, 3).fill_(5)
    assert all((member == 5).all() for member in members[4:7])
    assert_all_equal(members[:4] + members[7:], values[:4] + values[7:])


def test_a_parameter_given_twice_is_read_and_written_as_a_copy() -> None:
    (member,) = parameters(1)
    stack = ParameterBuffer([member, member])
    assert not stack.buffer.shared
    overwrite(stack, torch.ones(2, *member.shape))
    assert (member == 1).all()


# --- cost --------------------------------------------------------------------------------------------------------


def aten_calls(run: Callable[[], object]) -> int:
    run()  # first-call set-up is not counted
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))


def masked_write(stack: ParameterBuffer) -> Callable[[], None]:
    count, filters = len(stack.parameters), stack.parameters[0].shape[0]
    mask = (torch.rand(count, filters) < 0.5).view(count, filters, 1, 1, 1)
    old = torch.zeros(count, *stack.parameters[0].shape)

    def run() -> None:
        values = values_of(stack)
        torch.where(mask, values, old, out=values)
        overwrite(stack, values)

    return run


def test_the_number_of_kernels_does_not_grow_with_the_number_of_parameters() -> None:
    few, many = (aten_calls(masked_write(ParameterBuffer(parameters(count)))) for count in (2, 20))
    assert 1 <= few == many <= 4


def test_the_profiler_does_see_one_kernel_per_parameter_where_storage_is_not_shared() -> None:
    few, many = (
        aten_calls(masked_write(ParameterBuffer(view_of_a_larger_storage(parameters(count))))) for count in (2, 20)
    )
    assert many >= few + 18
