"""The small classifier of the demo: RePr's "vanilla" network of three convolutions, configurable in YAML."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_filterdiv.tensors.arguments import check_integer

__all__ = ["SmallConvNet", "three_convolutions"]


def three_convolutions(width: int = 32, image_size: int = 28, classes: int = 10) -> nn.Sequential:
    """Return C3(width): three 3x3 convolutions of ``width`` filters with ReLU, max-pooling by 2 after the first two.

    Args:
        width: filters per layer.
        image_size: height and width of the grey input, at least 4.
        classes: outputs of the linear classifier.

    Returns:
        Network from ``(B, 1, image_size, image_size)`` to ``(B, classes)``. The convolutions are named ``conv1`` to
        ``conv3``.
    """
    check_integer("width", width, low=1)
    check_integer("image_size", image_size, low=4)
    final = image_size // 2 // 2
    net = nn.Sequential()
    for index, inputs in enumerate((1, width, width), start=1):
        net.add_module(f"conv{index}", nn.Conv2d(inputs, width, 3, padding=1))
        net.add_module(f"relu{index}", nn.ReLU())
        if index < 3:
            net.add_module(f"pool{index}", nn.MaxPool2d(2))
    net.add_module("flatten", nn.Flatten())
    net.add_module("classifier", nn.Linear(width * final * final, classes))
    return net


class SmallConvNet(pl.LightningModule):
    """C3(width) trained with SGD (momentum 0.9) and cross-entropy; logs ``train_loss``, ``val_acc`` and ``test_acc``.

    Args:
        width: filters per convolution.
        image_size: height and width of the images.
        lr: learning rate.
        weight_decay: weight decay of all parameters.
        milestones: epochs at which the learning rate is divided by ten.
    """

    def __init__(
        self,
        width: int = 32,
        image_size: int = 8,
        lr: float = 0.05,
        weight_decay: float = 1e-4,
        milestones: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = three_convolutions(width, image_size)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")
        self.example_input_array = torch.zeros(1, 1, image_size, image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(B, 1, H, W)`` images to ``(B, 10)`` logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def _evaluate(self, batch: tuple[Tensor, Tensor], name: str) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log(name, self.accuracy, prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val_acc``."""
        self._evaluate(batch, "val_acc")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test_acc``."""
        self._evaluate(batch, "test_acc")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return SGD with momentum 0.9 and step decay."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams["lr"], momentum=0.9, weight_decay=self.hparams["weight_decay"]
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.hparams["milestones"] or [], gamma=0.1)
        return {"optimizer": optimizer, "lr_scheduler": schedule}
