"""The ``WeightAsynchronousUpdate`` callback."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS

from lightning_filterdiv.async_update.functional import AsynchronousUpdate, Axis, Hold, Sampling
from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer, check_number
from lightning_filterdiv.training.callback import FilterCallback

__all__ = ["WeightAsynchronousUpdate"]


class WeightAsynchronousUpdate(FilterCallback):
    """Update only a random subset of each layer's filters at every optimizer step (WAU).

    Zhang et al., Computational Visual Media 6(4), 2020. The defaults follow the paper's abstract; ``axis="in",
    sampling="with_replacement"`` is the official code.

    Args:
        update_fraction: share of a layer's filters updated per step, in (0, 1].
        axis: ``"out"``: a subset consists of output channels with their bias; ``"in"``: of slices of input channels.
        sampling: ``"without_replacement"``: exactly ``max(1, round(fraction * J))`` filters;
            ``"with_replacement"``: ``max(1, floor(fraction * n))`` draws.
        hold: ``"update"``: filters outside the subset stay bit-identical through the step while the optimizer's state
            advances; ``"gradient"``: only their gradient is zeroed, momentum and weight decay still move them.
        rescale: divide the update of the subset by the share of filters that move. This control separates the effect on
            diversity from that of a smaller learning rate.
        include: patterns of layers; ``None`` for every ``Conv1d/2d/3d``.
        exclude: patterns of layers to leave out.
        seed: the subsets are a function of the seed and the step number, the same on all ranks.
        check_ranks_every_n_steps: see :class:`~lightning_filterdiv.training.callback.FilterCallback`.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    gradient_stage = 30
    waits_for_layers = True

    def __init__(
        self,
        *,
        update_fraction: float = 0.5,
        axis: Axis = "out",
        sampling: Sampling = "without_replacement",
        hold: Hold = "update",
        rescale: bool = False,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        check_ranks_every_n_steps: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude, check_ranks_every_n_steps=check_ranks_every_n_steps)
        self.update_fraction = check_number("update_fraction", update_fraction, above=0.0, high=1.0)
        self.axis = check_choice("axis", axis, Axis)
        self.sampling = check_choice("sampling", sampling, Sampling)
        self.hold = check_choice("hold", hold, Hold)
        self.rescale = check_flag("rescale", rescale)
        self.seed = check_integer("seed", seed, low=0)
        self._updates: dict[int, AsynchronousUpdate] = {}
        self._taken: list[int] = []  # steps of each optimizer

    def fraction_at(self, epoch: int, step: int) -> float:
        """Return the share of filters to update at this step. Override it for a schedule.

        Args:
            epoch: the current epoch, from 0.
            step: steps this optimizer has taken so far.

        Returns:
            A number in (0, 1].
        """
        return self.update_fraction

    def last_subsets(self) -> dict[str, Tensor]:
        """Return the filters updated in the last step: layer name -> ``(J,)`` bool on the CPU."""
        return {name: mask for update in self._updates.values() for name, mask in update.last_subsets.items()}

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build one :class:`AsynchronousUpdate` per optimizer that owns chosen layers."""
        count = len(trainer.optimizers)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):
                raise MisconfigurationException(
                    "WeightAsynchronousUpdate needs one update per step and LBFGS searches along a line within a step; "
                    "use SGD, Adam or another optimizer with one evaluation per step"
                )
        if self._taken and len(self._taken) != count:
            raise ValueError(
                f"the state of WeightAsynchronousUpdate was saved with {len(self._taken)} optimizers, "
                f"this run has {count}: resume with as many, or remove checkpoint['callbacks'][{self.state_key!r}] to "
                f"count steps from 0 again"
            )
        self._taken = self._taken or [0] * count
        for index, optimizer in enumerate(trainer.optimizers):
            if not (layers := self.layers_of(index)):
                continue
            self._updates[index] = AsynchronousUpdate(
                layers,
                optimizer,
                update_fraction=self.update_fraction,
                axis=self.axis,
                sampling=self.sampling,
                hold=self.hold,
                rescale=self.rescale,
                seed=self.seed,
                stream=f"{self.state_key}/{index}",
            )
            self.follow_steps(index)
        if self.update_fraction < 1 and all(update.holds_nothing() for update in self._updates.values()):
            rank_zero_warn(
                f"WeightAsynchronousUpdate holds nothing still: update_fraction={self.update_fraction:g} comes to all "
                f"filters of {', '.join(map(repr, list(self.layers)[:6]))} (at least one is always updated). Use a "
                f"smaller update_fraction, or include wider layers"
            )

    def before_step(self, index: int) -> None:
        """Draw the subsets of this step, and remember or mask the other filters."""
        step = self._taken[index]
        self._updates[index].before_step(step, self.fraction_at(self.trainer.current_epoch, step))

    def repeated_step(self, index: int) -> None:
        """Refuse an optimizer that evaluates a step again after it has moved the weights.

        Raises:
            MisconfigurationException: always.
        """
        raise MisconfigurationException(
            f"{type(self.trainer.optimizers[index]).__name__} evaluates its closure more than once per step, so that "
            f"WeightAsynchronousUpdate cannot tell where the step began and nothing would be held still; use an "
            f"optimizer with one evaluation per step"
        )

    def after_step(self, index: int) -> None:
        """Restore the filters outside the subset. A step that a gradient scaler skips draws its subset again."""
        self._updates[index].after_step()
        self._taken[index] += 1

    def release(self) -> None:
        """Give the weights storages of their own again."""
        for update in self._updates.values():
            update.release()
        self._updates = {}

    def reset(self) -> None:
        """Start counting steps from 0."""
        self._taken = []

    def extra_state(self) -> dict[str, Any]:
        """Steps taken per optimizer, the keys of the draws."""
        return {"steps": list(self._taken)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the step counts."""
        steps = state["steps"]
        if not isinstance(steps, list) or not all(isinstance(step, int) and step >= 0 for step in steps):
            raise TypeError(f"steps must be a list of counts, got {steps!r}")
        self._taken = list(steps)
