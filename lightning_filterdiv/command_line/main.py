"""The ``filterdiv`` command."""

from __future__ import annotations

import argparse
import difflib
import os
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch

import lightning_filterdiv
from lightning_filterdiv.command_line import demo, entropy, inspect, merge
from lightning_filterdiv.command_line.model_source import PICKLED, ModelSourceError
from lightning_filterdiv.filters import NoLayersError

__all__ = ["main"]

_TRAINING = {
    "fit": "train a LightningModule from YAML or flags, all callbacks available by short name",
    "validate": "validate it",
    "test": "test it",
}


def _closest_callbacks(message: str) -> str:
    """What a class that does not exist may have been meant for; jsonargparse names none."""
    missing = re.search(r"Expected a dot import path string: (\w+)", message)
    known = [name for name in lightning_filterdiv.__all__ if name[0].isupper() and name != "FilterCallback"]
    near = difflib.get_close_matches(missing[1], known, n=1, cutoff=0.4) if missing else []
    return f"\nThere is no class {missing[1]!r}; the closest callback is {near[0]!r}" if missing and near else ""


def _lightning_restrains_loading() -> bool:
    """Whether Trainer can load checkpoints without unpickling, as it does from Lightning 2.6 on."""
    from lightning.pytorch import Trainer

    return "weights_only" in signature(Trainer.fit).parameters


def _refuse_pickles(path: str) -> None:
    """Open the file before Lightning does, which would unpickle it.

    Raises:
        ModelSourceError: it holds more than tensors and plain values.
    """
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelSourceError(
            f"the file of --ckpt_path {PICKLED}. If you trust where it comes from, load it in a script of your own"
        ) from error


def _training(arguments: Sequence[str]) -> int:
    """LightningCLI; importing the package has registered every callback by its short name."""
    from lightning.pytorch.cli import LightningCLI

    class FilterDivCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            known = LightningCLI.subcommands()
            return {name: known[name] for name in _TRAINING}

        def init_parser(self, **options: Any) -> Any:
            parser = super().init_parser(**options)
            plain = parser.error

            def error(message: str, *rest: Any, **more: Any) -> Any:
                return plain(message + _closest_callbacks(message), *rest, **more)

            parser.error = error  # type: ignore[method-assign]
            return parser

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except ValueError as error:
                # A constructor of ours refused a value: jsonargparse hides its words among every type that did not fit.
                reasons = [line.strip()[2:] for line in str(error).splitlines() if line.strip().startswith("- ")]
                ours = [reason for reason in reasons if not reason.startswith(("Expected a ", "Not a valid subclass"))]
                if not ours or "Does not validate" not in str(error):
                    raise
                print(f"filterdiv {arguments[0]}: {ours[0]} (in the configuration)", file=sys.stderr)
                raise SystemExit(2) from error

        def _before(self) -> None:
            path = self.config[self.subcommand].get("ckpt_path")
            if path is not None and os.path.isfile(path) and not _lightning_restrains_loading():
                _refuse_pickles(path)

        before_fit = before_validate = before_test = _before

    # A console script does not search the current folder, where users keep the classes that their YAML names.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        FilterDivCLI(args=list(arguments), parser_kwargs={"prog": "filterdiv"})
    except pickle.UnpicklingError as error:
        raise ModelSourceError(
            f"the file of --ckpt_path {PICKLED}. If you trust where it comes from, add --weights_only false"
        ) from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="filterdiv", description="Train networks with diverse filters, and look at how diverse they are."
    )
    parser.add_argument("--version", action="version", version=f"filterdiv {lightning_filterdiv.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo.add_arguments(
        commands.add_parser(
            "demo",
            help="train a small network on real digits, plain and with a callback",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    merge.add_arguments(
        commands.add_parser("merge", help="make the narrow network from a checkpoint of a fit with CentripetalSGD")
    )
    entropy.add_arguments(
        commands.add_parser(
            "entropy",
            help="how deep a network can usefully be for a data set",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    inspect.add_arguments(commands.add_parser("inspect", help="say how redundant the filters of a network are"))
    for name, text in _TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": demo.run,
    "merge": merge.run,
    "entropy": entropy.run,
    "inspect": inspect.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``filterdiv``.

    Args:
        arguments: without the program name; ``None`` for the command line.

    Returns:
        The exit status: 2 when a network, a file or a folder cannot be used, which one line on stderr explains.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in _TRAINING:
        try:
            return _training(arguments)
        except ModelSourceError as error:
            return _failed(arguments[0], error)
    options = _parser().parse_args(arguments)
    try:
        return _COMMANDS[options.command](options)
    except (ModelSourceError, NoLayersError, OSError) as error:
        return _failed(options.command, error)


def _failed(command: str, error: Exception) -> int:
    print(f"filterdiv {command}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
