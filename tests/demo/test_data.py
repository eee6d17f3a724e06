"""Data of the demo: digits that come with scikit-learn, and Fashion-MNIST from local files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_filterdiv.demo import Digits, FashionMNIST, SmallConvNet
from lightning_filterdiv.demo.data import DEBIAN_FASHION_MNIST


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
