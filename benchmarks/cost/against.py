"""Measure the package of this tree and that of another commit in one run.

Each version runs in its own process. The process prepares a case on the first request and then repeats it on demand.
The versions are asked in turn, in random order, so that a busy minute of the machine affects both. The measuring code
is that of this tree, and the package ``lightning_filterdiv`` that of the version. A case may therefore use only names
that both have.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common.paths import ROOT

__all__ = ["HERE", "compare", "serve", "short_name"]

#: The name of this tree beside that of a commit.
HERE = "here"
_PACKAGE = "lightning_filterdiv"


def short_name(revision: str) -> str:
    """The abbreviated hash of a commit.

    Raises:
        ValueError: git knows no such commit.
    """
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "--verify", f"{revision}^{{commit}}"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    if asked.returncode:
        raise ValueError(f"--against {revision}: git knows no such commit here ({asked.stderr.strip()})")
    return asked.stdout.strip()


def _export(revision: str, folder: Path) -> None:
    """Put the package of a commit into ``folder``."""
    command = ["git", "-C", str(ROOT), "archive", revision, _PACKAGE]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


class _Version:
    """A process that measures with one version of the package."""

    def __init__(self, module: str, package: Path, threads: int) -> None:
        paths = [str(package), str(ROOT)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", f"from {module} import worker; worker()"]
        # -c puts the current folder first, where the package of this tree must not be found.
        self._process = subprocess.Popen(
            command, env=environment, cwd=package, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, case: str) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that measures {case!r} ended with status {self._process.wait()}")
        result: dict[str, float] = json.loads(line)
        return result

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()


@contextmanager
def _versions(module: str, revision: str | None, threads: int) -> Iterator[dict[str, _Version]]:
    with ExitStack() as stack:
        versions = {HERE: _Version(module, ROOT, threads)}
        if revision is not None:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            _export(revision, folder)
            versions[short_name(revision)] = _Version(module, folder, threads)
        try:
            yield versions
        finally:
            for version in versions.values():
                version.close()


def compare(
    module: str, cases: Sequence[str], rounds: int, revision: str | None = None, threads: int = 1
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Case -> version -> one measurement per round.

    Args:
        module: module with a function ``worker()`` that calls :func:`serve`.
        cases: cases to measure.
        rounds: number of rounds that count; one more comes before them.
        revision: revision of the other version; ``None``: this tree alone.
        threads: threads of each process.
    """
    order = random.Random(0)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with _versions(module, revision, threads) as versions:
        for case in cases:
            found[case] = {name: [] for name in versions}
            for _ in range(rounds + 1):
                for name in order.sample(list(versions), len(versions)):
                    found[case][name].append(versions[name].measure(case))
    return {case: {name: of[1:] for name, of in names.items()} for case, names in found.items()}


def serve(prepare: Callable[[str], Callable[[], Mapping[str, float]]]) -> None:
    """Answer requests of :func:`compare` until its end.

    Args:
        prepare: case -> function that measures it once. It is kept until another case is requested.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # output of libraries is not an answer
    current, measure = "", None
    for line in sys.stdin:
        if measure is None or line.strip() != current:
            current = line.strip()
            measure = prepare(current)
        print(json.dumps(measure()), file=answers, flush=True)
