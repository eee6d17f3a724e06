"""Forecast the learning rates of a fit without changing its schedule."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.optim import Optimizer

if TYPE_CHECKING:  # the forecasts of methods use StepSettings without Lightning
    import lightning.pytorch as pl

__all__ = ["StepSettings", "fit_epochs", "forecast_learning_rates", "forecast_settings", "steps_per_epoch"]


class StepSettings(NamedTuple):
    """Settings of a parameter group at one optimizer step, named as in the optimizer."""

    lr: float
    weight_decay: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    decoupled_weight_decay: bool = False

    @classmethod
    def of(cls, group: dict[str, Any]) -> StepSettings:
        """Return the settings of an optimizer's parameter group. Missing options count as zero."""
        return cls(
            float(group["lr"]),
            float(group.get("weight_decay", 0.0)),
            float(group.get("momentum", 0.0)),
            float(group.get("dampening", 0.0)),
            bool(group.get("nesterov", False)),
            bool(group.get("decoupled_weight_decay", False)),
        )


def steps_per_epoch(trainer: pl.Trainer) -> int | None:
    """Number of optimizer steps in an epoch, the last one possibly on fewer batches; ``None`` if unknown."""
    batches = trainer.num_training_batches
    return None if batches == float("inf") else max(1, math.ceil(batches / trainer.accumulate_grad_batches))


def fit_epochs(trainer: pl.Trainer) -> int | None:
    """Return the number of epochs that the fit will have begun when it ends; ``None`` if unknown."""
    limits: list[int] = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs)
    per_epoch = steps_per_epoch(trainer)
    if trainer.max_steps >= 0 and per_epoch is not None and trainer.lightning_module.automatic_optimization:
        limits.append(math.ceil(trainer.max_steps / per_epoch))
    return min(limits, default=None)


def forecast_learning_rates(trainer: pl.Trainer, epochs: int) -> list[float] | str:
    """Learning rate of the first optimizer's first parameter group in each of ``epochs`` epochs from epoch 0.

    Within an epoch the mean is taken.

    Returns:
        ``epochs`` numbers, or a string with the reason why no forecast can be made.
    """
    if trainer.lightning_module.automatic_optimization and (trainer.current_epoch > 0 or trainer.global_step > 0):
        return "the fit is already under way"
    simulation = _Simulation.of(trainer, 0) if trainer.optimizers else "there is no optimizer"
    if isinstance(simulation, str):
        return simulation
    # The number of steps is needed only if the schedule changes inside an epoch.
    per_epoch = (steps_per_epoch(trainer) if simulation.interval == "step" else 1) or 1
    steps = simulation.steps(0, 0, per_epoch)
    return [fmean(next(steps)[0].lr for _ in range(per_epoch)) for _ in range(epochs)]


def forecast_settings(trainer: pl.Trainer, index: int = 0) -> list[list[StepSettings]] | str:
    """Settings of every parameter group of one optimizer at every step from now to the end of the fit.

    Args:
        trainer: in a fit, before the step that comes first.
        index: which of ``trainer.optimizers``.

    Returns:
        One list per step with one entry per group, or a string with the reason why no forecast can be made.
    """
    simulation = _Simulation.of(trainer, index)
    if isinstance(simulation, str):
        return simulation
    per_epoch = steps_per_epoch(trainer)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    if any(type(c).__name__ == "GradientAccumulationScheduler" and len(c.scheduling) > 1 for c in callbacks):
        return "the number of accumulated batches changes during the fit"
    by_epochs = trainer.max_epochs is not None and trainer.max_epochs >= 0
    if not by_epochs and trainer.max_steps < 0:
        return "the length of the fit is unknown (neither max_epochs nor max_steps)"
    if per_epoch is None and (simulation.interval or trainer.max_steps < 0):
        return "the number of steps per epoch is unknown"
    done = _steps_done_in_epoch(trainer)
    limits: list[int] = [trainer.max_steps - trainer.global_step] if trainer.max_steps >= 0 else []
    if by_epochs and per_epoch is not None:
        assert trainer.max_epochs is not None
        limits.append((trainer.max_epochs - trainer.current_epoch) * per_epoch - done)
    left = max(0, min(limits))
    steps = simulation.steps(trainer.current_epoch, done, per_epoch or done + left + 1)
    return [next(steps) for _ in range(left)]


