"""``filterdiv prune`` and ``filterdiv merge --twins``, to files that load, with an ONNX file beside them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch

from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.narrowing import load_merged

MODEL = "lightning_filterdiv.demo:SmallConvNet"


def test_prune_to_a_target_with_data_and_onnx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, onnx = tmp_path / "small.pt", tmp_path / "small.onnx"
    arguments = ["--importance", "taylor", "--target-macs", "0.5", "--data", "lightning_filterdiv.demo:Digits"]
    assert main(["prune", MODEL, "--out", str(out), "--onnx", str(onnx), "--pairs", "2", *arguments]) == 0
    text = capsys.readouterr().out
    assert text.startswith("channels of")
    for words in (
        "asked for: target_macs=0.5",
        "not lossless",
        "accuracy      ",
        "onnxruntime differs by",
    ):
        assert words in text
    for runtime in ("torch", "onnxruntime"):
        for batch in (1, 32):
            assert f"{runtime:<12} batch {batch:>3}" in text
    network = load_merged(SmallConvNet(), out).eval()
    x = torch.randn(5, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(onnx))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-3, atol=1e-4)


def test_twins_of_any_weights_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = SmallConvNet()
    conv = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        conv.weight[3] = conv.weight[1]
        if conv.bias is not None:
            conv.bias[3] = conv.bias[1]
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    files = [str(tmp_path / "weights.pt"), "--model", MODEL, "--out", str(tmp_path / "small.pt"), "--pairs", "0"]
    assert main(["merge", *files, "--twins", "0.9999"]) == 0
    assert "projection    changes the outputs by" in capsys.readouterr().out
    network = load_merged(SmallConvNet(), tmp_path / "small.pt").eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(network(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-macs", "1.5"], "--target-macs is a share of the full network"),
        (["--target-macs", "0.0001"], "is out of reach"),
        ([], "give one of --keep-fraction, --target-macs and --target-parameters"),
        (["--target-macs", "0.5", "--importance", "taylor"], "--importance taylor needs --data"),
        (["--target-macs", "0.5", "--include", "nothing"], "include pattern 'nothing' matches no layer"),
        (["--target-macs", "0.5", "--data", "digits"], "is no pkg.module:Name"),
        (["--target-macs", "0.5", "--onnx", "/no/folder/a.onnx"], "--onnx /no/folder/a.onnx cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", MODEL, "--out", str(tmp_path / "small.pt"), *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_files_are_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, onnx = tmp_path / "small.pt", tmp_path / "small.onnx"
    arguments = ["prune", MODEL, "--target-macs", "0.5", "--pairs", "0", "--out", str(out), "--onnx", str(onnx)]
    for mine, option in ((out, "--out"), (onnx, "--onnx")):
        mine.write_text("mine")
        assert main(arguments) == 2
        assert (
            f"{option}: {mine} exists; name another place, or add --overwrite to replace it" in capsys.readouterr().err
        )
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
        mine.unlink()
    out.write_text("mine")
    assert main([*arguments, "--overwrite"]) == 0
    load_merged(SmallConvNet(), out)
    assert onnx.stat().st_size > 1000
