"""Held rows stay bit-still through any optimizer, the others move as if nothing was held."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_filterdiv.optimizer_state import HeldRows, RowHold, reset_rows, row_state
from tests.support.kernels import profiled_operations

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
Make = Callable[[Sequence[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=0.1, initial_accumulator_value=0.3),
    "nadam": lambda p: torch.optim.NAdam(p, 0.1, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 0.1, weight_decay=0.1),
}


def index(*rows: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def network() -> list[nn.Parameter]:
    """Two convolutions of one shape, a channels_last one of that shape, a bias, a matrix and a free convolution."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    conv = [randn(6, 4, 3, 3) for _ in range(4)]
    conv[2] = conv[2].to(memory_format=torch.channels_last)
    return [nn.Parameter(value) for value in [*conv[:3], randn(6), randn(5, 7), conv[3]]]


def held_rows(parameters: Sequence[nn.Parameter]) -> list[HeldRows]:
    """Rows along dim 0 and dim 1, along both, of a vector, and none at all of the last parameter."""
    first, second, last, bias, matrix, _ = parameters
    return [
        HeldRows(first, index(0, 4)),
        HeldRows(second, index(2)),
        HeldRows(last, index(1, 3), dim=1),
        HeldRows(bias, index(0, 4)),
        HeldRows(matrix, index(1)),
        HeldRows(matrix, index(0, 6), dim=1),
    ]


