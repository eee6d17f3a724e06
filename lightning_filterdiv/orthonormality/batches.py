"""Buffers with the filters of many layers, viewed as one ``(B, n, d)`` batch per shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from lightning_filterdiv.orthonormality.functional import self_padding
from lightning_filterdiv.orthonormality.gradients import GramMatrices, PowerIteration, Spectrum, spectrum
from lightning_filterdiv.orthonormality.targets import FilterBlock
from lightning_filterdiv.tensors.flat_buffer import Bank, FlatBuffer, Run

__all__ = ["Batch", "Penalties"]


class Batch:
    """Blocks of one layout. No copy is made to read filters or store gradients if a filter is one block of memory. It
    is not for transposed convolutions and for blocks of several parameters.

    Args:
        blocks: blocks of one layout.
        runs: their parameters in the buffers, segment by segment.
        values: buffer that holds the parameters.
        gradients: buffer of the same layout, for the gradients.
        form: form of the penalty.
    """

    def __init__(
        self, blocks: Sequence[FilterBlock], runs: Sequence[Run], values: FlatBuffer, gradients: FlatBuffer, form: str
    ) -> None:
        self.blocks = list(blocks)
        first, n = blocks[0], blocks[0].shape[0]
        #: Places of the parameters in the buffers.
        self.members = range(runs[0].first, runs[-1].members.stop)
        self._parts = [run.stacked(values) for run in runs]
        self._results = [run.stacked(gradients) for run in runs]
        self._rows: Tensor | None = None
        #: ``(B, n, d)`` view that takes the gradient of :meth:`rows`; ``None``: pass it to :meth:`store`.
        self.out: Tensor | None = None
        # The order inside a filter matters to the starting vectors of SRIP and to shifts.
        ordered = form in ("srip", "convolutional")
        if len(runs) == 1 and not first.transposed:
            self._rows, self.out = (runs[0].rows(buffer, n, ordered=ordered) for buffer in (values, gradients))
        dtype, device = values.flat.dtype, values.flat.device
        # The Gram matrix is that of the columns where that is smaller and allowed.
        self._columns = n > first.shape[1] and first.mask is None and form != "mutual_coherence"
        self._factors: tuple[Tensor, Tensor] | None = None
        #: Gram matrices minus identity, from :meth:`Penalties.compare`.
        self.off: Tensor | None = None
        #: For the convolutional form; ``None`` where no shifts of a kernel overlap.
        self.spectrum: Spectrum | None = None
        taps = self._parts[0].shape[3:]
        if form == "convolutional" and any(self_padding(taps, first.stride)):
            self.spectrum = spectrum(taps, first.stride, dtype, device)
        #: ``(B, n, n)`` of ones and zeros: the pairs that count. ``twice`` has its transpose added, for the gradient.
        self.mask: Tensor | None = None
        self.twice: Tensor | None = None
        if first.mask is not None:
            both = np.stack([block.mask for block in blocks if block.mask is not None]).astype(np.float32)
            self.mask = torch.tensor(both, device="cpu").to(device, dtype)
            self.twice = self.mask + self.mask.mT

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(B, n, d)``."""
        return len(self.blocks) * self.blocks[0].groups, *self.blocks[0].shape

    def kernels(self) -> Tensor:
        """``(B, n, C, *k)``; ``B`` counts blocks times groups."""
        first, parts = self.blocks[0], self._parts
        if first.transposed:  # (L, in, J/G, *k)
            return torch.flatten(parts[0].unflatten(1, (first.groups, -1)).transpose(2, 3), 0, 1)
        if first.groups > 1:
            return torch.flatten(parts[0].unflatten(1, (first.groups, -1)), 0, 1)
        rows = [part.reshape(len(self.blocks), -1, *part.shape[2:]) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def rows(self) -> Tensor:
        """Return the filters as ``(B, n, d)``. Entries of a row are in the order of memory unless ``ordered``; a Gram
        matrix does not depend on it."""
        return self.kernels().flatten(2) if self._rows is None else self._rows

    @property
    def sides(self) -> tuple[int, int]:
        """``(B, m)``, number and size of the Gram matrices."""
        count, n, d = self.shape
        return count, d if self._columns else n

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two factors of the Gram matrices, ``(B, m, ...)`` and ``(B, ..., m)``."""
        if self._factors is not None:
            return self._factors
        rows = self.rows()
        factors = (rows.mT, rows) if self._columns else (rows, rows.mT)
        self._factors = None if self._rows is None else factors  # views stay the same from step to step
        return factors

    def store(self, gradient: Tensor) -> None:
        """Store a gradient shaped like :meth:`kernels`, or like a copied :meth:`rows`, in the buffer."""
        first = self.blocks[0]
        if gradient.dim() == 3:
            gradient = gradient.view(*gradient.shape[:2], -1, *self._parts[0].shape[3:])
        if first.transposed:
            stacked = [gradient.unflatten(0, (-1, first.groups)).transpose(2, 3).flatten(1, 2)]
        elif first.groups > 1:
            stacked = [gradient.unflatten(0, (-1, first.groups)).flatten(1, 2)]
        else:
            sizes = [part.shape[0] * part.shape[1] // len(self.blocks) for part in self._parts]
            stacked = list(gradient.split(sizes, dim=1))
        for part, result in zip(stacked, self._results, strict=True):
            result.copy_(part.reshape(result.shape))


class Penalties(Bank):
    """Batches that are computed in one dtype, with a buffer for values and one for gradients.

    Args:
        batches: the blocks of each, of one layout.
        form: form of the penalty.
        dtype: float32 or wider.
    """

    def __init__(self, batches: Sequence[Sequence[FilterBlock]], form: str, dtype: torch.dtype) -> None:
        segments = [
            [[p for b in blocks for p in b.segments[at]] for at in range(len(blocks[0].segments))] for blocks in batches
        ]
        super().__init__([segment for of_blocks in segments for segment in of_blocks], dtype)
        self.values, self.results = self.buffer(), self.buffer()
        runs = iter(self.runs)
        self.batches = [
            Batch(blocks, list(islice(runs, len(of_blocks))), self.values, self.results, form)
            for blocks, of_blocks in zip(batches, segments, strict=True)
        ]
        # Vectors of all batches as rows of one matrix: (rows, entries) of each batch, places of its entries.
        self._vectors = [(batch.shape[0], min(batch.shape[1:])) for batch in self.batches]
        self._widest = max(n for _, n in self._vectors)
        sizes = np.repeat([n for _, n in self._vectors], [count for count, _ in self._vectors])
        filled = np.flatnonzero(np.arange(self._widest) < sizes[:, None])
        self._filled = torch.tensor(filled, device="cpu")
        dtype, device = self.dtype, self.values.flat.device
        #: For ``"srip"``.
        self.iteration: PowerIteration | None = None
        if form == "srip":
            self.iteration = PowerIteration([batch.shape for batch in self.batches], dtype, device)
        self._compared = [batch for batch in self.batches if form != "srip" and batch.spectrum is None]
        self._grams = GramMatrices([batch.sides for batch in self._compared], dtype, device)
        for batch, matrix in zip(self._compared, self._grams.matrices, strict=True):
            batch.off = matrix

    def load(self, finite: bool = False) -> None:
        """Copy the parameters into the buffer, on request with zeros in place of numbers that are not finite."""
        self.values.read(self.tensors)
        if finite:
            torch.nan_to_num_(self.values.flat, nan=0.0, posinf=0.0, neginf=0.0)

    def compare(self) -> None:
        """Compute the Gram matrices of the loaded values minus the identity, for the forms that start from them."""
        if self._compared:
            self._grams.compute([batch.factors() for batch in self._compared])

    @property
    def vector_entries(self) -> int:
        """Return the total length of one vector for every matrix of every batch."""
        return len(self._filled)

    def padded(self, entries: Tensor) -> Tensor:
        """Return ``(sum of B, m)``: the vectors of all matrices, which follow each other in ``entries``, padded with
        zeros."""
        room = torch.zeros(sum(count for count, _ in self._vectors), self._widest, device="cpu")
        room.view(-1).index_copy_(0, self._filled, entries)
        return room

    def of_batches(self, padded: Tensor) -> list[Tensor]:
        """Return the ``(B, n)`` vectors of each batch from :meth:`padded`."""
        parts = padded.split([count for count, _ in self._vectors])
        return [part[:, :n] for part, (_, n) in zip(parts, self._vectors, strict=True)]
