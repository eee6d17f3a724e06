"""Held rows stay bit-still through any optimizer, the others move as if nothing was held."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_filterdiv.optimizer_state import HeldRows, RowHold
from tests.support.held_rows import (
    OPTIMIZERS,
    clone_states,
    give_gradients,
    held_masks,
    held_rows,
    index,
    network,
    same_bits,
    states,
)

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


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
