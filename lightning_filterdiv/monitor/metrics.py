"""Redundancy of filters as torchmetrics ``Metric`` objects, for ``self.log`` and for plain loops."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_filterdiv.filters import CONVOLUTIONS, filter_matrix
from lightning_filterdiv.monitor.activations import ChannelMoments, Moments, channel_redundancy
from lightning_filterdiv.similarity import cosine_similarity, effective_rank
from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer

__all__ = ["ChannelRedundancy", "EffectiveRank", "FilterCoherence"]

Reduction = Literal["mean", "max"]
ChannelFigure = Literal["mean_abs_correlation", "channel_effective_rank", "channel_twins"]


def _filters(layer: Tensor | nn.Module) -> Tensor:
    """Return the filters of a convolution, a matrix or a batch of matrices as ``(B, J, d)``."""
    if isinstance(layer, CONVOLUTIONS):
        layer = filter_matrix(layer)
    if not isinstance(layer, Tensor) or layer.dim() not in (2, 3):
        given = f"shape {tuple(layer.shape)}" if isinstance(layer, Tensor) else type(layer).__name__
        raise TypeError(f"update() takes a convolution, a (J, d) matrix or a (B, J, d) batch of layers, got {given}")
    layer = layer.detach()
    return layer.unsqueeze(0) if layer.dim() == 2 else layer


class _MeanOverLayers(Metric):
    """Number about one layer's filters, averaged over the layers seen."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    layers: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("layers", torch.zeros(()), dist_reduce_fx="sum")

    def _figure(self, batch: Tensor) -> Tensor:
        """Return the ``(B,)`` numbers of layers with filters ``(B, J, d)``."""
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
        """Return the mean over layers; NaN before the first :meth:`update`."""
        return self.total / self.layers


class FilterCoherence(_MeanOverLayers):
    """Absolute cosine between distinct filters of a layer, in [0, 1], averaged over the layers seen.

    Args:
        reduction: reduction over the pairs of one layer: ``"mean"`` (0.1 for random 3x3 kernels of 7 channels) or
            ``"max"`` (the mutual coherence; 1 as soon as two filters are parallel or opposite).
        kwargs: for :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``reduction`` is neither.
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

    It is between 0 and 1 if normalised, else at most ``min(J, d)``.

    Args:
        normalize: divide by ``min(J, d)``, so that layers of different size can be compared.
        kwargs: for :class:`torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, normalize: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalize = check_flag("normalize", normalize)

    def _figure(self, batch: Tensor) -> Tensor:
        rank = effective_rank(batch)
        return rank / min(batch.shape[-2:]) if self.normalize else rank


class ChannelRedundancy(Metric):
    """Similarity of the outputs of one layer's channels, over all positions and images seen.

    Correlations between channels are accumulated batch by batch in float64. No activation is kept.

    Args:
        channels: number of channels, C.
        figure: ``"mean_abs_correlation"`` between distinct channels; ``"channel_effective_rank"``, of the standardised
            channels as a fraction of C; or ``"channel_twins"``, the fraction of channels with another one at an
            absolute correlation above 0.9.
        kwargs: for :class:`torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: ``channels`` is no positive integer, or ``figure`` is unknown.
    """

    is_differentiable = False
    full_state_update = False
    positions: Tensor
    mean: Tensor
    products: Tensor

    def __init__(self, channels: int, figure: ChannelFigure = "mean_abs_correlation", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = check_integer("channels", channels, low=1)
        self.figure = check_choice("figure", figure, ChannelFigure)
        # Ranks are joined in compute, because joint moments are not sums of moments.
        for name, value in Moments.none(self.channels)._asdict().items():
            self.add_state(name, value, dist_reduce_fx=None)

    def update(self, activations: Tensor) -> None:
        """Add outputs of the layer.

        Args:
            activations: ``(N, C, *positions)`` or ``(N, C)``, any floating dtype.

        Raises:
            ValueError: wrong number of channels.
        """
        if not isinstance(activations, Tensor) or activations.dim() < 2 or activations.shape[1] != self.channels:
            given = tuple(activations.shape) if isinstance(activations, Tensor) else type(activations).__name__
            raise ValueError(f"activations must be (N, {self.channels}, *positions), got {given}")
        moments = ChannelMoments()
        moments.moments = Moments(self.positions, self.mean, self.products)
        moments.update(activations)
        self.positions, self.mean, self.products = moments.moments

    def compute(self) -> Tensor:
        """Return the result in float64; NaN before the first :meth:`update`."""
        parts = [Moments(self.positions, self.mean, self.products)]
        if self.mean.dim() > 1:  # of several ranks
            parts = [Moments(*part) for part in zip(self.positions, self.mean, self.products, strict=True)]
        joined = parts[0]
        for part in parts[1:]:
            joined = joined.joined(part)
        if not joined.positions:
            return torch.full_like(joined.positions, torch.nan)
        correlation = joined.correlation()
        measured = channel_redundancy({"": correlation}, {"": correlation})
        return torch.tensor(measured[""][self.figure], dtype=torch.float64, device=joined.mean.device)
