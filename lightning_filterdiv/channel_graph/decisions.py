"""Decisions of forward on values: recorded in one run and reused in another.

In a sort, an ``argmax``, a threshold or non-maximum suppression, the last bit of a floating number may change a choice.
Two networks that agree up to rounding may then return different boxes, or different numbers of boxes. For a comparison,
the second network takes over the decisions of the first, and the numbers behind each decision are compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .record import is_shape_only, macs_of

__all__ = ["Decision", "FollowDecisions", "RecordDecisions", "relative_difference"]


class Decision(NamedTuple):
    """One operator that turned floating numbers into whole numbers, truth values or a Python number."""

    operator: str
    numbers: list[Tensor]
    result: Any


def _numbers(args: Any, kwargs: Any) -> list[Tensor]:
    return [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]


def _decides(result: Any) -> bool:
    if isinstance(result, Tensor):
        return not result.is_floating_point()
    if isinstance(result, (list, tuple)):
        return any(map(_decides, result))
    return isinstance(result, (bool, int, float))


def relative_difference(expected: Tensor, obtained: Tensor) -> float:
    """Largest difference of two tensors of one shape, relative to the largest finite entry of the first.

    NaN and infinities in the same places of both are equal.
    """
    a, b = expected.double(), obtained.double()
    alike = (a == b) | (a.isnan() & b.isnan())
    if bool(alike.all()):
        return 0.0
    finite = a[a.isfinite()]
    scale = finite.abs().max() if finite.numel() else a.new_ones(())
    apart = (a - b).abs().masked_fill(alike, 0.0) / scale.clamp_min(torch.finfo(torch.float64).tiny)
    return float(apart.nan_to_num(nan=float("inf")).max())


# Torch's fused attention, whose products no mode sees.
_FUSED = frozenset(
    {torch.ops.aten._transformer_encoder_layer_fwd.default, torch.ops.aten._native_multi_head_attention.default}
)


class _Watch(TorchDispatchMode):
    """Counts the multiply-accumulate operations of a forward pass, as torch does.

    Attributes:
        macs: their number so far; None after a fused operator that hides its own.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: int | None = 0

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if func in _FUSED:
            self.macs = None
        elif self.macs is not None:
            self.macs += macs_of(func, args, kwargs, result)
        return result


class RecordDecisions(_Watch):
    """Records the decisions of a forward pass, and the narrowest floating type that it casts a wider one to."""

    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []
        self.narrowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._call(func, args, kwargs or {})
        if is_shape_only(func):
            return result
        if isinstance(result, Tensor) and result.is_floating_point():
            if result.dtype == self.narrowest:
                return result
            precision = torch.finfo(result.dtype).eps
            if precision > torch.finfo(self.narrowest).eps and any(
                torch.finfo(t.dtype).eps < precision for t in _numbers(args, kwargs)
            ):
                self.narrowest = result.dtype
        elif _decides(result) and (read := _numbers(args, kwargs)):
            self.decisions.append(Decision(str(func), [t.clone() for t in read], result))
        return result


class FollowDecisions(_Watch):
    """Reuse recorded decisions in order, as long as the same operators decide on tensors of the same shapes.

    Attributes:
        difference: largest relative difference of the numbers behind decisions.
        taken: the reused decisions, with the numbers behind them in this run.
    """

    def __init__(self, decisions: list[Decision]) -> None:
        super().__init__()
        self.difference = 0.0
        self.taken: list[Decision] = []
        self._left = iter(decisions)
        self._follows = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._call(func, args, kwargs or {})
        if isinstance(result, Tensor) and result.is_floating_point():
            return result
        if is_shape_only(func) or not self._follows or not _decides(result) or not (read := _numbers(args, kwargs)):
            return result
        decision = next(self._left, None)
        if decision is None or decision.operator != str(func):
            self._follows = False  # another path through forward: outputs are compared as they are
            return result
        if [t.shape for t in decision.numbers] != [t.shape for t in read]:
            return result  # channels that were narrowed
        for expected, obtained in zip(decision.numbers, read, strict=True):
            self.difference = max(self.difference, relative_difference(expected, obtained))
        self.taken.append(Decision(decision.operator, [t.clone() for t in read], decision.result))
        return decision.result
