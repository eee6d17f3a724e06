"""The buffers of ``RowHold``: state that is exchanged, other dtypes, every bit pattern, cost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.cost.fake_device import profiled_operations
from lightning_filterdiv.optimizer_state import HeldRows, RowHold
from lightning_filterdiv.tensors.flat_buffer import FlatBuffer
from tests.support.held_rows import (
    OPTIMIZERS,
    give_gradients,
    held_masks,
    held_rows,
    hold_step,
    index,
    network,
    states,
)


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


def test_the_number_of_operations_depends_neither_on_parameters_nor_on_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the copies of single tensors, which a GPU makes in one kernel."""
    monkeypatch.setattr(FlatBuffer, "cpu_shortcuts", False)

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
