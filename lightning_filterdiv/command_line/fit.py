"""``filterdiv fit``, ``validate`` and ``test``: LightningCLI that knows every callback here by its short name."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import pickle
import re
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_filterdiv
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import PICKLED, read_checkpoint, search_here
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
    _check_configurations(arguments)
    try:
        _FilterDivCLI(args=list(arguments), parser_kwargs={"prog": "filterdiv", "exit_on_error": False})
    except ArgumentError as error:
        more = f"The options are listed by: filterdiv {arguments[0]} --help"
        cause, meant = find_cause(str(error)), list(_meant(str(error)))
        first = meant if meant and "there is no class" in cause else [*filter(None, [cause]), *meant]
        raise CommandError("\n".join([*first, str(error), more])) from error


def _check_configurations(arguments: Sequence[str]) -> None:
    """Refuse what jsonargparse does not report: no name of a file, and a file that is no text.

    Raises:
        CommandError: one of the two.
    """
    for option, value in _values(arguments, ("-c", "--config")):
        if value == "":
            raise CommandError(f"{option} is empty, as an unset variable of a shell leaves it; name a YAML file")
        if os.path.isfile(value):
            try:
                Path(value).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CommandError(f"{option} {value} is not YAML in UTF-8 ({error}); name another file") from error


def _values(arguments: Sequence[str], options: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the values of ``options``, given after them or after ``=``."""
    for number, argument in enumerate(arguments):
        option, given, value = argument.partition("=")
        if option in options and (given or number + 1 < len(arguments)):
            yield option, value if given else arguments[number + 1]


class _FilterDivCLI(LightningCLI):
    refused: list[Exception]
    saved_arguments: Mapping[str, Any]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] for name in TRAINING}

    def parse_arguments(self, parser: Any, args: Any) -> None:
        # LightningCLI's own warns if both these arguments and a command line exist; here they are the same.
        self.config = parser.parse_args(args)
        section = self.config[self.config.subcommand]
        path, trusted = section.get("ckpt_path"), section.get("weights_only") is False
        self.saved_arguments = {} if path is None else _read_arguments(path, trusted)

    def _parse_ckpt_path(self) -> None:
        # Lightning's own takes class and arguments of the model from the file. It fails on one that a script saved,
        # which names no class, and on one with pickled objects.
        if "_class_path" in self.saved_arguments:
            with contextlib.suppress(pickle.UnpicklingError):
                super()._parse_ckpt_path()

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
            if not _raised_in(reason, "lightning_filterdiv", "lightning"):
                raise reason from None  # of a class of the user, who needs the traceback
            raise CommandError(f"{reason} (in the configuration)") from reason

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (MisconfigurationException, ValueError) as error:
            if not _raised_in(error, "lightning_filterdiv"):
                raise
            raise CommandError(str(error)) from error

    def _before(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(callback, FilterCallback):
                callback.check_launcher(self.trainer)  # setup would do it after the processes have started

    before_fit = before_validate = before_test = _before


def _raised_in(error: Exception, *packages: str) -> bool:
    """Whether code of one of ``packages`` raised ``error``; of other code the traceback is needed."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).partition(".")[0] in packages


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


def _read_arguments(path: str, trusted: bool) -> Mapping[str, Any]:
    """Open a checkpoint before Lightning does, which answers with a traceback, or (Lightning 2.5) unpickles it.

    Returns:
        The hyper-parameters of its model; none where Lightning has to find the file.

    Raises:
        CommandError: it is no checkpoint of Lightning's, is damaged, or holds more than tensors and plain values.
    """
    if path == "":
        raise CommandError(
            "--ckpt_path is empty, as an unset variable of a shell leaves it; name a file, or leave it out"
        )
    if not os.path.isfile(path):
        return {}  # a keyword such as "last", a URL, the folder of a sharded checkpoint, or nothing: Lightning says so
    try:
        checkpoint = read_checkpoint(Path(path), trusted)
    except CommandError as error:
        if PICKLED not in str(error):
            raise CommandError(f"--ckpt_path {error}") from error
        fix = "add --weights_only false" if _lightning_restrains_loading() else "load it in a script of your own"
        raise CommandError(f"the file of --ckpt_path {PICKLED}. If you trust where it comes from, {fix}") from error
    if "pytorch-lightning_version" not in checkpoint:
        raise CommandError(
            f"--ckpt_path {path} holds weights and no state of a training; name a file that Trainer or ModelCheckpoint "
            f"saved"
        )
    return checkpoint.get("hyper_parameters") or {}
