"""What the learning-rate schedule of a fit is going to do, without touching it."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl

__all__ = ["forecast_learning_rates"]


def forecast_learning_rates(trainer: pl.Trainer, epochs: int) -> list[float] | str:
    """Learning rate of the first optimizer's first parameter group in each of ``epochs`` epochs from epoch 0.

    The scheduler is simulated on a copy that shares the parameters (a plain deepcopy would duplicate them and the
    momentum) and has no optimizer state; interval and frequency are honoured. Within an epoch the mean is taken.

    Returns:
        ``epochs`` numbers, or a string with the reason why no forecast can be made.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return "manual optimization steps its schedulers itself"
    if trainer.current_epoch > 0 or trainer.global_step > 0:
        return "the fit is already under way"
    if not trainer.optimizers:
        return "there is no optimizer"
    if type(module).lr_scheduler_step is not _plain_scheduler_step(module):
        return "lr_scheduler_step is overridden"
    optimizer = trainer.optimizers[0]
    rate = float(optimizer.param_groups[0]["lr"])
    configs = [config for config in trainer.lr_scheduler_configs if config.scheduler.optimizer is optimizer]
    if not configs:
        return [rate] * epochs
    if len(configs) > 1:
        return "the optimizer has several schedulers"
    config = configs[0]
    if config.reduce_on_plateau:
        return "the schedule depends on a metric"
    steps = trainer.num_training_batches
    if config.interval == "step" and steps == float("inf"):
        return "the number of steps per epoch is unknown"
    memo: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    memo[id(optimizer.state)] = type(optimizer.state)(dict)
    memo |= {id(child): child for child in (module, trainer)}
    try:
        scheduler = copy.deepcopy(config.scheduler, memo)
    except Exception as error:  # whatever a user's scheduler holds on to
        return f"the scheduler cannot be copied ({type(error).__name__})"
    shadow = scheduler.optimizer
    rates: list[float] = []
    per_epoch = max(1, -(-int(steps) // trainer.accumulate_grad_batches)) if config.interval == "step" else 1
    done = 0
    for epoch in range(epochs):
        total = 0.0
        for _ in range(per_epoch):
            total += float(shadow.param_groups[0]["lr"])
            done += 1
            if config.interval == "step" and done % config.frequency == 0:
                _advance(scheduler, shadow)
        rates.append(total / per_epoch)
        if config.interval == "epoch" and (epoch + 1) % config.frequency == 0:
            _advance(scheduler, shadow)
    return rates


def _plain_scheduler_step(module: pl.LightningModule) -> Any:
    """``LightningModule.lr_scheduler_step`` of whichever namespace the module comes from."""
    for base in type(module).__mro__:
        if base.__name__ == "LightningModule":
            return vars(base)["lr_scheduler_step"]
    return None


def _advance(scheduler: Any, optimizer: Any) -> None:
    optimizer._opt_called = True  # else torch warns that the scheduler ran before the optimizer
    scheduler.step()
