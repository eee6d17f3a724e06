"""Commands under faults of files, disks, locales and pipes: one line and exit status 2, or a correct report."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_filterdiv.command_line.main import main

LIMITED = """
import resource, sys
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.command_line import inspect, merge  # imports may write caches
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
raise SystemExit(main(sys.argv[1:]))
"""
INSPECT = ("inspect", "run.ckpt", "--out", "out", "--max-figures", "1")


def _save(*names: str, weight: torch.Tensor | None = None) -> None:
    torch.manual_seed(0)
    weights = {f"{name}.weight": torch.randn(4, 3, 3, 3) if weight is None else weight for name in names}
    torch.save({"state_dict": weights, "epoch": 1}, "run.ckpt")


def _run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, errors="replace", **more)


@pytest.mark.parametrize(
    "name",
    ["a/b", "a..b", "..", "a\0b", "\x1b[2J", "a\nb", "слой", "層.\u202ea", "\ud800", "training", "forward", "$\\frac$"],
    ids=ascii,
)
def test_any_name_of_a_layer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _save(name, "plain")
    assert main([*INSPECT[:-1], "2"]) == 0
    out = capsys.readouterr().out
    assert not [char for char in out if not char.isprintable() and char != "\n"]
    with Path("out/report.csv").open(encoding="utf-8") as file:
        first, second = (row["layer"] for row in csv.DictReader(file))
    assert second == "plain"
    assert first.isprintable()
    assert first in Path("out/report.txt").read_text(encoding="utf-8")
    assert first.isascii() or first in Path("out/index.html").read_text(encoding="utf-8")
    pictures = list(Path("out/figures").iterdir())
    assert len(pictures) == 5
    assert all(path.name.isascii() for path in pictures)
    assert {path.name for path in Path().iterdir()} == {"out", "run.ckpt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to(torch.complex64), "has complex weights"),
        (lambda w: w.to_sparse(), "has a sparse weight (torch.sparse_coo); store it dense"),
        (lambda w: w[:0], "has a weight without numbers"),
        (lambda w: w[:, :0], "has a weight without numbers"),
        (lambda w: w.to("meta"), "has no values (device meta)"),
        (lambda w: w.to(torch.int64), "is quantised (torch.int64)"),
    ],
)
def test_weights_that_cannot_be_compared(
    change: Callable[[torch.Tensor], torch.Tensor], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _save("a", weight=change(torch.randn(4, 3, 3, 3)))
    assert main(INSPECT) == 2
    assert message in capsys.readouterr().err
    assert not Path("out/report.txt").exists()
    weights = torch.load("run.ckpt", weights_only=True)["state_dict"]
    torch.save({"state_dict": weights | {"b.weight": torch.randn(4, 3, 3, 3)}, "epoch": 1}, "run.ckpt")
    with pytest.warns(UserWarning, match="left out, because each"):
        assert main(INSPECT) == 0


def test_a_locale_that_is_not_utf_8() -> None:
    _save("слой")
    locale = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = _run(["-m", "lightning_filterdiv", *INSPECT], env=os.environ | locale)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u0441\\u043b\\u043e\\u0439 " in done.stdout
    assert "слой " in Path("out/report.txt").read_text(encoding="utf-8")


def test_a_full_disk_leaves_no_half_report() -> None:
    _save("a")
    done = _run(["-c", LIMITED, *INSPECT])
    assert done.returncode == 2
    assert "filterdiv inspect: out/" in done.stderr
    assert "cannot be written (File too large); free some space or name another place" in done.stderr
    assert [path for path in Path("out").rglob("*") if path.is_file()] == []


def test_a_full_disk_behind_stdout() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    _save("a")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lightning_filterdiv", *INSPECT]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "filterdiv inspect: standard output: No space left on device\n"


def test_a_closed_pipe_ends_quietly() -> None:
    _save("a")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "lightning_filterdiv", *INSPECT]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("out/index.html").exists()


DATA = """
import torch

class Broken(torch.utils.data.Dataset):
    def __len__(self): return 3
    def __getitem__(self, index): raise KeyError("line one\\nline two")

class Diverged(Broken):
    def __getitem__(self, index): return torch.full((1, 8, 8), float("nan"))

class Empty(Broken):
    def __len__(self): return 0

