"""``filterdiv entropy`` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from benchmarks.models import StagedResNet
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.entropy_depth import estimate_depth_bound


def some_images() -> TensorDataset:
    return TensorDataset(torch.arange(8 * 3 * 12 * 12).view(8, 3, 12, 12) % 16)


def narrow_and_deep() -> StagedResNet:
    return StagedResNet((6, 2), (8, 16))


def words() -> list[str]:
    return ["no", "images"]


HERE = "tests.command_line.test_entropy"


def test_bound_and_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["entropy", "--data", f"{HERE}:some_images", "--model", f"{HERE}:narrow_and_deep"]) == 0
    text = capsys.readouterr().out
    assert "entropy 2.773 ± 0.000 nats" in text
    assert "Bound: at most 3 convolutions per stage (heuristic, see docs)." in text
    assert "StagedResNet: 8 convolutions on the longest path: 6 at 12x12, 2 at 6x6" in text
    assert "1 of 2 stages are deeper than the bound" in text
    table = [line.split() for line in text.splitlines() if "12x12" in line and "convolutions" not in line]
    assert table == [["1", "12x12", "6", "3", "8", "3", "x", "11"]]


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    source = f"{HERE}:some_images"
    assert main(["entropy", "--data", source, "--unit", "bits", "--rounding", "floor", "--max-images", "3"]) == 0
    text = capsys.readouterr().out
    assert "entropy 4.000 ± 0.000 bits (mean and deviation over 3 images" in text
    assert "at most 4 convolutions per stage" in text
    model = ["--model", "torchvision:resnet18", "--input-shape", "1,3,64,64"]
    assert main(["entropy", "--data", source, "--unit", "bits", *model]) == 0
    text = capsys.readouterr().out
    assert "1 at 32x32, 4 at 16x16, 4 at 8x8" in text
    assert "No stage is deeper than the bound." in text


def test_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    arrays = [np.random.default_rng(i).integers(0, 20 + i, (9, 7, 3), dtype=np.uint8) for i in range(4)]
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "deep" / ("er" if index % 2 else ".") / f"{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert main(["entropy", "--data", str(tmp_path)]) == 0
    expected = estimate_depth_bound(torch.from_numpy(np.stack(arrays)))
    assert f"entropy {expected.entropy:.3f} ± {expected.std:.3f} nats" in capsys.readouterr().out


def test_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["entropy", "--data", "digits"]) == 0
    assert "1,437 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing"], "--data 'nothing' is none of digits, fashion_mnist"),
        (["--data", f"{HERE}:words"], "hold no images"),
        (["--data", f"{HERE}:missing"], "cannot be built without arguments"),
        (["--data", "no.such.module:Data"], "cannot be built without arguments"),
        (["--data", "torchvision:Nope", "--root", "."], "torchvision has no data set 'Nope'"),
        (["--data", "torchvision:CIFAR10"], "needs --root"),
        (["--data", "torchvision:CIFAR10", "--root", "."], "nothing is downloaded"),
        (["--data", "fashion_mnist", "--root", "."], "dataset-fashion-mnist"),
        (["--data", "digits", "--root", "."], "--root belongs to --data fashion_mnist and torchvision:NAME"),
        (["--data", "."], "--data .: the folder holds no image files (.bmp,"),
        (["--data", "digits", "--max-images", "0"], "--max-images must be at least 1"),
        (["--data", "digits", "--model", "torchvision:nope"], "torchvision has no model 'nope'"),
        (["--data", "digits", "--model", "torch.nn:Identity"], "has no convolution"),
        (["--data", "digits", "--model", "torchvision:alexnet"], "AlexNet cannot be traced"),
        (["--data", "digits", "--model", "torchvision:alexnet", "--input-shape", "1,1,64,64"], "see --input-shape"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["entropy", *arguments]) == 2
    caught = capsys.readouterr()
    assert message in caught.err
    assert caught.err.startswith("filterdiv entropy: ")
    assert len(caught.err.splitlines()) == 1


def test_a_damaged_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    assert main(["entropy", "--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'b.png'} is not an image that can be read" in error
    assert error.count("\n") == 1
