"""Damaged files of every kind, drawn from a seed: a command ends with status 0, or in one line with status 2."""

from __future__ import annotations

import contextlib
import io
import random
import resource
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from lightning_filterdiv import CentripetalSGD, ChannelImportance
from lightning_filterdiv.command_line import model_source
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.narrowing import load_merged
from lightning_filterdiv.narrowing.files import MergedFileError
from tests.suites.wrong_uses.support import MODEL, merged, net
from tests.support.mutations import mutate
from tests.support.training import fit

_MEMORY = 8 * 2**30
_YAML = """\
# a comment: слой
seed_everything: 1
model:
  class_path: lightning_filterdiv.demo.SmallConvNet
  init_args: {width: 4, image_size: 8}
trainer: {max_epochs: 2, callbacks: [{class_path: RePr, init_args: {cycles: 1, include: ["net.*"]}}]}
"""


class Kind(NamedTuple):
    """A kind of file, and what reads it.

    Attributes:
        content: of a valid file.
        read: path -> the exit status.
    """

    content: bytes
    read: Callable[[str], int]


def _command(*arguments: str) -> int:
    """Run ``filterdiv``; what it says must be one line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = main(arguments)
    assert status in (0, 2)
    if status == 2:
        assert said.getvalue().startswith("filterdiv ")
        assert said.getvalue().count("\n") == 1
        assert len(said.getvalue()) > len("filterdiv merge: x\n")
    return status


def _load_merged(path: str) -> int:
    try:
        load_merged(net(), path)
    except MergedFileError:
        return 2
    return 0


def _entropy(path: str) -> int:
    Path("pictures").mkdir(exist_ok=True)
    shutil.copy(path, "pictures/picture.png")
    return _command("entropy", "--data", "pictures")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Valid files, and their readers."""
    with contextlib.chdir(tmp_path_factory.mktemp("valid")):
        torch.manual_seed(0)
        saving = ModelCheckpoint(dirpath=".", filename="fit")
        fit([CentripetalSGD(), saving], model=SmallConvNet(width=4), max_epochs=1, limit_train_batches=1)
        checkpoint = Path("fit.ckpt").read_bytes()
        torch.save(SmallConvNet().state_dict(), "weights.pt")
        weights = Path("weights.pt").read_bytes()
        narrow = Path(merged()).read_bytes()
        gating = ModelCheckpoint(dirpath=".", filename="gates")
        fit([ChannelImportance(), gating], model=SmallConvNet(width=4), max_epochs=1, limit_train_batches=1)
        gates = Path("gates.ckpt").read_bytes()
        Image.effect_noise((8, 8), 64).save("picture.png")
        picture = Path("picture.png").read_bytes()
    quiet = ("--max-figures", "0", "--out", "report", "--overwrite")
    merge = ("--out", "narrow.pt", "--tolerance", "inf", "--pairs", "0")
    prune = ("--out", "narrow.pt", "--importance", "gates", "--keep-fraction", "0.5", "--pairs", "0", "--overwrite")
    shape = ("--input-shape", "1,1,8,8")
    return {
        "checkpoint": Kind(checkpoint, lambda path: _command("inspect", path, *quiet)),
        "checkpoint with a network": Kind(checkpoint, lambda path: _command("inspect", path, *MODEL, *quiet)),
        "clusters": Kind(checkpoint, lambda path: _command("merge", path, *MODEL, *merge)),
        "gates": Kind(gates, lambda path: _command("prune", path, *MODEL, *prune, *shape)),
        "picture": Kind(picture, _entropy),
        "state dict": Kind(weights, lambda path: _command("inspect", path, *MODEL, *quiet)),
        "merged network": Kind(narrow, _load_merged),
        "YAML": Kind(_YAML.encode(), lambda path: _command("inspect", "weights.pt", "--config", path, *quiet)),
    }


@pytest.fixture
def _limited_memory() -> Iterator[None]:
    """A size that a flipped bit has made large must fail here, and not take the memory of the machine."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the size of the process is not known")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def _damage(kind: Kind, seed: int, more: Callable[[int], bool]) -> Counter[int]:
    """Read damaged files until ``more(number)`` is false; each is a function of the seed and its number."""
    torch.save(SmallConvNet(width=4).state_dict(), "weights.pt")
    seen: Counter[int] = Counter()
    number = 0
    while more(number):
        Path("damaged").write_bytes(mutate(kind.content, random.Random(f"{seed}/{number}")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                seen[kind.read("damaged")] += 1
            except BaseException as error:
                error.add_note(f"number {number} of seed {seed}")
                raise
        number += 1
    return seen


#: Of the kinds.
NAMES = (
    "checkpoint", "checkpoint with a network", "clusters", "gates", "picture", "state dict", "merged network", "YAML",
)  # fmt: skip
#: Number of damaged files in the default tests.
FILES = dict.fromkeys(NAMES, 60) | {"clusters": 30, "gates": 30}


@pytest.mark.usefixtures("_limited_memory")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(name: str, kinds: dict[str, Kind]) -> None:
    kind = kinds[name]
    Path("valid").write_bytes(kind.content)
    torch.save(SmallConvNet(width=4).state_dict(), "weights.pt")
    assert kind.read("valid") == 0
    seen = _damage(kind, 0, lambda number: number < FILES[name])
    assert seen[2] > 10, "the damage is noticed"


@pytest.mark.usefixtures("_limited_memory")
def test_a_missing_check_is_noticed(kinds: dict[str, Kind], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "_check_entries", lambda *_: None)
    with pytest.raises((AttributeError, TypeError)):
        _damage(kinds["checkpoint"], 0, lambda number: number < 200)


@pytest.mark.soak
@pytest.mark.usefixtures("_limited_memory")
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_for_long(name: str, kinds: dict[str, Kind], record_property: Callable[[str, int], None]) -> None:
    """A new seed every time; a failure names it and the number of the file."""
    end = time.monotonic() + 120
    seen = _damage(kinds[name], random.SystemRandom().randrange(10**9), lambda _: time.monotonic() < end)
    record_property("files", seen.total())
    assert seen.total() > 100
