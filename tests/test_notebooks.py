"""Every notebook runs, and what is committed of it is clean."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from notebooks.execute import NOTEBOOKS, executed, problems


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["1-redundancy", "2-repr", "3-squeeze", "4-your-module", "5-timm"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_clean(path: Path) -> None:
    assert problems(nbformat.read(path, as_version=4)) == []


def test_notebooks_run(tmp_path: Path) -> None:
    """All in one kernel: its imports cost more than any of them."""
    slow = tmp_path / "slow.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(SLOW_CELL)]), slow)
    *notebooks, printed = executed([*NOTEBOOKS, slow])
    for path, notebook in zip(NOTEBOOKS, notebooks, strict=True):
        assert problems(notebook) == [], path.name
        assert _kinds(nbformat.read(path, as_version=4)) == _kinds(notebook), f"{path.name}: run notebooks/execute.py"
    # The kernel sent the lines in two messages; of a quick cell, the load of the machine decides how many there are.
    assert [output.text for output in printed.cells[0].outputs] == ["one\ntwo\n"]


#: Prints again after the kernel has flushed what it printed first.
SLOW_CELL = "import time\nprint('one', flush=True)\ntime.sleep(0.5)\nprint('two')"


def _kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    return [[output.output_type for output in cell.get("outputs", [])] for cell in notebook.cells]


def test_problems_are_found() -> None:
    cell = nbformat.v4.new_code_cell("1", execution_count=2)
    noise = nbformat.v4.new_output("stream", name="stderr", text="UserWarning: /root/x" + "x" * 300_000)
    cell.outputs = [noise, noise]
    found = " ".join(problems(nbformat.v4.new_notebook(cells=[cell])))
    assert "not run in order" in found
    assert "in several pieces" in found
    assert "stderr" in found
    assert "shows '/root/'" in found or "shows 'Warning'" in found
    assert "more than 300000" in found
