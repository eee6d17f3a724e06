"""Imports of the benchmarks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.common.paths import ROOT

MODULES = sorted((ROOT / "benchmarks").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_benchmarks_do_not_import_tests(path: Path) -> None:
    assert "tests" not in imported(path)


def test_every_import_of_a_file_is_seen(tmp_path: Path) -> None:
    """The test above can fail."""
    path = tmp_path / "module.py"
    path.write_text("import a.b, c as d\ndef f():\n    from tests.x import y\n    from . import z\n")
    assert imported(path) == {"a", "c", "tests", ""}
