"""Run the notebooks and keep their outputs small and clean.

    python notebooks/execute.py            # runs all, writes outputs into the files
    python notebooks/execute.py 2-repr     # only that one

All run in one kernel, with the names of the one before wiped: importing PyTorch and Lightning costs more than any of
them. Each runs in an empty folder of its own.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LIMIT = 300_000  # bytes of a file
_KERNELSPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}
_NOISE = re.compile(r"/(root|home|tmp|work|usr)/|Warning\b|Traceback|\bsite-packages\b")


def executed(paths: Sequence[Path]) -> list[NotebookNode]:
    """The notebooks with fresh outputs, tidied.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    together = nbformat.v4.new_notebook()
    with tempfile.TemporaryDirectory() as folder:
        for path, notebook in zip(paths, notebooks, strict=True):
            own = Path(folder, path.stem)
            own.mkdir()
            together.cells += [nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {own}"), *notebook.cells]
        client = NotebookClient(
            together,
            kernel_name="python3",
            timeout=180,
            extra_arguments=["--log-level=ERROR"],
            # The kernel sends what a cell prints in as many messages as its flush timer decides.
            coalesce_streams=True,
        )
        client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    return [_tidy(notebook) for notebook in notebooks]


def _tidy(notebook: NotebookNode) -> NotebookNode:
    """Drop what differs between machines, number cells from 1, and store figures in 256 colours."""
    notebook.metadata = NotebookNode(kernelspec=_KERNELSPEC)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.metadata = NotebookNode()
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "image/png" in output.get("data", {}):
                output.data = NotebookNode({"image/png": _smaller(output.data["image/png"])})
                output.metadata = NotebookNode()
    return notebook


def _smaller(png: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def problems(notebook: NotebookNode) -> list[str]:
    """What a committed notebook must not show: cells without a run, split or noisy streams, paths, too many bytes."""
    found = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("its cells were not run in order")
    for cell in code:
        streams = [output.name for output in cell.outputs if output.output_type == "stream"]
        if len(set(streams)) < len(streams):
            found.append(f"cell {cell.execution_count} has a stream in several pieces")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {cell.execution_count} writes to stderr or fails: {str(output)[:300]}")
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            if noise := _NOISE.search(text):
                found.append(f"cell {cell.execution_count} shows {noise[0]!r}")
    if (size := len(nbformat.writes(notebook).encode())) > LIMIT:
        found.append(f"it has {size} bytes, more than {LIMIT}")
    return found


def main() -> int:
    """Command line; status 1 if an output is not clean."""
    chosen = [path for path in NOTEBOOKS if not sys.argv[1:] or path.stem in sys.argv[1:]]
    status = 0
    for path, notebook in zip(chosen, executed(chosen), strict=True):
        nbformat.write(notebook, path)
        for problem in problems(notebook):
            print(f"{path.name}: {problem}")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
