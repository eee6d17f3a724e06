"""``filterdiv compare``: two networks side by side, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.inspect import Inspected, check_options, inspect_network, write_report
from lightning_filterdiv.monitor.comparison_report import (
    Side,
    comparison_csv,
    comparison_page,
    comparison_text,
    pair_layers,
)

__all__ = ["run"]


def run(options: argparse.Namespace) -> None:
    """Write ``report.txt``, ``report.csv`` and ``index.html``, and print the table.

    Raises:
        CommandError: a network, a file, an option or the folder cannot be used, or a pattern matches no layer.
    """
    _check_used(options)
    check_options(options)
    first, second = (inspect_network(source, options) for source in (options.first, options.second))
    pairs = pair_layers(first.rows, second.rows)
    heading = "\n".join(
        [
            f"Filter redundancy of {first.title} (A) and {second.title} (B)",
            *(f"{letter}: {note}" for letter, found in (("A", first), ("B", second)) for note in found.notes),
        ]
    )
    text = comparison_text(pairs, heading)
    page = comparison_page(pairs, _side(first), _side(second), options.threshold)
    write_report(options.out, text, comparison_csv(pairs), page, {})
    print(f"{text}\n\nwritten to {options.out}: report.txt, report.csv and index.html")


def _check_used(options: argparse.Namespace) -> None:
    """Refuse an option that neither network has a use for; one of them may.

    Raises:
        CommandError: there is one.
    """
    sources = (options.first, options.second)
    names = [":" in source and not Path(source).exists() for source in sources]
    if options.weights is not None and not any(names):
        raise CommandError("--weights belongs to torchvision:NAME and timm:NAME; both networks here are files")
    if (options.model is not None or options.config is not None) and all(names):
        raise CommandError("--model and --config belong to a file; both networks here are named already")


def _side(found: Inspected) -> Side:
    return Side(found.title, " ".join(found.notes), found.rows, found.views(), found.correlations)
