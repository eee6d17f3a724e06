"""Parameters of several layouts, rows of them to hold, and every kind of optimizer that moves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_filterdiv.optimizer_state import HeldRows, RowHold

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


def hold_step(hold: RowHold, optimizer: Optimizer, parameters: Sequence[nn.Parameter], step: int) -> None:
    give_gradients(parameters, step)
    hold.before_step(optimizer)
    optimizer.step()
    hold.after_step(optimizer)
