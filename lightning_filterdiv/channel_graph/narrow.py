"""Make channels equal (tie), and make the network really narrower (narrow)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..filters import canonical_name
from .channel_map import ChannelMap
from .classes import ChannelGroup
from .errors import NarrowingError
from .export import bare_module, without_compilation
from .graph import ChannelGraph

if TYPE_CHECKING:
    from .widths import Layout

__all__ = ["copy_network", "named_tensors", "narrow", "representatives", "tie", "update_attributes"]

Clusters = Mapping[str, Tensor]


def representatives(group: ChannelGroup, clusters: Tensor) -> Tensor:
    """(size,) index of the first member of each channel's cluster.

    Raises:
        NarrowingError: ``clusters`` is not one integer per channel of the group.
    """
    if not isinstance(clusters, Tensor):
        raise NarrowingError(
            f"group {group.name!r} has {group.size} channels: expected a tensor of that many cluster numbers, got "
            f"{type(clusters).__name__}; torch.tensor([...]) makes one of a list"
        )
    if clusters.shape != (group.size,) or clusters.is_floating_point() or bool((clusters < 0).any()):
        raise NarrowingError(
            f"group {group.name!r} has {group.size} channels: expected that many integers, the number of each one's "
            f"cluster from 0, got {clusters.dtype} of shape {tuple(clusters.shape)}"
            + (f" with the entry {int(clusters.min())}" if clusters.shape == (group.size,) else "")
        )
    clusters = clusters.detach().cpu().long()
    _, index = torch.unique(clusters, return_inverse=True)
    first = torch.full((int(index.max()) + 1,), group.size, dtype=torch.long)
    first.scatter_reduce_(0, index, torch.arange(group.size), "amin")
    return first[index]


def _checked(graph: ChannelGraph, clusters: Clusters) -> list[tuple[ChannelGroup, Tensor]]:
    known = {group.name: group for group in graph.groups}
    unknown = [name for name in clusters if name not in known]
    if unknown:
        reasons = [f"{name!r} ({graph.pinned[name]})" if name in graph.pinned else repr(name) for name in unknown]
        raise NarrowingError(f"no such channel group: {', '.join(reasons)}; the groups are {', '.join(known)}")
    return [(known[name], representatives(known[name], index)) for name, index in clusters.items()]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> parameter or buffer, under every name it has."""
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {canonical_name(name): tensor for name, tensor in pairs}


@torch.no_grad()
def tie(model: nn.Module, graph: ChannelGraph, clusters: Clusters) -> None:
    """Set every filter and per-channel entry to the mean of its cluster, in place.

    Args:
        model: the traced network or a copy of it.
        graph: its channel graph.
        clusters: group name -> (size,) cluster index of each channel.
    """
    tensors = named_tensors(model)
    for group, first in _checked(graph, clusters):
        counts = torch.zeros(group.size).index_add_(0, first, torch.ones(group.size))
        for part in group.parts:
            if part.kind == "consumer":
                continue
            tensor = tensors[part.tensor]
            for rows in part.rows.T.to(tensor.device):
                values = tensor.index_select(part.dim, rows).movedim(part.dim, 0)
                wide = values.double() if values.device.type == "cpu" else values.float()
                total = torch.zeros_like(wide).index_add_(0, first.to(tensor.device), wide)
                index = first.to(tensor.device)
                divisor = counts.to(tensor.device)[index].reshape(-1, *[1] * (wide.ndim - 1))
                mean = (total[index] / divisor).to(tensor.dtype).movedim(0, part.dim)
                tensor.index_copy_(part.dim, rows, mean)


@dataclass
class _Cut:
    """What happens to one dimension of one tensor."""

    removed: list[Tensor] = field(default_factory=list)
    into: list[Tensor] = field(default_factory=list)  # the index each removed one is merged into
    summed: bool = False  # consumer columns are added up, other rows dropped
    index: Tensor | None = None  # what is kept, in this order; default: all that is not removed


Cuts = dict[str, dict[int, _Cut]]


def _cuts(chosen: list[tuple[ChannelGroup, Tensor]]) -> Cuts:
    cuts: Cuts = {}
    for group, first in chosen:
        merged = first != torch.arange(group.size)
        for part in group.parts:
            cut = cuts.setdefault(part.tensor, {}).setdefault(part.dim, _Cut())
            cut.removed.append(part.rows[merged].reshape(-1))
            cut.into.append(part.rows[first[merged]].reshape(-1))
            cut.summed = part.kind == "consumer"
    return cuts


