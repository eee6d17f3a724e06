"""Merge filters that happen to be nearly equal, in networks trained without C-SGD."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup
from lightning_filterdiv.channel_graph.answers import TensorRows, layer_of, rows_back, rows_first
from lightning_filterdiv.channel_graph.forms import Form
from lightning_filterdiv.channel_graph.modules import copy_network, device_of, find_tensors
from lightning_filterdiv.channel_graph.verify import TOLERANCE, check_finite, random_inputs
from lightning_filterdiv.filters import find_submodule, named_modules, named_tensors
from lightning_filterdiv.narrowing.merge import Merged, merge_channels
from lightning_filterdiv.narrowing.widths import choose_groups
from lightning_filterdiv.tensors.arguments import check_module, check_number

__all__ = ["NoTwinsError", "find_twins", "merge_twins", "rescale_channels"]

_Norm = nn.modules.batchnorm._NormBase


class NoTwinsError(ValueError):
    """No two filters reach the threshold. The message gives the largest similarity."""


def merge_twins(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    threshold: float = 0.99,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    network: str | None = None,
    form: Form = "auto",
) -> Merged:
    """Merge filters that are nearly equal, up to a positive scale where folding the scale is exact.

    Channels are first rescaled without changing the outputs. A filter in front of a norm gets unit length. A channel
    that meets only positively homogeneous operators (ReLU, pooling, sums) gets unit size, and its scale moves into the
    columns that read it. A trial in float64 decides where this is exact. Then clusters of nearly equal channels are set
    to their means and merged.

    Args:
        model: the network; it is left as it was.
        example_inputs: for the trace; see :meth:`~lightning_filterdiv.channel_graph.ChannelGraph.trace`.
        threshold: cosine similarity from which two kernels are twins, in (0, 1]; numbers per channel (biases, norms)
            may differ by ``sqrt(2 - 2 * threshold)`` of their root mean square.
        include: patterns of layers; ``None``: all. Channels are merged where every layer that shares them is chosen.
        exclude: patterns of layers to leave out.
        network: trace only this submodule.
        form: see :func:`~lightning_filterdiv.narrowing.merge_channels`.

    Returns:
        The network and the report: ``report.projection`` is the relative change of the outputs by setting twins to
        their mean, ``report.trim`` that by narrowing, which is rounding.

    Raises:
        NoTwinsError: no two channels are that alike.
        TypeError, ValueError: a bad argument, by name.
        NoLayersError: no layer is left.
        NarrowingError, ExampleInputsError, TraceError: see
            :func:`~lightning_filterdiv.narrowing.merge_channels`.
    """
    check_module("model", model)
    check_number("threshold", threshold, above=0.0, high=1.0)
    check_finite(model)
    graph = ChannelGraph.trace(model, example_inputs, network=network)
    groups = choose_groups(graph, include, exclude)[0]
    rescaled = rescale_channels(model, graph, groups)
    clusters, nearest = find_twins(rescaled, groups, threshold)
    if not clusters:
        raise NoTwinsError(
            f"no two channels are twins at threshold={threshold:g}; the most alike have {nearest:.3f}: lower the "
            f"threshold, or train with CentripetalSGD, which makes channels equal"
        )
    return merge_channels(rescaled, clusters, example_inputs, network=network, tolerance=float("inf"), form=form)


# -- rescaling ---------------------------------------------------------------------------------------------------------


def _scale(tensor: Tensor, part: TensorRows, factors: Tensor) -> None:
    """Multiply the rows of channels by one factor each, in place."""
    laid = rows_first(tensor, part.dim, part.groups)
    factor = factors.to(tensor.device, tensor.dtype).reshape(-1, *[1] * (laid.ndim - 1))
    for rows in part.rows.T.to(tensor.device):
        laid.index_copy_(0, rows, laid.index_select(0, rows) * factor)
    if part.groups > 1:
        tensor.copy_(rows_back(laid, part.dim, part.groups))


class _Rescaling:
    """Ways to rescale the channels of a group. A forward pass decides if one is exact."""

    def __init__(self, model: nn.Module, group: ChannelGroup) -> None:
        modules = named_modules(model)
        self.group = group
        self.norms = {
            layer_of(p.tensor): m for p in group.parts if isinstance(m := modules.get(layer_of(p.tensor)), _Norm)
        }
        self.filters = [p for p in group.parts if p.kind == "filter"]
        self.affine = [
            p for p in group.parts if layer_of(p.tensor) in self.norms and p.tensor.endswith((".weight", ".bias"))
        ]
        self.statistics = [p for p in group.parts if layer_of(p.tensor) in self.norms and ".running_" in p.tensor]
        self.readers = [p for p in group.parts if p.kind == "consumer"]

    def before_norm(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Scale filters. The norm behind them cancels the scale."""
        for part in self.filters:
            _scale(tensors[part.tensor], part, factors)
        for part in self.statistics:
            tensor = tensors[part.tensor]
            if part.tensor.endswith("mean"):
                _scale(tensor, part, factors)
            else:
                eps = self.norms[layer_of(part.tensor)].eps
                tensor.add_(eps)
                _scale(tensor, part, factors.square())
                tensor.sub_(eps)

    def behind(self, tensors: Mapping[str, Tensor], factors: Tensor) -> None:
        """Scale the outputs of norms, or of filters without norms. The columns that read them cancel the scale."""
        for part in self.affine or self.filters:
            _scale(tensors[part.tensor], part, factors)
        for part in self.readers:
            _scale(tensors[part.tensor], part, 1 / factors)

    def sizes(self, tensors: Mapping[str, Tensor], parts: Sequence[TensorRows]) -> Tensor:
        """Return the ``(size,)`` length of the entries of each channel, 1 if there are none."""
        flat = [p.entries(tensors[p.tensor].detach()).flatten(1).double().cpu() for p in parts]
        length = torch.cat(flat, dim=1).norm(dim=1) if flat else torch.ones(self.group.size, dtype=torch.float64)
        return torch.where(length > 1e-6 * length.max().clamp_min(1e-300), length, 1.0)


