"""Measurement, description and refusal of each form of data."""

from __future__ import annotations

import gc
import io
import math
import random
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)
from torchvision import transforms
from torchvision.datasets import ImageFolder, VisionDataset

from benchmarks.training.loader import SeededBatches
from lightning_filterdiv.demo import Digits
from lightning_filterdiv.demo.data import DEBIAN_FASHION_MNIST, load_fashion_mnist
from lightning_filterdiv.entropy_depth import ImageDataError, estimate_depth_bound, image_entropy, images
from lightning_filterdiv.entropy_depth.estimate import measure
from lightning_filterdiv.entropy_depth.images import loader_source

RAW = torch.randint(0, 256, (40, 3, 12, 10), generator=torch.Generator().manual_seed(5), dtype=torch.uint8) // 8
LABELS = torch.arange(40) % 4
ENTROPY = image_entropy(RAW)
NORMALISE = transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
AUGMENT = transforms.Compose(
    [transforms.RandomCrop((12, 10), padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALISE]
)


class Arrays(VisionDataset):
    """As torchvision's CIFAR10: raw bytes in ``data``, PIL images through ``transform``."""

    def __init__(self, transform: Any = None) -> None:
        super().__init__(None, transform=transform)
        self.data = RAW.permute(0, 2, 3, 1).numpy()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        image = Image.fromarray(self.data[index])
        return (self.transform(image) if self.transform is not None else image), int(LABELS[index])


class Files(Dataset[Any]):
    """A user's own: images made on demand, a transform it calls without asking."""

    def __init__(self, transform: Any = np.array, form: Any = lambda image, label: (image, label)) -> None:
        self.transform, self.form = transform, form

    def __len__(self) -> int:
        return len(RAW)

    def __getitem__(self, index: int) -> Any:
        image = Image.fromarray(RAW[index].permute(1, 2, 0).numpy())
        return self.form(self.transform(image), index)


class Stream(IterableDataset[Any]):
    """No length, no items; one image at a time."""

    def __iter__(self) -> Iterator[Any]:
        return zip(RAW, LABELS, strict=True)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield RAW[0], 0


class Module(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.train = Arrays(AUGMENT)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=7, shuffle=True)


FORMS = {
    "tensor": lambda: RAW,
    "array": lambda: RAW.numpy(),
    "raw images of a data set": lambda: Arrays(AUGMENT),
    "raw images behind a loader": lambda: DataLoader(Arrays(AUGMENT), batch_size=7, shuffle=True, drop_last=True),
    "subset": lambda: DataLoader(Subset(Subset(Arrays(AUGMENT), range(40)), range(39, -1, -1)), batch_size=7),
    "data module": Module,
    "items": lambda: ConcatDataset([Subset(Arrays(), range(20)), Subset(Arrays(), range(20, 40))]),
    "items of tensors": lambda: TensorDataset(LABELS, RAW),
    "dict items": lambda: Files(np.array, lambda image, label: {"label": label, "image": image}),
    "list of PIL images": lambda: [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in RAW],
    "batches of tensors": lambda: DataLoader(Files(transforms.ToTensor()), batch_size=7, shuffle=True),
    "workers": lambda: DataLoader(Files(transforms.ToTensor()), batch_size=8, num_workers=1),
    "several loaders": lambda: {
        "a": DataLoader(Subset(Arrays(), range(10))),
        "b": DataLoader(TensorDataset(RAW[10:]), batch_size=4),
    },
    "iterable": Stream,
    "iterable in a loader": lambda: DataLoader(Stream(), batch_size=7),
    "dict batches": lambda: DataLoader([{"label": n, "image": image} for n, image in enumerate(RAW)], batch_size=7),
    "batches as items": lambda: DataLoader(list(zip(RAW.split(8), LABELS.split(8), strict=True)), batch_size=None),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_entropy_of_the_raw_images(form: str) -> None:
    bound = estimate_depth_bound(FORMS[form]())
    assert bound.n_images == 40
    assert bound.entropy == pytest.approx(float(ENTROPY.mean()), abs=1e-12)
    assert bound.std == pytest.approx(float(ENTROPY.std(correction=0)), abs=1e-12)
    assert bound.bound == math.ceil(bound.entropy)


def test_what_was_measured_is_said() -> None:
    raw = estimate_depth_bound(DataLoader(Arrays(AUGMENT)))
    assert (raw.source, raw.notes) == ("raw 8-bit images of Arrays", ())
    assert estimate_depth_bound(list(RAW)).source == "items of list"
    stream = estimate_depth_bound(DataLoader(Stream(), batch_size=4))
    assert stream.source == "batches of a DataLoader over Stream"
    assert "as the network sees them: random augmentation" in stream.notes[0]


def test_transforms_of_other_data_are_part_of_what_is_measured() -> None:
    """Padding and normalisation show in the entropy, and the notes say that they may."""
    seen = estimate_depth_bound(DataLoader(Files(AUGMENT), batch_size=8))
    assert abs(seen.entropy - float(ENTROPY.mean())) > 0.1
    assert "as the network sees them" in seen.notes[0]
    assert "look normalised" in seen.notes[1]


def test_images_of_many_sizes(tmp_path: Path) -> None:
    sizes = [(8, 8), (8, 8), (5, 9), (8, 8), (16, 4)]
    for index, size in enumerate(sizes):
        folder = tmp_path / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    data = ImageFolder(str(tmp_path))
    expected = [float(image_entropy(torch.from_numpy(np.array(Image.open(path)))[None])) for path, _ in data.samples]
    bound = estimate_depth_bound(data)
    assert bound.n_images == 5
    assert bound.entropy == pytest.approx(sum(expected) / 5, abs=1e-12)


def test_a_sampler_that_leaves_images_out_is_followed() -> None:
    some = DataLoader(Files(transforms.ToTensor()), sampler=SubsetRandomSampler([3, 5, 8]))
    raw = DataLoader(Arrays(transforms.ToTensor()), sampler=SubsetRandomSampler([3, 5, 8]))
    for loader in (some, raw):
        bound = estimate_depth_bound(loader)
        assert bound.n_images == 3
        assert bound.entropy == pytest.approx(float(ENTROPY[[3, 5, 8]].mean()))


def test_max_images() -> None:
    """Spread over data with items, which may be sorted by class; the first ones of a loader."""
    expected = float(ENTROPY[[0, 10, 20, 30]].mean())
    for data in (RAW, Arrays(), Files(), DataLoader(Arrays(AUGMENT), batch_size=3)):
        assert estimate_depth_bound(data, max_images=4).entropy == pytest.approx(expected)
    first = estimate_depth_bound(DataLoader(Stream(), batch_size=7), max_images=9)
    assert first.n_images == 9
    assert first.entropy == pytest.approx(float(ENTROPY[:9].mean()))


def test_endless_data_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "UNSIZED_LIMIT", 100)
    for data in (Endless(), DataLoader(Endless(), batch_size=7)):
        bound = estimate_depth_bound(data)
        assert bound.n_images == 100
        assert any("do not know their length: at most the first 100 images" in note for note in bound.notes)


# --------------------------------------------------------------------------- what is said about float images


def test_normalised_images_are_measured_and_it_is_said() -> None:
    normalised = NORMALISE(RAW.float() / 255)
    bound = estimate_depth_bound(TensorDataset(normalised, LABELS))
    assert bound.entropy == pytest.approx(float(image_entropy(normalised).mean()))
    assert bound.entropy > float(ENTROPY.mean()) + 0.3
    (note,) = bound.notes  # items: nothing was augmented
    assert "look normalised" in note
    assert "higher than that of the raw images" in note
    (note,) = estimate_depth_bound(normalised[:, :1]).notes
    assert "one channel, where that leaves the entropy unchanged" in note
    assert estimate_depth_bound(normalised[:, :1]).entropy == pytest.approx(float(image_entropy(RAW[:, :1]).mean()))
    assert not estimate_depth_bound(RAW.float() / 255).notes


def test_more_than_eight_bits_is_said() -> None:
    assert any("ln 256" in note for note in estimate_depth_bound(torch.rand(4, 3, 32, 32)).notes)


def test_a_demo_data_module() -> None:
    bound = estimate_depth_bound(Digits())
    assert bound.n_images == 1437 // 64 * 64  # its loader drops the last batch
    assert bound.bound == 2
    assert any("one channel" in note for note in bound.notes)


# --------------------------------------------------------------------------- wrong data


class _Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _with_nan() -> Tensor:
    images = RAW.float()
    images[17, 1, 2, 3] = math.nan
    return images


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (list, "no image came, there is nothing to measure"),
        (lambda: torch.zeros(0, 3, 4, 4), "no image came"),
        (lambda: DataLoader(TensorDataset(torch.zeros(0, 3, 4, 4))), "no image came"),
        (lambda: DataLoader(_Empty(), batch_size=3), "batches of a DataLoader over _Empty: no image came"),
        (lambda: SeededBatches((RAW[:4],), 8, 0), "batches of SeededBatches: no image came"),
        (lambda: ["a sentence", "another"], "items of list hold no images: an item has str"),
        (lambda: DataLoader(["a sentence", "another"], batch_size=2), "hold no images: a batch has str, str"),
        (
            lambda: DataLoader(TensorDataset(torch.zeros(8, 16, dtype=torch.int64)), batch_size=4),
            r"hold no images: a batch has \(4, 16\) int64",
        ),
        (lambda: torch.zeros(8, 16), "holds no images: they need at least height and width"),
        (lambda: "cifar10", "cannot find images in str"),
        (lambda: 3, "cannot find images in int"),
        (_with_nan, r"Tensor of shape \(40, 3, 12, 10\): image 17 holds NaN values"),
        (lambda: DataLoader([_with_nan()[:10], _with_nan()[10:]], batch_size=None), "image 17 holds NaN values"),
    ],
)
def test_wrong_data(data: Any, message: str) -> None:
    with pytest.raises(ImageDataError, match=message):
        estimate_depth_bound(data())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"unit": "bytes"}, ValueError, "unit must be one of"),
        ({"rounding": "up"}, ValueError, "rounding must be one of"),
        ({"max_images": 0}, ValueError, "max_images must be an integer >= 1"),
        ({"max_images": 2.5}, TypeError, "max_images must be an integer"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate_depth_bound(RAW, **arguments)


# --------------------------------------------------------------------------- manners


def test_memory_is_constant() -> None:
    """Batches are let go of: at any moment at most the one in hand and the one before are alive."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched(torch.Tensor):
        pass

    class Batches(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            nonlocal most
            for _ in range(200):
                batch = torch.zeros(64, 1, 8, 8).as_subclass(Watched)
                alive.add(batch)
                gc.collect(0)
                most = max(most, len(alive))
                yield batch

    bound = estimate_depth_bound(DataLoader(Batches(), batch_size=None))
    assert bound.n_images == 200 * 64
    assert 1 <= most <= 3


def test_batches_without_images_are_passed_over() -> None:
    """A collate function may drop what it cannot read."""
    parts = [RAW[:8], RAW[:0], RAW[8:]]
    assert estimate_depth_bound(DataLoader(parts, batch_size=None)).n_images == 40


def test_random_generators_are_left_as_they_were() -> None:
    own = torch.Generator().manual_seed(3)
    loader = DataLoader(Endless(), batch_size=4, generator=own)
    for data in (Files(AUGMENT), DataLoader(Stream(), batch_size=4), loader):
        random.seed(1), np.random.seed(1), torch.manual_seed(1), own.manual_seed(3)
        estimate_depth_bound(data, max_images=8)
        after = random.random(), float(np.random.rand()), float(torch.rand(())), float(torch.rand((), generator=own))
        random.seed(1), np.random.seed(1), torch.manual_seed(1), own.manual_seed(3)
        assert after == (
            random.random(),
            float(np.random.rand()),
            float(torch.rand(())),
            float(torch.rand((), generator=own)),
        )


def test_a_loader_keeps_its_place() -> None:
    loader = SeededBatches((RAW, LABELS), 8, seed=0)
    loader.load_state_dict({"epoch": 0, "next": 2})
    measure(loader_source(loader))
    assert len(list(loader)) == 3


def test_persistent_workers_are_left_to_training() -> None:
    """Their first pass seeds them: started here, training would draw other augmentations."""
    loader = DataLoader(Files(transforms.ToTensor()), batch_size=8, num_workers=1, persistent_workers=True)
    assert estimate_depth_bound(loader).n_images == 40
    assert loader._iterator is None


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for image in RAW[:4]:
                time.sleep(0.4)  # longer than the second that nothing is shown for
                yield image

    shown = {}
    for name, stream, progress in (
        ("terminal", _Terminal(), True),
        ("off", _Terminal(), False),
        ("file", io.StringIO(), True),
    ):
        monkeypatch.setattr("sys.stderr", stream)
        estimate_depth_bound(Slow(), progress=progress)
        shown[name] = stream.getvalue()
    assert "entropy of images" in shown["terminal"]
    assert shown["terminal"].endswith("\r"), "the line is wiped"
    assert shown["off"] == shown["file"] == ""


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist() -> None:
    from skimage.measure import shannon_entropy

    images, _ = load_fashion_mnist("train")
    bound = estimate_depth_bound(images)
    assert bound.n_images == 60_000
    assert bound.entropy == pytest.approx(2.853, abs=5e-4)
    assert (bound.bound, estimate_depth_bound(images, unit="bits").bound) == (3, 5)
    some = images[::600]
    expected = [shannon_entropy(image.numpy(), base=math.e) for image in some]
    assert image_entropy(some).tolist() == pytest.approx(expected, abs=1e-12)
