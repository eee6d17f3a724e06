"""``filterdiv inspect``: every source, the three outputs, and what wrong input says."""

from __future__ import annotations

import csv
import re
import urllib.error
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.command_line.model_source import restore_model
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.filters import filter_matrix, write_filters
from lightning_filterdiv.monitor.activations import measure_channels
from lightning_filterdiv.monitor.report import advice, report_layers
from tests.support import browser


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
    assert re.search(r"net\.conv2 +1\.\d\d +32 +288 .* 20 +10 .* 32 +0\.000  CentripetalSGD to merge 10", text)
    assert "20 of 96 filters have a twin at |cos| > 0.9; 10 could be merged into one of the same sign" in text
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
    for name, layers in (("torchvision:squeezenet1_0", 26), ("timm:resnet10t", 14)):
        out = tmp_path / name.partition(":")[2]
        assert main(["inspect", name, "--max-figures", "0", "--out", str(out)]) == 0
        text = capsys.readouterr().out
        assert f"Trained ones: filterdiv inspect {name} --weights DEFAULT" in text
        assert text.count("Random weights") == 1
        assert "what would help" not in text, "nothing is advised"
        for method in ("CentripetalSGD", "BasisOrthonormality", "RePr", "filterdiv merge", "prune_channels"):
            assert method not in text
            assert method not in (out / "index.html").read_text(encoding="utf-8").partition("<h2>What the")[0]
        assert {row["advice"] for row in _rows(out).values()} == {""}
        assert len(_rows(out)) == layers


def test_a_constructor_that_brings_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made twice it has the same ones: these are no random weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("brings.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def random(): return nn.Sequential(nn.Conv2d(3, 8, 3))\n"
        "def stored():\n"
        "    net = random()\n"
        "    net[0].weight.data = torch.linspace(-1, 1, 216).view(8, 3, 3, 3)\n"
        "    return net\n"
    )
    assert main(["inspect", "brings:stored", "--out", "stored"]) == 0
    assert "Weights that the constructor brings" in capsys.readouterr().out
    assert main(["inspect", "brings:random", "--out", "random"]) == 0
    assert "Trained ones: filterdiv inspect CHECKPOINT --model brings:random" in capsys.readouterr().out


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
    assert main(["inspect", "torchvision:squeezenet1_0", "--weights", "DEFAULT", *options, "--overwrite"]) == 0
    assert "Weights DEFAULT of torchvision:squeezenet1_0." in capsys.readouterr().out
    assert float(_rows(tmp_path / "out")["features.0"]["mean_abs_cosine"]) == pytest.approx(1)


