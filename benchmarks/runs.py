"""Runs of an experiment, one small JSON file each: what is there is kept, the rest is made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["run_missing", "run_parser"]


def run_parser(
    description: str | None, option: str, choices: Sequence[Any], seeds: list[int], out: Path
) -> argparse.ArgumentParser:
    """A command line with ``option`` (which runs), ``--seeds``, ``--out`` and ``--table``.

    Args:
        description: the module's docstring.
        option: such as ``--arms``.
        choices: what it may name; all by default.
        seeds: default.
        out: default folder of the results.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = list(choices)
    parser.add_argument(option, nargs="+", type=type(which[0]), choices=which, default=which, dest="which")
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--table", action="store_true", help="print the tables of finished runs and stop")
    return parser


def _text(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=1) + "\n"


def run_missing(
    options: argparse.Namespace,
    run: Callable[[Any, int], dict[str, Any]],
    prefix: str = "",
    text: Callable[[dict[str, Any]], str] = _text,
) -> None:
    """Make every run of :func:`run_parser`'s options whose file does not exist, on one thread, seed by seed.

    Args:
        options: what the parser returned.
        run: (which, seed) -> result with a ``test_accuracy``.
        prefix: of the files, before the name of the run.
        text: of a result.
    """
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for which in options.which:
            path = options.out / f"{prefix}{which}-seed{seed}.json"
            if path.exists():
                continue
            result = run(which, seed)
            scratch = path.with_suffix(".tmp")  # a run that is cut off leaves no half file
            scratch.write_text(text(result))
            scratch.replace(path)
            print(f"{prefix}{which} seed {seed}: {100 * result['test_accuracy']:.2f} %", flush=True)
