"""Sets of filters to be made orthonormal together: those of a convolution, or of the shared bases of a stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lightning_filterdiv.filters import CONVOLUTIONS, Conv, canonical_name
from lightning_filterdiv.orthonormality.functional import tap_stride
from lightning_filterdiv.shared_basis.modules import SharedBasisConv2d, shared_bases
from lightning_filterdiv.tensors.stacking import group_by

__all__ = ["FilterBlock", "filter_blocks"]

_TRANSPOSED = CONVOLUTIONS[3:]


@dataclass(frozen=True)
class FilterBlock:
    """One matrix of filters, whose rows are in one or several parameters.

    Attributes:
        name: name of the layer, or of the Gram of shared bases.
        segments: parameters whose filters are the rows, in order; those of a segment have one shape.
        mask: ``(n, n)`` bool, the pairs that count; ``None``: all.
        pool: see :class:`~lightning_filterdiv.shared_basis.FilterBasis`.
        groups: groups of the convolution: filters of different groups see different channels and are never compared.
        transposed: filters are dim 1 of the weight.
        stride: in taps, for the convolutional form.
    """

    name: str
    segments: tuple[tuple[nn.Parameter, ...], ...]
    mask: npt.NDArray[np.bool_] | None = field(default=None, compare=False)
    pool: str = ""
    groups: int = 1
    transposed: bool = False
    stride: tuple[int, ...] = ()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return all parameters in order."""
        return [parameter for segment in self.segments for parameter in segment]

    @property
    def shape(self) -> tuple[int, int]:
        """Return ``(n, d)``, the shape of each of the ``groups`` matrices."""
        first = self.parameters[0]
        if self.transposed:
            return first.shape[1], first.numel() // first.shape[1] // self.groups
        return sum(len(p) for p in self.parameters) // self.groups, first[0].numel()

    @property
    def entries(self) -> int:
        """Return the number of pairs that count."""
        return self.groups * self.shape[0] ** 2 if self.mask is None else int(self.mask.sum())


def _parameter(conv: Conv | nn.Linear) -> nn.Parameter:
    weight: Any = conv.weight  # torch annotates a plain tensor
    return weight  # type: ignore[no-any-return]


def _ordinary(name: str, conv: Conv | nn.Linear) -> FilterBlock:
    if isinstance(conv, nn.Linear):
        return FilterBlock(name, ((_parameter(conv),),))
    taps = tuple(tap_stride(s, d) for s, d in zip(conv.stride, conv.dilation, strict=True))
    transposed = isinstance(conv, _TRANSPOSED)
    return FilterBlock(name, ((_parameter(conv),),), groups=conv.groups, transposed=transposed, stride=taps)


def filter_blocks(
    model: nn.Module, layers: Mapping[str, Conv | nn.Linear], *, unique: bool = False
) -> list[FilterBlock]:
    """Return one block per ordinary layer of ``layers``, and one per Gram matrix of its shared bases.

    Args:
        model: the network that ``layers`` belong to.
        layers: canonical name -> convolution or linear layer.
        unique: also compare the filters of a basis with the unique filters of its layers, and unique filters of one
            layer with each other (the paper's CIFAR-10 experiments). A pair of a shared and a unique filter counts
            once.

    Returns:
        Blocks in the order of ``layers``. If one basis of a Gram is in ``layers``, the block holds all bases of that
        Gram, because frozen filters are still neighbours.

    Raises:
        ValueError: ``unique`` is set and no layer has unique filters.
    """
    bases = [(canonical_name(name), basis, own) for name, basis, own in shared_bases(model)]
    grams = group_by(bases, lambda entry: entry[1].gram or f"basis {entry[0]}")
    blocks: list[FilterBlock] = []
    covered: set[int] = set()
    for name, conv in layers.items():
        if id(conv) in covered:
            continue
        members = next((gram for gram in grams if any(basis is conv for _, basis, _ in gram)), None)
        if members is None:
            blocks.append(_ordinary(name, conv))
            continue
        covered |= {id(basis) for _, basis, _ in members}
        blocks.append(_shared([basis for _, basis, _ in members], members[0][1].gram or members[0][0],
                              [layer for _, _, own in members for _, layer in own] if unique else []))  # fmt: skip
    if unique and all(block.mask is None for block in blocks):
        raise ValueError(
            "unique=True, but no layer of the chosen shared bases has filters of its own to compare; share with "
            "share_filter_bases(model, unique=1), or use unique=False"
        )
    return blocks


def _shared(bases: list[nn.Conv2d], name: str, layers: list[SharedBasisConv2d]) -> FilterBlock:
    segments = [tuple(members) for members in group_by([_parameter(basis) for basis in bases], lambda p: p.shape)]
    own = [_parameter(layer.unique) for layer in layers if layer.unique is not None]
    pool = getattr(bases[0], "pool", "")
    stride = tuple(tap_stride(s, d) for s, d in zip(bases[0].stride, bases[0].dilation, strict=True))
    if len({weight.shape[1:] for segment in segments for weight in segment}) > 1:
        raise ValueError(
            f"the shared bases of {name!r} have filters of different shapes, {[tuple(b.weight.shape) for b in bases]}, "
            f"which cannot be orthonormal together; give them different names in gram"
        )
    if not own:
        return FilterBlock(name, tuple(segments), pool=pool, stride=stride)
    shared_rows = sum(len(basis.weight) for basis in bases)
    rows = shared_rows + sum(len(weight) for weight in own)
    mask = np.zeros((rows, rows), dtype=np.bool_)
    mask[:shared_rows] = True  # shared with shared and with unique; (unique, shared) is left out: counted once
    start = shared_rows
    for weight in own:
        mask[start : start + len(weight), start : start + len(weight)] = True
        start += len(weight)
    segments += [tuple(members) for members in group_by(own, lambda p: p.shape)]
    return FilterBlock(name, tuple(segments), mask, pool, stride=stride)
