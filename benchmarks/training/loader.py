"""A loader whose batches are a function of (seed, epoch, index), so that a resumed run sees the same batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_filterdiv.tensors.randomness import keyed_generator


class Restartable(ABC):
    """Shuffled batches of ``count`` rows, restartable in the middle of an epoch.

    Args:
        count: rows.
        batch_size: rows per batch and rank; an incomplete last batch is dropped.
        seed: the permutation of an epoch is a function of (seed, epoch).
        rank: number of the interleaved share of every global batch to yield.
        world_size: number of shares.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._epoch, self._next = 0, 0
        self._interrupted: int | None = None  # the epoch that a resumed run stopped in

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    @property
    def sampler(self) -> Restartable:
        """Object on which Lightning calls ``set_epoch``."""
        return self

    batch_sampler = sampler  # a loader with one is expected to have the other

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation. Lightning calls this at every epoch, also after a resume, whose loader state it
        restores only in the middle of an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[Tensor]]:
        # Lightning does not exhaust a loader whose length it knows: an epoch begins here, not after the last batch.
        start = self._next if self._interrupted == self._epoch and self._next < len(self) else 0
        self._interrupted = None
        for index, batch in enumerate(self.batches(start), start):
            self._next = index + 1
            yield batch

    @abstractmethod
    def batches(self, start: int) -> Iterator[list[Tensor]]:
        """The batches of this epoch from ``start`` on."""

    def rows(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """Index and this rank's rows of the batches of this epoch from ``start`` on."""
        order = torch.randperm(self.count, generator=keyed_generator("batches", self.seed, self._epoch))
        size = self.batch_size * self.world_size
        for index in range(start, len(self)):
            yield index, order[index * size : (index + 1) * size][self.rank :: self.world_size]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of batches yielded."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._interrupted, self._next = state["epoch"], state["next"]


class SeededBatches(Restartable):
    """Tensors in memory.

    Args:
        tensors: ``(N, ...)`` tensors that are indexed together.
        batch_size: as for :class:`Restartable`, like ``seed``, ``rank`` and ``world_size``.
        seed: seed of permutations and augmentation.
        rank: rank of this process.
        world_size: number of processes.
        augment: applied to the first tensor of a batch, with a generator that is a function of (seed, epoch, index,
            rank).
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        super().__init__(len(tensors[0]), batch_size, seed, rank, world_size)
        self.tensors, self.augment = tensors, augment

    def batches(self, start: int) -> Iterator[list[Tensor]]:
        """See :meth:`Restartable.batches`."""
        for index, rows in self.rows(start):
            batch = [tensor[rows] for tensor in self.tensors]
            if self.augment is not None:
                generator = keyed_generator("augment", self.seed, self._epoch, index, self.rank)
                batch[0] = self.augment(batch[0], generator)
            yield batch


class _Keyed(Dataset[Any]):
    """Items whose random transforms are a function of (seed, epoch, row), independent of the worker."""

    def __init__(self, items: Dataset[Any], seed: int) -> None:
        self.items, self.seed = items, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, row = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed_generator("item", self.seed, epoch, row).initial_seed())
            return self.items[row]


class SeededItems(Restartable):
    """A data set of files, read by the workers of a ``DataLoader``; its transforms draw from torch's global generator.

    Args:
        items: data set with a length.
        batch_size: as for :class:`Restartable`, like ``seed``, ``rank`` and ``world_size``.
        seed: seed of permutations and transforms.
        rank: rank of this process.
        world_size: number of processes.
        options: options of the ``DataLoader``, such as ``num_workers``.
    """

    def __init__(
        self, items: Dataset[Any], batch_size: int, seed: int, rank: int = 0, world_size: int = 1, **options: Any
    ) -> None:
        super().__init__(len(items), batch_size, seed, rank, world_size)  # type: ignore[arg-type]  # has a length
        self.items, self.options = items, options

    def batches(self, start: int) -> Iterator[list[Tensor]]:
        """See :meth:`Restartable.batches`. The workers are new ones in every epoch."""
        epoch = self._epoch
        keys = ([(epoch, row) for row in rows.tolist()] for _, rows in self.rows(start))
        generator = keyed_generator("workers", self.seed, epoch)  # leaves the global one alone
        yield from DataLoader(_Keyed(self.items, self.seed), batch_sampler=keys, generator=generator, **self.options)


class Shares:
    """One rank's rows in order, for evaluation: every row is seen once, for any number of ranks.

    Args:
        tensors: ``(N, ...)`` tensors that are indexed together.
        batch_size: rows per batch and rank.
        rank: rank of this process.
        world_size: number of processes.
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.tensors = tuple(tensor[rank::world_size] for tensor in tensors)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for start in range(0, len(self.tensors[0]), self.batch_size):
            yield [tensor[start : start + self.batch_size] for tensor in self.tensors]


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """The standard augmentation of small images: zero padding, a random crop of the old size, a random mirror image.

    Args:
        images: ``(B, C, H, W)`` on the CPU, normalised (the padding is the mean).
        generator: generator of the offsets and mirrors.
        padding: pixels on every side.

    Returns:
        ``(B, C, H, W)``.
    """
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    rows = top[:, None] + torch.arange(height)
    columns = torch.arange(width)
    columns = left[:, None] + torch.where(mirrored[:, None], columns.flip(0), columns)
    # Advanced indices on both sides of a slice come first in the result: (B, H, W, C).
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
