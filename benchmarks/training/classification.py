"""The LightningModules of the benchmarks: a network, cross-entropy, SGD with step decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.models import build_network
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.shared_basis import share_anchored_filters, share_filter_bases

__all__ = ["Classification", "Classifier"]


class Classifier(pl.LightningModule):
    """Cross-entropy and SGD with step decay around ``net``; logs ``train_loss``.

    Args:
        net: ``(B, C, H, W)`` images to ``(B, classes)`` logits.
        image_shape: channels, height and width.
        lr: learning rate of SGD at the start.
        momentum: momentum of SGD.
        nesterov: use Nesterov momentum.
        weight_decay: weight decay of all parameters.
        milestones: epochs at which the learning rate is multiplied by ``gamma``.
        gamma: see ``milestones``.
        convolution_lr: learning rate of convolutions relative to ``lr``.
    """

    def __init__(
        self,
        net: nn.Module,
        image_shape: Sequence[int],
        *,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        convolution_lr: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])  # those of a subclass too
        self.net = net
        self.example_input_array = torch.zeros(2, *image_shape)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` images to ``(B, classes)`` logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def sgd(self) -> torch.optim.SGD:
        """Return the optimizer; convolutions are a parameter group of their own where ``convolution_lr`` is not 1."""
        hp = self.hparams
        groups: list[dict[str, Any]] = [{"params": list(self.parameters())}]
        if hp["convolution_lr"] != 1:
            convolutions = {id(p) for conv in select_filters(self).values() for p in conv.parameters()}
            groups = [
                {"params": [p for p in self.parameters() if id(p) not in convolutions]},
                {
                    "params": [p for p in self.parameters() if id(p) in convolutions],
                    "lr": hp["convolution_lr"] * hp["lr"],
                },
            ]
        return torch.optim.SGD(
            groups, lr=hp["lr"], momentum=hp["momentum"], nesterov=hp["nesterov"], weight_decay=hp["weight_decay"]
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with step decay."""
        optimizer, hp = self.sgd(), self.hparams
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, hp["milestones"] or [], gamma=hp["gamma"])
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Classification(Classifier):
    """The :class:`Classifier` of ``benchmarks.training.train``: a network by name; logs ``val_acc`` and ``test_acc``.

    Args:
        network: by name, fitted to the images; or ``module.function`` of your own, called with channels, size of the
            (square) images and classes.
        options: further arguments of that network, such as ``{"width": 12}``.
        lr: learning rate of SGD at the start.
        momentum: momentum of SGD.
        nesterov: use Nesterov momentum.
        weight_decay: weight decay of all parameters.
        milestones: epochs at which the learning rate is multiplied by ``gamma``.
        gamma: see ``milestones``.
        convolution_lr: learning rate of convolutions relative to ``lr``; a control for methods that move filters less.
        weights: checkpoint of a finished run of the same network to start from (``checkpoints/last.ckpt``).
        shared_filter_bases: arguments of ``share_filter_bases`` to apply to the network.
        anchored_filters: arguments of ``share_anchored_filters`` to apply to the network.
        channels_last: memory format; the same numbers up to rounding.
        image_shape: channels, height and width; comes from the data.
        classes: comes from the data.
    """

    def __init__(
        self,
        network: str = "c3",
        options: dict[str, Any] | None = None,
        lr: float = 0.02,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        convolution_lr: float = 1.0,
        weights: str | None = None,
        shared_filter_bases: dict[str, Any] | None = None,
        anchored_filters: dict[str, Any] | None = None,
        channels_last: bool = False,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        classes: int = 10,
    ) -> None:
        net = build_network(network, image_shape, classes, **(options or {}))
        if shared_filter_bases is not None:
            share_filter_bases(net, **shared_filter_bases)
        if anchored_filters is not None:
            share_anchored_filters(net, **anchored_filters)
        if weights is not None:
            _start_from(net, weights)
        if channels_last:
            net.to(memory_format=torch.channels_last)
        super().__init__(
            net, image_shape, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
            milestones=milestones, gamma=gamma, convolution_lr=convolution_lr,
        )  # fmt: skip
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro")

    def _evaluate(self, batch: Sequence[Tensor], name: str) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log(name, self.accuracy, prog_bar=True, on_epoch=True)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log ``val_acc``."""
        self._evaluate(batch, "val_acc")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Log ``test_acc``."""
        self._evaluate(batch, "test_acc")


def _start_from(net: nn.Module, path: str) -> None:
    """Load the network of another run.

    Raises:
        ValueError: it is of another network.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    try:
        net.load_state_dict({key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")})
    except RuntimeError as error:
        raise ValueError(f"--model.weights {path} is not of this network: {error}") from error
