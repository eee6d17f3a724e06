"""Follow an optimizer step: announced by Lightning, begun, evaluated, then taken or skipped.

Lightning calls ``on_before_optimizer_step`` when the gradients of a step are final. Only the optimizer knows if the
step is then taken. A gradient scaler skips it after an overflow. An optimizer such as SAM evaluates its closure several
times in one step. User code may break a step off. :class:`StepProtocol` distinguishes these cases for one optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepProtocol", "gradient_scale", "optimizer_index"]


def optimizer_index(trainer: pl.Trainer, optimizer: Any) -> int:
    """Return the position in ``trainer.optimizers`` of an optimizer or of Lightning's wrapper around it.

    Raises:
        RuntimeError: it is none of them. (A ``StopIteration`` would look like the end of the data to Lightning.)
    """
    # Compare the optimizer itself first. One that wraps another (Lookahead) has an attribute of the same name as
    # Lightning's.
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        for index, known in enumerate(trainer.optimizers):
            if known is candidate:
                return index
    raise RuntimeError(
        f"a step of {type(optimizer).__name__} was announced, which is none of the optimizers of configure_optimizers; "
        f"step those, or Lightning's wrappers of them from self.optimizers()"
    )


def gradient_scale(trainer: pl.Trainer, optimizer: Optimizer) -> Tensor | None:
    """Return the factor by which gradients are still multiplied. Fused optimizers divide by the loss scale inside their
    step.

    Returns:
        A scalar on the device of the optimizer's parameters, ``None`` where gradients are unscaled already.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=optimizer.param_groups[0]["params"][0].device))
    return scale


class StepProtocol:
    """Follows the steps of one optimizer, and reports each that was really taken.

    A torch step post-hook is the only place that a skipped fp16 step does not reach. It also fires for the inner steps
    of an optimizer whose ``step`` calls ``super().step``; those do not count.

    Args:
        optimizer: the one to follow; two hooks are registered on it until :meth:`release`.
        taken: called after every step that was announced and taken.
        owner: name of the callback, for errors.
    """

    def __init__(self, optimizer: Optimizer, taken: Callable[[], None], owner: str) -> None:
        self.optimizer = optimizer
        self._taken, self._owner = taken, owner
        self._depth = 0  # of nested step() calls
        self._begun = 0
        self._announced_at: int | None = None
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
        ]

    def announce(self) -> bool:
        """Note that Lightning announced a step.

        Returns:
            True if the optimizer evaluates this step a second time.
        """
        # In fp32 the closure runs inside the step and may run twice. With a scaler it runs before the step.
        again = self._depth > 0 and self._announced_at == self._begun
        self._announced_at = self._begun
        return again

    def forget_broken_off(self) -> None:
        """Forget a step that user code broke off and caught. Called between batches, when no step is in progress."""
        self._depth = 0

    def release(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, *_: Any) -> None:
        self._begun += not self._depth
        self._depth += 1

    def _end(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        if self._announced_at is None:
            raise RuntimeError(
                f"an optimizer step reached {self._owner} without on_before_optimizer_step: in manual optimization "
                f"call step() on self.optimizers(), not on self.optimizers(use_pl_optimizer=False)"
            )
        self._announced_at = None
        self._taken()
