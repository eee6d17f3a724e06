"""``filterdiv fit``, ``validate`` and ``test``: LightningCLI that knows every callback here by its short name."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import pickle
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_filterdiv
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import PICKLED, read_checkpoint, search_here
from lightning_filterdiv.command_line.options import TRAINING
from lightning_filterdiv.command_line.yaml_errors import find_cause
from lightning_filterdiv.training.callback import FilterCallback

__all__ = ["FilterDivCLI", "run"]

#: Imports every room, because LightningCLI knows only imported classes.
_PUBLIC = [getattr(lightning_filterdiv, name) for name in lightning_filterdiv.__all__]

#: What a configuration holds beside the options of Trainer.
_SECTIONS = ("model", "data", "trainer", "optimizer", "lr_scheduler", "ckpt_path", "seed_everything")
_EXAMPLE = """ Callbacks of this package are known by name, in YAML and as in
--trainer.callbacks+=RePr --trainer.callbacks.cycles=2"""
_UNKNOWN_OPTION = re.compile(r"does not accept option '([^']+)'$|[Uu]nrecognized arguments: --([\w.]+)")


def run(arguments: Sequence[str]) -> None:
    """Run LightningCLI.

    Args:
        arguments: one of :data:`~lightning_filterdiv.command_line.options.TRAINING` and its options.

    Raises:
        CommandError: an argument, a value in the configuration or the checkpoint cannot be used.
        SystemExit: status 0 after ``--help``.
    """
    search_here()
    for option, value in _values(arguments):
        if option in ("-c", "--config") and value == "":
            raise CommandError(f"{option} is empty, as an unset variable of a shell leaves it; name a YAML file")
    try:
        descriptions = {
            name: {"description": f"{text[0].upper()}{text[1:]}.{_EXAMPLE}"} for name, text in TRAINING.items()
        }
        FilterDivCLI(args=list(arguments), parser_kwargs={"prog": "filterdiv", **descriptions})
    except _ConfigurationError as error:
        raise CommandError(f"{error}\nThe options are listed by: filterdiv {arguments[0]} --help") from error


def _values(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield options with their values, given after them or after ``=``."""
    for number, argument in enumerate(arguments):
        option, given, value = argument.partition("=")
        if given or number + 1 < len(arguments):
            yield option, value if given else arguments[number + 1]


class _ConfigurationError(CommandError):
    """Option or value that the parser refuses."""


class _SaveConfiguration(SaveConfigCallback):
    """Saves the configuration as Lightning does. A fit that ends before its first batch takes the file back."""

    trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the configuration.

        Raises:
            CommandError: an earlier run has left one in the folder.
        """
        try:
            super().setup(trainer, pl_module, stage)
        except RuntimeError as error:
            if "to NOT exist" not in str(error):
                raise
            raise CommandError(
                f"{self._path(trainer)} is of an earlier run and would be lost; move it, or name another folder with "
                f"--trainer.default_root_dir"
            ) from error

    def on_train_batch_start(self, *_: Any) -> None:
        """Note that from now on the file belongs to a training."""
        self.trained = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the file if nothing was trained, so that the corrected command can be run again."""
        if self.already_saved and self.save_to_log_dir and not self.trained and trainer.is_global_zero:
            self._path(trainer).unlink(missing_ok=True)

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.log_dir or ".", self.config_filename)


