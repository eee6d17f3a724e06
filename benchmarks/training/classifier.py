"""The LightningModule of the benchmarks that train a bare network."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Classifier"]


class Classifier(pl.LightningModule):
    """Cross-entropy and SGD with Nesterov momentum 0.9 around ``net``, weight decay 5e-4.

    Args:
        net: the network.
        epochs: of the fit; the learning rate is divided by ten after 60 % and 87 % of them.
        learning_rate: at the start.
        example: images to trace with.
    """

    def __init__(self, net: nn.Module, epochs: int, learning_rate: float, example: Tensor | None = None) -> None:
        super().__init__()
        self.net, self.epochs, self.learning_rate = net, epochs, learning_rate
        self.example_input_array = example

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 1, H, W)`` images to ``(B, 10)`` logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with step decay."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        milestones = [round(0.6 * self.epochs), round(0.87 * self.epochs)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": schedule}