@torch.no_grad()
def rescale_channels(model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup]) -> nn.Module:
    """Return a copy with the same function, whose filters and channels have unit size where that is exact.

    Args:
        model: the traced network.
        graph: its channel graph.
        groups: whose channels.
    """
    result = copy_network(model)
    generator = torch.Generator().manual_seed(0)
    ways = {group.name: _Rescaling(model, group) for group in groups}
    random = {g.name: (0.5 + 1.5 * torch.rand(g.size, generator=generator)).double() for g in groups}

    trial = copy_network(model).eval().double()
    traced, known = find_submodule(trial, graph.network), named_tensors(trial)
    args, kwargs = tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        random_inputs(graph.arguments, device_of(model), generator),
    )

    def outputs() -> list[Tensor] | None:
        try:
            return list(find_tensors(traced(*args, **kwargs)))
        except (RuntimeError, ValueError, TypeError):
            return None  # forward casts, so that exactness cannot be shown

    expected = outputs()

    def exact(chosen: Sequence[ChannelGroup], apply: Callable[[_Rescaling], Callable[..., None]]) -> bool:
        names = {part.tensor for group in chosen for part in group.parts}
        kept = {name: known[name].clone() for name in names}
        for group in chosen:
            apply(ways[group.name])(known, random[group.name])
        found = outputs()
        for name, tensor in kept.items():
            known[name].copy_(tensor)
        if expected is None or found is None or [t.shape for t in expected] != [t.shape for t in found]:
            return False
        pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True)]
        return all(bool(((a - b).abs() <= TOLERANCE * a.abs().max()).all()) for a, b in pairs)

    def which(part: Sequence[ChannelGroup], apply: Callable[[_Rescaling], Callable[..., None]]) -> list[ChannelGroup]:
        if not part or exact(part, apply):
            return list(part)
        half = len(part) // 2
        return [] if len(part) == 1 else which(part[:half], apply) + which(part[half:], apply)

    tensors = named_tensors(result)
    normed = [group for group in groups if ways[group.name].norms and ways[group.name].statistics]
    for group in which(normed, lambda way: way.before_norm):
        way = ways[group.name]
        factors = 1 / way.sizes(tensors, way.filters)
        ratio = _smallest_variance(way, tensors)
        # A channel whose variance is far below eps cannot be rescaled, and stays as it is.
        factors = torch.where(factors.square() * (ratio + 1) > 1.0, factors, 1.0)
        way.before_norm(tensors, factors)
    for group in which(list(groups), lambda way: way.behind):
        way = ways[group.name]
        way.behind(tensors, 1 / way.sizes(tensors, way.affine or way.filters))
    return result


