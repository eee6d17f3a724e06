"""Options of the command line, which agree with the modules behind them."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from lightning_filterdiv.command_line import demo
from lightning_filterdiv.command_line.options import COMMANDS, TRAINING, parse
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
                "source": "a.ckpt",
                "weights": None,
                "network": None,
                "include": None,
                "exclude": None,
                "out": Path("b.pt"),
                "input_shape": (1, 3, 8, 8),
                "tolerance": 1e-3,
                "pairs": 20,
                "twins": None,
                "form": "auto",
                "onnx": None,
                "overwrite": False,
                **_MODEL,
            },
        ),
        (
            ["prune", "torchvision:resnet18", "--out", "b.pt", "--target-macs", "0.5"],
            {
                "source": "torchvision:resnet18",
                "out": Path("b.pt"),
                "weights": None,
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
                "form": "auto",
                "onnx": None,
                "overwrite": False,
                **_MODEL,
            },
        ),
        (["methods"], {}),
        (
            ["entropy", "--data", "digits", "--input-shape", "1,1,8,9"],
            {
                "data": "digits",
                "root": None,
                "unit": "nats",
                "rounding": "ceil",
                "max_images": None,
                "input_shape": (1, 1, 8, 9),
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
    assert _accepted(capsys, *pruning, "--importance") == list(get_args(Importance))
    assert _accepted(capsys, *pruning, "--scope") == list(get_args(Scope))
    assert _accepted(capsys, "demo", "--method") == list(demo.METHODS)
    assert _accepted(capsys, "demo", "--data") == list(demo.DATA)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_module_that_runs_it(command: str) -> None:
    assert callable(importlib.import_module(f"lightning_filterdiv.command_line.{command}").run)


def _options(command: str) -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    COMMANDS[command][2](parser)
    return parser._actions[1:]


@pytest.mark.parametrize("command", COMMANDS)
def test_one_style_of_options(command: str) -> None:
    """Hyphens, a value in capitals, help that is no fragment, a default that the formatter adds."""
    for option in _options(command):
        (name,) = option.option_strings or [option.metavar]
        assert re.fullmatch(r"--[a-z]+(-[a-z]+)*|[A-Z]+", str(name)), name
        assert option.nargs == 0 or option.choices or str(option.metavar).isupper() or "." in str(option.metavar), name
        assert option.help
        assert not option.help.startswith(("of ", "for ", "its ")), name
        assert "%(default)" not in option.help, name
        known = f"{name} means something else elsewhere"
        if name in ("--out", "--seed", "--max-images", "--data"):
            continue
        for other in COMMANDS:
            for same in _options(other):
                assert name not in same.option_strings or (option.metavar, option.type, option.nargs) == (
                    same.metavar,
                    same.type,
                    same.nargs,
                ), known


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_each_default_once(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in _options(command):
        if option.option_strings and option.default is not None and option.default is not False:
            default = " ".join(option.default) if isinstance(option.default, list) else option.default
            assert text.count(f"(default: {default})") >= 1, option.option_strings
    assert "(default: None)" not in text
    assert not re.search(r"\(default[^()]*\) \(default", text)


def test_every_command_that_writes_files_keeps_what_is_there() -> None:
    """``demo`` has a new folder for every run instead."""
    writing = {c for c in COMMANDS if any("--out" in option.option_strings for option in _options(c))}
    keeping = {c for c in COMMANDS if any("--overwrite" in option.option_strings for option in _options(c))}
    assert writing - keeping == {"demo"}
    assert not set(TRAINING) & set(COMMANDS)
