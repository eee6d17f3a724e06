"""The fit of all experiments (FM5k's images, one CPU, no logging), and the accuracy of a network."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from benchmarks.training.data import FashionMNIST

__all__ = ["accuracy", "fit", "fm5k", "predictions"]


def fm5k(seed: int, transform: nn.Module | None = None) -> FashionMNIST:
    """5,000 training images of Fashion-MNIST (a permutation drawn from ``seed``) in batches of 64, all test images."""
    return FashionMNIST(batch_size=64, train_images=5_000, seed=seed, transform=transform)


def fit(model: pl.LightningModule, data: FashionMNIST, epochs: int, callbacks: Sequence[Callback] = ()) -> None:
    """Train ``model`` in place."""
    model.train()  # a network that was judged before is in eval mode, and Lightning leaves modes as they are
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, callbacks=list(callbacks), limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)


@torch.no_grad()
def predictions(net: nn.Module, images: Tensor) -> Tensor:
    """``(N,)`` predicted classes in eval mode."""
    net.eval()
    return torch.cat([net(part).argmax(1) for part in images.split(500)])


def accuracy(net: nn.Module, data: FashionMNIST) -> float:
    """Share of right predictions on all test images."""
    _, _, images, labels = data.parts
    return float((predictions(net, images) == labels).double().mean())
