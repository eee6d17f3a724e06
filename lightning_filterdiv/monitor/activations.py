"""Redundancy of the outputs of filters: the absolute correlation between channels of a layer. No Lightning here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_filterdiv.filters import Conv
from lightning_filterdiv.monitor.functional import NEAR_DUPLICATE, Dropped, effective_rank_of_gram
from lightning_filterdiv.tensors.stacking import group_by

__all__ = [
    "ACTIVATION_METRICS",
    "ChannelMoments",
    "Moments",
    "Pair",
    "channel_redundancy",
    "in_function_only",
    "measure_channels",
    "record_channels",
]

#: Scalar name -> meaning, in the order of the columns of :func:`channel_redundancy`.
ACTIVATION_METRICS = {
    "mean_abs_correlation": "mean |correlation| between distinct channels",
    "channel_effective_rank": "effective rank of the standardised channels as a fraction of their number",
    "channel_twins": "fraction of channels with another one at |correlation| > 0.9",
    "twins_in_function_only": "fraction of channels with a twin whose filter is not at |cos| > 0.9",
}
_CHUNK = 1 << 15  # positions at a time
_CONSTANT = 1e-7  # relative deviation below which a channel is constant up to rounding


class Moments(NamedTuple):
    """Moments of ``C`` channels over positions, in float64.

    Attributes:
        positions: ``()``, number of positions.
        mean: ``(C,)``.
        products: ``(C, C)`` sums of products of deviations from the mean.
    """

    positions: Tensor
    mean: Tensor
    products: Tensor

    @classmethod
    def none(cls, channels: int, device: torch.device | str = "cpu") -> Moments:
        """Return moments over no position."""
        start = torch.zeros((), dtype=torch.float64, device=device)
        return cls(start, start.new_zeros(channels), start.new_zeros(channels, channels))

    def joined(self, other: Moments) -> Moments:
        """Return the moments over the positions of both (Chan, Golub, LeVeque 1979), accurate for large means too."""
        count = self.positions + other.positions
        share = other.positions / torch.where(count > 0, count, 1.0)
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.positions * share)
        return Moments(count, self.mean + shift * share, self.products + other.products + between)

    def selected(self, channels: Tensor) -> Moments:
        """Return the moments of some of the channels."""
        return Moments(self.positions, self.mean[channels], self.products[channels][:, channels])

    def correlation(self) -> Tensor:
        """Return the ``(C, C)`` signed correlation in [-1, 1], with diagonal 1. A constant channel has 0 with all
        channels, itself included."""
        variance = self.products.diagonal()
        floor = self.positions * (_CONSTANT * self.mean).square()
        inverse = torch.where(variance > floor, variance, torch.inf).rsqrt()
        return (self.products * inverse * inverse[:, None]).clamp(-1.0, 1.0)


class ChannelMoments:
    """Moments of the channels of a layer, accumulated batch by batch. No output is stored."""

    def __init__(self) -> None:
        self.moments: Moments | None = None

    @torch.no_grad()
    def update(self, outputs: Tensor) -> None:
        """Add outputs ``(N, C, *positions)``, or ``(N, C)``, of any floating dtype."""
        with torch.autocast(outputs.device.type, enabled=False):
            columns = outputs.detach().transpose(0, 1).flatten(1)
            if self.moments is None:
                self.moments = Moments.none(columns.shape[0], columns.device)
            for part in columns.split(_CHUNK, dim=1):
                self.moments = self.moments.joined(_moments(part))


def _moments(columns: Tensor) -> Moments:
    wide = columns.double()
    mean = wide.mean(dim=1)
    deviations = wide - mean[:, None]
    return Moments(torch.full_like(mean[0], wide.shape[1]), mean, deviations @ deviations.mT)


def channel_redundancy(
    correlations: Mapping[str, Tensor], cosines: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Measure how redundant the channels of each layer are.

    Args:
        correlations: layer -> ``(C, C)`` float64 correlation, see :meth:`Moments.correlation`.
        cosines: layer -> ``(C, C)`` cosine of the filters of these channels.

    Returns:
        Layer -> metric -> value, with the metrics of :data:`ACTIVATION_METRICS`. Layers of equal width are computed as
        one batch. A layer of one channel has correlation 0. A layer whose outputs are not finite has NaN.
    """
    values: dict[str, dict[str, float]] = {}
    for batch in group_by(correlations.items(), lambda item: (item[1].shape, item[1].device)):
        correlation = torch.stack([matrix for _, matrix in batch])
        measured = _measure(correlation, torch.stack([cosines[name].to(correlation) for name, _ in batch])).tolist()
        for (name, _), row in zip(batch, measured, strict=True):
            values[name] = dict(zip(ACTIVATION_METRICS, row, strict=True))
    return {name: values[name] for name in correlations}