class FilterDivCLI(LightningCLI):
    """LightningCLI that knows the callbacks here by their short names and says in one line what it cannot use.

    ``filterdiv fit`` runs it. A script of your own can use it in place of ``LightningCLI``, with the same arguments.

    Raises:
        CommandError: an argument, a value in the configuration or the checkpoint cannot be used. The message names the
            callback, the argument, the value and what is allowed.
    """

    refused: list[Exception]
    saved_arguments: Mapping[str, Any]

    def __init__(
        self,
        model_class: Any = None,
        datamodule_class: Any = None,
        save_config_callback: type[SaveConfigCallback] | None = _SaveConfiguration,
        *more: Any,
        **options: Any,
    ) -> None:
        super().__init__(model_class, datamodule_class, save_config_callback, *more, **options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return fit, validate and test, each with the arguments that are not options."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in TRAINING}

    def init_parser(self, **options: Any) -> Any:
        """Return a parser that raises its errors."""
        return super().init_parser(**{"exit_on_error": False} | options)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the command line.

        Raises:
            CommandError: an option or a value cannot be used.
        """
        # LightningCLI's own method warns if there are arguments and a command line. Here they are the same.
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, UnicodeDecodeError) as error:
            reason = str(error)
            if "codec can't decode" not in reason:
                raise _ConfigurationError(_in_one_line(reason)) from None
            named = [f"{option} {value}" for option, value in _values(args or sys.argv[1:]) if _is_binary(value)]
            file = named[0] if named else "a file that the configuration names"
            raise CommandError(f"{file} is not YAML in UTF-8; name another file") from error
        section = self.config[self.config.subcommand] if self.config.get("subcommand") else self.config
        path, trusted = section.get("ckpt_path"), section.get("weights_only") is False
        self.saved_arguments = {} if path is None else _read_arguments(path, trusted)

    def _parse_ckpt_path(self) -> None:
        # Lightning's own takes class and arguments of the model from the file. It fails on one that a script saved,
        # which names no class, and on one with pickled objects.
        if "_class_path" in self.saved_arguments:
            with contextlib.suppress(pickle.UnpicklingError):
                super()._parse_ckpt_path()

    def setup_parser(self, *arguments: Any, **options: Any) -> None:
        """Add what keeps the first error of a constructor."""
        super().setup_parser(*arguments, **options)
        # jsonargparse tries every type of a union, and its error lists each failure as text. Errors of constructors are
        # therefore stored where they are raised. LightningCLI registers constructors of models and data by the same
        # method.
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
        """Construct callbacks, model, data and trainer.

        Raises:
            CommandError: a class of Lightning or of this package refuses an argument.
        """
        try:
            super().instantiate_classes()
        except Exception:
            if not self.refused:
                raise
            reason = self.refused[0]
            if not _raised_in(reason, "lightning_filterdiv", "lightning"):
                raise reason from None  # an error in a user's class: the user needs the traceback
            raise CommandError(f"{reason} (in the configuration)") from reason

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if isinstance(error, (MisconfigurationException, ValueError)) and _raised_in(error, "lightning_filterdiv"):
                raise CommandError(str(error)) from error
            if _raised_in(error, "lightning", "torch", "packaging") and (part := _unrestored(error)):
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                raise CommandError(
                    f"--ckpt_path {self.config[subcommand].ckpt_path}: its {part} cannot be restored ({cause}). The "
                    f"file is damaged, or of another network, optimizer or trainer; name another checkpoint"
                ) from error
            raise

    def _before(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(callback, FilterCallback):
                callback.check_launcher(self.trainer)  # setup would do it after the processes have started

    before_fit = before_validate = before_test = _before


def _raised_in(error: Exception, *packages: str) -> bool:
    """Whether code of one of ``packages`` raised ``error``; of other code the traceback is needed."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).partition(".")[0] in packages


def _unrestored(error: Exception) -> str:
    """Name the part of a checkpoint that Trainer failed to restore; empty if ``error`` has another origin."""
    if isinstance(error, OSError):  # there is no such file
        return ""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_code.co_name for frame in frames if frame.f_globals["__name__"] == checkpoint_connector.__name__]
    if names[-1:] == ["resume_start"]:
        return "version"
    return names[-1].removeprefix("restore_").replace("_", " ") if names and "restore_" in names[-1] else ""


def _is_binary(path: str) -> bool:
    try:
        Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _in_one_line(message: str) -> str:
    """Return the cause of an error of jsonargparse, or the whole message if its form is unknown."""
    cause, meant = find_cause(message), list(_meant(message))
    if meant and (not cause or "there is no class" in cause):
        return "\n".join(meant if cause else [*meant, message])
    if unknown := _UNKNOWN_OPTION.search(message):
        trainer = (f"trainer.{name}" for name in signature(Trainer).parameters)
        near = difflib.get_close_matches(unknown[1] or unknown[2], [*_SECTIONS, *trainer], n=1, cutoff=0.7)
        return f"{message}; did you mean {near[0]!r}?" if near else message
    return cause or message


def _meant(message: str) -> Iterator[str]:
    """Yield the callback that a word in ``message`` is close to.

    jsonargparse makes no suggestions, and names the missing class only inside its message.
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
    """True if Trainer can load checkpoints without unpickling, as it does from Lightning 2.6 on."""
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
