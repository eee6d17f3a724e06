"""``filterdiv methods``: all methods with what we measured. Nothing here imports torch."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from importlib.resources import files

__all__ = ["FILE", "describe_methods", "run"]

#: Written by ``python -m benchmarks.tables.cards`` of the repository, from the result files of the benchmarks.
FILE = "methods.json"


def run(options: argparse.Namespace) -> None:
    """Print the list."""
    print(describe_methods(min(shutil.get_terminal_size().columns, 120)))


def describe_methods(width: int = 100) -> str:
    """Return all methods in parts: name, one line, and what was measured.

    Args:
        width: characters per line, at least 40.
    """
    content = json.loads(files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    lines: list[str] = []
    for part in content["parts"]:
        lines += [*textwrap.wrap(part["title"], width), ""]
        for method in part["methods"]:
            lines += textwrap.wrap(f"{method['name']}: {method['does']}", width, subsequent_indent="    ")
            lines += textwrap.wrap(
                f"measured: {method['measured']}", width, initial_indent="    ", subsequent_indent="    "
            )
        lines.append("")
    return "\n".join([*lines, *textwrap.wrap(content["note"], width)])
