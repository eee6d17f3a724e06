"""Data modules of the benchmarks: images in memory, in an order that a resumed run can repeat; ImageNet from folders.

``batch_size`` is per process, as everywhere in Lightning. Nothing is downloaded unless ``download=True`` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.training.loader import SeededBatches, SeededItems, Shares, crop_and_flip
from lightning_filterdiv import demo
from lightning_filterdiv.tensors.arguments import check_integer, check_number
from lightning_filterdiv.tensors.randomness import keyed_generator

__all__ = ["CIFAR10", "CIFAR100", "Digits", "FashionMNIST", "ImageNet", "ImagesInMemory"]

Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def _process(data: pl.LightningDataModule) -> tuple[int, int]:
    """Rank and number of processes."""
    return (0, 1) if data.trainer is None else (data.trainer.global_rank, data.trainer.world_size)


class ImagesInMemory(pl.LightningDataModule):
    """Images normalised per channel by the training part.

    :class:`~benchmarks.training.loader.SeededBatches` hands them out.

    Args:
        batch_size: images per step and process.
        train_images: use the head of a permutation of the training images, drawn from ``seed``; ``None`` for all.
        augment: zero padding by four, random crop, random mirror image.
        transform: module that all normalised images go through once, such as ``torch.nn.AvgPool2d``.
        seed: seed of subset, order and augmentation.
        root: folder of the data; ``None`` for the usual place.
        download: fetch what is missing, where the data set can be fetched.
        wrong_labels: share of the training images that get another class than theirs, drawn from ``seed``; ``None``:
            all labels stay. Test labels always stay.

    Attributes:
        image_shape: channels, height, width, behind ``transform``.
        classes: number of classes.
    """

    image_shape: tuple[int, int, int]
    classes: int = 10

    def __init__(
        self,
        batch_size: int = 64,
        train_images: int | None = None,
        augment: bool = False,
        seed: int = 1,
        root: str | None = None,
        download: bool = False,
        transform: nn.Module | None = None,
        wrong_labels: float | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = check_integer("batch_size", batch_size, low=1)
        self.train_images = None if train_images is None else check_integer("train_images", train_images, low=1)
        self.seed = check_integer("seed", seed, low=0)
        self.wrong_labels = (
            None if wrong_labels is None else check_number("wrong_labels", wrong_labels, low=0.0, high=1.0)
        )
        self.augment, self.root, self.download, self.transform = augment, root, download, transform
        if transform is not None:
            channels, height, width = self._transformed(torch.zeros(1, *self.image_shape)).shape[1:]
            self.image_shape = channels, height, width

    def read(self) -> Parts:
        """Training images and labels, test images and labels; images ``(N, C, H, W)`` float in 0..1."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Download, if it can be."""

    def prepare_data(self) -> None:
        """Download if asked to; Lightning calls this in one process per machine."""
        if self.download:
            self.fetch()

    def setup(self, stage: str | None = None) -> None:
        """Read the data, unless that is done."""
        _ = self.parts

    @cached_property
    def parts(self) -> Parts:
        """Return the result of :meth:`read` as a subset, normalised and transformed.

        Raises:
            ValueError: ``train_images`` is more than there are.
        """
        train_x, train_y, test_x, test_y = self.read()
        if self.train_images is not None:
            if self.train_images > len(train_x):
                raise ValueError(f"train_images={self.train_images}, but {type(self).__name__} has {len(train_x)}")
            order = torch.randperm(len(train_x), generator=keyed_generator("subset", self.seed))[: self.train_images]
            train_x, train_y = train_x[order], train_y[order]
        if self.wrong_labels is not None:
            train_y = self._mislabelled(train_y)
        channels = [(channel.mean(), channel.std()) for channel in train_x.movedim(1, 0)]
        mean, deviation = (torch.stack(part).view(-1, 1, 1) for part in zip(*channels, strict=True))
        return (
            self._transformed((train_x - mean) / deviation), train_y,
            self._transformed((test_x - mean) / deviation), test_y,
        )  # fmt: skip

    @torch.no_grad()
    def _transformed(self, images: Tensor) -> Tensor:
        if self.transform is None:
            return images
        return torch.cat([self.transform(part) for part in images.split(1000)])

    def _mislabelled(self, labels: Tensor) -> Tensor:
        """Copy of ``labels`` in which the share ``wrong_labels`` names one of the other classes, all equally likely."""
        assert self.wrong_labels is not None
        generator = keyed_generator("wrong labels", self.seed)
        chosen = torch.randperm(len(labels), generator=generator)[: round(self.wrong_labels * len(labels))]
        shift = torch.randint(1, self.classes, (len(chosen),), generator=generator)
        labels = labels.clone()
        labels[chosen] = (labels[chosen] + shift) % self.classes
        return labels

    def train_dataloader(self) -> SeededBatches:
        """Seeded batches; the incomplete last one is dropped."""
        rank, world_size = _process(self)
        if len(self.parts[0]) < self.batch_size * world_size:
            raise ValueError(
                f"{len(self.parts[0])} training images do not fill one batch of {self.batch_size} on {world_size} "
                f"processes; lower batch_size or raise train_images"
            )
        augment = crop_and_flip if self.augment else None
        return SeededBatches(self.parts[:2], self.batch_size, self.seed, rank, world_size, augment)

    def val_dataloader(self) -> Shares:
        """The test images, every one once."""
        return Shares(self.parts[2:], 500, *_process(self))

    def test_dataloader(self) -> Shares:
        """The test images, every one once."""
        return self.val_dataloader()


