"""``FilterCallback`` by itself: what it refuses, chooses and restores for every callback of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch.strategies as ours
import pytest
import pytorch_lightning.strategies as theirs
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_filterdiv import FilterCallback, WeightAsynchronousUpdate
from lightning_filterdiv.filters import NoLayersError
from lightning_filterdiv.training.callback import optimizer_index
from tests.support.training import SAFELY, Classifier, batches, fit, make_trainer

# --------------------------------------------------------------------------- strategies


class MyDDP(ours.DDPStrategy):
    """A user's subclass: nobody has looked at it."""


REFUSED = [
    *(ours.FSDPStrategy, ours.ModelParallelStrategy, ours.DeepSpeedStrategy),
    *(theirs.FSDPStrategy, theirs.ModelParallelStrategy, theirs.DeepSpeedStrategy),
    *(ours.XLAStrategy, ours.SingleDeviceXLAStrategy, MyDDP),
]


def _set_up(strategy: type) -> None:
    class Trainer:
        """Just what ``setup`` looks at; a real FSDP trainer needs a GPU."""

        is_global_zero, global_step = False, 0

    trainer, callback = Trainer(), FilterCallback()
    trainer.strategy, trainer.callbacks = object.__new__(strategy), [callback]
    callback.setup(trainer, Classifier(), "fit")


@pytest.mark.parametrize("strategy", REFUSED, ids=lambda cls: f"{cls.__module__.split('.')[0]}.{cls.__name__}")
def test_refused_strategies(strategy: type) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        _set_up(strategy)
    assert strategy.__name__ in str(caught.value)
    assert "Use strategy='ddp' or a single device" in str(caught.value)
    assert f"add '{strategy.__module__}.{strategy.__qualname__}'" in str(caught.value)


def test_a_trusted_strategy_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{MyDDP.__module__}.{MyDDP.__qualname__}"
    monkeypatch.setattr(FilterCallback, "trusted_strategies", FilterCallback.trusted_strategies | {name})
    _set_up(MyDDP)


# --------------------------------------------------------------------------- layers


def test_all_convolutions_frozen() -> None:
    model = Classifier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("net.10" in name)
    with pytest.raises(NoLayersError, match=r"all 4 selected convolutions are frozen .*Unfreeze some"):
        fit([FilterCallback()], model=model)


def test_layers_that_change_places_are_noticed() -> None:
    """One frozen, another unfrozen in the same group at the same moment: their number stays the same."""

    class Swaps(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[5].requires_grad_(trainer.current_epoch == 0)
            pl_module.net[7].requires_grad_(trainer.current_epoch > 0)

    class Partial(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.net[7].requires_grad_(False)
            return super().configure_optimizers()

    callback = FilterCallback()
    seen: list[list[str]] = []

    class Looks(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(list(callback.layers))

    fit([Swaps(), callback, Looks()], model=Partial())
    assert seen[0] == ["net.0", "net.3", "net.5"]
    assert seen[1] == seen[2] == ["net.0", "net.3", "net.7"]


def test_two_instances_on_one_layer_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"act on layer 'net\.3'.* with include and exclude"):
        fit([FilterCallback(include=["net.3"]), FilterCallback(include=["net.*"])])


class _SharesLayers(FilterCallback):
    """Mutant: the overlap check removed."""

    shares_layers = True


def test_the_overlap_check_is_what_refuses() -> None:
    fit([_SharesLayers(include=["net.3"]), _SharesLayers(include=["net.*"])])


def test_two_identical_instances_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        make_trainer([FilterCallback(), FilterCallback()])


# --------------------------------------------------------------------------- optimizers


def test_an_optimizer_that_nobody_configured_is_an_error() -> None:
    trainer = fit(max_epochs=1).trainer
    with pytest.raises(RuntimeError, match="a step of SGD was announced, which is none of the optimizers"):
        optimizer_index(trainer, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))


# --------------------------------------------------------------------------- order of callbacks


class _Mask(FilterCallback):
    gradient_stage = 30


class _Penalty(FilterCallback):
    gradient_stage = 10


def test_a_penalty_after_a_mask_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"_Penalty must come before _Mask .*Swap the two"):
        fit([_Mask(), _Penalty()])
    fit([_Penalty(), _Mask()], max_epochs=1)


# --------------------------------------------------------------------------- checkpoints


def _checkpoint(callbacks: list[Callback], folder: Path, **options: Any) -> str:
    fit([*callbacks, ModelCheckpoint(dirpath=folder, filename="end")], **options)
    return str(folder / "end.ckpt")


def test_state_saved_for_other_layers_is_refused(tmp_path: Path) -> None:
    path = _checkpoint([FilterCallback(include=["net.3"])], tmp_path)
    with pytest.raises(MisconfigurationException, match="for other layers") as caught:
        fit([FilterCallback(include=["net.5"])], ckpt_path=path)
    assert "remove the entry from checkpoint['callbacks']" in str(caught.value)


def test_another_instance_s_state_is_not_ours(tmp_path: Path) -> None:
    path = _checkpoint([FilterCallback(include=["net.3"])], tmp_path)
    fit([FilterCallback(include=["net.3"]), FilterCallback(include=["net.5"])], ckpt_path=path, max_epochs=4)


def test_changed_arguments_are_said(tmp_path: Path) -> None:
    path = _checkpoint([WeightAsynchronousUpdate(update_fraction=0.5)], tmp_path)
    with pytest.warns(UserWarning, match=re.escape("the new values are used: update_fraction: 0.5 -> 0.25")):
        fit([WeightAsynchronousUpdate(update_fraction=0.25)], ckpt_path=path)


def test_a_corrupted_checkpoint(tmp_path: Path) -> None:
    path = _checkpoint([FilterCallback()], tmp_path)
    content = torch.load(path, weights_only=True)
    content["callbacks"][FilterCallback().state_key] = {"version": 1, "arguments": {}, "layers": {}}
    torch.save(content, path)
    with pytest.raises(ValueError, match="missing entry 'extra'"):
        fit([FilterCallback()], ckpt_path=path)


def test_validating_a_checkpoint_between_fits_keeps_the_clock(tmp_path: Path) -> None:
    path = _checkpoint([WeightAsynchronousUpdate()], tmp_path)
    callback = WeightAsynchronousUpdate()
    trainer = make_trainer([callback], limit_val_batches=1.0)
    model = Classifier()
    trainer.fit(model, batches())
    assert callback.extra_state() == {"steps": [18]}
    trainer.validate(model, batches(steps=1), ckpt_path=path, verbose=False, **SAFELY)
    assert callback.extra_state() == {"steps": [18]}