def _smallest_variance(way: _Rescaling, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the ``(size,)`` smallest running variance of each channel, in units of eps."""
    found = [
        part.entries(tensors[part.tensor]).flatten(1).double().cpu().amin(1) / way.norms[layer_of(part.tensor)].eps
        for part in way.statistics
        if part.tensor.endswith("var")
    ]
    return torch.stack(found).amin(0) if found else torch.zeros(way.group.size, dtype=torch.float64)


# -- clusters ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def find_twins(model: nn.Module, groups: Sequence[ChannelGroup], threshold: float) -> tuple[dict[str, Tensor], float]:
    """Find clusters of channels in which every member is a twin of the first one.

    Args:
        model: result of :func:`rescale_channels`.
        groups: whose channels.
        threshold: see :func:`merge_twins`.

    Returns:
        Group name -> ``(size,)`` cluster index, of groups with twins; and the largest similarity of two channels.
    """
    tensors = named_tensors(model)
    clusters: dict[str, Tensor] = {}
    nearest = 0.0
    for group in groups:
        apart = _distances(tensors, group)
        if group.blocks is not None:
            apart.masked_fill_(group.blocks[:, None] != group.blocks[None, :], float("inf"))
        if group.size > 1:
            others = apart + torch.diag(torch.full((group.size,), float("inf"), dtype=apart.dtype))
            nearest = max(nearest, 1 - float(others.min()) / 2)
        index = _clustered(apart <= 2 - 2 * threshold + 1e-12, group)
        if len(index.unique()) < group.size:
            clusters[group.name] = index
    return clusters, nearest


def _distances(tensors: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """Return ``(size, size)`` largest squared distances over all tensors, relative to the longer kernel or the mean
    square."""
    worst = torch.zeros(group.size, group.size, dtype=torch.float64)
    for part in group.parts:
        if part.kind == "consumer" or not tensors[part.tensor].is_floating_point():
            continue
        rows = part.entries(tensors[part.tensor].detach()).flatten(1).double().cpu()
        square = rows.square().sum(1)
        between = (square[:, None] + square[None, :] - 2 * rows @ rows.T).clamp_min(0)
        if rows.shape[1] > 1:
            scale = torch.maximum(square[:, None], square[None, :])
        else:
            scale = square.mean().expand_as(between)
        worst = torch.maximum(worst, torch.where(between > 0, between / scale.clamp_min(1e-300), 0.0))
    return worst


def _clustered(alike: Tensor, group: ChannelGroup) -> Tensor:
    """Return the ``(size,)`` cluster of each channel, with equally many clusters in every block."""
    index = torch.arange(group.size)
    leaders: list[list[int]] = [[] for _ in range(group.block_count)]
    for block, members in enumerate(group.members()):
        for channel in members.tolist():
            leader = next((first for first in leaders[block] if alike[first, channel]), None)
            if leader is None:
                leaders[block].append(channel)
            index[channel] = channel if leader is None else leader
    most = max(map(len, leaders))
    for block, members in enumerate(group.members()):
        followers = [channel for channel in reversed(members.tolist()) if index[channel] != channel]
        for channel in followers[: most - len(leaders[block])]:
            index[channel] = channel
    return index