class Digits(ImagesInMemory):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, 80 % for training; needs no files."""

    image_shape = (1, 8, 8)

    def read(self) -> Parts:
        """See :meth:`ImagesInMemory.read`; the split is drawn from ``seed``."""
        return demo.Digits(seed=self.seed).load()


class FashionMNIST(ImagesInMemory):
    """Fashion-MNIST, 28x28 grey, 60,000 + 10,000 images, from ``root`` (also as torchvision lays it out there), from
    where torchvision put it (``data`` by default), or from Debian's package."""

    image_shape = (1, 28, 28)

    def fetch(self) -> None:
        """See :meth:`ImagesInMemory.fetch`."""
        torchvision.datasets.FashionMNIST(self.root or "data", download=True)

    def read(self) -> Parts:
        """See :meth:`ImagesInMemory.read`."""
        fetched = Path(self.root or "data") / "FashionMNIST" / "raw"
        return demo.FashionMNIST(str(fetched) if fetched.is_dir() else self.root).load()


class _CIFAR(ImagesInMemory):
    image_shape = (3, 32, 32)
    source: type[torchvision.datasets.CIFAR10]

    def fetch(self) -> None:
        """See :meth:`ImagesInMemory.fetch`."""
        self.source(self.root or "data", download=True)

    def read(self) -> Parts:
        """See :meth:`ImagesInMemory.read`."""
        root = self.root or "data"
        parts: list[Tensor] = []
        for train in (True, False):
            try:
                found = self.source(root, train=train)
            except RuntimeError as error:  # what torchvision raises for files that are absent or damaged
                raise FileNotFoundError(
                    f"{type(self).__name__} is not in {root!r}: put {self.source.filename} there and unpack it, or let "
                    f"torchvision fetch it with --data.download true; --data.root names another folder"
                ) from error
            parts += [torch.from_numpy(found.data).permute(0, 3, 1, 2).float() / 255, torch.tensor(found.targets)]
        return parts[0], parts[1], parts[2], parts[3]


class CIFAR10(_CIFAR):
    """CIFAR-10, 32x32, 50,000 + 10,000 images, from ``root`` (``data`` by default)."""

    source = torchvision.datasets.CIFAR10


class CIFAR100(_CIFAR):
    """CIFAR-100, 32x32, 50,000 + 10,000 images, from ``root`` (``data`` by default)."""

    source = torchvision.datasets.CIFAR100
    classes = 100


class ImageNet(pl.LightningDataModule):
    """Folders ``train/CLASS/*`` and ``val/CLASS/*``: random resized crop and mirror image, centre crop for validation.

    Args:
        root: folder that holds ``train`` and ``val``.
        batch_size: images per step and process.
        workers: loader processes per training process.
        classes: number of class folders.
        seed: seed of order and augmentation, which a resumed run repeats, also in the middle of an epoch.
    """

    image_shape = (3, 224, 224)

    def __init__(
        self, root: str = "imagenet", batch_size: int = 64, workers: int = 8, classes: int = 1000, seed: int = 1
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.workers = root, batch_size, workers
        self.classes, self.seed = classes, seed

    def _folder(self, part: str, transforms: Iterable[Any]) -> torchvision.datasets.ImageFolder:
        path = Path(self.root) / part
        if not path.is_dir():
            raise FileNotFoundError(
                f"no folder {path}: ImageNet is expected as {self.root}/train/CLASS/*.JPEG and "
                f"{self.root}/val/CLASS/*.JPEG; name its place with --data.root"
            )
        tail = [
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
        images = torchvision.datasets.ImageFolder(path, v2.Compose([*transforms, *tail]))
        if len(images.classes) != self.classes:
            raise ValueError(f"{path} holds {len(images.classes)} class folders, classes={self.classes} was asked for")
        return images

    @property
    def _options(self) -> dict[str, Any]:
        return {"num_workers": self.workers, "pin_memory": torch.cuda.is_available()}

    def train_dataloader(self) -> SeededItems:
        """Seeded batches; the incomplete last one is dropped."""
        images = self._folder("train", [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])
        rank, world_size = _process(self)
        return SeededItems(images, self.batch_size, self.seed, rank, world_size, **self._options)

    def val_dataloader(self) -> DataLoader[Any]:
        """Resize to 256, centre crop of 224; Lightning shares it out between the processes."""
        images = self._folder("val", [v2.Resize(256), v2.CenterCrop(224)])
        return DataLoader(images, batch_size=self.batch_size, persistent_workers=self.workers > 0, **self._options)

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation images: the test part has no public labels."""
        return self.val_dataloader()
