"""``filterdiv merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import Digits, SmallConvNet
from lightning_filterdiv.narrowing import load_merged, merge_channels
from tests.support.training import fit


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LightningModule trained until its clusters are one, and saved."""
    folder = tmp_path_factory.mktemp("merge")
    torch.manual_seed(0)
    saving = ModelCheckpoint(dirpath=folder, filename="end")
    data = Digits()
    data.setup()
    loader = data.train_dataloader()
    fit([CentripetalSGD(), saving], model=SmallConvNet(width=8), loader=loader, max_epochs=14)  # type: ignore[arg-type]
    return folder / "end.ckpt"


def test_the_command_merges_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = checkpoint.with_name("narrow.pt")
    source = ["--model", "lightning_filterdiv.demo:SmallConvNet"]
    assert main(["merge", str(checkpoint), "--out", str(out), *source]) == 0
    text = capsys.readouterr().out
    for line in ("channels      24 -> 15", "parameters  ", "MACs  ", "projection  ", "latency  "):
        assert line in text
    original = SmallConvNet.load_from_checkpoint(checkpoint, weights_only=True).eval()
    narrow = load_merged(SmallConvNet(width=8), out).eval()
    assert narrow.net.conv2.weight.shape == (5, 5, 3, 3)
    data = Digits()
    data.setup()
    images = next(iter(data.test_dataloader()))[0]
    assert torch.equal(narrow(images).argmax(1), original(images).argmax(1))
    clusters = CentripetalSGD.clusters_from(torch.load(checkpoint, weights_only=True))
    by_hand = merge_channels(original, clusters).network
    assert torch.equal(by_hand.net.conv3.weight, narrow.net.conv3.weight)


def test_a_checkpoint_from_the_middle_of_a_fit(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says where it is from, and what that means; the end of the fit says nothing of the kind."""
    content = torch.load(checkpoint, weights_only=True)
    end = content["global_step"]
    content["global_step"] = end // 3
    path, out = tmp_path / "middle.ckpt", tmp_path / "narrow.pt"
    torch.save(content, path)
    source = ["--model", "lightning_filterdiv.demo:SmallConvNet", "--pairs", "0", "--out", str(out)]
    assert main(["merge", str(path), *source]) == 0
    middle = f"step {end // 3} of a planned {end}: by the forecast, distances inside clusters are "
    assert f"checkpoint    {middle}" in capsys.readouterr().out
    content["state_dict"]["net.conv2.weight"].normal_()
    torch.save(content, path)
    source.append("--overwrite")
    assert main(["merge", str(path), *source]) == 2
    error = capsys.readouterr().err
    assert f"These weights are those of {middle}" in error
    assert "Merge the checkpoint of the end of the fit" in error
    assert "--tolerance inf" in error
    assert "Train longer" not in error
    assert main(["merge", str(checkpoint), *source]) == 0
    assert "planned" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda c: c["callbacks"].clear(), [], "holds no clusters of CentripetalSGD"),
        (lambda c: None, ["--input-shape", "1,3,8,8"], "does not accept the example inputs"),
        (lambda c: c["state_dict"]["net.conv2.weight"].normal_(), [], "--tolerance inf"),
        (lambda c: c["state_dict"].pop("net.conv2.bias"), [], "1 missing ('net.conv2.bias'"),
    ],
    ids=["no clusters", "input shape", "not tied", "other weights"],
)
def test_the_command_ends_in_one_readable_line(
    change: Any,
    arguments: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "wrong.ckpt")
    source = ["--model", "lightning_filterdiv.demo:SmallConvNet"]
    out = tmp_path / "narrow.pt"
    assert main(["merge", str(tmp_path / "wrong.ckpt"), "--out", str(out), *source, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("filterdiv merge: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
