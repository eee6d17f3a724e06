"""What is measured in each kind of data, and what is refused."""

from __future__ import annotations

import gc
import io
import math
import random
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
    WeightedRandomSampler,
)
from torchvision import transforms
from torchvision.datasets import ImageFolder, VisionDataset

from benchmarks.training.loader import SeededBatches
from lightning_filterdiv.demo import Digits
from lightning_filterdiv.demo.data import DEBIAN_FASHION_MNIST, load_fashion_mnist
from lightning_filterdiv.entropy_depth import ImageDataError, estimate, estimate_depth_bound, image_entropy, loaders
from lightning_filterdiv.entropy_depth.loaders import image_source

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


def _pairs(batch: Any) -> dict[str, Tensor]:
    return {"label": torch.stack([b[1] for b in batch]), "image": torch.stack([b[0] for b in batch])}


RAW_DATA = {
    "tensor": lambda: RAW,
    "array": lambda: RAW.numpy(),
    "torchvision": lambda: Arrays(AUGMENT),
    "loader": lambda: DataLoader(Arrays(AUGMENT), batch_size=7, shuffle=True, drop_last=True),
    "subset": lambda: DataLoader(Subset(Arrays(AUGMENT), range(40)), batch_size=7),
    "concatenated": lambda: ConcatDataset([Subset(Arrays(), range(20)), Subset(Arrays(), range(20, 40))]),
    "tensor data set": lambda: TensorDataset(LABELS, RAW),
    "data module": Module,
    "own transform": lambda: Files(transforms.ToTensor()),
    "own transform, workers": lambda: DataLoader(Files(transforms.ToTensor()), batch_size=8, num_workers=1),
    "dict items": lambda: Files(AUGMENT, lambda image, label: {"label": label, "image": image}),
    "list of PIL images": lambda: [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in RAW],
    "several loaders": lambda: {
        "a": DataLoader(Subset(Arrays(), range(10))),
        "b": DataLoader(Subset(Arrays(), range(10, 40))),
    },
    "iterable": Stream,
    "iterable in a loader": lambda: DataLoader(Stream(), batch_size=7),
    "iterable, dict batches": lambda: DataLoader(Stream(), batch_size=7, collate_fn=_pairs),
    "batches as items": lambda: DataLoader(list(zip(RAW.split(8), LABELS.split(8), strict=True)), batch_size=None),
}


@pytest.mark.parametrize("kind", RAW_DATA)
def test_every_kind_gives_the_entropy_of_the_raw_images(kind: str) -> None:
    found = estimate_depth_bound(RAW_DATA[kind]())
    assert found.n_images == 40
    assert found.entropy == pytest.approx(float(ENTROPY.mean()), abs=1e-12)
    assert found.std == pytest.approx(float(ENTROPY.std(correction=0)), abs=1e-12)
    assert found.bound == math.ceil(found.entropy)


def test_what_was_measured_is_said() -> None:
    assert estimate_depth_bound(Arrays(AUGMENT)).source == "raw 8-bit images of Arrays"
    assert estimate_depth_bound(Files(AUGMENT)).source == "items of Files before their transforms"
    assert estimate_depth_bound(list(RAW)).source == "items of list"
    stream = estimate_depth_bound(DataLoader(Stream(), batch_size=4))
    assert stream.source == "batches of a DataLoader over Stream, as the network sees them"
    assert "augmentation" in stream.notes[0]


def test_transforms_that_cannot_be_left_out() -> None:
    class Decodes(Files):
        def __getitem__(self, index: int) -> Any:
            return self.transform(index), 0

    found = estimate_depth_bound(Decodes(lambda index: RAW[index]))
    assert found.entropy == pytest.approx(float(ENTROPY.mean()))
    assert found.source == "items of Decodes after their transforms"
    assert "could not be left out" in found.notes[0]


def test_images_of_many_sizes(tmp_path: Path) -> None:
    sizes = [(8, 8), (8, 8), (5, 9), (8, 8), (16, 4)]
    for index, size in enumerate(sizes):
        folder = tmp_path / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    data = ImageFolder(str(tmp_path), transform=transforms.Compose([transforms.Resize(4), AUGMENT]))
    expected = [float(image_entropy(torch.from_numpy(np.array(Image.open(path)))[None])) for path, _ in data.samples]
    found = estimate_depth_bound(data)
    assert found.n_images == 5
    assert found.entropy == pytest.approx(sum(expected) / 5, abs=1e-12)


def test_samplers() -> None:
    subset = DataLoader(Arrays(), sampler=SubsetRandomSampler([3, 5, 8]))
    assert estimate_depth_bound(subset).entropy == pytest.approx(float(ENTROPY[[3, 5, 8]].mean()))
    weighted = estimate_depth_bound(DataLoader(Arrays(), sampler=WeightedRandomSampler([1.0] * 40, 10)))
    assert weighted.n_images == 40
    assert "WeightedRandomSampler" in weighted.notes[0]


def test_max_images_are_spread_over_the_data() -> None:
    found = estimate_depth_bound(Arrays(), max_images=4)
    assert found.entropy == pytest.approx(float(ENTROPY[[0, 10, 20, 30]].mean()))
    assert estimate_depth_bound(ConcatDataset([Arrays(), Arrays()]), max_images=8).n_images == 8
    first = estimate_depth_bound(DataLoader(Stream(), batch_size=7), max_images=9)
    assert first.n_images == 9
    assert first.entropy == pytest.approx(float(ENTROPY[:9].mean()))