def held_masks(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The same, entry by entry, written independently of ``RowHold``."""
    masks = [torch.zeros(parameter.shape, dtype=torch.bool) for parameter in parameters]
    masks[0][[0, 4]] = True
    masks[1][2] = True
    masks[2][:, [1, 3]] = True
    masks[3][[0, 4]] = True
    masks[4][1, :] = True
    masks[4][:, [0, 6]] = True
    return masks


def give_gradients(parameters: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def states(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    found = optimizer.state.get(parameter, {})
    return {k: v for k, v in found.items() if isinstance(v, Tensor) and v.shape == parameter.shape}


def clone_states(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in states(optimizer, p).items()} for p in parameters]


def same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.detach().contiguous().view(torch.int32), two.detach().contiguous().view(torch.int32))


# --- any optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_steps", [0, 3], ids=["from-the-first-step", "after-dense-steps"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_held_rows_stay_and_the_others_move_as_without_hold(name: str, dense_steps: int) -> None:
    held, free = network(), network()
    held_optimizer, free_optimizer = OPTIMIZERS[name](held), OPTIMIZERS[name](free)
    hold = RowHold(held_rows(held))
    masks = held_masks(held)
    for step in range(dense_steps):
        for parameters, optimizer in ((held, held_optimizer), (free, free_optimizer)):
            give_gradients(parameters, step)
            optimizer.step()
    values, before = [p.detach().clone() for p in held], clone_states(held_optimizer, held)
    strides = [p.stride() for p in held]
    for step in range(dense_steps, dense_steps + 8):
        for parameters in (held, free):
            give_gradients(parameters, step)
        hold.before_step(held_optimizer)
        held_optimizer.step()
        hold.after_step(held_optimizer)
        free_optimizer.step()
    assert [p.stride() for p in held] == strides
    for i, (mine, theirs, mask) in enumerate(zip(held, free, masks, strict=True)):
        assert same_bits(mine.detach()[mask], values[i][mask])
        assert same_bits(mine.detach()[~mask], theirs.detach()[~mask])
        assert not (mine.detach()[~mask] == values[i][~mask]).any()
        mine_states, their_states = states(held_optimizer, mine), states(free_optimizer, theirs)
        assert mine_states.keys() == their_states.keys() != set()
        for key, state in mine_states.items():
            # State born in the first step starts with zero rows, whatever the step put there.
            expected = before[i][key][mask] if key in before[i] else torch.zeros_like(state[mask])
            assert same_bits(state[mask], expected), key
            assert same_bits(state[~mask], their_states[key][~mask]), key


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adagrad"])
def test_zeroing_gradients_alone_is_no_freeze(name: str) -> None:
    """The control of the test above: without ``RowHold`` every one of these rows moves, and so does its state."""
    parameters = network()
    optimizer = OPTIMIZERS[name](parameters)
    give_gradients(parameters, 0)
    optimizer.step()
    values, before = [p.detach().clone() for p in parameters], clone_states(optimizer, parameters)
    give_gradients(parameters, 1)
    for parameter, mask in zip(parameters, held_masks(parameters), strict=True):
        parameter.grad[mask] = 0
    optimizer.step()
    for i, mask in enumerate(held_masks(parameters)[:-1]):
        assert not (parameters[i].detach()[mask] == values[i][mask]).any()
        assert any(not torch.equal(s[mask], before[i][k][mask]) for k, s in states(optimizer, parameters[i]).items())


def test_state_born_in_a_step_would_not_be_zero_without_the_hold() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = OPTIMIZERS["sgd"]([parameter])
    parameter.grad = torch.zeros(3, 2)
    optimizer.step()
    assert (states(optimizer, parameter)["momentum_buffer"] == 0.1).all()  # the weight decay


def test_adagrad_state_exists_before_the_first_step_and_is_kept() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = OPTIMIZERS["adagrad"]([parameter])
    hold = RowHold([HeldRows(parameter, index(1))])
    parameter.grad = torch.ones(3, 2)
    hold.before_step(optimizer)
    optimizer.step()
    hold.after_step(optimizer)
    assert states(optimizer, parameter)["sum"][1].tolist() == pytest.approx([0.3, 0.3])
    assert states(optimizer, parameter)["sum"][0, 0] > 1


@PROPERTY
@given(st.data())
def test_any_rows_along_any_dims(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    parameter, twin = (nn.Parameter(torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)) for _ in range(2))
    mask = torch.zeros(shape, dtype=torch.bool)
    rows = []
    for _ in range(data.draw(st.integers(1, 3))):
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        chosen = data.draw(st.lists(st.integers(0, shape[dim] - 1), unique=True))
        rows.append(HeldRows(parameter, index(*chosen), dim))
        mask.index_fill_(dim, index(*chosen), True)
    start = parameter.detach().clone()
    hold = RowHold(rows)
    mine, other = OPTIMIZERS["adamw"]([parameter]), OPTIMIZERS["adamw"]([twin])
    for step in range(2):
        give_gradients([parameter], step)
        give_gradients([twin], step)
        hold.before_step(mine)
        assert torch.equal(parameter.grad, twin.grad.masked_fill(mask, 0))
        mine.step()
        hold.after_step(mine)
        other.step()
    assert torch.equal(parameter.detach(), torch.where(mask, start, twin.detach()))


# --- gradients ---------------------------------------------------------------------------------------------------


def test_gradients_of_held_rows_are_zeroed_in_place() -> None:
    parameters = network()
    optimizer = OPTIMIZERS["sgd"](parameters)
    give_gradients(parameters, 0)
    objects = [p.grad for p in parameters]
    pointers = [p.grad.data_ptr() for p in parameters]
    expected = [p.grad.masked_fill(m, 0) for p, m in zip(parameters, held_masks(parameters), strict=True)]
    RowHold(held_rows(parameters)).before_step(optimizer)
    assert all(p.grad is gradient for p, gradient in zip(parameters, objects, strict=True))
    assert [p.grad.data_ptr() for p in parameters] == pointers
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, expected, strict=True))


def test_gradients_that_are_views_of_a_bucket_are_zeroed_in_the_bucket() -> None:
    parameters = [nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    bucket = torch.ones(12)
    for parameter, piece in zip(parameters, bucket.split(6), strict=True):
        parameter.grad = piece.view(3, 2)
    hold = RowHold([HeldRows(parameters[0], index(0)), HeldRows(parameters[1], index(2))])
    hold.before_step(torch.optim.SGD(parameters, 0.1))
    assert bucket.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["sgd", "adamw", "fused"])
def test_nan_and_inf_do_not_reach_held_rows(name: str, bad: float) -> None:
    """Neither from their own gradients, which are assigned zero, nor from the other rows."""
    parameters = network()
    optimizer = OPTIMIZERS[name](parameters)
    hold = RowHold(held_rows(parameters))
    values = [p.detach().clone() for p in parameters]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, bad)
        hold.before_step(optimizer)
        for parameter, mask in zip(parameters, held_masks(parameters), strict=True):
            assert (parameter.grad[mask] == 0).all()  # or gradient clipping would see them
        optimizer.step()
        hold.after_step(optimizer)
    for i, (parameter, mask) in enumerate(zip(parameters, held_masks(parameters), strict=True)):
        assert same_bits(parameter.detach()[mask], values[i][mask])
        assert not parameter.detach()[~mask].isfinite().any()
        for state in states(optimizer, parameter).values():
            assert (state[mask] == 0).all()


def test_a_parameter_without_gradient_is_skipped_and_given_none() -> None:
    with_gradient, without = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = OPTIMIZERS["adamw"]([with_gradient, without])
    hold = RowHold([HeldRows(with_gradient, index(0)), HeldRows(without, index(0))])
    with_gradient.grad = torch.ones(3, 2)
    hold.before_step(optimizer)
    optimizer.step()
    hold.after_step(optimizer)
    assert without.grad is None
    assert not states(optimizer, without)
    assert torch.equal(without.detach(), torch.ones(3, 2))
    assert with_gradient[0].tolist() == [1, 1]
    assert with_gradient[1, 0] != 1
    # Later the other one gets a gradient: its state is born one step after that of its neighbour.
    without.grad = torch.ones(3, 2)
    hold.before_step(optimizer)
    optimizer.step()
    hold.after_step(optimizer)
    for parameter in (with_gradient, without):
        assert parameter[0].tolist() == [1, 1]
        assert all((state[0] == 0).all() and (state[1] != 0).all() for state in states(optimizer, parameter).values())


def test_every_parameter_keeps_its_own_rows_when_a_neighbour_has_no_gradient() -> None:
    parameters = [nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    optimizer = OPTIMIZERS["sgd"](parameters)
    hold = RowHold([HeldRows(parameter, index(row)) for row, parameter in enumerate(parameters)])
    for silent in range(3):
        for i, parameter in enumerate(parameters):
            parameter.grad = None if i == silent else torch.ones(3, 2)
        hold.before_step(optimizer)
        optimizer.step()
        hold.after_step(optimizer)
    for row, parameter in enumerate(parameters):
        assert [i for i in range(3) if (parameter[i] == 1).all()] == [row]


def test_no_gradient_at_all() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS["sgd"]([parameter])
    hold = RowHold([HeldRows(parameter, index(0))])
    hold.before_step(optimizer)
    assert hold.pending
    optimizer.step()
    hold.after_step(optimizer)
    assert parameter.grad is None


def test_only_parameters_of_the_passed_optimizer_are_touched() -> None:
    mine, theirs = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    my_optimizer, their_optimizer = OPTIMIZERS["sgd"]([mine]), OPTIMIZERS["sgd"]([theirs])
    hold = RowHold([HeldRows(mine, index(0)), HeldRows(theirs, index(0))])
    mine.grad, theirs.grad = torch.ones(3, 2), torch.ones(3, 2)
    hold.before_step(my_optimizer)
    assert (theirs.grad == 1).all()
    my_optimizer.step()
    their_optimizer.step()  # between the two: its update must survive
    moved = theirs.detach().clone()
    hold.after_step(my_optimizer)
    assert (moved != 1).all()
    assert torch.equal(theirs.detach(), moved)
    assert mine[0].tolist() == [1, 1]


# --- protocol ----------------------------------------------------------------------------------------------------


def test_a_step_that_never_happened_leaves_no_trace() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = OPTIMIZERS["sgd"]([parameter])
    hold = RowHold([HeldRows(parameter, index(0))])
    parameter.grad = torch.full((3, 2), float("inf"))
    hold.before_step(optimizer)  # overflow: the scaler skips the step
    assert hold.pending
    with torch.no_grad():
        parameter[0] = 7  # the user writes the row, for example by loading weights
    parameter.grad = torch.ones(3, 2)
    hold.before_step(optimizer)
    optimizer.step()
    hold.after_step(optimizer)
    assert parameter[0].tolist() == [7, 7]
    assert not hold.pending


def test_with_a_gradient_scaler_that_skips_a_step() -> None:
    parameters = network()
    optimizer = OPTIMIZERS["adamw"](parameters)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    hold = RowHold(held_rows(parameters))
    optimizer.register_step_post_hook(lambda *_: hold.after_step(optimizer))
    start = [p.detach().clone() for p in parameters]
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(sum((p * p).sum() for p in parameters)).backward()
        if step == 1:
            parameters[-1].grad[0, 0, 0, 0] = float("inf")  # a free parameter, whose gradient the hold does not see
        scaler.unscale_(optimizer)
        hold.before_step(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert hold.pending == (step == 1)
    assert optimizer.state[parameters[0]]["step"] == 2
    for parameter, value, mask in zip(parameters, start, held_masks(parameters), strict=True):
        assert same_bits(parameter.detach()[mask], value[mask])
        assert not (parameter.detach()[~mask] == value[~mask]).any()


def test_a_step_that_was_not_announced_is_an_error() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS["sgd"]([parameter])
    hold = RowHold([HeldRows(parameter, index(0))])
    message = r"optimizer\.step\(\) ran without RowHold\.before_step\(optimizer\) before it"
    with pytest.raises(RuntimeError, match=message):
        hold.after_step(optimizer)
    hold.before_step(optimizer)
    hold.after_step(optimizer)
    with pytest.raises(RuntimeError, match=message):
        hold.after_step(optimizer)
    hold.before_step(optimizer)
    hold.discard()
    with pytest.raises(RuntimeError, match=message):
        hold.after_step(optimizer)


def test_nothing_to_hold_changes_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS["sgd"]([parameter])
    parameter.grad = torch.ones(3)
    for rows in ([], [HeldRows(parameter, index())]):
        hold = RowHold(rows)
        hold.before_step(optimizer)
        optimizer.step()
        hold.after_step(optimizer)
        assert (parameter.grad == 1).all()
    assert (parameter != 1).all()


@pytest.mark.parametrize("dims", [(-1,), (-2,), (1, -1), (0, -1), (-4,)])
def test_dims_counted_from_the_end(dims: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.ones(4, 3, 2, 5))
    parameter.grad = torch.ones_like(parameter)
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    for dim in dims:
        mask.index_fill_(dim, index(1), True)
    hold = RowHold([HeldRows(parameter, index(1), dim) for dim in dims])
    hold.before_step(OPTIMIZERS["sgd"]([parameter]))
    assert torch.equal(parameter.grad == 0, mask)


@pytest.mark.parametrize("dim", [1, -2])
def test_rows_along_a_dim_that_is_not_there_are_refused(dim: int) -> None:
    with pytest.raises(IndexError):
        RowHold([HeldRows(nn.Parameter(torch.ones(3)), index(0), dim)])


# --- buffers -----------------------------------------------------------------------------------------------------


def hold_step(hold: RowHold, optimizer: Optimizer, parameters: Sequence[nn.Parameter], step: int) -> None:
    give_gradients(parameters, step)
    hold.before_step(optimizer)
    optimizer.step()
    hold.after_step(optimizer)


@pytest.mark.parametrize("name", ["sgd", "adamw", "fused"])
def test_state_that_was_exchanged_between_steps_is_held(name: str) -> None:
    """``load_state_dict`` files new tensors under the parameters."""
    parameters = network()
    optimizer = OPTIMIZERS[name](parameters)
    hold = RowHold(held_rows(parameters))
    for step in range(2):
        hold_step(hold, optimizer, parameters, step)
    loaded = optimizer.state_dict()
    for state in loaded["state"].values():
        state.update({key: torch.full_like(v, 0.5) for key, v in state.items() if torch.is_tensor(v) and v.numel() > 1})
    optimizer.load_state_dict(loaded)
    for step in range(2, 4):
        hold_step(hold, optimizer, parameters, step)
    for parameter, mask in zip(parameters, held_masks(parameters), strict=True):
        for state in states(optimizer, parameter).values():
            assert (state[mask] == 0.5).all()
            assert not (state[~mask] == 0.5).any()


class WideMomentum(Optimizer):
    """Keeps a buffer in float64, whatever the parameter has, and files another tensor at every step."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["buffer"] = state.get("buffer", torch.zeros_like(p, dtype=torch.float64)) + p.grad.double() / 3
            p.sub_(state["buffer"].to(p.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_state_of_another_dtype_is_held_in_full_precision(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.rand(4, 3).to(dtype))
    optimizer = WideMomentum([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    hold = RowHold([HeldRows(parameter, index(1))])
    start, state = parameter.detach().clone(), optimizer.state[parameter]["buffer"].clone()
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        hold.before_step(optimizer)
        optimizer.step()
        hold.after_step(optimizer)
    assert torch.equal(parameter[1], start[1])
    assert torch.equal(optimizer.state[parameter]["buffer"][1], state[1])
    assert (optimizer.state[parameter]["buffer"][0] > 1).all()


def test_every_bit_pattern_is_held() -> None:
    """Signed zeros and NaN with a payload, which no arithmetic would bring back."""
    patterns = torch.tensor([[-(2**31), 0x7FC12345, -1, 1], [0, 0, 0, 0]], dtype=torch.int32)
    parameter = nn.Parameter(patterns.view(torch.float32).clone())
    optimizer = OPTIMIZERS["sgd"]([parameter])
    hold = RowHold([HeldRows(parameter, index(0))])
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        hold.before_step(optimizer)
        optimizer.step()
        hold.after_step(optimizer)
    assert torch.equal(parameter.detach().view(torch.int32)[0], patterns[0])
    assert (parameter[1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype: torch.dtype) -> None:
    parameter, twin = (nn.Parameter(torch.full((3, 2), 1 + 2j, dtype=dtype)) for _ in range(2))
    mine, other = OPTIMIZERS["sgd"]([parameter]), OPTIMIZERS["sgd"]([twin])
    hold = RowHold([HeldRows(parameter, index(2))])
    for _ in range(2):
        parameter.grad, twin.grad = torch.full_like(parameter, 2 - 1j), torch.full_like(twin, 2 - 1j)
        hold.before_step(mine)
        mine.step()
        hold.after_step(mine)
        other.step()
    assert (parameter[2] == 1 + 2j).all()
    assert torch.equal(parameter[:2], twin[:2])


def test_the_number_of_operations_depends_neither_on_parameters_nor_on_shapes() -> None:
    """But for the copies of single tensors, which a GPU makes in one kernel."""

    def operations(shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = OPTIMIZERS["sgd"](parameters)
        hold = RowHold([HeldRows(parameter, index(0)) for parameter in parameters])
        for _ in range(2):  # state is made in the first step
            give_gradients(parameters, 0)
            hold.before_step(optimizer)
            optimizer.step()
            hold.after_step(optimizer)

        def hooks() -> None:
            hold.before_step(optimizer)
            hold.after_step(optimizer)

        counts = profiled_operations(hooks)
        assert counts.pop("aten::copy_") == 8 * len(shapes)
        return dict(counts)

    few = operations([(3,)])
    assert few == operations([(3,), (3,), (4, 2), (4, 2, 3, 3), (8, 4, 1, 1)])
    assert 0 < sum(few.values()) <= 20


# --- optimizers whose state has no rows --------------------------------------------------------------------------


def unsupported(name: str, parameter: nn.Parameter) -> Optimizer:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    return getattr(torch.optim, name)([parameter])


@pytest.mark.parametrize(("name", "key"), [("LBFGS", "old_dirs"), ("Adafactor", "row_var")])
def test_state_without_rows_is_refused_by_optimizer_and_key(name: str, key: str) -> None:
    parameter = nn.Parameter(torch.rand(4, 3, 3, 3) + 1)
    optimizer = unsupported(name, parameter)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert key in optimizer.state[parameter]
    hold = RowHold([HeldRows(parameter, index(0))])
    message = rf"{name} keeps state '.*' that does not have the shape of its parameter \(4, 3, 3, 3\).*such as SGD"
    with pytest.raises(ValueError, match=message):
        hold.before_step(optimizer)
    assert not hold.pending
    for call in (lambda: row_state(optimizer, parameter), lambda: reset_rows(optimizer, parameter, index(0))):
        with pytest.raises(ValueError, match=message):
            call()


def test_state_without_rows_that_the_step_creates_is_refused_after_it() -> None:
    parameter = nn.Parameter(torch.rand(4, 3, 3, 3) + 1)
    optimizer = unsupported("Adafactor", parameter)
    hold = RowHold([HeldRows(parameter, index(0))])
    before = parameter.detach()[0].clone()
    parameter.grad = torch.ones_like(parameter)
    hold.before_step(optimizer)
    optimizer.step()
    with pytest.raises(ValueError, match="Adafactor keeps state 'row_var'"):
        hold.after_step(optimizer)
    assert torch.equal(parameter.detach()[0], before)


def test_lbfgs_is_refused_for_every_parameter_from_the_first_step() -> None:
    """It files its history under the first parameter only; the rows of the others are no less entangled."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first.grad, second.grad = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match="LBFGS keeps state 'old_dirs'"):
        RowHold([HeldRows(second, index(0))]).before_step(torch.optim.LBFGS([first, second]))


def test_another_parameters_unsupported_state_does_not_matter() -> None:
    conv, bias = nn.Parameter(torch.rand(4, 3, 3, 3)), nn.Parameter(torch.rand(4))
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    optimizer = torch.optim.Adafactor([conv, bias])
    hold = RowHold([HeldRows(bias, index(1))])  # vectors have element-wise state
    start = bias.detach().clone()
    for _ in range(2):
        conv.grad, bias.grad = torch.ones_like(conv), torch.ones_like(bias)
        hold.before_step(optimizer)
        optimizer.step()
        hold.after_step(optimizer)
    assert bias[1] == start[1]
    assert bias[0] != start[0]


# --- row_state and reset_rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_row_state_finds_every_moment_and_no_counter(name: str) -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = OPTIMIZERS[name]([parameter])
    parameter.grad = torch.ones(3, 2)
    optimizer.step()
    keys = {
        "sgd": {"momentum_buffer"},
        "amsgrad": {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
        "rmsprop": {"square_avg", "momentum_buffer", "grad_avg"},
        "adagrad": {"sum"},
    }
    found = row_state(optimizer, parameter)
    assert found.keys() == keys.get(name, {"exp_avg", "exp_avg_sq"})
    assert all(value is optimizer.state[parameter][key] for key, value in found.items())


def test_row_state_is_empty_before_the_first_step_and_leaves_it_so() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS["adamw"]([parameter])
    assert row_state(optimizer, parameter) == {}
    assert parameter not in optimizer.state  # optimizer.state is a defaultdict: looking must not create an entry


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_reset_rows_zeroes_these_rows_of_the_state_in_place(name: str, dim: int) -> None:
    parameters = network()
    optimizer = OPTIMIZERS[name](parameters)
    for step in range(2):
        give_gradients(parameters, step)
        optimizer.step()
    parameter = parameters[0]
    values, others = [p.detach().clone() for p in parameters], clone_states(optimizer, parameters)
    pointers = {key: state.data_ptr() for key, state in states(optimizer, parameter).items()}
    counts = {k: float(v) for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.numel() == 1}
    reset_rows(optimizer, parameter, index(0, 2), dim)
    mask = torch.zeros(parameter.shape, dtype=torch.bool).index_fill_(dim, index(0, 2), True)
    for key, state in states(optimizer, parameter).items():
        assert (others[0][key][mask] != 0).all()
        assert torch.equal(state, others[0][key].masked_fill(mask, 0))
        assert state.data_ptr() == pointers[key]
    assert all(torch.equal(p.detach(), value) for p, value in zip(parameters, values, strict=True))
    assert {k: float(optimizer.state[parameter][k]) for k in counts} == counts
    for other, before in zip(parameters[1:], others[1:], strict=True):
        assert all(torch.equal(state, before[key]) for key, state in states(optimizer, other).items())


def test_step_sizes_of_rprop_start_at_the_learning_rate() -> None:
    """At zero they would be clamped to the smallest step, and the row would hardly move again."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Rprop([parameter], lr=0.03)
    for _ in range(5):
        parameter.grad = torch.ones(2)
        optimizer.step()
    reset_rows(optimizer, parameter, index(1))
    state = optimizer.state[parameter]
    assert state["step_size"].tolist()[0] > 0.04
    assert state["step_size"].tolist()[1] == pytest.approx(0.03)
    assert state["prev"].tolist() == [1.0, 0.0]


def test_a_reset_late_in_training_overshoots_as_documented() -> None:
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1.0, eps=0.0)
    parameter.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    state = optimizer.state[parameter]
    for key, late in (("step", 1e6), ("exp_avg", 1.0), ("exp_avg_sq", 1.0)):  # after a million steps like the first
        state[key].fill_(late)
    reset_rows(optimizer, parameter, index(0))
    before = parameter.detach().clone()
    parameter.grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    assert (before - parameter.detach()).tolist() == pytest.approx([0.1 / 0.001**0.5, 1.0], rel=1e-3)
