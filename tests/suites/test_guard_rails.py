"""Guard rails of ``FilterCallback`` in every callback: layers, optimizers, checkpoints, stages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_filterdiv import FilterCallback, WeightAsynchronousUpdate
from lightning_filterdiv.filters import NoLayersError
from tests.registry import EDITING, ONE_EACH, Case
from tests.support.training import Classifier, batches, differing, fit, make_trainer, small_net

each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)


@each
def test_the_other_namespace(case: Case) -> None:
    """All other suites train with ``lightning.pytorch``."""

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = small_net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    options: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 3, "logger": False, "callbacks": [case.make()],
        "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False,
    }  # fmt: skip
    if pytorch_lightning.__version__.startswith("2.5"):
        # Lightning's own limit, and why README asks for 2.6 here.
        with pytest.raises(ValueError, match="Expected a parent"):
            pytorch_lightning.Trainer(**options)
        return
    trainer = pytorch_lightning.Trainer(**options)
    trainer.fit(Module(), batches())
    assert trainer.global_step == 18


# --------------------------------------------------------------------------- choosing layers


@each
def test_a_pattern_that_matches_nothing(case: Case) -> None:
    with pytest.raises(NoLayersError) as caught:
        fit([case.make(include=["net.33"])])
    assert "include pattern 'net.33' matches no convolution" in str(caught.value)
    assert "the closest name is 'net.3'" in str(caught.value)
    assert "Available: 'net.0', 'net.3', 'net.5', 'net.7'" in str(caught.value)


@each
def test_a_model_without_convolutions(case: Case) -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(NoLayersError, match="Classifier has no convolution"):
        fit([case.make()], model=Classifier(net=dense))


@pytest.mark.parametrize("case", EDITING, ids=lambda case: case.name)
def test_frozen_layers_are_left_alone(case: Case) -> None:
    model = Classifier()
    frozen = model.net[3]
    frozen.requires_grad_(False)
    before = frozen.weight.clone()
    callback = case.make()
    fit([callback], model=model)
    assert list(callback.layers) == ["net.0", "net.5", "net.7"]
    assert torch.equal(frozen.weight, before)


@pytest.mark.parametrize("case", EDITING, ids=lambda case: case.name)
def test_layers_unfrozen_later_join(case: Case) -> None:
    """As BackboneFinetuning does it: frozen, outside the optimizer, handed to it at the second epoch."""

    class Unfreezes(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.net[3].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[3].parameters())})

    class Partial(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.net[3].requires_grad_(False)
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    callback = case.make()
    seen: list[int] = []

    class Looks(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(len(callback.layers))

    fit([Unfreezes(), callback, Looks()], model=Partial())
    assert seen == [3, 4, 4]


@each
def test_resuming_with_a_layer_frozen_is_no_different_network(case: Case, tmp_path: Path) -> None:
    fit([case.make(), ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1)])
    model = Classifier()
    model.net[7].requires_grad_(False)
    callback = case.make()
    fit([callback], model=model, ckpt_path=str(tmp_path / "step=6.ckpt"))
    assert ("net.7" in callback.layers) is not case.cls.trainable_only


# --------------------------------------------------------------------------- unusual optimizers


class _Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer under the name that Lightning's wrapper uses too."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.optimizer = torch.optim.SGD(self.param_groups, lr=0.05)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)


class _CallsSuper(torch.optim.SGD):
    """Torch fires the hooks of a step for the inner one too."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class _TwoEvaluations(torch.optim.SGD):
    """Evaluates its closure twice per step, as sharpness-aware minimisation does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


class _With(Classifier):
    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.make = optimizer

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


@pytest.mark.parametrize("case", EDITING, ids=lambda case: case.name)
def test_an_optimizer_around_another_one(case: Case) -> None:
    run = fit([case.make()], model=_With(_Lookahead))
    assert run.trainer.global_step == 18
    plain = fit(model=_With(_Lookahead))
    assert any(not torch.equal(run.tensors()[name], value) for name, value in plain.tensors().items())


@pytest.mark.parametrize("case", EDITING, ids=lambda case: case.name)
def test_an_optimizer_that_calls_its_parent(case: Case) -> None:
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # hooks are put on a class by its first instance
    run = fit([case.make()], model=_With(lambda p: _CallsSuper(p, lr=0.05)))
    plain = fit([case.make()], model=_With(lambda p: torch.optim.SGD(p, lr=0.05)))
    assert not differing(run.tensors(), plain.tensors())


def test_several_evaluations_per_step_are_refused() -> None:
    """Held filters would move: the second evaluation sees, and remembers, what the first one led to."""
    with pytest.raises(
        MisconfigurationException, match="_TwoEvaluations evaluates its closure more than once per step"
    ):
        fit([WeightAsynchronousUpdate()], model=_With(lambda p: _TwoEvaluations(p, lr=0.05)))
    with pytest.raises(MisconfigurationException, match="LBFGS searches along a line"):
        fit([WeightAsynchronousUpdate()], model=_With(torch.optim.LBFGS))


# --------------------------------------------------------------------------- checkpoints

#: ``FilterCallback``'s own check, and each override of it.
CHECKS_ARCHITECTURE = [
    case
    for case in ONE_EACH
    if case.name == "wau" or case.cls._check_restored_layers is not FilterCallback._check_restored_layers
]


def _checkpoint(callbacks: list[Callback], folder: Path, **options: Any) -> str:
    fit([*callbacks, ModelCheckpoint(dirpath=folder, filename="end")], **options)
    return str(folder / "end.ckpt")


@pytest.mark.parametrize("case", [c for c in ONE_EACH if c.refuses_other_layers], ids=lambda case: case.name)
def test_weights_of_other_layers_are_refused(case: Case, tmp_path: Path) -> None:
    path = _checkpoint([case.make(include=["net.3"])], tmp_path)
    assert case.refuses_other_layers is not None
    with pytest.raises(RuntimeError, match=re.escape(case.refuses_other_layers)):
        fit([case.make(include=["net.5"])], ckpt_path=path)


@pytest.mark.parametrize("case", CHECKS_ARCHITECTURE, ids=lambda case: case.name)
def test_a_different_architecture(case: Case, tmp_path: Path) -> None:
    path = _checkpoint([case.make()], tmp_path)
    other = small_net()
    other[3], other[4] = nn.Conv2d(6, 5, 3, padding=1), nn.ReLU()
    other[5] = nn.Conv2d(5, 8, 3, padding=1)
    # Weights are checked by Lightning; where a user loads loosely, the callback's state is still checked by us.
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit([case.make()], model=Classifier(net=other), ckpt_path=path)
    state = torch.load(path, weights_only=True)["callbacks"][case.make().state_key]
    callback = case.make()
    callback.load_state_dict(state)
    with pytest.raises(MisconfigurationException, match=r"net\.3 had 8 filters, now 5"):
        fit([callback], model=Classifier(net=other))


@each
def test_a_checkpoint_without_our_state_starts_afresh(case: Case, tmp_path: Path) -> None:
    path = _checkpoint([], tmp_path)
    if case.refuses_without_state is not None:  # it changes the network: there is nothing to start with
        with pytest.raises((RuntimeError, MisconfigurationException), match=re.escape(case.refuses_without_state)):
            fit([case.make()], ckpt_path=path, max_epochs=4)
        return
    assert fit([case.make()], ckpt_path=path, max_epochs=4).trainer.global_step == 24


@each
def test_other_stages(case: Case) -> None:
    """Validation and test neither resolve layers nor fail."""
    trainer = make_trainer([case.make()], limit_val_batches=1.0)
    trainer.validate(Classifier(), batches(steps=1), verbose=False)
