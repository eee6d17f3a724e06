"""``filterdiv demo``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_filterdiv.command_line.demo import _train
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.command_line.options import parse


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    assert main(["demo", "--epochs", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"test accuracy\s+\d+\.\d %\s+\d+\.\d %", text)
    for layer in ("net.conv1", "net.conv2", "net.conv3"):
        assert re.search(rf"{layer}  mean \|cos\| / chance\s+\d\.\d\d\s+\d\.\d\d", text)
        assert re.search(rf"{layer}  effective rank / full\s+[01]\.\d+\s+[01]\.\d+", text)
    assert f"tensorboard --logdir {out}" in text
    for run in ("plain", "repr"):
        events = EventAccumulator(str(out / run / "version_0")).Reload()
        scalars = events.Tags()["scalars"]
        assert "Filters/cosine_over_chance" in scalars
        assert not {"epoch", "hp_metric"} & set(scalars), "no card that says nothing"
        steps = [event.step for event in events.Scalars("filterdiv_layers/cosine_over_chance/net.conv1")]
        assert steps[0] == 0, "measured before training too"
        assert len(steps) == 4
        assert "filterdiv_figures/similarity/net.conv1" in events.Tags()["images"]


def test_demo_learns() -> None:
    """Not a toy: the accuracy it prints is that of a network which reads digits."""
    assert _train("plain", None, parse(["demo", "--epochs", "5"])).accuracy > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--epochs", "2"], "--method repr needs at least 3 epochs, got --epochs 2"),
        (["--out", "file"], "--out file cannot be written (File exists: file); name another folder"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"filterdiv demo: {message}\n"
    assert not captured.out
