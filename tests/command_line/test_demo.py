"""``filterdiv demo``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_filterdiv.command_line import demo
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.narrowing import count_parameters, load_merged

README = Path(__file__).parents[2] / "README.md"


def _rows(text: str) -> dict[str, list[str]]:
    """Label -> values of the table."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if re.search(r"\S\s{2,}\S", line)]
    return {label: values for label, *values in lines}


def test_squeezed_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    assert main(["demo", "--epochs", "5", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    rows = _rows(captured.out)
    plain, trained, merged = (float(share.removesuffix(" %")) for share in rows["test accuracy"])
    assert plain > 90, "not a toy: it reads digits"
    assert trained == merged
    assert re.search(r"Merging changed 0 of 360 predictions", captured.out)
    full, same, narrow = (int(number.replace(",", "")) for number in rows["parameters"])
    assert full == same > 3 * narrow
    shown = README.read_text()
    for label in ("parameters", "MACs per image"):
        assert _rows(shown)[label] == rows[label], "README shows what the demo prints"
    assert "Merging changed 0 of 360 predictions" in shown
    assert f"tensorboard --logdir {out}" in captured.out
    assert captured.err.splitlines() == [f"{name}: training for 5 epochs" for name in ("plain", "csgd")], "no terminal"
    for noise in ("Warning", "srun", "TPU", "Tip"):
        assert noise not in captured.out
    network = load_merged(SmallConvNet(image_size=8), out / "csgd" / "version_0" / "narrow.pt")
    assert count_parameters(network) == narrow
    assert f"for load_merged: {out / 'csgd' / 'version_0' / 'narrow.pt'}" in captured.out, "a folder of this run"
    for run in ("plain", "csgd"):
        events = EventAccumulator(str(out / run / "version_0")).Reload()
        scalars = events.Tags()["scalars"]
        assert "Filters/cosine_over_chance" in scalars
        assert not {"epoch", "hp_metric"} & set(scalars), "no card that says nothing"
        steps = [event.step for event in events.Scalars("filterdiv_layers/cosine_over_chance/net.conv1")]
        assert steps[0] == 0, "measured before training too"
        assert "filterdiv_figures/similarity/net.conv1" in events.Tags()["images"]


def test_several_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method can be chosen, and several at once."""
    out = tmp_path / "runs"
    methods = [name for name in demo.METHODS if name != "csgd"]
    assert main(["demo", "--epochs", "3", "--out", str(out), "--method", *methods]) == 0
    rows = _rows(capsys.readouterr().out)
    assert all(len(values) == 1 + len(methods) for label, values in rows.items() if label != "plain")
    shared = 1 + methods.index("shared")
    parameters = [int(number.replace(",", "")) for number in rows["parameters"]]
    assert parameters[shared] < parameters[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--method", "repr", "--epochs", "2"], "--method repr needs at least 3 epochs, got --epochs 2"),
        (["--out", "file"], "--out file cannot be written (File exists: file); name another folder"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"filterdiv demo: {message}\n"
    assert not captured.out
