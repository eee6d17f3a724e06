"""A loader whose batches are a function of (seed, epoch, index), so that a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_filterdiv.randomness import keyed_generator


class SeededBatches:
    """Shuffled batches of tensors in memory, restartable in the middle of an epoch.

    Args:
        tensors: ``(N, ...)`` tensors that are indexed together.
        batch_size: rows per batch and rank; an incomplete last batch is dropped.
        seed: the permutation of an epoch is a function of (seed, epoch).
        rank: which interleaved share of every global batch to yield.
        world_size: number of shares.
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
        self.tensors, self.batch_size, self.seed = tensors, batch_size, seed
        self.rank, self.world_size, self.augment = rank, world_size, augment
        self._epoch, self._next = 0, 0
        self._interrupted: int | None = None  # the epoch that a resumed run stopped in

    def __len__(self) -> int:
        return len(self.tensors[0]) // (self.batch_size * self.world_size)

    @property
    def sampler(self) -> SeededBatches:
        """Where Lightning looks for ``set_epoch``."""
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
        order = torch.randperm(len(self.tensors[0]), generator=keyed_generator("batches", self.seed, self._epoch))
        size = self.batch_size * self.world_size
        for index in range(start, len(self)):
            self._next = index + 1
            rows = order[index * size : (index + 1) * size][self.rank :: self.world_size]
            batch = [tensor[rows] for tensor in self.tensors]
            if self.augment is not None:
                generator = keyed_generator("augment", self.seed, self._epoch, index, self.rank)
                batch[0] = self.augment(batch[0], generator)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._interrupted, self._next = state["epoch"], state["next"]


class Shares:
    """One rank's rows in order, for evaluation: every row is seen once, whatever the number of ranks.

    Args:
        tensors: ``(N, ...)`` tensors that are indexed together.
        batch_size: rows per batch and rank.
        rank: of this process.
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
        generator: of the offsets and mirrors.
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
