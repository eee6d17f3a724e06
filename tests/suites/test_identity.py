"""Construction, repr, YAML, state and coexistence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_filterdiv
from lightning_filterdiv import WeightAsynchronousUpdate
from tests.registry import CASES, EDITING, ONE_EACH, SLOW_CASES, Case
from tests.support.training import ACCELERATOR, Classifier, batches, differing, fit


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_repr_evaluates_to_an_equal_callback(case: Case) -> None:
    callback = case.make(include=["net.3", "net.5"])
    again = eval(repr(callback), vars(lightning_filterdiv))
    assert type(again) is type(callback)
    assert again.arguments() == callback.arguments()
    assert all(callback.arguments()[key] == value for key, value in case.arguments.items() if key != "include")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_state_key_names_layers_only(case: Case) -> None:
    layers = {key: value for key, value in case.arguments.items() if key in ("include", "exclude")}
    assert case.make().state_key == case.cls(**layers).state_key
    assert case.make(include=["net.3"]).state_key != case.make().state_key
    assert case.make(exclude=["net.3"]).state_key != case.make().state_key


def test_defaults() -> None:
    """A default is part of the public API: one that changes shows in the diff of ``defaults.txt``."""
    expected = Path(__file__).with_name("defaults.txt").read_text().splitlines()
    assert sorted(repr(case.cls()) for case in ONE_EACH) == expected


def test_every_public_callback_is_registered() -> None:
    public = {
        value
        for value in vars(lightning_filterdiv).values()
        if isinstance(value, type)
        and issubclass(value, lightning_filterdiv.FilterCallback)
        and value is not lightning_filterdiv.FilterCallback
    }
    assert public == {case.cls for case in CASES}
    assert {case.cls for case in ONE_EACH} == public
    assert all(case.wrong for case in ONE_EACH)


# --------------------------------------------------------------------------- YAML


class FixedData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return batches()


def _command_line(text: str, folder: Path) -> LightningCLI:
    path = folder / "run.yaml"
    path.write_text(text)
    return LightningCLI(
        Classifier, FixedData, args=["fit", "--config", str(path)], save_config_kwargs={"overwrite": True}
    )


@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_yaml_round_trip(case: Case, tmp_path: Path) -> None:
    """Parsed by short name, fitted, saved by LightningCLI, and the saved file gives the same run again."""
    trainer = {
        "accelerator": ACCELERATOR,
        "devices": 1,
        "max_epochs": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "first")}},
        "callbacks": [{"class_path": case.cls.__name__, "init_args": case.arguments}],
    }
    first = _command_line(yaml.safe_dump({"trainer": trainer}), tmp_path)
    (callback,) = [c for c in first.trainer.callbacks if isinstance(c, case.cls)]
    assert callback.arguments() == case.make().arguments()
    (saved,) = (tmp_path / "first").rglob("config.yaml")
    text = saved.read_text()
    assert case.cls.__name__ in text
    second = _command_line(text, tmp_path)
    assert second.trainer.global_step == first.trainer.global_step == 18
    assert not differing(first.model.state_dict(), second.model.state_dict())
    plain = _command_line(yaml.safe_dump({"trainer": trainer | {"callbacks": []}}), tmp_path)
    assert bool(differing(first.model.state_dict(), plain.model.state_dict())) is case.trains_differently


# --------------------------------------------------------------------------- state


def check_state_is_safe(callback: Any, folder: Path) -> None:
    """Save, load with weights_only, resume."""
    fit([callback, ModelCheckpoint(dirpath=folder, filename="end")])
    loaded = torch.load(folder / "end.ckpt", weights_only=True)
    state = loaded["callbacks"][callback.state_key]
    assert state["layers"] == {"net.0": 6, "net.3": 8, "net.5": 8, "net.7": 8}
    assert state["arguments"] == callback.arguments()


@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_state_is_weights_only_safe(case: Case, tmp_path: Path) -> None:
    check_state_is_safe(case.make(), tmp_path)


class _KeepsNumpy(WeightAsynchronousUpdate):
    """Mutant: a numpy scalar, which a weights_only load refuses."""

    def extra_state(self) -> dict[str, Any]:
        return {"steps": [np.int64(3)]}


def test_unsafe_state_is_caught(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="numpy"):
        check_state_is_safe(_KeepsNumpy(), tmp_path)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_damaged_state(case: Case) -> None:
    """A callback's own entries; what is around them, ``FilterCallback`` checks for all."""
    callback = case.make()
    fit([callback])
    state = callback.state_dict()
    if not state["extra"]:
        return  # everything is a function of weights, epoch and step
    state["extra"] = dict.fromkeys(state["extra"], "?")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        case.make().load_state_dict(state)
    assert f"must be a {'dict' if case.name == 'csgd' else 'list'}" in str(caught.value)
    assert "to start" in str(caught.value)


# --------------------------------------------------------------------------- several instances


@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_two_instances_on_disjoint_layers(case: Case) -> None:
    first, second = case.make(include=["net.3"]), case.make(include=["net.5", "net.7"])
    run = fit([first, second])
    assert list(first.layers) == ["net.3"]
    assert list(second.layers) == ["net.5", "net.7"]
    for alone in (["net.3"], ["net.5", "net.7"]):
        single = fit([case.make(include=alone)])
        assert bool(differing(run.tensors(), single.tensors())) is case.trains_differently


@pytest.mark.parametrize("case", EDITING, ids=lambda case: case.name)
def test_two_instances_on_one_layer_are_refused(case: Case) -> None:
    with pytest.raises(MisconfigurationException, match=r"act on layer 'net\.3'"):
        fit([case.make(include=["net.3"]), case.make(include=["net.*"])])


class _PassesArgumentsOn(WeightAsynchronousUpdate):
    """A user's subclass with an argument of its own."""

    def __init__(self, every: int = 2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.every = every


def test_a_subclass_may_pass_arguments_on() -> None:
    callback = _PassesArgumentsOn(every=3, update_fraction=0.25)
    assert list(callback.arguments())[:2] == ["every", "update_fraction"]
    assert "update_fraction=0.25" in repr(callback)
    again = eval(repr(callback), {"_PassesArgumentsOn": _PassesArgumentsOn})
    assert again.arguments() == callback.arguments()