def test_only_weights_downloads(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    asked: list[str] = []

    def refuse(url: str, *_: Any, **__: Any) -> Any:
        asked.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    options = ["--max-figures", "0", "--out", str(tmp_path / "out")]
    assert main(["inspect", "torchvision:squeezenet1_0", *options]) == 0
    assert not asked
    assert main(["inspect", "torchvision:squeezenet1_0", "--weights", "IMAGENET1K_V1", *options, "--overwrite"]) == 2
    assert "--weights IMAGENET1K_V1 of torchvision:squeezenet1_0 cannot be loaded: URLError" in capsys.readouterr().err
    assert len(asked) == 1


def test_an_existing_report_is_not_overwritten_silently(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", str(checkpoint), "--max-figures", "0", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    (tmp_path / "out" / "index.html").write_text("mine")
    assert main(arguments) == 2
    there = tmp_path / "out" / "report.txt"
    assert f"--out: {there} exists; name another place, or add --overwrite to replace it" in capsys.readouterr().err
    assert (tmp_path / "out" / "index.html").read_text() == "mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "out" / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_bare_state_dict_is_read_as_it_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(SmallConvNet().state_dict(), tmp_path / "bare.pt")
    assert main(["inspect", str(tmp_path / "bare.pt"), "--max-figures", "0", "--out", str(tmp_path / "out")]) == 0
    assert "read as they are stored" in capsys.readouterr().out
    assert list(_rows(tmp_path / "out")) == ["net.conv1", "net.conv2", "net.conv3"]


# --------------------------------------------------------------------------- channels on data


def test_data_show_what_weights_do_not(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "lightning_filterdiv.demo:SmallConvNet", "--max-figures", "0"]
    torch.manual_seed(0)
    torch.save(torch.randn(12, 1, 8, 8), tmp_path / "batch.pt")
    for folder, data, note in (
        ("file", str(tmp_path / "batch.pt"), "Shown 10 images of batch.pt."),
        ("name", "digits", "Shown 10 images of digits"),
        ("class", "lightning_filterdiv.demo:Digits", "Shown 10 images of lightning_filterdiv.demo:Digits"),
    ):
        shown = ["--data", data, "--max-images", "10", "--out", str(tmp_path / folder)]
        assert main(["inspect", str(checkpoint), *options, *shown]) == 0
        text = capsys.readouterr().out
        assert note in text
        assert "pairs of channels are alike on the data and not in their weights" in text
    rows = _rows(tmp_path / "file")
    model = restore_model("lightning_filterdiv.demo:SmallConvNet", None, torch.load(checkpoint, weights_only=True))
    layers = {"net.conv2": model.net.conv2}
    images = torch.load(tmp_path / "batch.pt", weights_only=True)[:10]
    correlation = measure_channels(model, layers, lambda: model(images))["net.conv2"]
    off = correlation.abs().fill_diagonal_(0.0)
    assert float(rows["net.conv2"]["mean_abs_correlation"]) == pytest.approx(float(off.sum()) / (32 * 31), rel=1e-6)
    assert int(rows["net.conv2"]["channel_twins"]) == int((off.amax(dim=1) > 0.9).sum()) >= 20
    page = (tmp_path / "file" / "index.html").read_text(encoding="utf-8")
    assert page.count("Alike in function, not in weights") == 3


@pytest.mark.parametrize(
    ("data", "more", "message"),
    [
        ("{tmp}/batch.pt", [], "holds weights alone: name their network with --model"),
        ("{tmp}/batch.pt", ["--model", "lightning_filterdiv.demo:SmallConvNet"], "does not run on images (2, 5, 5)"),
        ("{tmp}/words.pt", ["--model", "lightning_filterdiv.demo:SmallConvNet"], "holds no batch of images"),
        ("nothing", ["--model", "lightning_filterdiv.demo:SmallConvNet"], "--data 'nothing' is none of"),
    ],
)
def test_data_that_cannot_be_shown(
    data: str, more: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torch.randn(3, 2, 5, 5), tmp_path / "batch.pt")
    torch.save({"a": 1}, tmp_path / "words.pt")
    arguments = ["--data", data.format(tmp=tmp_path), "--out", str(tmp_path / "out"), *more]
    assert main(["inspect", str(checkpoint), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (["{tmp}/nothing.ckpt"], "nothing.ckpt: no such file"),
        (["resnet18"], "did you mean torchvision:resnet18 or timm:resnet18?"),
        (["timm.resnet18"], "did you mean timm:resnet18?"),
        (["torchvision.resnet_18"], "did you mean torchvision:resnet18, "),
        (["{tmp}/text.ckpt"], "text.ckpt is not a checkpoint"),
        (["{tmp}/bare.pt", "--weights", "DEFAULT"], "--weights belongs to torchvision:NAME and timm:NAME"),
        (["brings.it:Class", "--weights", "DEFAULT"], "--weights belongs to torchvision:NAME and timm:NAME"),
        (["torchvision:alexnet", "--weights", "V9"], "torchvision has no weights 'V9' of alexnet; there are DEFAULT, "),
        (["torchvision:nothing", "--weights", "DEFAULT"], "torchvision has no model 'nothing'"),
        (["{ckpt}", "--max-images", "0"], "--max-images must be an integer >= 1, got 0"),
        (["{tmp}/linear.ckpt"], "holds no convolution"),
        (["torchvision:resnet19"], "torchvision has no model 'resnet19'; did you mean torchvision:resnet1"),
        (["timm:resnet18x"], "timm has no model 'resnet18x'; did you mean timm:resnet18"),
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


def test_advice_follows_what_was_measured() -> None:
    healthy = {"filters": 32, "over_chance": 1.0, "tied": 0, "mergeable": 0, "dead": 0.0}
    for change, expected in (
        ({}, "nothing needed"),
        ({"tied": 9, "mergeable": 9}, "filterdiv merge: 9 are tied"),
        ({"dead": 0.5, "mergeable": 9}, "prune_channels removes dead"),
        ({"mergeable": 9}, "CentripetalSGD to merge 9"),
        ({"mergeable": 1}, "nothing needed"),
        ({"over_chance": 4.0}, "BasisOrthonormality"),
        ({"over_chance": float("nan")}, "not finite"),
    ):
        text = advice(**(healthy | change))
        assert text.startswith(expected), change
        assert "RePr" not in text, "it lost accuracy in our own runs"


def test_tied_clusters_are_told_from_parallel_filters() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 12, 3)
    write_filters(conv, range(4), filter_matrix(conv)[4:8] * 1.0001)
    write_filters(conv, [8], 2 * filter_matrix(conv)[9:10])
    write_filters(conv, [10], -filter_matrix(conv)[11:12])
    (row,) = report_layers({"tied": conv}, 0.9)
    assert (row.twins, row.mergeable) == (12, 5), "the opposite pair is a twin, and not mergeable"
    assert row.advice == "filterdiv merge: 4 are tied to others"
    assert report_layers({"tied": conv}, 0.9, trained=False)[0].advice == ""


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
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(page)
    assert len(links.targets) > 3 * 3, "heat map, scale and kernels of every layer"
    assert all(target.startswith("data:") for target in links.targets)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", re.sub(r"data:image/png[^\"]*", "", page))
    assert "prefers-color-scheme: dark" in page


@browser.needed
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_click_on_a_layer_shows_its_heat_map_its_kernels_and_its_twins(
    scheme: str, checkpoint: Path, tmp_path: Path
) -> None:
    assert main(["inspect", str(checkpoint), "--out", str(tmp_path / "out"), "--max-figures", "0"]) == 0
    page = tmp_path / "out" / "index.html"
    script = """
      const pictures = () => [...document.querySelectorAll('.panel img')];
      const before = pictures().length;
      const row = [...document.querySelectorAll('tr.layer')].find(row => row.innerText.includes('net.conv2'));
      row.cells[3].click();
      await Promise.all(pictures().map(picture => picture.decode()));
      const seen = {
        before, kinds: pictures().filter(p => p.naturalWidth && p.clientWidth > 5).map(p => p.className),
        twins: document.querySelector('.panel .twins').innerText, expanded: row.querySelector('button').ariaExpanded,
        under: document.querySelector('tr.detail').previousElementSibling === row,
        background: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
        width: document.documentElement.scrollWidth - innerWidth,
      };
      row.querySelector('button').click();
      return {...seen, after: pictures().length};
    """
    for width in (1300, 420):
        seen, console = browser.evaluate(page, script, tmp_path, dark=scheme == "dark", width=width)
        assert not console
        assert (seen["before"], seen["after"]) == (0, 0)
        assert {"map", "scale", "mosaic", "kernel"} == set(seen["kinds"])
        assert seen["kinds"].count("kernel") == 20
        assert "+1.000" in seen["twins"]
        assert (seen["expanded"], seen["under"]) == ("true", True)
        assert seen["width"] <= 0, "the page itself does not scroll sideways"
        dark = sum(map(int, re.findall(r"\d+", seen["background"])[:3])) < 3 * 60
        assert dark == (scheme == "dark")
        assert (sum(map(int, re.findall(r"\d+", seen["ink"])[:3])) > 3 * 128) == dark


@browser.needed
def test_a_click_on_a_heading_sorts_and_keeps_open_panels_with_their_layer(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(checkpoint), "--out", str(tmp_path / "out"), "--max-figures", "0"]) == 0
    page = tmp_path / "out" / "index.html"
    script = """
      document.querySelectorAll('tr.layer button')[0].click();
      const heads = [...document.querySelectorAll('thead th')];
      heads.find(head => head.innerText === 'mergeable').click();
      return [...document.querySelectorAll('.wide > table > tbody > tr')].map(
        row => row.className === 'detail' ? 'detail' : row.cells[0].dataset.value);
    """
    order, console = browser.evaluate(page, script, tmp_path)
    assert not console
    assert order[0] == "net.conv2", "most mergeable first"
    assert order[order.index("net.conv1") + 1] == "detail"
    assert browser.evaluate(page, "return document.querySelectorAl('a')", tmp_path)[1], "the check sees errors"
