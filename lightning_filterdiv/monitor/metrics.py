"""Redundancy of filters as torchmetrics ``Metric`` objects, for ``self.log`` and for plain loops."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_filterdiv.filters import CONVOLUTIONS, filter_matrix
from lightning_filterdiv.similarity import cosine_similarity, effective_rank
from lightning_filterdiv.tensors.arguments import check_choice, check_flag

__all__ = ["EffectiveRank", "FilterCoherence"]

Reduction = Literal["mean", "max"]


def _filters(layer: Tensor | nn.Module) -> Tensor:
    """``(B, J, d)`` filters of a convolution, a matrix or a batch of matrices."""
    if isinstance(layer, CONVOLUTIONS):
        layer = filter_matrix(layer)
    if not isinstance(layer, Tensor) or layer.dim() not in (2, 3):
        given = f"shape {tuple(layer.shape)}" if isinstance(layer, Tensor) else type(layer).__name__
        raise TypeError(f"update() takes a convolution, a (J, d) matrix or a (B, J, d) batch of layers, got {given}")
    layer = layer.detach()
    return layer.unsqueeze(0) if layer.dim() == 2 else layer


class _MeanOverLayers(Metric):
    """A figure of one layer's filters, averaged over the layers seen."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    layers: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("layers", torch.zeros(()), dist_reduce_fx="sum")

    def _figure(self, batch: Tensor) -> Tensor:
        """``(B, J, d)`` filters to the ``(B,)`` figures of their layers."""
        raise NotImplementedError

    def update(self, filters: Tensor | nn.Module) -> None:
        """Add one layer, or a batch of layers of equal shape.

        Args:
            filters: a convolution, ``(J, d)`` or ``(B, J, d)``.
        """
        batch = _filters(filters)
        self.total += self._figure(batch).sum().to(self.total)
        self.layers += batch.shape[0]

    def compute(self) -> Tensor:
        """Mean over layers; NaN before the first :meth:`update`."""
        return self.total / self.layers


class FilterCoherence(_MeanOverLayers):
    """Absolute cosine between distinct filters of a layer, in [0, 1], averaged over the layers seen.

    Args:
        reduction: over the pairs of one layer: ``"mean"`` (0.1 for random 3x3 kernels of 7 channels) or ``"max"`` (the
            mutual coherence; 1 as soon as two filters are parallel or opposite).
        kwargs: for :class:`torchmetrics.Metric`.

    Raises:
        ValueError: another reduction.
    """

    higher_is_better = False

    def __init__(self, reduction: Reduction = "mean", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reduction = check_choice("reduction", reduction, Reduction)

    def _figure(self, batch: Tensor) -> Tensor:
        overlap = cosine_similarity(batch).abs().triu(diagonal=1)
        count = batch.shape[-2]
        if self.reduction == "mean":
            return overlap.sum(dim=(-2, -1)) / max(1, count * (count - 1) // 2)
        return overlap.amax(dim=(-2, -1))


class EffectiveRank(_MeanOverLayers):
    """Effective rank of the filters of a layer, averaged over the layers seen (Roy and Vetterli, EUSIPCO 2007).

    Between 0 and 1 if normalised, else up to ``min(J, d)``.

    Args:
        normalize: as a fraction of ``min(J, d)``, so that layers of different size compare.
        kwargs: for :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, normalize: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalize = check_flag("normalize", normalize)

    def _figure(self, batch: Tensor) -> Tensor:
        rank = effective_rank(batch)
        return rank / min(batch.shape[-2:]) if self.normalize else rank
