"""ExpandNet: compact before, after and in every file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_filterdiv import ExpandNet
from lightning_filterdiv.demo import Digits, SmallConvNet
from lightning_filterdiv.expansion import ExpansionError, is_expanded
from lightning_filterdiv.filters import NoLayersError
from tests.registry import ONE_EACH, Case
from tests.support.training import SAFELY, Classifier, Run, batches, differing, fit, make_trainer


class _Looks(Callback):
    """What the network is while it trains."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.expanded = [is_expanded(m) for m in pl_module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.keys = list(pl_module.state_dict())
        self.logits = pl_module(batch[0]).detach()


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_is_the_compact_network(tmp_path: Path, weights_only: bool) -> None:
    looks = _Looks()
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only
    )
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", callbacks=[ExpandNet(kind="CL+FC"), looks, checkpoint], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = SmallConvNet(width=6)
    names = list(model.state_dict())
    trainer.fit(model, datamodule=Digits())
    assert looks.expanded == [True] * 4
    assert looks.keys == names == list(model.state_dict())
    assert [type(m) for m in model.net if hasattr(m, "weight")] == [nn.Conv2d] * 3 + [nn.Linear]
    loaded = SmallConvNet.load_from_checkpoint(tmp_path / "step=2.ckpt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    trainer.test(model, datamodule=Digits(), ckpt_path=str(tmp_path / "step=1.ckpt"), verbose=False, **SAFELY)


def test_outputs_before_and_after_the_end() -> None:
    run = fit([ExpandNet(), looks := _Looks()], precision="64-true", model=Classifier(lr_scale=0.3))
    last = list(batches())
    run.model.train()
    batch = next(b for b in last if float(b[0].sum()) is not None)
    assert looks.logits.shape == (16, 4)
    # The same batch statistics: the last batch that training saw.
    final = _last_batch(run)
    torch.testing.assert_close(run.model(final.double()), looks.logits, rtol=1e-9, atol=1e-12)
    assert batch[0].shape == final.shape


def _last_batch(run: Any) -> torch.Tensor:
    loader = batches()
    loader.set_epoch(2)
    return list(loader)[-1][0]


def test_a_checkpoint_without_factors_is_refused(tmp_path: Path) -> None:
    fit([ModelCheckpoint(dirpath=tmp_path, filename="plain")], max_epochs=1)
    with pytest.raises(MisconfigurationException, match="no factors: it was saved without ExpandNet"):
        fit([ExpandNet()], ckpt_path=str(tmp_path / "plain.ckpt"))


def test_another_rate_is_refused(tmp_path: Path) -> None:
    fit([ExpandNet(), ModelCheckpoint(dirpath=tmp_path, filename="four")], max_epochs=1)
    with pytest.raises(ValueError, match="resume with the same kind, rate, expand_image and layers"):
        fit([ExpandNet(rate=2)], ckpt_path=str(tmp_path / "four.ckpt"))


class _TooEarly(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.early = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.early


def test_weights_that_are_loaded_during_training_are_refused() -> None:
    """Factors cannot follow; the same weights change nothing and are fine."""
    model = Classifier(lr_scale=0.3)

    def reload(module: Classifier, step: int) -> None:
        if step == 1:
            module.load_state_dict(module.state_dict())
            assert module.net[3].weight.requires_grad
        if step == 3:
            module.load_state_dict({key: 2 * tensor for key, tensor in module.state_dict().items()})

    model.hook = reload
    with pytest.raises(MisconfigurationException, match=r"other weights of 'net\.0' was loaded during training"):
        fit([ExpandNet()], model=model)
    assert max(model.losses) == 3
    assert not any(is_expanded(module) for module in model.modules())


def test_an_early_optimizer_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="make optimizers in configure_optimizers"):
        fit([ExpandNet()], model=_TooEarly())


@pytest.mark.parametrize("initial", ["keep", "fresh"])
def test_frozen_layers_keep_their_weights(initial: Any) -> None:
    model = Classifier()
    model.net[3].requires_grad_(False)
    before = model.net[3].weight.clone()
    fit([ExpandNet(initial=initial)], model=model, max_epochs=1)
    assert torch.equal(model.net[3].weight, before)


def test_a_second_fit_starts_from_new_weights() -> None:
    """Weights that were changed between two fits of one network count, also where new ones were asked for."""
    callback, model = ExpandNet(initial="fresh"), Classifier(lr_scale=0.3)
    fit([callback], model=model, max_epochs=1)
    with torch.no_grad():
        model.net[3].weight.mul_(0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "weight" in name}
    seen: dict[str, torch.Tensor] = {}
    model.hook = lambda m, step: None if seen else seen.update(copy.deepcopy(m.state_dict()))
    fit([callback], model=model, max_epochs=1)
    for name, tensor in before.items():
        torch.testing.assert_close(seen[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert differing(before, {name: model.state_dict()[name] for name in before})


def test_two_that_overlap_are_refused() -> None:
    with pytest.raises(ExpansionError, match="leave it out with exclude"):
        fit([ExpandNet(include=["net.3"]), ExpandNet()])


@pytest.mark.parametrize("case", [case for case in ONE_EACH if case.cls is not ExpandNet], ids=lambda case: case.name)
def test_it_stands_beside_a_callback_on_other_layers(case: Case) -> None:
    def train(*callbacks: Callback) -> Run:
        return fit([ExpandNet(rate=2, include=["net.0", "net.3"]), *callbacks], model=Classifier(lr_scale=1 / 3))

    alone, together = train(), train(case.make(include=["net.5", "net.7"]))
    assert bool(differing(together.tensors(), alone.tensors())) is case.trains_differently
    assert not any(is_expanded(m) for m in together.model.modules())


@pytest.mark.parametrize("case", [case for case in ONE_EACH if case.cls is not ExpandNet], ids=lambda case: case.name)
def test_a_callback_that_finds_only_expanded_layers_says_whose_they_are(case: Case) -> None:
    with pytest.raises(NoLayersError, match="expanded by ExpandNet; give ExpandNet other layers with its include"):
        fit([ExpandNet(), case.make()])


def test_validation_alone_expands_nothing() -> None:
    model = Classifier()
    trainer = make_trainer([ExpandNet()], limit_val_batches=1.0)
    trainer.validate(model, batches(steps=1), verbose=False)
    assert not any(is_expanded(m) for m in model.modules())
