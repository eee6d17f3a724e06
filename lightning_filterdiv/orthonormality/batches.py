"""Filters of many layers side by side in one buffer, viewed as one ``(B, n, d)`` batch per shape, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_filterdiv.orthonormality.targets import FilterBlock
from lightning_filterdiv.tensors.flat_buffer import FlatBuffer

__all__ = ["Bank", "Batch"]


class Batch:
    """Blocks of one layout. Reading their filters and storing their gradients copies nothing where a filter is one
    block of memory, which it is but for transposed convolutions and blocks of several parameters.

    Args:
        blocks: of one layout.
        side: rows of the Gram matrix that the form takes.
        ordered: whether :meth:`rows` must have the order (channel, kernel position) in every memory format.
        values: buffer that holds the parameters of the blocks, segment by segment.
        gradients: buffer laid out alike, for the gradients.
        first: place of the first parameter.
    """

    def __init__(
        self,
        blocks: Sequence[FilterBlock],
        side: int,
        ordered: bool,
        values: FlatBuffer,
        gradients: FlatBuffer,
        first: int,
    ) -> None:
        self.blocks = list(blocks)
        segments = segments_of(blocks)
        #: Places of the parameters in the buffers.
        self.members = range(first, first + sum(map(len, segments)))
        starts = [first + sum(map(len, segments[:at])) for at in range(len(segments))]
        self._parts = [values.stack(at, len(segment)) for at, segment in zip(starts, segments, strict=True)]
        self._results = [gradients.stack(at, len(segment)) for at, segment in zip(starts, segments, strict=True)]
        self._rows: Tensor | None = None
        #: Where the gradient of :meth:`rows` belongs, ``(B, n, d)``; ``None``: hand it to :meth:`store`.
        self.out: Tensor | None = None
        like, n = self._parts[0], blocks[0].shape[0]
        block = math.prod(like.shape[2:])
        one_block = like.is_contiguous() if ordered else like.stride()[:2] == (block * like.shape[1], block)
        if one_block and len(segments) == 1 and not blocks[0].transposed:
            shape = (len(blocks) * blocks[0].groups, n, block)
            self._rows, self.out = (
                buffer.flat.narrow(0, buffer.start(first), like.numel()).view(shape) for buffer in (values, gradients)
            )
        dtype, device = values.flat.dtype, values.flat.device
        self.identity = torch.eye(side, dtype=dtype, device=device)
        #: ``(B, n, n)`` of ones and zeros: the pairs that count. ``twice``: with its transpose added, for the gradient.
        self.mask: Tensor | None = None
        self.twice: Tensor | None = None
        if blocks[0].mask is not None:
            both = np.stack([block.mask for block in blocks if block.mask is not None]).astype(np.float32)
            self.mask = torch.tensor(both, device="cpu").to(device, dtype)
            self.twice = self.mask + self.mask.mT

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
        """``(B, n, d)``; inside a row in the order of memory, which no Gram matrix sees, unless ``ordered``."""
        return self.kernels().flatten(2) if self._rows is None else self._rows

    def store(self, gradient: Tensor) -> None:
        """Put a gradient shaped like :meth:`kernels`, or like a copied :meth:`rows`, into the buffer."""
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


def segments_of(blocks: Sequence[FilterBlock]) -> list[list[nn.Parameter]]:
    """The parameters of blocks of one layout, segment by segment."""
    return [[p for block in blocks for p in block.segments[at]] for at in range(len(blocks[0].segments))]


class Bank:
    """Batches whose parameters are computed with in one dtype, in one buffer for values and one for gradients.

    Args:
        batches: the blocks of each.
        sides: of their Gram matrices.
        ordered: see :class:`Batch`.
        dtype: float32 or wider.
    """

    def __init__(
        self, batches: Sequence[Sequence[FilterBlock]], sides: Sequence[int], ordered: bool, dtype: torch.dtype
    ) -> None:
        self.parameters: list[nn.Parameter] = []
        firsts = []
        for blocks in batches:
            firsts.append(len(self.parameters))
            self.parameters += [p for segment in segments_of(blocks) for p in segment]
        self.values, self.gradients = FlatBuffer(self.parameters, dtype), FlatBuffer(self.parameters, dtype)
        self.batches = [
            Batch(blocks, side, ordered, self.values, self.gradients, first)
            for blocks, side, first in zip(batches, sides, firsts, strict=True)
        ]

    def load(self, finite: bool = False) -> None:
        """Copy the parameters into the buffer, with zeros in place of what is not finite if so asked."""
        self.values.read(list(self.parameters), range(len(self.parameters)))
        if finite:
            torch.nan_to_num_(self.values.flat, nan=0.0, posinf=0.0, neginf=0.0)
