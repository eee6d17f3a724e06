"""What the command line accepts, and that it is what the modules behind it accept."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, get_args

import pytest

from lightning_filterdiv.command_line import demo
from lightning_filterdiv.command_line.options import COMMANDS, parse
from lightning_filterdiv.entropy_depth.functional import Rounding, Unit
from lightning_filterdiv.narrowing import Importance
from lightning_filterdiv.narrowing.widths import Scope

_MODEL = {"model": None, "config": None, "trust_pickle": False}
_REPORT = {
    "weights": None,
    "data": None,
    "root": None,
    "max_images": 64,
    "overwrite": False,
    "threshold": 0.9,
    "include": None,
    "exclude": None,
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo"], {"method": ["csgd"], "data": "digits", "epochs": 15, "seed": 0, "out": Path("filterdiv_demo")}),
        (
            ["inspect", "a.ckpt"],
            {
                "source": "a.ckpt",
                "out": Path("report"),
                "max_figures": 8,
                **_REPORT,
                **_MODEL,
            },
        ),
        (
            ["compare", "a.ckpt", "timm:b"],
            {"first": "a.ckpt", "second": "timm:b", "out": Path("comparison"), **_REPORT, **_MODEL},
        ),
        (
            ["merge", "a.ckpt", "--out", "b.pt", "--input-shape", "1,3,8,8"],
            {
                "checkpoint": Path("a.ckpt"),
                "out": Path("b.pt"),
                "input_shape": (1, 3, 8, 8),
                "tolerance": 1e-3,
                "pairs": 20,
                "twins": None,
                "onnx": None,
                **_MODEL,
            },
        ),
        (
            ["prune", "torchvision:resnet18", "--out", "b.pt", "--target-macs", "0.5"],
            {
                "source": "torchvision:resnet18",
                "out": Path("b.pt"),
                "importance": "l2",
                "keep_fraction": None,
                "target_macs": 0.5,
                "target_parameters": None,
                "scope": "layer",
                "max_layer_fraction": None,
                "channels_multiple": 1,
                "include": None,
                "exclude": None,
                "network": None,
                "input_shape": None,
                "data": None,
                "seed": 0,
                "pairs": 20,
                "onnx": None,
                **_MODEL,
            },
        ),
        (
            ["entropy", "--data", "digits", "--input-size", "8", "9"],
            {
                "data": "digits",
                "root": None,
                "unit": "nats",
                "rounding": "ceil",
                "max_images": None,
                "input_size": [8, 9],
                **_MODEL,
            },
        ),
    ],
)
def test_options_and_defaults(arguments: list[str], expected: dict[str, Any]) -> None:
    assert vars(parse(arguments)) == expected | {"command": arguments[0]}


def _accepted(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Choices of the last option, as its error lists them."""
    with pytest.raises(SystemExit):
        parse([*arguments, "?"])
    listed = capsys.readouterr().err.partition("(choose from ")[2].partition(")")[0]
    return [choice.strip("'") for choice in listed.split(", ")]


def test_choices_are_those_of_the_modules(capsys: pytest.CaptureFixture[str]) -> None:
    """The options stand in a file that imports no torch, so that their choices are written down twice."""
    entropy = ("entropy", "--data", "digits")
    assert _accepted(capsys, *entropy, "--unit") == list(get_args(Unit))
    assert _accepted(capsys, *entropy, "--rounding") == list(get_args(Rounding))
    pruning = ("prune", "torchvision:resnet18", "--out", "a.pt")
    assert _accepted(capsys, *pruning, "--importance") == [name for name in get_args(Importance) if name != "gates"]
    assert _accepted(capsys, *pruning, "--scope") == list(get_args(Scope))
    assert _accepted(capsys, "demo", "--method") == list(demo.METHODS)
    assert _accepted(capsys, "demo", "--data") == list(demo.DATA)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_module_that_runs_it(command: str) -> None:
    assert callable(importlib.import_module(f"lightning_filterdiv.command_line.{command}").run)