class Images(Broken):
    def __getitem__(self, index): return torch.rand(1, 8, 8)

class Lazy(torch.nn.Sequential):
    def __init__(self): super().__init__(torch.nn.LazyConv2d(4, 3))

class Meta(torch.nn.Sequential):
    def __init__(self): super().__init__(torch.nn.Conv2d(1, 4, 3, device="meta"))
"""
NETWORK = "lightning_filterdiv.demo:SmallConvNet"
PRUNE = ("prune", "--keep-fraction", "0.5", "--importance", "taylor", "--out", "a.pt", "--input-shape", "1,1,8,8")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("inspect", NETWORK, "--data", "my_data:Broken"), "my_data:Broken: reading it fails (KeyError: 'line one"),
        (("inspect", NETWORK, "--data", "my_data:Diverged"), "my_data:Diverged holds NaN or infinite values; repair"),
        (("inspect", NETWORK, "--data", "my_data:Empty"), "my_data:Empty: no image came; check the folder"),
        (("entropy", "--data", "my_data:Broken"), "my_data:Broken: reading it fails (KeyError: 'line one"),
        (("entropy", "--data", "my_data:Diverged"), "image 0 holds NaN values, which have no entropy"),
        (
            ("prune", NETWORK, "--keep-fraction", "0.5", "--out", "a.pt", "--input-shape", "99999999999,1,8,8"),
            "--input-shape 99999999999,1,8,8 does not fit into memory; give a smaller one",
        ),
        ((*PRUNE, NETWORK, "--data", "my_data:Broken"), "--data my_data:Broken: reading it fails (KeyError: 'line one"),
        ((*PRUNE, NETWORK, "--data", "my_data:Images"), "needs batches of (inputs, labels) for the cross-entropy\n"),
        ((*PRUNE, "my_data:Lazy"), "'0.weight' of Lazy is lazy and has no shape yet; build the network with its sizes"),
        ((*PRUNE, "my_data:Meta"), "'0.weight' of Meta has no values (device meta); build the network"),
    ],
    ids=[
        "broken",
        "NaN",
        "empty",
        "broken, entropy",
        "NaN, entropy",
        "memory",
        "broken, prune",
        "labels",
        "lazy",
        "meta",
    ],
)
def test_data_that_cannot_be_used(
    command: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my_data.py").write_text(DATA)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_weights_for_a_lazy_network() -> None:
    Path("my_network.py").write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self): super().__init__(nn.LazyConv2d(4, 3))"
    )
    torch.save({"0.weight": torch.randn(4, 3, 3, 3), "0.bias": torch.randn(4)}, "lazy.pt")
    assert main(["inspect", "lazy.pt", "--model", "my_network:Net", "--out", "out", "--max-figures", "0"]) == 0


def test_a_warning_is_one_line() -> None:
    _save("plain")
    weights = torch.load("run.ckpt", weights_only=True)
    weights["state_dict"]["odd.weight"] = torch.zeros(4, 3, 3, 3, dtype=torch.complex64)
    torch.save(weights, "run.ckpt")
    result = _run(["-m", "lightning_filterdiv", *INSPECT])
    assert result.returncode == 0
    assert result.stderr == "filterdiv inspect: warning: left out, because each has complex weights: 'odd'\n"


def test_ctrl_c_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_filterdiv.command_line.inspect.run", interrupted)
    assert main([*INSPECT]) == 130
    assert capsys.readouterr().err == "filterdiv inspect: interrupted\n"


def test_extra_state_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(".")
    Path("extra.py").write_text(
        "from torch import nn\n"
        "class Scale(nn.Module):\n"
        "    def get_extra_state(self): return {'scale': 1.0}\n"
        "    def set_extra_state(self, state): assert state['scale'] == 2.0\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self): super().__init__(nn.Conv2d(1, 4, 3), Scale())\n"
    )
    from lightning_filterdiv.command_line.model_source import build_model

    weights = build_model("extra:Net").state_dict()
    for scale, status in ((2.0, 0), (3.0, 2)):
        torch.save(weights | {"1._extra_state": {"scale": scale}}, "bare.pt")
        assert main(["inspect", "bare.pt", "--model", "extra:Net", *INSPECT[2:], "--overwrite"]) == status
    assert "the weights cannot be loaded into a Net: AssertionError" in capsys.readouterr().err
