"""Files that would make a folder if anything in them were unpickled without restraint."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_filterdiv.demo import SmallConvNet

#: The folder that only an unpickled file makes.
TRAP = "trap"


class Payload:
    """Makes the folder ``TRAP`` in the current one when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (TRAP,)


def payload() -> bytes:
    # Protocol 2 is what torch.save writes: a restrained reader gets as far as the call and stops there.
    return pickle.dumps({"state_dict": {}, "epoch": 1, "more": Payload()}, protocol=2)


def _content() -> dict[str, object]:
    return {"state_dict": SmallConvNet().state_dict(), "epoch": 1, "callbacks": {}, "more": Payload()}


def _zip_checkpoint(path: Path) -> None:
    torch.save(_content(), path)


def _old_checkpoint(path: Path) -> None:
    torch.save(_content(), path, _use_new_zipfile_serialization=False)


def _plain_pickle(path: Path) -> None:
    path.write_bytes(payload())


def _tar(path: Path) -> None:
    """The oldest format of torch.save."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(payload())
            archive.addfile(member, io.BytesIO(payload()))


def _inject(path: Path, pickles: Callable[[str], bool]) -> None:
    """Put the payload into members of a zip archive that another program wrote."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    hit = [name for name in members if pickles(name)]
    assert hit, list(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, payload() if name in hit else content)


def _inside_a_zip(path: Path) -> None:
    """A harmless checkpoint whose data.pkl was exchanged."""
    torch.save({"state_dict": SmallConvNet().state_dict(), "epoch": 1, "callbacks": {}}, path)
    _inject(path, lambda name: name.endswith("data.pkl"))


def _torch_script(path: Path) -> None:
    torch.jit.trace(nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 4, 4)).save(str(path))
    _inject(path, lambda name: name.endswith((".pkl",)))


def _exported(path: Path) -> None:
    program = torch.export.export(nn.Conv2d(1, 2, 3), (torch.zeros(1, 1, 4, 4),))
    torch.export.save(program, str(path))
    _inject(path, lambda name: name.endswith((".pt", ".pkl", "_config.json")))


#: File name -> what writes it.
FORMS: dict[str, Callable[[Path], None]] = {
    "zip.ckpt": _zip_checkpoint,
    "old.pth": _old_checkpoint,
    "plain.pkl": _plain_pickle,
    "plain.ckpt": _plain_pickle,
    "tar.pt": _tar,
    "inside.ckpt": _inside_a_zip,
    "script.pt": _torch_script,
    "exported.pt2": _exported,
}


def write(name: str) -> Path:
    path = Path(name)
    FORMS[name](path)
    return path