def _follow_layout(graph: ChannelGraph, chosen: list[tuple[ChannelGroup, Tensor]], layout: Layout, cuts: Cuts) -> None:
    """Put what is kept where the network's forward will look for it."""
    kept = {group.name: group.channels[first.unique()].tolist() for group, first in chosen}
    # Channel of the narrow network -> channel of the original.
    source = {new: kept[name][i] if name else i for new, (name, i) in layout.channels.items()}
    filters = {channel for row in graph.table.filters().values() for channel in row}
    old_rows, new_rows = graph.table.rows_by_channel(), layout.graph.table.rows_by_channel()
    old_tensors, new_tensors = named_tensors(graph.model), named_tensors(layout.graph.model)
    for (tensor, dim), by_channel in new_rows.items():
        places = {
            row: old
            for new, rows in by_channel.items()
            if new in source
            for row, old in zip(rows, old_rows[tensor, dim][source[new]], strict=True)
        }
        # What no filter owns (columns that read the network input, or padding) stays in order.
        owned = {row for channel, rows in old_rows[tensor, dim].items() if channel in filters for row in rows}
        rest = [row for row in range(old_tensors[tensor].shape[dim]) if row not in owned]
        free = [row for row in range(new_tensors[tensor].shape[dim]) if row not in places]
        if len(rest) != len(free):
            raise NarrowingError(f"{tensor} cannot be narrowed: forward adds or drops entries that no channel owns")
        places.update(zip(free, rest, strict=True))
        cuts.setdefault(tensor, {}).setdefault(dim, _Cut()).index = torch.tensor(
            [places[i] for i in range(len(places))]
        )


