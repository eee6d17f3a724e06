"""A small real training run for all suites: deterministic, restartable, well under a second."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.loader import SeededBatches

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-2, fused=True),
}
STEPS_PER_EPOCH = 6
#: Where the suites train: ``FILTERDIV_ACCELERATOR=gpu pytest tests/suites`` runs them on a GPU.
ACCELERATOR = os.environ.get("FILTERDIV_ACCELERATOR", "cpu")
DEVICE = "cuda" if ACCELERATOR == "gpu" else "cpu"
#: For a trainer's methods that read a checkpoint. Lightning 2.5 has no such argument: what it loads is checked by the
#: suites' own ``torch.load``.
SAFELY: dict[str, Any] = {"weights_only": True} if "weights_only" in signature(pl.Trainer.fit).parameters else {}


def small_net() -> nn.Sequential:
    """Convolutions with and without bias and norm, two of equal shape, a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def batches(batch_size: int = 16, rank: int = 0, world_size: int = 1, steps: int = STEPS_PER_EPOCH) -> SeededBatches:
    """Learnable images: each of four classes has its own pattern, with noise."""
    generator = torch.Generator().manual_seed(11)
    labels = torch.arange(steps * 16 * world_size) % 4
    patterns = torch.randn(4, 1, 8, 8, generator=generator)
    images = patterns[labels] + 0.3 * torch.randn(len(labels), 1, 8, 8, generator=generator)
    return SeededBatches((images, labels), batch_size, seed=3, rank=rank, world_size=world_size)


class Classifier(pl.LightningModule):
    """Records what it saw: the loss and a fingerprint of the batch by global step."""

    def __init__(
        self, optimizer: str = "sgd", net: nn.Module | None = None, seed: int = 0, lr_scale: float = 1.0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = net if net is not None else small_net()
        self.optimizer_name, self.lr_scale = optimizer, lr_scale
        self.losses: dict[int, float] = {}
        self.seen: dict[tuple[int, int], float] = {}
        self.hook: Callable[[Classifier, int], None] | None = None

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        if self.hook is not None:
            self.hook(self, self.trainer.global_step)
        images = batch[0].to(next(self.parameters()).dtype)
        loss = F.cross_entropy(self(images), batch[1])
        self.losses[self.trainer.global_step] = loss.item()
        self.seen[self.current_epoch, batch_idx] = float(batch[0].double().sum())
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.optimizer_name, self.parameters())

    def make_optimizer(self, name: str, parameters: Any) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS[name](parameters)
        for group in optimizer.param_groups:
            group["lr"] *= self.lr_scale
        return optimizer


class ManualClassifier(Classifier):
    """Manual optimization with two optimizers: the first steps every batch, the second every other batch."""

    def __init__(self, wrapped: bool = True, lr_scale: float = 1.0) -> None:
        super().__init__(lr_scale=lr_scale)
        self.automatic_optimization = False
        self.wrapped = wrapped

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers(use_pl_optimizer=self.wrapped)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses[batch_idx + STEPS_PER_EPOCH * self.current_epoch] = loss.item()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        head = list(self.net[5:].parameters())
        body = list(self.net[:5].parameters())
        return [self.make_optimizer("sgd", body), self.make_optimizer("adamw", head)], []


@dataclass
class Run:
    """A finished fit."""

    model: Classifier
    trainer: pl.Trainer
    callbacks: list[Callback] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and optimizer state, by name."""
        found = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        for index, optimizer in enumerate(self.trainer.optimizers):
            for number, state in optimizer.state_dict()["state"].items():
                found |= {f"optimizer{index}.{number}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        return found


def make_trainer(callbacks: Sequence[Callback] = (), **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": ACCELERATOR,
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**(defaults | options), callbacks=list(callbacks))


def fit(
    callbacks: Sequence[Callback] = (),
    *,
    model: Classifier | None = None,
    loader: Any = None,
    validation: Any = None,
    ckpt_path: str | None = None,
    **options: Any,
) -> Run:
    """Train ``model`` (default: :class:`Classifier` with SGD) with ``callbacks``."""
    model = Classifier() if model is None else model
    if validation is not None:
        options.setdefault("limit_val_batches", 1.0)
    trainer = make_trainer(callbacks, **options)
    loader = batches() if loader is None else loader
    trainer.fit(model, loader, validation, ckpt_path=ckpt_path, **(SAFELY if ckpt_path else {}))
    return Run(model, trainer, list(callbacks))


def since_lightning_2_6(name: str) -> Any:
    """One of Lightning's callbacks; the test is skipped where it does not exist yet."""
    return getattr(pl.callbacks, name, None) or pytest.skip(f"{name} came with Lightning 2.6")


def same(left: Any, right: Any) -> bool:
    """Equality of nested states that may hold tensors; a NaN (no forecast) equals a NaN."""
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    both_nan = isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right)
    return both_nan or bool(left == right)


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit-identical (a missing one counts)."""
    names = sorted(left.keys() | right.keys())
    return [n for n in names if n not in left or n not in right or not torch.equal(left[n], right[n])]
