"""The ``filterdiv`` command: find the module of a command, run it, and report errors in one line."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.options import TRAINING, parse
from lightning_filterdiv.files import WriteError, printable

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``filterdiv``.

    Args:
        arguments: without the program name; ``None`` for the command line.

    Returns:
        The exit status: 0, or 2 if a network, a file or an option cannot be used, which stderr explains. Also 0 if the
        reader of stdout has gone (``filterdiv ... | head``). 130 after Ctrl-C.

    Raises:
        SystemExit: status 0 after ``--help`` or ``--version``; 2 if the arguments are wrong.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    # A module is imported when its command runs, because torch and Lightning take seconds.
    try:
        with _forgiving_output():
            if command in TRAINING:
                importlib.import_module("lightning_filterdiv.command_line.fit").run(arguments)
            else:
                options = parse(arguments)
                command = options.command
                run = importlib.import_module(f"lightning_filterdiv.command_line.{command}").run
                with _warnings_on_one_line(command):
                    run(options)
            sys.stdout.flush()
    except (CommandError, OSError) as error:
        if isinstance(error, BrokenPipeError) and command not in TRAINING:  # where it may be a worker's pipe
            _discard_output()
            return 0
        reason = "\n".join(map(printable, _reason(error).splitlines()))
        print(f"filterdiv {command}: {reason}", file=sys.stderr)
        if isinstance(error, OSError):
            _discard_output()
        return 2
    except KeyboardInterrupt:
        print(f"filterdiv {command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _reason(error: Exception) -> str:
    """Return the message of an error, without the number of a system error."""
    if isinstance(error, WriteError) or not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    return f"{error.filename or 'standard output'}: {error.strerror}"


@contextlib.contextmanager
def _forgiving_output() -> Iterator[None]:
    """Print characters that the encoding of stdout lacks as escapes."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    before = out.errors
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        out.reconfigure(errors=before)


@contextlib.contextmanager
def _warnings_on_one_line(command: str) -> Iterator[None]:
    """Print warnings for users without the line of code that they come from."""
    before = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        if category is not UserWarning:
            return before(message, category, *place, **more)
        return f"filterdiv {command}: warning: {printable(' '.join(str(message).split()))}\n"

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _discard_output() -> None:
    """Drop the buffer of stdout if it cannot be written. Python would try again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # a test's stdout has no descriptor
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