def test_endless_data_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "UNSIZED_LIMIT", 100)
    for data in (Endless(), DataLoader(Endless(), batch_size=7)):
        found = estimate_depth_bound(data)
        assert found.n_images == 100
        assert any("do not know their length: at most the first 100 images" in note for note in found.notes)


# --------------------------------------------------------------------------- what is said about float images


def test_normalised_images_are_measured_and_it_is_said() -> None:
    normalised = NORMALISE(RAW.float() / 255)
    found = estimate_depth_bound(TensorDataset(normalised, LABELS))
    assert found.entropy == pytest.approx(float(image_entropy(normalised).mean()))
    assert found.entropy > float(ENTROPY.mean()) + 0.3
    (note,) = found.notes
    assert "look normalised" in note
    assert "higher than that of the raw images" in note
    (note,) = estimate_depth_bound(normalised[:, :1]).notes
    assert "one channel, where that leaves the entropy unchanged" in note
    assert estimate_depth_bound(normalised[:, :1]).entropy == pytest.approx(float(image_entropy(RAW[:, :1]).mean()))
    assert not estimate_depth_bound(RAW.float() / 255).notes


def test_more_than_eight_bits_is_said() -> None:
    assert any("ln 256" in note for note in estimate_depth_bound(torch.rand(4, 3, 32, 32)).notes)


def test_a_demo_data_module() -> None:
    found = estimate_depth_bound(Digits())
    assert found.n_images == 1437
    assert found.bound == 2
    assert "one channel" in found.notes[0]


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
        (list, "the data set is empty"),
        (lambda: torch.zeros(0, 3, 4, 4), "the data set is empty"),
        (lambda: TensorDataset(torch.zeros(0, 3, 4, 4)), "the data set is empty"),
        (lambda: DataLoader(TensorDataset(torch.zeros(0, 3, 4, 4))), "the data set is empty"),
        (lambda: DataLoader(_Empty(), batch_size=3), "no image came"),
        (lambda: SeededBatches((RAW[:4],), 8, 0), "batches of SeededBatches: the data set is empty"),
        (lambda: ["a sentence", "another"], "hold no images: an item is str"),
        (lambda: DataLoader(["a sentence", "another"], batch_size=2), r"hold no images: a batch is \(str, str\)"),
        (
            lambda: DataLoader(TensorDataset(torch.zeros(8, 16, dtype=torch.int64)), batch_size=4),
            r"hold no images: \(8, 16\)|a batch is \(\(4, 16\) int64",
        ),
        (lambda: torch.zeros(8, 16), "holds no images: they need at least height and width"),
        (lambda: "cifar10", "cannot find images in str"),
        (lambda: 3, "cannot find images in int"),
        (_with_nan, "image 17 holds NaN"),
        (lambda: TensorDataset(_with_nan()), "image 17 holds NaN"),
        (lambda: DataLoader([_with_nan()], batch_size=None), "image 17 holds NaN"),
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

    found = estimate_depth_bound(DataLoader(Batches(), batch_size=None))
    assert found.n_images == 200 * 64
    assert 1 <= most <= 3


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
    estimate_depth_bound(image_source(loader, loader=True).batches())
    assert len(list(loader)) == 3


def test_the_data_set_is_left_as_it_was() -> None:
    data = Files(AUGMENT)
    estimate_depth_bound(data)
    assert data.transform is AUGMENT


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_long_data(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    estimate_depth_bound(RAW)
    assert terminal.getvalue() == "", "nothing for what takes a moment"
    monkeypatch.setattr(estimate._Progress, "delay", 0.0)
    monkeypatch.setattr(estimate._Progress, "every", 0.0)
    estimate_depth_bound(DataLoader(list(zip(RAW.split(8), LABELS.split(8), strict=True)), batch_size=None))
    estimate_depth_bound(RAW)
    shown = terminal.getvalue()
    assert "100 % of 40" in shown
    assert shown.endswith("\r\033[K"), "the line is wiped"
    terminal.truncate(0)
    estimate_depth_bound(RAW, progress=False)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    estimate_depth_bound(RAW)
    assert terminal.getvalue() == ""


def test_fingerprints() -> None:
    """Equal for equal data, whatever the loader; another image, length or number of images changes it."""
    first = image_source(DataLoader(Arrays(AUGMENT), batch_size=3)).fingerprint
    assert image_source(DataLoader(Arrays(), batch_size=9, shuffle=True)).fingerprint == first
    other = Arrays()
    other.data = 255 - other.data
    shorter = Arrays()
    shorter.data = shorter.data[:39]
    changed = [image_source(other), image_source(shorter), image_source(Arrays(), 20), image_source(Files())]
    assert len({first, *(source.fingerprint for source in changed)}) == 5


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist() -> None:
    from skimage.measure import shannon_entropy

    images, _ = load_fashion_mnist("train")
    found = estimate_depth_bound(images)
    assert found.n_images == 60_000
    assert found.entropy == pytest.approx(2.853, abs=5e-4)
    assert (found.bound, estimate_depth_bound(images, unit="bits").bound) == (3, 5)
    some = images[::600]
    expected = [shannon_entropy(image.numpy(), base=math.e) for image in some]
    assert image_entropy(some).tolist() == pytest.approx(expected, abs=1e-12)
