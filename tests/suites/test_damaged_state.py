"""States of callbacks that are damaged, entry by entry: one line that names the callback and the fix, or none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, fit

Keys = tuple[Any, ...]
MISSING = object()
VALUES = (MISSING, None, "text", [], {}, -1, True, torch.zeros(0), torch.tensor([float("nan")]), [["text"]])
each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@cache
def saved(case: str, folder: Path) -> dict[str, Any]:
    """A checkpoint from the middle of a fit, in which RePr has filters out."""
    made = next(c for c in ONE_EACH if c.name == case)
    model = Classifier(lr_scale=made.lr_scale)
    fit([made.make(), ModelCheckpoint(dirpath=folder / case, filename="{step}", save_top_k=-1)], model=model)
    checkpoint: dict[str, Any] = torch.load(folder / case / "step=12.ckpt", weights_only=True)
    return checkpoint


def entries(state: Any, at: Keys = (), depth: int = 5) -> Iterator[Keys]:
    """The first entries of every dict and list, with theirs."""
    if depth and isinstance(state, dict | list):
        for key in list(state)[:3] if isinstance(state, dict) else range(min(2, len(state))):
            yield (*at, key)
            yield from entries(state[key], (*at, key), depth - 1)


def all_entries(state: dict[str, Any]) -> list[Keys]:
    own = [(key, entry) for key in ("arguments", "extra") for entry in state[key]]
    deeper = [path for key, entry in own for path in entries(state[key][entry], (key, entry))]
    return [*((key,) for key in state), *own, *deeper, *entries(state["layers"], ("layers",))]


def damaged(state: dict[str, Any], path: Keys, value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(state)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if value is MISSING:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return changed  # type: ignore[no-any-return]


def check_load(case: Case, state: dict[str, Any]) -> bool:
    """True if it can be loaded; AssertionError or another error unless that is said in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arguments that have changed
        try:
            case.make().load_state_dict(state)
        except ValueError as error:
            said = str(error)
        else:
            return True
    assert said.startswith(f"the checkpoint's state of {case.cls.__name__} cannot be used: ")
    assert said.endswith(f"to start {case.cls.__name__} afresh from these weights")
    assert "\n" not in said
    return False


def check_resume(case: Case, checkpoint: dict[str, Any], state: dict[str, Any], folder: Path) -> None:
    """A resume ends well or in one line; any other error fails."""
    key = next(key for key in checkpoint["callbacks"] if key.startswith(case.cls.__name__))
    torch.save({**checkpoint, "callbacks": {**checkpoint["callbacks"], key: state}}, folder / "damaged.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = Classifier(lr_scale=case.lr_scale)
            fit([case.make()], model=model, ckpt_path=str(folder / "damaged.ckpt"), limit_train_batches=1)
        except (ValueError, MisconfigurationException) as error:
            said = str(error)
        else:
            return
    assert case.cls.__name__ in said or "of the fit that saved the checkpoint" in said
    assert "\n" not in said or "Use " in said  # the plan of RePr is a table


def state_of(case: Case, checkpoint: dict[str, Any]) -> dict[str, Any]:
    states = checkpoint["callbacks"]
    found: dict[str, Any] = next(state for key, state in states.items() if key.startswith(case.cls.__name__))
    return found


@each
def test_what_cannot_be_read_is_said(case: Case, shared: Path) -> None:
    state = state_of(case, saved(case.name, shared))
    assert check_load(case, state)
    loaded = [check_load(case, damaged(state, path, value)) for path in all_entries(state) for value in VALUES]
    assert 0 < sum(loaded) < len(loaded)


@pytest.mark.parametrize("value", [MISSING, torch.tensor([3.0])], ids=["missing", "tensor"])
def test_dropped_filters_that_cannot_be_read(value: Any, shared: Path, tmp_path: Path) -> None:
    """They are read when the network is there."""
    case = next(case for case in ONE_EACH if case.name == "repr")
    checkpoint = saved(case.name, shared)
    state = state_of(case, checkpoint)
    dropped = state["extra"]["dropped"]
    assert dropped is not None
    for path in entries(dropped, ("extra", "dropped"), depth=3):
        check_resume(case, checkpoint, damaged(state, path, value), tmp_path)


def test_a_plan_that_cannot_be_read(shared: Path) -> None:
    """What a resume computes with is checked when it is loaded."""
    case = next(case for case in ONE_EACH if case.name == "repr")
    state = state_of(case, saved(case.name, shared))
    extra = state["extra"]
    for name in ("history", "regrowth"):
        first: tuple[Any, ...] = ("extra", name, 0) if name == "history" else ("extra", name)
        event = extra[name][0] if name == "history" else extra[name]
        for number in range(len(event)):
            assert not check_load(case, damaged(state, (*first, number), torch.zeros(0))), (name, number)
    for entry in ("epochs", "plan_start"):
        assert not check_load(case, damaged(state, ("extra", entry), "text"))
        assert check_load(case, damaged(state, ("extra", entry), MISSING)), "states of release 0.1 have none"


@pytest.mark.soak
@each
def test_a_resume_from_damage_ends_in_one_line(case: Case, shared: Path, tmp_path: Path) -> None:
    checkpoint = saved(case.name, shared)
    state = state_of(case, checkpoint)
    for path in all_entries(state):
        for value in (MISSING, None, "text", torch.tensor([float("nan")])):
            if path[0] == "extra" and check_load(case, changed := damaged(state, path, value)):
                check_resume(case, checkpoint, changed, tmp_path)
