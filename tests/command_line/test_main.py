"""The ``filterdiv`` command as a user meets it."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_filterdiv
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import Digits, FashionMNIST, SmallConvNet
from lightning_filterdiv.demo.data import DEBIAN_FASHION_MNIST


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs"
    assert main(["demo", "--epochs", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"test accuracy\s+\d+\.\d %\s+\d+\.\d %", text)
    for layer in ("net.conv1", "net.conv2", "net.conv3"):
        assert re.search(rf"{layer}  mean \|cos\|\s+0\.\d+\s+0\.\d+", text)
        assert re.search(rf"{layer}  effective rank / full\s+[01]\.\d+\s+[01]\.\d+", text)
    assert f"tensorboard --logdir {out}" in text
    for run in ("plain", "repr"):
        events = EventAccumulator(str(out / run / "version_0")).Reload()
        assert "filterdiv/mean_abs_cosine/network" in events.Tags()["scalars"]
        steps = [event.step for event in events.Scalars("filterdiv/mean_abs_cosine/net.conv1")]
        assert steps[0] == 0, "measured before training too"
        assert len(steps) == 4
        assert "filterdiv/figures/similarity/net.conv1" in events.Tags()["images"]


def test_demo_learns() -> None:
    """Not a toy: the accuracy it prints is that of a network which reads digits."""
    import argparse

    from lightning_filterdiv.command_line.demo import _train

    options = argparse.Namespace(data="digits", seed=0, epochs=5, out=Path("runs"))
    assert _train("plain", None, options).accuracy > 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--method", "magic"], "invalid choice: 'magic'"),
        (["demo", "--data", "imagenet"], "invalid choice: 'imagenet'"),
        (["demo", "--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["demo", "--epochs", "few"], "invalid int value: 'few'"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_commands(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code != 0
    assert message in str(caught.value) + capsys.readouterr().err


def test_wrong_yaml_names_the_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: lightning_filterdiv.demo.SmallConvNet\n"
        "trainer:\n  callbacks:\n    - class_path: WeightAsynchronousUpdate\n      init_args: {axis: sideways}\n"
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path)])
    error = capsys.readouterr().err
    assert "axis" in error
    assert "sideways" in error
    assert "'out'" in error


def test_fit_validate_test(tmp_path: Path) -> None:
    """The three commands of one YAML file; the callback is named by its short name."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {class_path: lightning_filterdiv.demo.SmallConvNet, init_args: {width: 8}}\n"
        "data: lightning_filterdiv.demo.Digits\n"
        "trainer:\n  max_epochs: 1\n  accelerator: cpu\n  enable_progress_bar: false\n"
        f"  logger: {{class_path: CSVLogger, init_args: {{save_dir: '{tmp_path}'}}}}\n"
        "  callbacks:\n    - class_path: WeightAsynchronousUpdate\n      init_args: {update_fraction: 0.5}\n"
    )
    assert main(["fit", "--config", str(path)]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert any(key.startswith("WeightAsynchronousUpdate{") for key in state)
    for command in ("validate", "test"):
        assert main([command, "--config", str(path), "--ckpt_path", str(checkpoint)]) == 0
    assert any("test_acc" in file.read_text() for file in tmp_path.rglob("metrics.csv"))


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lightning_filterdiv", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"filterdiv {lightning_filterdiv.__version__}"


def test_digits() -> None:
    data = Digits(batch_size=32, seed=1)
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert data._train is not None
    assert data._test is not None
    assert len(data._train) + len(data._test) == 1797
    assert float(data._train.tensors[0].mean()) == pytest.approx(0, abs=1e-4)
    assert SmallConvNet(image_size=8)(images).shape == (32, 10)


def _write_fashion(folder: Path, count: int) -> None:
    for part in ("train", "t10k"):
        pixels = np.arange(count * 784, dtype=np.uint32).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + bytes(range(count))))


def test_fashion_mnist_from_files(tmp_path: Path) -> None:
    _write_fashion(tmp_path, 10)
    data = FashionMNIST(root=str(tmp_path), train_images=6, seed=2)
    data.setup()
    assert data._train is not None
    assert data._train.tensors[0].shape == (6, 1, 28, 28)
    other = FashionMNIST(root=str(tmp_path), train_images=6, seed=3)
    other.setup()
    assert other._train is not None
    assert not torch.equal(data._train.tensors[1], other._train.tensors[1])


def test_missing_fashion_mnist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        FashionMNIST(root=str(tmp_path)).setup()


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_real_fashion_mnist() -> None:
    data = FashionMNIST()
    train_x, train_y, test_x, _ = data.load()
    assert train_x.shape == (60_000, 1, 28, 28)
    assert test_x.shape == (10_000, 1, 28, 28)
    assert train_y.bincount().tolist() == [6_000] * 10
