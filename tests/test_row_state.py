"""Rows of optimizer state: found, refused by name where they cannot be told apart, and reset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_filterdiv.optimizer_state import HeldRows, RowHold, reset_rows, row_state
from tests.support.held_rows import (
    OPTIMIZERS,
    clone_states,
    give_gradients,
    index,
    network,
    states,
)

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
