"""Write files whole or not at all, make safe file names, and find damage that torch does not notice."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

__all__ = ["WriteError", "find_damage", "is_pickled", "printable", "safe_file_name", "why_unwritable", "write_files"]

_NAME_LENGTH = 150  # file systems take 255 bytes, and callers add an ending


class WriteError(OSError):
    """A file could not be written. The message names it and the reason."""


def why_unwritable(path: str | os.PathLike[str], *, folder: bool = False) -> str:
    """Return the reason why ``path`` cannot be written, found by trying. Nothing changes, and nothing stays behind.

    Args:
        path: a file to be written, in a folder that exists.
        folder: ``path`` is a folder for files instead; it need not exist, nor its parents.

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
            _try_folder(target)
        elif target.is_file():
            target.open("ab").close()
        else:
            _try(target.parent)
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    except ValueError as error:  # a NUL
        return f"{error}"
    return ""


def _try_folder(folder: Path) -> None:
    """Make a folder, with a file in it, and remove what was made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _try(folder)
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it was not made, or somebody else uses it by now
                path.rmdir()


def _try(folder: Path) -> None:
    """Make a file in ``folder`` and remove it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error  # the file's name says nothing


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, bytes | memoryview]) -> None:
    """Write files into a folder that exists: all of them, or on an error none.

    Each file is written under a temporary name and then moved. A full disk therefore leaves no partial file, and older
    files stay as they were.

    Args:
        folder: where the files go.
        contents: path below ``folder`` -> content. Folders between are made.

    Raises:
        WriteError: one cannot be written; with its path and the reason.
    """
    folder = Path(folder)
    # Devices and pipes are written to, not replaced. Links stay links. Some folders allow changes of the file only.
    targets = {name: Path(os.path.realpath(folder / name)) for name in contents}
    in_place = [n for n, t in targets.items() if t.exists() and not (t.is_file() and os.access(t.parent, os.W_OK))]
    path = folder
    try:
        with contextlib.ExitStack() as stack:
            staged: dict[str, Path] = {}
            for name in [name for name in contents if name not in in_place]:
                path = folder / name
                targets[name].parent.mkdir(parents=True, exist_ok=True)
                beside = tempfile.mkdtemp(prefix=".filterdiv-", dir=targets[name].parent)
                stack.callback(shutil.rmtree, beside, ignore_errors=True)
                staged[name] = Path(beside) / "file"
                _write(staged[name], contents[name])
                if targets[name].exists():
                    shutil.copymode(targets[name], staged[name])
            for name in in_place:
                path = folder / name
                _write(targets[name], contents[name])
            for name, file in staged.items():
                path = folder / name
                file.replace(targets[name])
    except OSError as error:
        fix = "free some space or name another place" if _is_full(error) else "name another place"
        raise WriteError(f"{path} cannot be written ({error.strerror}); {fix}") from error


def _write(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def printable(text: str) -> str:
    """Return ``text`` on one line that any terminal can show: control characters and the like as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def safe_file_name(name: str) -> str:
    r"""Return a file name for a layer. ASCII letters, digits and ``-._~[]`` stay; other bytes become ``%xx``.

    Different names stay different; a long one ends in a digest. ``name`` may hold separators, NUL or lone surrogates.
    """
    safe = quote(name, safe="[]", errors="surrogatepass")
    if safe.strip(".") == "":
        safe = "%2E" * len(safe)
    if len(safe) > _NAME_LENGTH:
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
        safe = f"{safe[: _NAME_LENGTH - 17]}-{digest}"
    return safe


def is_pickled(path: str | os.PathLike[str]) -> bool:
    """True if a file is an archive or begins like a pickle. Old pickles have letters as opcodes, so text may match."""
    with open(path, "rb") as file:
        if file.read(1) == b"\x80":
            return True
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an archive whose directory is damaged
        return True


def find_damage(path: str | os.PathLike[str]) -> str:
    """Return why the content of a file of ``torch.save`` is not what was saved; ``""`` if no damage is found.

    ``torch.load`` does not compare checksums: a flipped bit in a weight would pass.
    """
    try:
        if not zipfile.is_zipfile(path):
            return ""
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile has many types for an archive whose directory is damaged
        return f"its directory cannot be read ({type(error).__name__})"
    return "" if broken is None else f"{printable(broken)!r} in it does not match its checksum"
