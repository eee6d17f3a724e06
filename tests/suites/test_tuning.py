"""Lightning's learning-rate finder and batch-size scaler try steps before the fit: no callback counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, batches, differing, make_trainer


class Tuned(Classifier):
    """Has the attributes that a tuner looks for, and its own data in a fixed order."""

    def __init__(self, lr_scale: float = 1.0) -> None:
        super().__init__("adamw", lr_scale=lr_scale)
        self.lr, self.batch_size = 1e-2, 16

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr * self.lr_scale)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*batches().tensors), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:  # the scaler asks for one, and takes no batch of it
        return self.train_dataloader()


def plain(case: Case, batch_size: int) -> dict[str, torch.Tensor]:
    model = Tuned(case.lr_scale)
    model.batch_size = batch_size
    make_trainer([case.make()]).fit(model)
    return model.state_dict()


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_the_learning_rate_finder_leaves_no_trace(case: Case) -> None:
    model = Tuned(case.lr_scale)
    trainer = make_trainer([case.make()])
    finder = Tuner(trainer).lr_find(model, num_training=8, early_stop_threshold=None, update_attr=False)
    assert finder is not None
    assert len(finder.results["loss"]) == 8
    trainer.fit(model)
    assert trainer.global_step == 18
    assert not differing(plain(case, 16), model.state_dict())


#: Both tuners put a fit back by the same checkpoint; here those that trace the network, which takes a second each time,
#: run under soak.
FEW_TRACES = [
    pytest.param(case, marks=pytest.mark.soak if hasattr(case.make(), "network") else (), id=case.name)
    for case in ONE_EACH
]


@pytest.mark.parametrize("case", FEW_TRACES)
def test_the_batch_size_scaler_leaves_no_trace(case: Case) -> None:
    model = Tuned(case.lr_scale)
    trainer = make_trainer([case.make()])
    size = Tuner(trainer).scale_batch_size(model, steps_per_trial=2, init_val=8, max_trials=2)
    assert size == model.batch_size
    assert size in (16, 32)
    trainer.fit(model)
    assert not differing(plain(case, size), model.state_dict())
