"""A short plan, witnesses of a fit, and unusual modules."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn import functional as F

from lightning_filterdiv import RePr
from lightning_filterdiv.filters import filter_matrix
from tests.support.training import Classifier

SHORT: dict[str, Any] = {"full_epochs": 1, "sub_epochs": 1, "cycles": 1}


class Watch(Callback):
    """What is dropped at every step, and the filters of every layer."""

    def __init__(self, callback: RePr) -> None:
        self.callback = callback
        self.counts: list[int] = []
        self.filters: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counts.append(sum(rows.numel() for rows in self.callback.dropped.values()))
        self.filters.append({n: filter_matrix(c).clone() for n, c in self.callback.layers.items()})


class Stops(Callback):
    """Ends the fit at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class NeverCallsForward(Classifier):
    """training_step goes to the submodule directly."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])
