"""Every notebook runs, and what is committed of it is clean."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from notebooks.execute import NOTEBOOKS, executed, problems


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["1-redundancy", "2-repr", "3-squeeze", "4-your-module"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_clean(path: Path) -> None:
    assert problems(nbformat.read(path, as_version=4)) == []


def test_notebooks_run() -> None:
    """All in one kernel: its imports cost more than any of them."""
    for path, notebook in zip(NOTEBOOKS, executed(NOTEBOOKS), strict=True):
        assert problems(notebook) == [], path.name
        committed = nbformat.read(path, as_version=4)
        kinds = [
            [[output.output_type for output in cell.get("outputs", [])] for cell in book.cells]
            for book in (committed, notebook)
        ]
        assert kinds[0] == kinds[1], f"{path.name}: run python notebooks/execute.py"


def test_problems_are_found() -> None:
    cell = nbformat.v4.new_code_cell("1", execution_count=2)
    cell.outputs = [nbformat.v4.new_output("stream", name="stderr", text="UserWarning: /root/x" + "x" * 300_000)]
    found = " ".join(problems(nbformat.v4.new_notebook(cells=[cell])))
    assert "not run in order" in found
    assert "stderr" in found
    assert "shows '/root/'" in found or "shows 'Warning'" in found
    assert "more than 300000" in found
