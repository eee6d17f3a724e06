"""A resume with another argument says truthfully if the new value is used."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_filterdiv import CentripetalSGD, EntropyDepthBound, FilterSimilarityMonitor
from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, differing, fit

#: Case -> another value of each argument.
OTHER: dict[str, dict[str, Any]] = {
    "wau": {
        "update_fraction": 0.25, "axis": "in", "sampling": "with_replacement", "hold": "gradient", "rescale": True,
        "seed": 1,
    },
    "csgd": {
        "keep_fraction": 0.25, "target_macs": 0.5, "target_parameters": 0.5, "scope": "global",
        "max_layer_fraction": 0.75, "channels_multiple": 2, "strength": 0.5, "vector_strength": 0.5,
        "clustering": "even", "seed": 1,
    },
    "basis": {
        "weight": 1.0, "every_n_steps": 3, "milestones": {1: 0.5}, "form": "soft", "decoupled": True, "linear": True,
    },
    "expand": {"initial": "fresh", "seed": 1},
    "importance": {"seed": 1},
}  # fmt: skip
#: Arguments whose change is refused, with words of the message.
SAME = "resume with the same kind, rate, expand_image and layers"
REFUSED: dict[str, dict[str, tuple[Any, str]]] = {
    "expand": {"kind": ("CL+FC", SAME), "rate": (3, SAME), "expand_image": (True, SAME)},
    "importance": {
        "placement": ("cifar", 'Missing key(s) in state_dict: "net.0.gate.squeeze.bias"'),
        "reduction": (2, "size mismatch for net.0.gate.squeeze.weight"),
    },
}
#: Of callbacks that change no weight, and of RePr, whose events to come are asked for: see the tests of those rooms.
ELSEWHERE = ("monitor", "entropy", "repr")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changed")


@cache
def saved(case: str, folder: Path) -> str:
    made = next(c for c in ONE_EACH if c.name == case).make()
    fit([made, ModelCheckpoint(dirpath=folder / case, filename="{step}", save_top_k=-1)])
    return str(folder / case / "step=6.ckpt")


def resumed(case: Case, folder: Path, **changed: Any) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    callback = case.make(**changed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit([callback], model=Classifier(seed=1), ckpt_path=saved(case.name, folder))
    said = [str(warning.message) for warning in caught if "resumes with" in str(warning.message)]
    return callback, run.tensors(), said


ROWS = [
    pytest.param(case, name, value, id=f"{case.name}-{name}")
    for case in ONE_EACH
    for name, value in OTHER.get(case.name, {}).items()
]


@pytest.mark.parametrize(("case", "name", "value"), ROWS)
def test_what_is_said_is_true(case: Case, name: str, value: Any, shared: Path) -> None:
    callback, tensors, said = resumed(case, shared, **{name: value})
    _, unchanged, nothing = resumed(case, shared)
    assert not nothing
    assert len(said) == 1
    old = case.make().arguments()[name]
    if name in case.cls.fixed_on_resume:
        assert f"{name} stays {old!r}, not {value!r}: {case.cls.fixed_on_resume[name]}" in said[0]
        assert not differing(tensors, unchanged)
        assert callback.state_dict()["arguments"][name] == old
    else:
        assert f"the new values are used: {name}: {old!r} -> {value!r}" in said[0]
        assert differing(tensors, unchanged)


@pytest.mark.parametrize("case", [c for c in ONE_EACH if c.name in REFUSED], ids=lambda case: case.name)
def test_what_cannot_change_is_refused(case: Case, shared: Path) -> None:
    for name, (value, words) in REFUSED[case.name].items():
        with pytest.raises((ValueError, RuntimeError), match=re.escape(words)):
            resumed(case, shared, **{name: value})


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_the_tables_name_arguments(case: Case) -> None:
    """Every fixed argument is one, and every argument of a callback that changes weights is tried above."""
    arguments = case.make().arguments().keys() - set(case.cls.identity_arguments) - {"check_ranks_every_n_steps"}
    assert case.cls.fixed_on_resume.keys() <= arguments
    if case.name not in ELSEWHERE:
        tried = OTHER[case.name].keys() | REFUSED.get(case.name, {}).keys()
        # Each of these belongs to a form that the case does not have.
        assert arguments - tried <= {"squared", "unique", "seed"} if case.name == "basis" else arguments == tried


def test_the_page_lists_what_is_fixed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "resume.md").read_text()
    for case in ONE_EACH:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{case.cls.__name__}` |"))
        used, kept = row.split("|")[2:4]
        assert set(re.findall(r"`(\w+)`", kept)) == case.cls.fixed_on_resume.keys()
        assert not set(re.findall(r"`(\w+)`", used)) & case.cls.fixed_on_resume.keys()


def test_arguments_before_there_are_clusters(shared: Path) -> None:
    callback = CentripetalSGD(keep_fraction=0.5)
    state = callback.state_dict()
    other = CentripetalSGD(keep_fraction=0.25)
    with pytest.warns(UserWarning, match=re.escape("the new values are used: keep_fraction: 0.5 -> 0.25")):
        other.load_state_dict(state)


def test_a_new_strength_is_forecast_for_the_steps_left(shared: Path) -> None:
    case = next(c for c in ONE_EACH if c.name == "csgd")
    callback, _, _ = resumed(case, shared, strength=0.5)
    plain, _, _ = resumed(case, shared)
    assert isinstance(callback, CentripetalSGD)
    assert callback.resolved_strength == 0.5
    assert callback.forecast_k > plain.forecast_k
    points = next(iter(callback.filterdiv_deviation().values()))
    assert [step for step, _, _ in points] == [0, 6, 12, 18]
    # The forecast does not know the momentum of the steps before.
    assert abs(math.log(points[-1][1] / points[-1][2])) < 1
    assert points[-1][1] < next(iter(plain.filterdiv_deviation().values()))[-1][1] / 2


def test_auto_is_resolved_again_for_another_length(tmp_path: Path) -> None:
    fit([CentripetalSGD(), ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)])
    strengths = []
    for epochs in (3, 8):
        callback = CentripetalSGD()
        fit([callback], ckpt_path=str(tmp_path / "step=6.ckpt"), max_epochs=epochs)
        strengths.append(callback.resolved_strength)
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["callbacks"][CentripetalSGD().state_key]
    assert strengths[0] == state["extra"]["strength"]
    assert strengths[1] < strengths[0]


def test_callbacks_that_only_look_use_new_values() -> None:
    state = FilterSimilarityMonitor(max_figures=2).state_dict()
    other = FilterSimilarityMonitor(max_figures=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_state_dict(state)
    assert other.max_figures == 1
    assert not FilterSimilarityMonitor.fixed_on_resume
    assert not EntropyDepthBound.fixed_on_resume