def copy_network(model: nn.Module, tensors: Mapping[int, object] | None = None) -> nn.Module:
    """Deep copy without compilation wrappers, gradients or the Trainer.

    Args:
        model: the network.
        tensors: ``id`` of a parameter or buffer -> what stands for it in the copy.
    """
    model = bare_module(model)
    memo: dict[int, Any] = dict(tensors or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that a hook computes before each call
                memo[id(value)] = value.detach().clone()
    trainer = getattr(model, "_trainer", None)
    if trainer is not None:
        memo[id(trainer)] = trainer
    with without_compilation(model):
        try:
            copied = copy.deepcopy(model, dict(memo))
        except Exception:  # a lock, an open file, a logger: whatever a module keeps that cannot be copied is shared
            copied = copy.deepcopy(model, memo | _uncopyable(model, memo))
    if trainer is not None:
        copied.__dict__["_trainer"] = None
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _uncopyable(model: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Plain attributes of the modules that refuse to be copied, standing for themselves."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and id(value) not in memo:
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    found[id(value)] = value
    return found


@torch.no_grad()
def narrow(model: nn.Module, graph: ChannelGraph, clusters: Clusters) -> nn.Module:
    """A narrower copy of ``model``: one channel per cluster.

    Rows of the first member are kept; in every consumer the kept column is the sum of the cluster's columns. Exact if
    the channels of each cluster are equal (see :func:`tie`). Modules are narrowed, ``forward`` is not rewritten;
    submodules that move channels become a :class:`ChannelMap`.

    Args:
        model: the traced network or a copy of it (for instance in another dtype).
        graph: its channel graph.
        clusters: group name -> (size,) cluster index of each channel; other groups stay as they are.

    Returns:
        A module of the same class; dtype, device, ``requires_grad``, mode and memory format are kept.

    Raises:
        NarrowingError: unknown group, wrong cluster shape, or a width that the network's forward cannot express.
    """
    chosen = [(group, first) for group, first in _checked(graph, clusters) if len(first.unique()) < group.size]
    bound = frozenset().union(*graph.constrained)
    tied = [(group, first) for group, first in chosen if int(group.channels[0]) in bound]
    if tied:
        model, graph = _narrow_tied(model, graph, tied)
        free = {group.name: first for group, first in chosen if int(group.channels[0]) not in bound}
        chosen = _checked(graph, free)
    result = copy_network(model)
    _cut(result, _cuts(chosen))
    _install_maps(result, graph, chosen)
    return result


def _narrow_tied(
    model: nn.Module, graph: ChannelGraph, tied: list[tuple[ChannelGroup, Tensor]]
) -> tuple[nn.Module, ChannelGraph]:
    """Narrow groups whose counts a forward body ties together; returns the network and its graph."""
    from .widths import layout_for, widths_of

    wanted = {group.name: len(first.unique()) for group, first in tied}
    layout = layout_for(graph, widths_of(graph, wanted))
    if layout is None or any(layout.counts[name] != count for name, count in wanted.items()):
        found = "" if layout is None else f"; it would make them { ({name: layout.counts[name] for name in wanted}) }"
        raise NarrowingError(
            f"forward splits, shuffles or pads channels itself and cannot express the counts {wanted}{found}. "
            "Ask expressible_counts for counts that fit"
        )
    first_of = {group.name: first for group, first in tied}
    everything = [(group, first_of.get(group.name, torch.arange(group.size))) for group in graph.groups]
    cuts = _cuts(tied)
    _follow_layout(graph, everything, layout, cuts)
    result = copy_network(model)
    _cut(result, cuts)
    layout.graph.rebind(result)
    return result, layout.graph


def _cut(model: nn.Module, cuts: Cuts) -> None:
    """Replace the tensors in ``cuts`` by narrower ones, in place."""
    tensors = named_tensors(model)
    replaced = {id(tensors[name]): _cut_tensor(tensors[name], dims) for name, dims in cuts.items()}
    for module in _replace(model, replaced):
        update_attributes(module)


def _cut_tensor(tensor: Tensor, dims: Mapping[int, _Cut]) -> Tensor:
    value = tensor.detach().clone()
    wide = torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else value.dtype
    for dim, cut in dims.items():
        removed = torch.cat(cut.removed) if cut.removed else torch.zeros(0, dtype=torch.long)
        if cut.summed and len(removed):
            columns = value.index_select(dim, removed.to(value.device)).to(wide)
            into = torch.cat(cut.into).to(value.device)
            value = value.to(wide).index_add_(dim, into, columns).to(value.dtype)
        index = cut.index
        if index is None:
            mask = torch.ones(value.shape[dim], dtype=torch.bool)
            mask[removed] = False
            index = mask.nonzero().squeeze(1)
        value = value.index_select(dim, index.to(value.device))
    for memory_format, ndim in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.ndim == ndim and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=memory_format):
            return value.contiguous(memory_format=memory_format)
    return value.contiguous()


def _replace(model: nn.Module, replaced: Mapping[int, Tensor]) -> list[nn.Module]:
    """Put new tensors in place of old ones (looked up by identity, so shared tensors stay shared)."""
    touched: list[nn.Module] = []
    parameters = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in replaced:
                if id(old) not in parameters:
                    parameters[id(old)] = nn.Parameter(replaced[id(old)], requires_grad=old.requires_grad)
                module._parameters[name] = parameters[id(old)]
                touched.append(module)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and id(buffer) in replaced:
                module._buffers[name] = replaced[id(buffer)]
                touched.append(module)
    return touched


def update_attributes(module: nn.Module) -> None:
    """Make the integer attributes of ``module`` agree with its tensors."""
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        reads, writes = module.weight.shape[:2]
        if module.groups > 1:
            module.groups = reads
            writes *= reads
        module.in_channels, module.out_channels = reads, writes
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        writes, reads = module.weight.shape[:2]
        if module.groups > 1:  # depthwise: other grouped convolutions are pinned
            per_channel = module.out_channels // module.groups
            module.groups = reads = writes // per_channel
        module.in_channels, module.out_channels = reads, writes
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = next(t for t in (module.weight, module.running_mean, module.bias) if t is not None)
        module.num_features = tensor.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()


def _install_maps(model: nn.Module, graph: ChannelGraph, chosen: list[tuple[ChannelGroup, Tensor]]) -> None:
    merged: dict[int, int] = {}  # channel id -> channel id of its representative
    for group, first in chosen:
        merged.update(zip(group.channels.tolist(), group.channels[first].tolist(), strict=True))
    modules = {canonical_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    for site in graph.map_sites:
        expand, keep = _expand(site.reads, merged), _keep(site.writes, merged)
        if expand is None and keep is None:
            continue
        inner = modules[site.module]
        expand, keep = (None if t is None else t.to(device) for t in (expand, keep))
        new = inner.narrowed(expand, keep) if isinstance(inner, ChannelMap) else ChannelMap(inner, expand, keep)
        new.train(inner.training)
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is inner and parent is not new:
                    parent._modules[name] = new


def _keep(channels: tuple[int, ...], merged: Mapping[int, int]) -> Tensor | None:
    """Positions of a tensor that remain: unowned ones and representatives."""
    kept = [i for i, c in enumerate(channels) if merged.get(c, c) == c]
    return None if len(kept) == len(channels) else torch.tensor(kept)


def _expand(channels: tuple[int, ...], merged: Mapping[int, int]) -> Tensor | None:
    """For each original position, where its channel is found in the narrow tensor."""
    kept = [i for i, c in enumerate(channels) if merged.get(c, c) == c]
    if len(kept) == len(channels):
        return None
    where: dict[tuple[int, int], int] = {}
    seen: dict[int, int] = {}
    for position, i in enumerate(kept):
        c = channels[i]
        where[c, seen.get(c, 0)] = position
        seen[c] = seen.get(c, 0) + 1
    index, seen = [], {}
    unowned = {i: position for position, i in enumerate(kept)}
    for i, c in enumerate(channels):
        rank = seen.get(c, 0)
        seen[c] = rank + 1
        if i not in unowned and (merged[c], rank) not in where:
            raise NarrowingError(
                "merged channels do not appear equally often in the input of a submodule that moves channels"
            )
        index.append(unowned[i] if i in unowned else where[merged[c], rank])
    return torch.tensor(index)