def _measure(correlation: Tensor, cosine: Tensor) -> Tensor:
    """``(B, C, C)``, ``(B, C, C) -> (B, len(ACTIVATION_METRICS))``."""
    count = correlation.shape[-1]
    finite = correlation.isfinite().flatten(1).all(dim=1)
    correlation = torch.where(finite[:, None, None], correlation, 0.0)
    rank = effective_rank_of_gram(correlation) / max(1, count)
    overlap = correlation.abs()
    overlap.diagonal(dim1=-2, dim2=-1).zero_()
    mean = overlap.sum(dim=(-2, -1)) / max(1, count * (count - 1))
    twin = overlap > NEAR_DUPLICATE
    unlike = twin & ~(cosine.abs() > NEAR_DUPLICATE)
    twins, function_only = (found.any(dim=-1).double().mean(dim=-1) for found in (twin, unlike))
    return torch.stack([mean, rank, twins, function_only], dim=-1).masked_fill(~finite[:, None], torch.nan)


class Pair(NamedTuple):
    """Two channels of a layer that have similar outputs and different weights.

    Attributes:
        first: index of a filter.
        second: index of another one, larger.
        correlation: signed correlation of their outputs.
        cosine: signed cosine of their weights.
    """

    first: int
    second: int
    correlation: float
    cosine: float


def in_function_only(correlation: Tensor, cosine: Tensor, limit: float = NEAR_DUPLICATE) -> list[Pair]:
    """Return the pairs with ``|correlation| > limit`` and ``|cos| <= limit``, the most alike first.

    Args:
        correlation: ``(C, C)``.
        cosine: ``(C, C)`` of the same filters.
        limit: in [0, 1).
    """
    correlation, cosine = correlation.double().cpu(), cosine.double().cpu()
    found = ((correlation.abs() > limit) & (cosine.abs() <= limit)).triu(diagonal=1).nonzero()
    pairs = [Pair(i, j, float(correlation[i, j]), float(cosine[i, j])) for i, j in found.tolist()]
    return sorted(pairs, key=lambda pair: (-abs(pair.correlation), pair.first, pair.second))


@contextlib.contextmanager
def record_channels(layers: Mapping[str, Conv]) -> Iterator[dict[str, ChannelMoments]]:
    """Accumulate moments of the outputs of ``layers`` in every forward pass inside the block.

    Args:
        layers: name -> convolution. Outputs are taken before norm and activation.

    Yields:
        name -> moments; ``None`` for a layer that was not called.
    """
    recorded = {name: ChannelMoments() for name in layers}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: Any, output: Tensor) -> None:
            # An input without batch dimension is one image.
            batched = output.dim() == len(layers[name].kernel_size) + 2
            recorded[name].update(output if batched else output.unsqueeze(0))

        return record

    handles = [conv.register_forward_hook(hook(name)) for name, conv in layers.items()]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Modes:
    """Training mode of every module."""

    modules: list[tuple[nn.Module, bool]]

    @classmethod
    def of(cls, network: nn.Module) -> _Modes:
        return cls([(module, module.training) for module in network.modules()])

    def restore(self) -> None:
        for module, training in self.modules:
            module.training = training


@torch.no_grad()
def measure_channels(
    network: nn.Module,
    layers: Mapping[str, Conv],
    run: Callable[[], object],
    dropped: Mapping[str, Dropped] | None = None,
) -> dict[str, Tensor]:
    """Measure correlations between the channels of each layer while ``run`` calls ``network`` in evaluation mode.

    Modes, buffers and the random state are restored afterwards.

    Args:
        network: network that ``run`` calls.
        layers: name -> convolution inside it.
        run: function that calls the network, once or batch by batch.
        dropped: name -> filters whose channels do not count.

    Returns:
        Layer -> ``(C', C')`` float64 correlation of the channels that count, for layers that ran.
    """
    modes = _Modes.of(network)
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    try:
        network.eval()
        # A hook on a compiled module never fires, so the original module runs.
        eagerly = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(devices=list(devices)), eagerly, record_channels(layers) as recorded:
            run()
    finally:
        modes.restore()
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
    correlations: dict[str, Tensor] = {}
    for name, gathered in recorded.items():
        moments = gathered.moments
        if moments is None:
            continue
        out = set((dropped or {}).get(name, Dropped()).filters)
        kept = [index for index in range(len(moments.mean)) if index not in out]
        correlations[name] = (moments.selected(torch.tensor(kept, dtype=torch.int64)) if out else moments).correlation()
    return correlations
