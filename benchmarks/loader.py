"""A loader whose batches are a function of (seed, epoch, index), so that a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Iterator
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
    """

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.tensors, self.batch_size, self.seed = tensors, batch_size, seed
        self.rank, self.world_size = rank, world_size
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
            yield [tensor[rows] for tensor in self.tensors]

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._interrupted, self._next = state["epoch"], state["next"]
