"""Data, schedules and witnesses of these tests."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_filterdiv.training.learning_rates import StepSettings, forecast_settings
from tests.support.training import Classifier

IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(2))


class Scheduled(Classifier):
    """Two parameter groups and a schedule by name."""

    def __init__(self, schedule: str = "one_cycle", net: nn.Module | None = None) -> None:
        super().__init__(net=net)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        vectors = [p for p in self.parameters() if p.dim() == 1]
        kernels = [p for p in self.parameters() if p.dim() > 1]
        groups = [{"params": kernels, "weight_decay": 1e-2}, {"params": vectors, "weight_decay": 0.0, "lr": 0.1}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
        lr = torch.optim.lr_scheduler
        total = int(self.trainer.estimated_stepping_batches)
        config: dict[str, Any] = {
            "one_cycle": lambda: {"scheduler": lr.OneCycleLR(optimizer, 0.1, total), "interval": "step"},
            "every_other_batch": lambda: {
                "scheduler": lr.ExponentialLR(optimizer, 0.9),
                "interval": "step",
                "frequency": 2,
            },
            "epochs": lambda: {"scheduler": lr.MultiStepLR(optimizer, [1, 2], gamma=0.2), "interval": "epoch"},
            "every_other_epoch": lambda: {
                "scheduler": lr.ExponentialLR(optimizer, 0.3),
                "interval": "epoch",
                "frequency": 2,
            },
        }
        return {"optimizer": optimizer, "lr_scheduler": config[self.schedule]()}


class Recorder(Callback):
    """Settings of all groups at every step, and what was forecast at the first one."""

    def __init__(self) -> None:
        self.seen: list[list[StepSettings]] = []
        self.forecast: Any = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.forecast is None:
            self.forecast = forecast_settings(trainer)
        self.seen.append([StepSettings.of(group) for group in optimizer.param_groups])
