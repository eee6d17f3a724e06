"""Runs of an experiment, one small JSON file each. Existing runs are kept, missing ones are made. Also means over runs.

Several processes may be given the same runs: they share the work.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy import stats

__all__ = [
    "LockError", "exclusive", "half_interval", "interval", "read_runs", "run_missing", "run_parser", "write_whole",
]  # fmt: skip


class LockError(RuntimeError):
    """The file system of the results has no locks."""


def run_parser(description: str | None, arms: Iterable[str], seeds: list[int], out: Path) -> argparse.ArgumentParser:
    """Return a command line with ``--arms``, ``--seeds``, ``--out`` and ``--table``.

    Args:
        description: the module's docstring.
        arms: arms to compare; all by default.
        seeds: default.
        out: default folder of the results.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--table", action="store_true", help="print the tables of finished runs and stop")
    return parser


def write_whole(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that an interrupted run leaves no partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # several processes may write the same one
    scratch.write_text(text)
    scratch.replace(path)


@contextmanager
def exclusive(path: Path, wait: bool) -> Iterator[int | None]:
    """File descriptor of a lock, ``None`` if another process holds it; it goes with the process, however that ends.

    Args:
        path: file of the lock; it and its folder are made, and stay.
        wait: for the process that holds it.

    Raises:
        LockError: the file system has no locks; the message says what to do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        except OSError as error:  # some network file systems are mounted without
            raise LockError(
                f"{path.parent} cannot be locked ({error}): choose an --out on another file system"
            ) from error
        yield file.fileno()


def read_runs(folder: Path, names: Iterable[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """Name -> its results by seed, without what has not run.

    Args:
        folder: folder of ``NAME-seedN.json`` files.
        names: which, in this order; by default all by name, the baseline first.

    Raises:
        FileNotFoundError: the folder holds no result.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        found.setdefault(path.name.rpartition("-seed")[0], []).append(json.loads(path.read_text()))
    if not found:
        raise FileNotFoundError(f"no NAME-seedN.json in {folder}")
    order = list(names) or sorted(found, key=lambda name: (name != "baseline", name))
    return {name: sorted(found[name], key=lambda run: int(run["seed"])) for name in order if name in found}


def half_interval(values: Sequence[float]) -> float:
    """Return half the 95 % interval of a mean (Student's t); NaN for one or two values."""
    if len(values) < 3:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def interval(values: Sequence[float], sign: str = "") -> str:
    """Return mean and half the 95 % interval, as ``"87.13 ± 0.31"``; the mean alone for one or two values."""
    shown = f"{fmean(values):{sign}.2f}"
    return shown if len(values) < 3 else f"{shown} ± {half_interval(values):.2f}"


def run_missing(
    options: argparse.Namespace, run: Callable[[str, int], dict[str, Any]], table: Callable[[Path], str]
) -> None:
    """Make every run of :func:`run_parser`'s options whose file does not exist, on one thread, seed by seed.

    With ``--table`` print the table of what is there instead.

    One process at a time works on a seed, because its runs may start from one another. Seeds that another process works
    on come last, and are taken over if that process leaves them unfinished.

    Args:
        options: what the parser returned.
        run: (arm, seed) -> result with a ``test_accuracy``.
        table: folder -> tables of finished runs, in Markdown.

    Raises:
        LockError: the file system of ``--out`` has no locks.
    """
    if options.table:
        finished = any(options.out.glob("*-seed*.json"))
        print(table(options.out) if finished else f"No run in {options.out} is finished; start them without --table.")
        return
    torch.set_num_threads(1)
    seeds = list(options.seeds)
    for wait in (False, True):
        elsewhere = []
        for seed in seeds:
            with exclusive(options.out / ".partial" / f"seed{seed}.lock", wait) as lock:
                if lock is None:
                    elsewhere.append(seed)
                    continue
                for arm in options.arms:
                    path = options.out / f"{arm}-seed{seed}.json"
                    if path.exists():
                        continue
                    result = run(arm, seed)
                    write_whole(path, json.dumps(result, indent=1) + "\n")
                    print(f"{arm} seed {seed}: {100 * result['test_accuracy']:.2f} %", flush=True)
        seeds = elsewhere
