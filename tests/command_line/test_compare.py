"""``filterdiv compare``: layers matched by name, the three outputs, and the page in a browser."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.filters import filter_matrix, write_filters
from lightning_filterdiv.monitor.comparison_report import comparison_summary, pair_layers
from lightning_filterdiv.monitor.report import report_layers
from tests.support import browser


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """A Lightning checkpoint, and the network inside it as a bare state dict, in which ten filters are duplicates."""
    torch.manual_seed(0)
    model = SmallConvNet()
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "callbacks": {}}, tmp_path / "a.ckpt")
    write_filters(model.net.conv2, range(10), 2 * filter_matrix(model.net.conv2)[10:20])
    torch.save(model.net.state_dict(), tmp_path / "b.pt")
    return [str(tmp_path / "a.ckpt"), str(tmp_path / "b.pt")]


def test_text_and_csv(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *two, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "Filter redundancy of a.ckpt (A) and b.pt (B)" in text
    assert re.search(r"net\.conv2 +0\.\d\d → 1\.\d\d +32 +288 .* 0 → 20 +0 → 10 ", text), "net. is no other layer"
    assert re.search(r"net\.conv1 +(\d\.\d\d) +32 +9 ", text), "what is alike is said once"
    assert "of 1 layer are over a tenth more alike in B, those of 0 layers over a tenth less. 0 filters of A" in text
    assert "0 filters of A and 20 of B have a twin." in text
    assert (tmp_path / "out" / "report.txt").read_text(encoding="utf-8") in text + "\n"
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["net.conv1", "net.conv2", "net.conv3"]
    assert (rows["net.conv2"]["twins_a"], rows["net.conv2"]["twins_b"]) == ("0", "20")
    assert rows["net.conv1"]["over_chance_a"] == rows["net.conv1"]["over_chance_b"]


def test_a_layer_that_only_one_has() -> None:
    torch.manual_seed(0)
    first = report_layers({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3)}, 0.9)
    second = report_layers({"b": nn.Conv2d(4, 6, 3), "c": nn.Conv2d(6, 4, 3)}, 0.9)
    pairs = pair_layers(first, second)
    assert [(p.name, p.first is not None, p.second is not None) for p in pairs] == [
        ("a", True, False),
        ("b", True, True),
        ("c", False, True),
    ]
    assert "1 layer is only in A, 1 only in B." in comparison_summary(pairs)
    assert "no layer of one name in common" in comparison_summary(pair_layers(first[:1], second[1:]))


def test_names_and_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.randn(4, 3, 64, 64), tmp_path / "batch.pt")
    options = ["--data", str(tmp_path / "batch.pt"), "--include", "features.[03]*", "--out", str(tmp_path / "out")]
    assert main(["compare", "torchvision:squeezenet1_0", "torchvision:squeezenet1_1", *options]) == 0
    text = capsys.readouterr().out
    assert "A: Random weights" in text
    assert "B: Shown 4 images of batch.pt." in text
    assert "mean |corr|" in text


def test_wrong_input_is_one_line(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["compare", two[0], str(tmp_path / "nothing.pt"), "--out", out]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("filterdiv compare: ")
    assert "nothing.pt: no such file" in captured.err
    assert not Path(out, "report.txt").exists()
    assert main(["compare", *two, "--out", out]) == 0
    assert main(["compare", *two, "--out", out]) == 2
    assert "report.txt exists; name another place, or add --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["a/b", "..", "\x1b[2J", "слой", "層.\u202ea", "\ud800", "<script>", "$\\frac$"], ids=ascii
)
def test_any_name_of_a_layer(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("a", "b"):
        weights = {f"{part}.weight": torch.randn(4, 3, 3, 3) for part in (name, "plain")}
        torch.save({"state_dict": weights, "epoch": 1}, tmp_path / f"{file}.ckpt")
    arguments = [str(tmp_path / "a.ckpt"), str(tmp_path / "b.ckpt"), "--out", str(tmp_path / "out")]
    assert main(["compare", *arguments]) == 0
    out = capsys.readouterr().out
    assert not [char for char in out if not char.isprintable() and char != "\n"]
    with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
        first, second = (row["layer"] for row in csv.DictReader(file))
    assert second == "plain"
    assert first.isprintable()
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1, "names are escaped"


@browser.needed
def test_a_click_shows_the_layer_of_both(two: list[str], tmp_path: Path) -> None:
    assert main(["compare", *two, "--out", str(tmp_path / "out")]) == 0
    script = """
      const row = [...document.querySelectorAll('tr.layer')].find(row => row.innerText.includes('net.conv2'));
      row.click();
      const pictures = [...document.querySelectorAll('.panel img')];
      await Promise.all(pictures.map(picture => picture.decode()));
      return {
        kinds: pictures.map(picture => picture.className), sides: [...document.querySelectorAll('.panel .side')].map(
          side => side.innerText), colours: [...row.cells].map(cell => cell.className),
        width: document.documentElement.scrollWidth - innerWidth,
      };
    """
    for dark, width in ((False, 1300), (True, 420)):
        seen, console = browser.evaluate(tmp_path / "out" / "index.html", script, tmp_path, dark=dark, width=width)
        assert not console
        assert [seen["kinds"].count(kind) for kind in ("map", "mosaic", "kernel")] == [2, 2, 20]
        assert seen["sides"] == ["A: net.conv2 of a.ckpt", "B: conv2 of b.pt"]
        assert "bad" in seen["colours"]
        assert seen["width"] <= 0


def test_a_file_beside_a_name(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--model`` belongs to the file."""
    network = "lightning_filterdiv.demo:SmallConvNet"
    assert main(["compare", two[0], network, "--model", network, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert f"A: Weights of a.ckpt in {network}." in text
    assert "B: Random weights" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["a.ckpt", "b.ckpt", "--weights", "DEFAULT"],
            "--weights belongs to torchvision:NAME and timm:NAME; both netw",
        ),
        (["timm:a", "timm:b", "--model", "timm:a"], "--model and --config belong to a file; both networks here are na"),
        (["timm:a", "timm:b", "--config", "run.yaml"], "--model and --config belong to a file"),
        (["a.ckpt", "b.ckpt", "--root", "."], "--root belongs to --data; name the data too"),
    ],
)
def test_an_option_without_use(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(Path().iterdir()), "nothing is left behind"
