"""The ``filterdiv`` command: find the module of a command, run it, and report what it cannot use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.options import TRAINING, parse

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``filterdiv``.

    Args:
        arguments: without the program name; ``None`` for the command line.

    Returns:
        The exit status: 0, or 2 if a network, a file or an option cannot be used, which stderr explains.

    Raises:
        SystemExit: status 0 after ``--help`` or ``--version``; 2 if the arguments are wrong.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    # A module is imported when its command runs: torch and Lightning take seconds.
    try:
        if command in TRAINING:
            importlib.import_module("lightning_filterdiv.command_line.fit").run(arguments)
        else:
            options = parse(arguments)
            command = options.command
            importlib.import_module(f"lightning_filterdiv.command_line.{command}").run(options)
    except (CommandError, OSError) as error:
        print(f"filterdiv {command}: {error}", file=sys.stderr)
        return 2
    return 0