def _steps_done_in_epoch(trainer: pl.Trainer) -> int:
    """Return the number of optimizer steps done in the present epoch. It does not follow from ``global_step``, because
    a resume may have batches of another size."""
    loop: Any = trainer.fit_loop
    batch, epoch = loop.epoch_loop.batch_progress.current, loop.epoch_progress.current
    # Before the first batch of a resume the counts may be those of an epoch that is complete.
    under_way = batch.ready > batch.processed or epoch.ready > epoch.completed
    batches = batch.processed if under_way else 0
    total, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    return math.ceil(total / accumulate) if batches >= total else batches // accumulate


class _Simulation:
    """A copy of an optimizer's schedule that shares the parameters and has no optimizer state."""

    def __init__(self, trainer: pl.Trainer, optimizer: Optimizer, scheduler: Any, config: Any) -> None:
        self._trainer, self._optimizer, self._scheduler = trainer, optimizer, scheduler
        self._frequency = 1 if config is None else int(config.frequency)
        #: "step", "epoch", or "" without a schedule.
        self.interval: str = "" if config is None else str(config.interval)

    @classmethod
    def of(cls, trainer: pl.Trainer, index: int) -> _Simulation | str:
        """Return the simulation, or the reason why there is none."""
        module = trainer.lightning_module
        if not module.automatic_optimization:
            return "manual optimization steps its schedulers itself"
        if type(module).lr_scheduler_step is not _plain_scheduler_step(module):
            return "lr_scheduler_step is overridden"
        optimizer = trainer.optimizers[index]
        configs = [config for config in trainer.lr_scheduler_configs if config.scheduler.optimizer is optimizer]
        if not configs:
            return cls(trainer, optimizer, None, None)
        if len(configs) > 1:
            return "the optimizer has several schedulers"
        config = configs[0]
        if config.reduce_on_plateau:
            return "the schedule depends on a metric"
        if config.interval == "step" and trainer.num_training_batches == float("inf"):
            return "the number of steps per epoch is unknown"
        # A plain deepcopy would duplicate the parameters and the momentum.
        memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        memo[id(optimizer.state)] = type(optimizer.state)(dict)
        memo |= {id(child): child for child in (module, trainer)}
        try:
            scheduler = copy.deepcopy(config.scheduler, memo)
        except Exception as error:  # objects that a user's scheduler keeps
            return f"the scheduler cannot be copied ({type(error).__name__})"
        return cls(trainer, scheduler.optimizer, scheduler, config)

    def steps(self, epoch: int, step: int, per_epoch: int) -> Iterator[list[StepSettings]]:
        """Yield the settings of all groups, step after step without end, from step ``step`` of ``epoch``, the present
        position of the schedule."""
        batches, accumulate = self._trainer.num_training_batches, self._trainer.accumulate_grad_batches
        if step >= per_epoch:  # the last batch of an epoch has stepped its schedule
            epoch, step = epoch + 1, 0
        while True:
            yield [StepSettings.of(group) for group in self._optimizer.param_groups]
            step += 1
            # Lightning counts batches, not steps, against the frequency.
            if self.interval == "step" and min(step * accumulate, batches) % self._frequency == 0:
                self._advance()
            if step == per_epoch:
                epoch, step = epoch + 1, 0
                if self.interval == "epoch" and epoch % self._frequency == 0:
                    self._advance()

    def _advance(self) -> None:
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # else torch warns of a wrong order
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the copy's optimizer is not the one torch has wrapped
            self._scheduler.step()


def _plain_scheduler_step(module: pl.LightningModule) -> Any:
    """``LightningModule.lr_scheduler_step`` of whichever namespace the module comes from."""
    for base in type(module).__mro__:
        if base.__name__ == "LightningModule":
            return vars(base)["lr_scheduler_step"]
    return None
