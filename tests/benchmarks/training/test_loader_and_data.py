"""Batches, shares, augmentation, and what missing data says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.training.data import CIFAR10, Digits, FashionMNIST, ImageNet
from benchmarks.training.loader import SeededBatches, SeededItems, Shares, crop_and_flip


def test_shares_of_all_ranks_are_the_whole_in_order() -> None:
    rows, labels = torch.arange(23.0), torch.arange(23)
    seen = [torch.cat([batch[0] for batch in Shares((rows, labels), 4, rank, 3)]) for rank in range(3)]
    assert [len(part) for part in seen] == [8, 8, 7]
    assert torch.equal(torch.cat(seen).sort().values, rows)
    assert [len(Shares((rows,), 4, rank, 3)) for rank in range(3)] == [2, 2, 2]


def test_ranks_share_the_batch_of_one_process() -> None:
    rows = torch.arange(40)
    whole = list(SeededBatches((rows,), 8, seed=3))
    halves = [list(SeededBatches((rows,), 4, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    for one, first, second in zip(whole, *halves, strict=True):
        assert set(one[0].tolist()) == set(first[0].tolist()) | set(second[0].tolist())


def test_crops_are_windows_of_the_padded_image_or_of_its_mirror_image() -> None:
    images = torch.randn(64, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    out = crop_and_flip(images, torch.Generator().manual_seed(1), padding=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = set()
    for index in range(64):
        windows = {
            (top, left, flip): torch.equal(
                out[index],
                (padded[index, :, top : top + 6, left : left + 5].flip(-1) if flip
                 else padded[index, :, top : top + 6, left : left + 5]),
            )
            for top in range(5) for left in range(5) for flip in (False, True)
        }  # fmt: skip
        (window,) = [key for key, equal in windows.items() if equal]
        found.add(window)
    assert {flip for _, _, flip in found} == {False, True}
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))


def test_augmentation_is_a_function_of_seed_epoch_index_and_rank() -> None:
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def batches(rank: int = 0, epoch: int = 0) -> list[torch.Tensor]:
        loader = SeededBatches((images,), 8, 5, rank, 2, crop_and_flip)
        loader.set_epoch(epoch)
        return [batch[0] for batch in loader]

    again = SeededBatches((images,), 8, 5, 0, 2, crop_and_flip)
    again.load_state_dict({"epoch": 0, "next": 1})
    assert torch.equal(next(iter(again))[0], batches()[1])  # as after a resume in the middle of the epoch
    assert torch.equal(batches()[0], batches()[0])
    assert not torch.equal(batches()[0], batches(epoch=1)[0])
    assert not torch.equal(batches()[0], batches(rank=1)[0])


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    """Row and a random number, as a random transform would draw it."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.tensor([float(row), float(torch.rand(()))])


def test_items_and_their_transforms_are_functions_of_seed_epoch_and_row() -> None:
    def batches(epoch: int = 0, workers: int = 0, start: int = 0, rank: int = 0, ranks: int = 1) -> list[torch.Tensor]:
        loader = SeededItems(Noisy(), 6 // ranks, 4, rank, ranks, num_workers=workers)
        loader.load_state_dict({"epoch": epoch, "next": start})  # as after a resume in the middle of the epoch
        loader.set_epoch(epoch)
        state = torch.get_rng_state()
        found = list(loader)
        assert torch.equal(torch.get_rng_state(), state)
        assert loader.state_dict() == {"epoch": epoch, "next": 3}
        return found

    whole = batches()
    assert [batch.shape for batch in whole] == [(6, 2)] * 3
    assert len(torch.cat(whole)[:, 0].unique()) == 18
    assert all(torch.equal(one, other) for one, other in zip(whole, batches(workers=2), strict=True))
    assert all(torch.equal(one, other) for one, other in zip(whole[1:], batches(workers=2, start=1), strict=True))
    assert not torch.equal(whole[0], batches(epoch=1)[0])
    halves = [batches(rank=rank, ranks=2) for rank in range(2)]
    for one, first, second in zip(whole, *halves, strict=True):
        assert {tuple(item) for item in one.tolist()} == {tuple(item) for item in torch.cat([first, second]).tolist()}
    drawn = {float(row): float(value) for row, value in torch.cat(whole)}
    again = {float(row): float(value) for row, value in torch.cat(batches(epoch=1))}
    assert all(drawn[row] != again[row] for row in drawn.keys() & again.keys())


def test_data_are_fetched_once_per_machine_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, download: calls.append((root, download)))
    FashionMNIST(root=str(tmp_path)).prepare_data()
    assert calls == []
    FashionMNIST(root=str(tmp_path), download=True).prepare_data()
    FashionMNIST(download=True).prepare_data()
    assert calls == [(str(tmp_path), True), ("data", True)]
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)  # where torchvision puts it
    asked: list[str | None] = []
    monkeypatch.setattr("lightning_filterdiv.demo.FashionMNIST", lambda root: asked.append(root) or Nothing())
    FashionMNIST(root=str(tmp_path)).read()
    FashionMNIST(root=str(tmp_path / "raw")).read()
    assert asked == [str(tmp_path / "FashionMNIST" / "raw"), str(tmp_path / "raw")]


