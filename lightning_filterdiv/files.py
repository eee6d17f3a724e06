"""Check that a file or a folder can be written, before the work whose result is to go there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["why_unwritable"]


def why_unwritable(path: str | os.PathLike[str], *, folder: bool = False) -> str:
    """Reason why nothing can be written at ``path``, found by trying; nothing of an existing file changes.

    Args:
        path: a file to be written, in a folder that exists.
        folder: ``path`` is a folder for files instead; it is created with its parents.

    Returns:
        Half a sentence that names the obstacle; ``""`` if there is none.
    """
    target = Path(path)
    if not folder:
        if target.is_dir():
            return "it is a folder; name a file in it"
        if not target.parent.is_dir():
            return f"there is no folder {target.parent}; make it first"
    try:
        if folder:
            target.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            target.open("ab").close()
        else:
            _try(target if folder else target.parent)
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return ""


def _try(folder: Path) -> None:
    """Make a file in ``folder`` and remove it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error  # the file's name says nothing
