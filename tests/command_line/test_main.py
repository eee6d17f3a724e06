"""The ``filterdiv`` command: what it answers without importing torch, and what wrong commands get."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import lightning_filterdiv
from lightning_filterdiv.command_line.options import COMMANDS, TRAINING

#: ``python -m lightning_filterdiv`` where every import of something heavy fails; at the end stderr says what is loaded.
LIGHT = """
import runpy, sys

HEAVY = {"lightning", "lightning_fabric", "matplotlib", "numpy", "pytorch_lightning", "sklearn", "torch", "torchvision"}

class Refuses:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in HEAVY, f"imports {name}"

sys.meta_path.insert(0, Refuses())
try:
    runpy.run_module("lightning_filterdiv", run_name="__main__")
finally:
    assert not HEAVY & set(sys.modules)
"""


def light(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True)


def test_version_needs_no_torch() -> None:
    done = light("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"filterdiv {lightning_filterdiv.__version__}\n"


def test_help_needs_no_torch() -> None:
    done = light("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in [*COMMANDS, *TRAINING]:
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_no_torch(command: str) -> None:
    done = light(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: filterdiv {command} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspct"], "there is no command 'inspct'; did you mean 'inspect'?"),
        (["entrpy", "--data", "digits"], "there is no command 'entrpy'; did you mean 'entropy'?"),
        (["fitt", "--config", "run.yaml"], "there is no command 'fitt'; did you mean 'fit'?"),
        (
            ["dance"],
            "there is no command 'dance'; the commands are demo, methods, inspect, compare, merge, prune, entropy, ",
        ),
        ([], "the following arguments are required: COMMAND"),
        (["--dance"], "the following arguments are required: COMMAND"),
        (["demo", "--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["demo", "--data", "imagenet"], "argument --data: invalid choice: 'imagenet'"),
        (["demo", "--epochs", "few"], "argument --epochs: invalid int value: 'few'"),
        (["inspect", "a.pt", "--model", "a:B", "--config", "c.yaml"], "not allowed with argument --model"),
        (["merge", "a.ckpt", "--out", "b.pt", "--input-shape", "1,0"], "integers such as 1,3,224,224, got '1,0'"),
        (["merge", "a.ckpt", "--out", ""], "the argument after '--out' is empty, as an unset variable of a shell"),
        (["inspect", "a.ckpt", "--out="], "--out= is empty, as an unset variable of a shell leaves it; give a value"),
        (["inspect", "a.ckpt", "--exclude", "b", ""], "the argument after 'b' is empty"),
        (["compare", "a.ckpt", ""], "the argument after 'a.ckpt' is empty"),
        (["demo", "--out", ""], "the argument after '--out' is empty"),
        ([""], "there is no command ''; the commands are demo"),
    ],
)
def test_wrong_commands_need_no_torch(arguments: list[str], message: str) -> None:
    done = light(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert re.fullmatch(r"(filterdiv(?: [a-z]+)?): .+; see \1 --help\n", done.stderr), "one line, without the usage"
    assert not done.stdout


def test_a_command_that_computes_is_caught_importing() -> None:
    """The tests above notice an import."""
    done = light("entropy", "--data", "digits")
    assert done.returncode == 1
    assert "AssertionError: imports torch" in done.stderr or "AssertionError: imports numpy" in done.stderr
