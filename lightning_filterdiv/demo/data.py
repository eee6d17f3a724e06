"""Data modules for images that come with scikit-learn or with Debian's package ``dataset-fashion-mnist``."""

from __future__ import annotations

import gzip
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_filterdiv.tensors.arguments import check_integer
from lightning_filterdiv.tensors.randomness import keyed_generator

__all__ = ["Digits", "FashionMNIST", "Images", "load_fashion_mnist"]

#: Where Debian's package ``dataset-fashion-mnist`` puts its four files.
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Images(pl.LightningDataModule):
    """Images in memory as float tensors ``(N, 1, H, W)``, normalised by mean and deviation of the training set.

    Args:
        batch_size: images per step.
        seed: seed of the train/test split or subset.
        transform: module that is applied once to all normalised images. It must keep their shape.
    """

    image_size: int

    def __init__(self, batch_size: int = 64, seed: int = 0, transform: nn.Module | None = None) -> None:
        super().__init__()
        self.batch_size = check_integer("batch_size", batch_size, low=1)
        self.seed = check_integer("seed", seed, low=0)
        self.transform = transform
        self._train: TensorDataset | None = None
        self._test: TensorDataset | None = None

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return train images, train labels, test images, test labels; images ``(N, 1, H, W)`` float, unnormalised."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the images once, normalise both parts by the training part, and apply the transform.

        Raises:
            ValueError: ``transform`` changes the shape of images.
        """
        if self._train is not None:
            return
        train_x, train_y, test_x, test_y = self.load()
        mean, deviation = train_x.mean(), train_x.std()
        self._train = TensorDataset(self._transformed((train_x - mean) / deviation), train_y)
        self._test = TensorDataset(self._transformed((test_x - mean) / deviation), test_y)

    @torch.no_grad()
    def _transformed(self, images: Tensor) -> Tensor:
        if self.transform is None:
            return images
        changed = torch.cat([self.transform(part) for part in images.split(1000)])
        if changed.shape != images.shape:
            raise ValueError(
                f"transform must keep the shape {tuple(images.shape[1:])} of images, "
                f"{type(self.transform).__name__} made {tuple(changed.shape[1:])} of it"
            )
        return changed

    def _loader(self, data: TensorDataset | None, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
        assert data is not None, "setup() runs first"
        return DataLoader(data, batch_size=self.batch_size, shuffle=shuffle, drop_last=shuffle)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the training images, shuffled, without the last incomplete batch."""
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test images."""
        return self._loader(self._test, shuffle=False)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test images."""
        return self._loader(self._test, shuffle=False)


class Digits(Images):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 80 % for training."""

    image_size = 8

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`Images.load`; a stratified, seeded split."""
        # Imported here because scikit-learn takes seconds to import, and FashionMNIST does not need it.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=self.seed)
        train_x, test_x, train_y, test_y = (torch.from_numpy(np.asarray(part)) for part in split)
        return (
            train_x.float().view(-1, 1, 8, 8) / 16,
            train_y.long(),
            test_x.float().view(-1, 1, 8, 8) / 16,
            test_y.long(),
        )


class FashionMNIST(Images):
    """Fashion-MNIST (Xiao et al. 2017), 28x28 grey, 60,000 training and 10,000 test images, read from local files.

    Args:
        root: folder with the four ``*-ubyte.gz`` files; ``None`` for that of Debian's package.
        train_images: size of a seeded random subset of the training images; ``None`` for all.
        batch_size: images per step.
        seed: seed of the subset.
        transform: see :class:`Images`.

    Raises:
        FileNotFoundError: the files are missing. The message says how to get them.
    """

    image_size = 28

    def __init__(
        self,
        root: str | None = None,
        train_images: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        transform: nn.Module | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, transform=transform)
        self.root = root
        self.train_images = None if train_images is None else check_integer("train_images", train_images, low=1)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`Images.load`; the subset is the head of a permutation drawn from the seed."""
        root = None if self.root is None else Path(self.root)
        train_x, train_y = load_fashion_mnist("train", root)
        test_x, test_y = load_fashion_mnist("t10k", root)
        if self.train_images is not None:
            order = torch.randperm(len(train_x), generator=keyed_generator("subset", self.seed))[: self.train_images]
            train_x, train_y = train_x[order], train_y[order]
        return train_x.unsqueeze(1).float() / 255, train_y, test_x.unsqueeze(1).float() / 255, test_y


def load_fashion_mnist(part: str, root: Path | None = None) -> tuple[Tensor, Tensor]:
    """Read one part of Fashion-MNIST from its IDX files.

    Args:
        part: ``"train"`` or ``"t10k"``.
        root: folder of the files; ``None`` for Debian's.

    Returns:
        Images ``(N, 28, 28)`` uint8 and labels ``(N,)`` int64.

    Raises:
        FileNotFoundError: the message says what to install.
    """
    folder = DEBIAN_FASHION_MNIST if root is None else root
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        path = folder / f"{part}-{kind}-ubyte.gz"
        if not path.exists():
            raise FileNotFoundError(
                f"Fashion-MNIST is not at {folder}: {path.name} is missing. On Debian or Ubuntu run "
                f"'apt-get install dataset-fashion-mnist', else give root=FOLDER holding the four *-ubyte.gz files"
            )
        with gzip.open(path) as file:
            arrays.append(np.frombuffer(file.read(), dtype=np.uint8, offset=header).copy())
    images, labels = (torch.from_numpy(array) for array in arrays)
    return images.view(-1, 28, 28), labels.long()
