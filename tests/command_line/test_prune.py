"""``filterdiv prune`` and ``filterdiv merge --twins``, to files that load, with an ONNX file beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_filterdiv import ChannelImportance
from lightning_filterdiv.channel_importance import restore_gates
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.narrowing import load_merged, prune_channels
from tests.support.training import fit

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
        (["--target-macs", "0.5", "--data", "nowhere"], "--data 'nowhere' is none of digits, fashion_mnist, or pkg"),
        (["--target-macs", "0.5", "--importance", "gates"], "needs a checkpoint of a fit with ChannelImportance"),
        (["--target-macs", "0.5", "--importance", "gates", "--data", "digits"], "needs a checkpoint of a fit with"),
        (["--target-macs", "0.5", "--exclude", "*"], "no layer is left: exclude leaves no layer"),
        (["--target-macs", "0.5", "--weights", "DEFAULT"], "--weights belongs to torchvision:NAME and timm:NAME"),
        (["--keep-fraction", "conv9=0.5"], "--keep-fraction pattern 'conv9' matches no layer"),
        (["--keep-fraction", "0.5", "--keep-fraction", "*=0.7"], "--keep-fraction: give one SHARE, or PATTERN=SHARE"),
        (["--target-macs", "0.5", "--include", "net.classifier"], "trace a part of the network with --network NAME"),
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


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a fit with ChannelImportance."""
    folder = tmp_path_factory.mktemp("gates")
    torch.manual_seed(0)
    callbacks = [ChannelImportance(reduction=2), ModelCheckpoint(dirpath=folder, filename="end")]
    fit(callbacks, model=SmallConvNet(), max_epochs=2)
    return folder / "end.ckpt"


def network_inside(**_: Any) -> torch.nn.Module:
    """Of :class:`SmallConvNet`, whatever its hyper-parameters are called."""
    return SmallConvNet().net


@pytest.mark.parametrize("inside", [False, True])
def test_gates_of_a_checkpoint_need_no_data(gated: Path, inside: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Inside: the plain network of the LightningModule, whose layers have other names."""
    model = "tests.command_line.test_prune:network_inside" if inside else MODEL
    out = gated.with_name(f"narrow_{inside}.pt")
    arguments = ["--importance", "gates", "--keep-fraction", "0.5", "--input-shape", "1,1,8,8", "--pairs", "0"]
    assert main(["prune", str(gated), "--model", model, "--out", str(out), *arguments]) == 0
    assert "by gates" in capsys.readouterr().out
    checkpoint = torch.load(gated, weights_only=True)
    trained = SmallConvNet()
    means = restore_gates(trained, checkpoint)
    trained.load_state_dict(checkpoint["state_dict"])
    expected = prune_channels(trained, importance=means, keep_fraction=0.5, verbose=False).network
    fresh = network_inside() if inside else SmallConvNet()
    found = load_merged(fresh, out)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(found.eval()(x), expected.eval()(x))


def test_gates_are_measured_anew_on_data(gated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--importance", "gates", "--keep-fraction", "0.5", "--data", "digits", "--pairs", "0"]
    out = str(gated.with_name("measured.pt"))
    assert main(["prune", str(gated), "--model", MODEL, "--out", out, *arguments]) == 0
    assert "accuracy      " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (lambda c: c, ["--importance", "l2"], "rank channels by them with --importance gates"),
        (lambda c: c, ["--importance", "gates", "--model", "torchvision:resnet18"], "had a gate in the fit"),
        (lambda c: c["callbacks"].clear(), ["--importance", "gates"], "the weights are not those of a SmallConvNet"),
        (lambda c: _gate_state(c).pop("arguments"), ["--importance", "gates"], "state of ChannelImportance is damaged"),
        (
            lambda c: _gate_state(c)["extra"].update(sums=torch.ones(3)),
            ["--importance", "gates"],
            "state of ChannelImportance is damaged",
        ),
    ],
)
def test_gates_that_cannot_be_used_are_one_line(
    gated: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], Any],
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = torch.load(gated, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "other.ckpt")
    model = [] if "--model" in arguments else ["--model", MODEL]
    out = tmp_path / "out.pt"
    assert (
        main(["prune", str(tmp_path / "other.ckpt"), *model, *arguments, "--target-macs", "0.5", "--out", str(out)])
        == 2
    )
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not out.exists()


def _gate_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return next(state for name, state in checkpoint["callbacks"].items() if "ChannelImportance" in name)


def test_shares_by_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = ["--keep-fraction", "net.conv1=0.5", "--keep-fraction", "net.conv2=0.25", "--pairs", "0"]
    assert main(["prune", MODEL, "--out", str(tmp_path / "small.pt"), *shares]) == 0
    network = load_merged(SmallConvNet(), tmp_path / "small.pt")
    full = SmallConvNet()
    assert 2 * network.net.conv1.out_channels == full.net.conv1.out_channels
    assert 4 * network.net.conv2.out_channels == full.net.conv2.out_channels


def test_a_network_of_a_library_says_that_its_weights_are_random(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input-shape", "1,3,64,64", "--out", str(tmp_path / "small.pt"), "--pairs", "0"]
    assert main(["merge", "torchvision:squeezenet1_1", *arguments, "--twins", "0.2", "--include", "features.0"]) == 0
    text = capsys.readouterr().out
    assert "weights       random; name a file, or trained weights with --weights DEFAULT" in text
    assert "channels      64 -> " in text


@pytest.mark.parametrize("option", [["--network", "net"], ["--include", "conv1"], ["--weights", "DEFAULT"]])
def test_options_of_twins_do_nothing_without(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "end.ckpt", "--model", MODEL, "--out", str(tmp_path / "small.pt"), *option]) == 2
    assert f"{option[0]} belongs to --twins" in capsys.readouterr().err


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
