"""``FilterCallback`` by itself: what it refuses, chooses and restores for every callback of the package."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch.strategies as ours
import pytest
import pytorch_lightning.strategies as theirs
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_filterdiv import (
    CentripetalSGD,
    ChannelImportance,
    EntropyDepthBound,
    FilterCallback,
    RePr,
    WeightAsynchronousUpdate,
)
from lightning_filterdiv.filters import NoLayersError
from lightning_filterdiv.training.callback import optimizer_index
from tests.registry import EDITING, ONE_EACH, Case
from tests.support.training import SAFELY, Classifier, batches, differing, fit, make_trainer

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


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_variant_of_a_callback_on_the_same_layers_is_refused(case: Case) -> None:
    """Two of RePr would each remember the other's zeros; a user's own subclass counts."""
    mine = type("Mine", (case.cls,), {})
    yours = type("Yours", (case.cls,), {})
    callbacks = [mine(**case.arguments), yours(**case.arguments)]
    if case.cls.shares_layers:
        fit(callbacks, max_epochs=1)
        return
    with pytest.raises(ValueError if case.name == "expand" else MisconfigurationException) as caught:
        fit(callbacks, max_epochs=3)
    words = "'net.0' is expanded already" if case.name == "expand" else "Mine and Yours both act on layer 'net."
    assert words in str(caught.value)


class _SharesLayers(FilterCallback):
    """Mutant: the overlap check removed."""

    shares_layers = True


def test_the_overlap_check_is_what_refuses() -> None:
    fit([_SharesLayers(include=["net.3"]), _SharesLayers(include=["net.*"])])


def test_two_identical_instances_are_refused() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        make_trainer([FilterCallback(), FilterCallback()])


class _Backbone(Classifier):
    """All convolutions before the classifier, as BackboneFinetuning wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:-1], self.net[-1]
        del self.net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


class _UnfreezesLater(BackboneFinetuning):
    """Unfreezes at epoch 1."""

    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)


@pytest.mark.parametrize("case", EDITING, ids=lambda case: case.name)
def test_a_frozen_backbone_is_waited_for(case: Case) -> None:
    callback, seen = case.make(include=["backbone.*"]), []

    class Looks(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(len(callback.layers))

    run = fit([_UnfreezesLater(), callback, Looks()], model=_Backbone(), max_epochs=4)
    assert seen == [0, 4, 4, 4]
    assert differing(run.tensors(), fit([_UnfreezesLater()], model=_Backbone(), max_epochs=4).tensors())


@pytest.mark.parametrize("case", EDITING, ids=lambda case: case.name)
def test_a_fit_without_a_trainable_layer_says_so(case: Case) -> None:
    model = Classifier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("net.10" in name)
    with pytest.warns(UserWarning, match=r"did nothing at the end of this fit.* Unfreeze some"):
        fit([case.make()], model=model)


class _SkipsFirst(Classifier):
    """The first two batches are bad: the network is not called."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.current_epoch == 0 and batch_idx < 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_batches_that_are_skipped_at_the_start(case: Case) -> None:
    callback = case.make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit([callback], model=_SkipsFirst())
    assert not [str(warning.message) for warning in caught if "forward call" in str(warning.message)]
    assert bool(differing(run.tensors(), fit(model=_SkipsFirst()).tensors())) is case.trains_differently
    if isinstance(callback, CentripetalSGD):
        assert callback.filterdiv_events()[0]["step"] == 2
    if isinstance(callback, EntropyDepthBound):
        assert callback.depth is not None


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_first_epoch_without_batches(case: Case) -> None:
    """``on_train_batch_start`` of the LightningModule may end an epoch before it begins."""

    class SkipsEpoch(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 else None

    callback = case.make()
    run = fit([callback], model=SkipsEpoch(), max_epochs=4)
    assert run.trainer.global_step == 18
    assert bool(differing(run.tensors(), fit(model=SkipsEpoch(), max_epochs=4).tensors())) is case.trains_differently
    if isinstance(callback, RePr):
        assert [(event["kind"], event["epoch"]) for event in callback.history] == [("drop", 1), ("regrow", 2)]


def test_a_phase_without_batches_is_left_out() -> None:
    class SkipsEpochs(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch < 2 else None

    callback = RePr(full_epochs=1, sub_epochs=1, cycles=2, include=["net.*"])
    with pytest.warns(UserWarning, match="leaves out cycle 1: no batch trained the network in its phase"):
        fit([callback], model=SkipsEpochs(), max_epochs=6)
    assert [(event["kind"], event["epoch"]) for event in callback.history] == [("drop", 3), ("regrow", 4)]


def test_a_network_that_is_never_called_is_said() -> None:
    class Never(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            return None

    with pytest.warns(UserWarning, match="CentripetalSGD did nothing in this fit: no step had a forward call"):
        fit([CentripetalSGD()], model=Never(), max_epochs=1)
    with pytest.warns(UserWarning, match="EntropyDepthBound cannot count the depth of Never: no forward call"):
        fit([EntropyDepthBound()], model=Never(), max_epochs=1)
    with pytest.warns(UserWarning, match="ChannelImportance has nothing to report: no image passed a gate"):
        fit([ChannelImportance()], model=Never(), max_epochs=1)
    with pytest.warns(UserWarning, match="RePr did nothing in this fit: no batch had a forward call of the network"):
        fit([RePr(full_epochs=1, sub_epochs=1, cycles=1)], model=Never(), max_epochs=4)


def test_a_fit_that_stops_before_an_event_is_said() -> None:
    class Stops(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = True

    with pytest.warns(UserWarning, match=r"before 2 events of RePr were due \(first: drop of cycle 1 after epoch 1\)"):
        fit([RePr(full_epochs=1, sub_epochs=1, cycles=1)], model=Stops(), max_epochs=4)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_another_default_device_is_refused(case: Case) -> None:
    """Our generators are on the CPU, so that draws are the same on every device."""
    model, loader = Classifier(), batches()
    before = {name: type(module) for name, module in model.named_modules()}
    with torch.device("meta"), pytest.raises(MisconfigurationException, match=r"makes them on 'meta'\. Call torch"):
        fit([case.make()], model=model, loader=loader)
    assert {name: type(module) for name, module in model.named_modules()} == before


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
