"""``filterdiv inspect``: every source, the three outputs, and what wrong input says."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.filters import filter_matrix, write_filters
from lightning_filterdiv.monitor.report import advice, report_layers

CHROMIUM = shutil.which("chromium")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Lightning-like checkpoint whose first layer holds ten duplicates of its 32 filters."""
    torch.manual_seed(0)
    model = SmallConvNet()
    write_filters(model.net.conv2, range(10), 2 * filter_matrix(model.net.conv2)[10:20])
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": model.state_dict(), "epoch": 3, "callbacks": {}}, path)
    return path


def _rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "report.csv").open() as file:
        return {row["layer"]: row for row in csv.DictReader(file)}


def test_a_checkpoint_with_and_without_its_network(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoint), "--out", str(tmp_path / "plain"), "--max-figures", "0"]) == 0
    assert "read as they are stored" in capsys.readouterr().out
    arguments = ["--model", "lightning_filterdiv.demo:SmallConvNet", "--out", str(tmp_path / "model")]
    assert main(["inspect", str(checkpoint), *arguments, "--max-figures", "1"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"net\.conv2 +32 +288 .* 10 +0\.000  CentripetalSGD to remove 10", text)
    assert "10 of 96 filters in 3 layers could be merged at |cos| > 0.9" in text
    assert _rows(tmp_path / "plain") == _rows(tmp_path / "model")
    assert (tmp_path / "model" / "report.txt").read_text() in text + "\n"
    assert {path.name for path in (tmp_path / "model" / "figures").iterdir()} == {
        "distribution.png",
        "similarity-net.conv2.png",
        "kernels-net.conv2.png",
    }


def test_threshold_and_patterns(checkpoint: Path, tmp_path: Path) -> None:
    options = ["--threshold", "0.999999", "--include", "*.conv[23]", "--exclude", "*.conv3", "--max-figures", "0"]
    assert main(["inspect", str(checkpoint), "--out", str(tmp_path / "out"), *options]) == 0
    assert list(_rows(tmp_path / "out")) == ["net.conv2"]


def test_names_of_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    options = ["--max-figures", "0", "--out", str(tmp_path / "out")]
    assert main(["inspect", "torchvision:squeezenet1_0", *options]) == 0
    assert re.search(r"Random weights: squeezenet1_0-\w+\.pth is not in torch's hub", capsys.readouterr().out)
    assert len(_rows(tmp_path / "out")) == 26
    assert main(["inspect", "timm:resnet10t", *options]) == 0
    assert "features.0" not in _rows(tmp_path / "out")
    assert "Random weights" in capsys.readouterr().out


def test_local_weights_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from torchvision.models import SqueezeNet1_0_Weights, squeezenet1_0

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    model = squeezenet1_0()
    nn.init.ones_(model.features[0].weight)
    torch.save(model.state_dict(), folder / SqueezeNet1_0_Weights.DEFAULT.url.split("/")[-1])
    options = ["--include", "features.0", "--max-figures", "0", "--out", str(tmp_path / "out")]
    assert main(["inspect", "torchvision:squeezenet1_0", *options]) == 0
    assert "found on this machine" in capsys.readouterr().out
    assert float(_rows(tmp_path / "out")["features.0"]["mean_abs_cosine"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (["{tmp}/nothing.ckpt"], "nothing.ckpt: no such file"),
        (["resnet18"], "did you mean torchvision:resnet18?"),
        (["{tmp}/text.ckpt"], "text.ckpt is not a checkpoint"),
        (["{tmp}/bare.pt"], "is a bare state dict: say which network it belongs to with --model"),
        (["{tmp}/linear.ckpt"], "holds no convolution"),
        (["torchvision:resnet19"], "torchvision has no model 'resnet19'; the closest names are resnet1"),
        (["timm:resnet18x"], "timm has no model 'resnet18x'; the closest names are resnet"),
        (["{ckpt}", "--model", "torchvision:alexnet"], "the weights are not those of a AlexNet"),
        (["{ckpt}", "--out", "{tmp}/text.ckpt/report"], "cannot be written"),
        (["{ckpt}", "--threshold", "1.5"], "--threshold must be a finite number with 0 <= --threshold < 1, got 1.5"),
        (["{ckpt}", "--max-figures", "-1"], "--max-figures must be an integer >= 0, got -1"),
        (["{ckpt}", "--include", "net.conv9"], "include pattern 'net.conv9' matches no convolution"),
        (["torchvision:alexnet", "--model", "torchvision:alexnet"], "names a network already"),
    ],
)
def test_wrong_input_is_one_line(
    case: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save(SmallConvNet().state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": nn.Sequential(nn.Linear(2, 2)).state_dict(), "epoch": 1}, tmp_path / "linear.ckpt")
    arguments = [part.format(tmp=tmp_path, ckpt=checkpoint) for part in case]
    assert main(["inspect", "--out", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("filterdiv inspect: ")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_advice_names_the_worst_finding() -> None:
    healthy = {"filters": 32, "mean": 0.05, "random": 0.05, "rank": 0.9, "mergeable": 0, "dead": 0.0}
    for change, expected in (
        ({}, "nothing"),
        ({"dead": 0.5, "mergeable": 9}, "RePr to bring dead"),
        ({"mergeable": 9}, "CentripetalSGD to remove 9"),
        ({"mergeable": 1}, "nothing"),
        ({"mean": 0.2}, "BasisOrthonormality"),
        ({"rank": 0.3}, "RePr for more directions"),
        ({"mean": float("nan")}, "not finite"),
    ):
        assert advice(**(healthy | change)).startswith(expected), change


def test_a_diverged_layer_is_reported(tmp_path: Path) -> None:
    conv = nn.Conv2d(3, 8, 3)
    conv.weight.data[0] = float("nan")
    (row,) = report_layers({"bad": conv}, 0.9)
    assert row.advice == "not finite: training diverged"


# --------------------------------------------------------------------------- the page


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.targets += [value or "" for key, value in attrs if key in ("src", "href")]


def test_the_page_needs_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(checkpoint), "--out", str(tmp_path / "out"), "--max-figures", "1"]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    links = _Links()
    links.feed(page)
    assert len(links.targets) == 4
    assert all(target.startswith("data:") for target in links.targets)
    assert links.rows == 1 + 3
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", re.sub(r"data:image/png[^\"]*", "", page))
    assert "prefers-color-scheme: dark" in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_opens_offline_without_a_console_error(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(checkpoint), "--out", str(tmp_path / "out"), "--max-figures", "1"]) == 0
    page = tmp_path / "out" / "index.html"

    def open_page(path: Path) -> str:
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --host-resolver-rules=MAP%*%~NOTFOUND"
        command = [str(CHROMIUM), *(flag.replace("%", " ") for flag in flags.split()), "--enable-logging=stderr"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
        environment = os.environ | {"HOME": str(tmp_path)}
        done = subprocess.run(
            [*command, path.as_uri()], capture_output=True, text=True, timeout=180, check=True, env=environment
        )
        return done.stdout + "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    # A click on a heading sorts: the script itself clicks, and a mistake in it would show as a console line.
    clicking = tmp_path / "clicking.html"
    text = page.read_text().replace("</script>", "document.querySelectorAll('th')[7].click();</script>")
    clicking.write_text(text)
    shown = open_page(clicking)
    assert "CONSOLE" not in shown
    assert re.search(r"<tbody>\s*<tr><td class=\"text\" data-value=\"net.conv2\">", shown), "most mergeable first"
    clicking.write_text(text.replace("document.querySelectorAll", "document.querySelectorAl"))
    assert "CONSOLE" in open_page(clicking), "the check sees errors"
