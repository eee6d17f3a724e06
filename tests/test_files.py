"""The check that a file or folder can be written."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lightning_filterdiv.files import why_unwritable


def test_a_file_that_can_be_written() -> None:
    assert why_unwritable("new.pt") == ""
    assert list(Path().iterdir()) == [], "nothing is left behind"
    Path("old.pt").write_text("kept")
    os.utime("old.pt", (1, 1))
    assert why_unwritable(Path("old.pt")) == ""
    assert Path("old.pt").read_text() == "kept"
    assert Path("old.pt").stat().st_mtime == 1


def test_a_file_that_cannot_be_written() -> None:
    Path("folder").mkdir()
    Path("file").write_text("")
    assert why_unwritable("folder") == "it is a folder; name a file in it"
    assert why_unwritable("none/new.pt") == "there is no folder none; make it first"
    assert why_unwritable("file/new.pt") == "there is no folder file; make it first"


def test_a_folder_is_made_with_its_parents() -> None:
    assert why_unwritable("a/b", folder=True) == ""
    assert Path("a/b").is_dir()
    assert list(Path("a/b").iterdir()) == []
    assert why_unwritable("a/b", folder=True) == ""
    Path("file").write_text("")
    assert why_unwritable("file", folder=True) == "File exists: file"
    assert why_unwritable("file/b", folder=True) == "Not a directory: file/b"


@pytest.mark.parametrize(("path", "folder"), [("full/new.pt", False), ("full", True)])
def test_a_folder_that_takes_no_file(path: str, folder: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is named, not the file that was tried in it."""
    Path("full").mkdir()

    def refuse(**_: Any) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system", "full/tmp8d1x")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert why_unwritable(path, folder=folder) == "Read-only file system: full"


def test_an_existing_file_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("old.pt").write_text("kept")

    def refuse(self: Path, mode: str) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert why_unwritable("old.pt") == "Permission denied: old.pt"