class Nothing:
    def load(self) -> None:
        """Nothing."""


def test_images_are_normalised_by_the_training_part() -> None:
    data = Digits(train_images=600, seed=2)
    data.setup()
    assert data.parts is not None
    assert data.parts[0].shape == (600, 1, 8, 8)
    assert abs(float(data.parts[0].mean())) < 1e-5
    assert abs(float(data.parts[0].std()) - 1) < 1e-5
    assert len(data.test_dataloader()) == 1


def test_digits_need_no_file_and_a_subset_of_other_seeds_differs() -> None:
    parts = []
    for seed in (1, 2):
        data = Digits(train_images=100, seed=seed)
        data.setup()
        parts.append(data.parts)
    assert not torch.equal(parts[0][0], parts[1][0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda folder: Digits(batch_size=0), "batch_size must be an integer >= 1"),
        (lambda folder: Digits(train_images=0), "train_images must be an integer >= 1"),
        (lambda folder: Digits(train_images=5000).setup(), "train_images=5000, but Digits has 1437"),
        (lambda folder: FashionMNIST(root=str(folder)).setup(), "apt-get install dataset-fashion-mnist"),
        (lambda folder: CIFAR10(root=str(folder)).setup(), "--data.download true"),
        (lambda folder: ImageNet(root=str(folder)).train_dataloader(), "train/CLASS"),
    ],
)
def test_what_cannot_be_had_says_how_to_get_it(tmp_path: Path, build: object, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(tmp_path)  # type: ignore[operator]


def test_a_batch_that_never_fills_is_refused() -> None:
    data = Digits(train_images=30, batch_size=64)
    data.setup()
    with pytest.raises(ValueError, match="30 training images do not fill one batch of 64"):
        data.train_dataloader()


def test_imagenet_folders_are_read_as_they_lie(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (300, 260), (200, 30, 30)).save(tmp_path / part / name / "0.png")
    data = ImageNet(root=str(tmp_path), batch_size=2, workers=0, classes=2)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 224, 224)
    assert sorted(labels.tolist()) == [0, 1]
    expected = (200 / 255 - 0.485) / 0.229
    assert torch.allclose(images[:, 0], torch.full((2, 224, 224), expected), atol=1e-5)
    with pytest.raises(ValueError, match="holds 2 class folders, classes=1000"):
        ImageNet(root=str(tmp_path), workers=0).val_dataloader()


def test_wrong_labels_are_a_share_of_the_training_labels() -> None:
    """Of another class each, the same for one seed; images and test labels stay."""
    right, wrong, again = (Digits(seed=3, train_images=500, wrong_labels=share) for share in (None, 0.2, 0.2))
    other = Digits(seed=4, train_images=500, wrong_labels=0.2)
    for part in (0, 2, 3):
        assert torch.equal(right.parts[part], wrong.parts[part])
    differs = right.parts[1] != wrong.parts[1]
    assert int(differs.sum()) == 100
    assert set(wrong.parts[1].tolist()) == set(range(10))
    assert torch.equal(wrong.parts[1], again.parts[1])
    assert not torch.equal(differs, Digits(seed=4, train_images=500).parts[1] != other.parts[1])
    with pytest.raises(ValueError, match="wrong_labels"):
        Digits(wrong_labels=1.5)
