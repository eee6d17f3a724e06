"""``filterdiv fit``, ``validate`` and ``test``: LightningCLI that knows every callback here by its short name."""

from __future__ import annotations

import difflib
import functools
import os
import pickle
import re
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_filterdiv
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import PICKLED, search_here
from lightning_filterdiv.command_line.options import TRAINING
from lightning_filterdiv.command_line.yaml_errors import find_cause
from lightning_filterdiv.training.callback import FilterCallback

__all__ = ["run"]

#: LightningCLI knows the classes that are imported, and rooms are imported on first use.
_PUBLIC = [getattr(lightning_filterdiv, name) for name in lightning_filterdiv.__all__]


def run(arguments: Sequence[str]) -> None:
    """Run LightningCLI.

    Args:
        arguments: one of :data:`~lightning_filterdiv.command_line.options.TRAINING` and its options.

    Raises:
        CommandError: an argument, a value in the configuration or the checkpoint cannot be used.
        SystemExit: status 0 after ``--help``.
    """
    search_here()
    try:
        _FilterDivCLI(args=list(arguments), parser_kwargs={"prog": "filterdiv", "exit_on_error": False})
    except ArgumentError as error:
        more = f"The options are listed by: filterdiv {arguments[0]} --help"
        cause, meant = find_cause(str(error)), list(_meant(str(error)))
        first = meant if meant and "there is no class" in cause else [*filter(None, [cause]), *meant]
        raise CommandError("\n".join([*first, str(error), more])) from error
    except pickle.UnpicklingError as error:
        raise CommandError(
            f"the file of --ckpt_path {PICKLED}. If you trust where it comes from, add --weights_only false"
        ) from error


class _FilterDivCLI(LightningCLI):
    refused: list[Exception]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] for name in TRAINING}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        # LightningCLI's own warns if both these arguments and a command line exist; here they are the same.
        self.config = parser.parse_args(args)

    def setup_parser(self, *arguments: Any, **options: Any) -> None:
        super().setup_parser(*arguments, **options)
        # jsonargparse tries every type of a union, and its error lists each failure as text. An error of a constructor
        # is kept where it happens. LightningCLI adds what constructs models and data by the same method.
        self.refused = []
        add = self.parser.add_instantiator

        def add_observed(construct: Callable[..., Any], *rest: Any, **more: Any) -> None:
            add(self._observed(construct), *rest, **more)

        self.parser.add_instantiator = add_observed
        self.parser.add_instantiator(lambda cls, *values, **named: cls(*values, **named), Callback)

    def _observed(self, construct: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(construct)
        def observed(*values: Any, **named: Any) -> Any:
            try:
                return construct(*values, **named)
            except Exception as error:
                self.refused.append(error)
                raise

        return observed

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception:
            if not self.refused:
                raise
            reason = self.refused[0]
            *_, (frame, _) = traceback.walk_tb(reason.__traceback__)
            if frame.f_globals["__name__"].partition(".")[0] not in ("lightning_filterdiv", "lightning"):
                raise reason from None  # of a class of the user, who needs the traceback
            raise CommandError(f"{reason} (in the configuration)") from reason

    def _before(self) -> None:
        for callback in self.trainer.callbacks:
            if isinstance(callback, FilterCallback):
                try:
                    callback.check_launcher(self.trainer)  # setup would do it after the processes have started
                except MisconfigurationException as error:
                    raise CommandError(str(error)) from error
        path = self.config[self.subcommand].get("ckpt_path")
        if path is not None and os.path.isfile(path) and not _lightning_restrains_loading():
            _refuse_pickles(path)

    before_fit = before_validate = before_test = _before


def _meant(message: str) -> Iterator[str]:
    """Yield the callback that a word in ``message`` is close to.

    jsonargparse suggests nothing and gives the class that it did not find only in its message, which quotes it.
    """
    callbacks = [value.__name__ for value in _PUBLIC if isinstance(value, type) and issubclass(value, Callback)]
    known = {"Callback", *(cls.__name__ for cls in _subclasses(Callback))}
    for word in dict.fromkeys(re.findall(r"\w+", message)):
        if word not in known and (near := difflib.get_close_matches(word, callbacks, n=1, cutoff=0.7)):
            yield f"There is no callback {word!r}; did you mean {near[0]!r}?"


def _subclasses(cls: type[object]) -> Iterator[type[object]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _lightning_restrains_loading() -> bool:
    """Whether Trainer can load checkpoints without unpickling, as it does from Lightning 2.6 on."""
    return "weights_only" in signature(Trainer.fit).parameters


def _refuse_pickles(path: str) -> None:
    """Open the file before Lightning does, which would unpickle it.

    Raises:
        CommandError: it holds more than tensors and plain values.
    """
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CommandError(
            f"the file of --ckpt_path {PICKLED}. If you trust where it comes from, load it in a script of your own"
        ) from error
