"""Files: the check that one can be written, writing it whole, safe names, and damage."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from lightning_filterdiv.files import (
    WriteError,
    find_damage,
    printable,
    safe_file_name,
    why_unwritable,
    write_files,
)


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


def test_a_folder_need_not_exist() -> None:
    assert why_unwritable("a/b", folder=True) == ""
    assert not list(Path().iterdir()), "nothing is left behind"
    Path("a").mkdir()
    assert why_unwritable("a/b", folder=True) == why_unwritable("a", folder=True) == ""
    assert list(Path().rglob("*")) == [Path("a")], "what was there stays"
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


# --------------------------------------------------------------------------- whole files


def _below() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def test_files_are_written_whole() -> None:
    Path("old").write_text("old")
    Path("old").chmod(0o640)
    Path("link").symlink_to("old")
    write_files(".", {"link": b"new", "a/b.txt": b"b"})
    assert Path("link").is_symlink()
    assert Path("old").read_text() == "new"
    assert Path("old").stat().st_mode & 0o777 == 0o640
    assert _below() == {"old", "link", "a", "a/b.txt"}


def test_a_device_is_written_to_and_not_replaced() -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_files(".", {"pipe": b"content"})
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert Path("pipe").is_fifo()


def test_a_full_disk_leaves_nothing_behind() -> None:
    """A limit on the size of files fails where a full disk does: in the middle of a write."""
    Path("second").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"^second cannot be written \(File too large\); free some space or name"):
            write_files(".", {"first": b"1", "second": b"2" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _below() == {"second"}
    assert Path("second").read_text() == "old"


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("net.conv1", "net.conv1"),
        ("net[0:4]", "net[0%3A4]"),
        ("a/b", "a%2Fb"),
        ("a\\b", "a%5Cb"),
        ("..", "%2E%2E"),
        ("\0\n\x1b", "%00%0A%1B"),
        ("50%", "50%25"),
        ("слой", "%D1%81%D0%BB%D0%BE%D0%B9"),
        ("\ud800", "%ED%A0%80"),
    ],
)
def test_file_names(name: str, file: str) -> None:
    assert safe_file_name(name) == file


def test_long_names_stay_different() -> None:
    first, second = (safe_file_name("x" * 300 + end) for end in "ab")
    assert first != second
    assert len(first) == len(second) == 150


def test_printable() -> None:
    assert printable("a.b слой 層") == "a.b слой 層"
    assert printable("\x1b[2J\n\0\ud800\u202e") == r"\x1b[2J\n\x00\ud800\u202e"


# --------------------------------------------------------------------------- damage


def test_damage_that_torch_does_not_notice() -> None:
    torch.save({"weight": torch.zeros(10_000)}, "good.pt")
    assert find_damage("good.pt") == ""
    content = bytearray(Path("good.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("bad.pt").write_bytes(content)
    assert torch.load("bad.pt", weights_only=True)["weight"].any()
    assert find_damage("bad.pt") == "'good/data/0' in it does not match its checksum"
    Path("text").write_text("hello")
    assert find_damage("text") == ""
