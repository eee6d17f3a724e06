"""From the channels to keep to the network that has only those."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup, NarrowingError
from lightning_filterdiv.channel_graph.capture import find_submodule
from lightning_filterdiv.channel_graph.narrow import copy_network, named_tensors, narrow
from lightning_filterdiv.channel_graph.verify import TOLERANCE, compare, random_inputs
from lightning_filterdiv.filters import canonical_name

__all__ = ["prune_channels"]


@torch.no_grad()
def prune_channels(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``model`` without the other channels: their filters, norms and the columns that read them are gone.

    The result is compared with ``model`` whose consumers ignore those channels, on random inputs in float64.

    Args:
        model: the traced network, or another with the same tensors. It is left as it was.
        graph: its channel graph.
        keep: group name -> ``(n,)`` indices of channels to keep, of :func:`select_channels`; other groups stay whole.

    Returns:
        A narrower module of the same class, trainable, in the order of the kept channels.

    Raises:
        NarrowingError: an unknown or pinned group (with the reason), widths that forward cannot express, or a result
            that does not compute the same.
        ValueError: indices that are out of range, repeated or none; gates that are still in the network.
    """
    for name, module in model.named_modules():
        if obstacle := getattr(module, "narrowing_obstacle", None):
            raise ValueError(f"{canonical_name(name)!r} {obstacle}")
    groups = {group.name: group for group in graph.groups}
    clusters = {name: _clusters(name, groups.get(name), kept) for name, kept in keep.items()}
    silent = copy_network(model)
    _silence(silent, groups, keep)
    result = _narrow(silent, graph, clusters, groups, keep)
    reference = copy_network(silent).double().eval()
    device = next((p.device for p in reference.parameters()), torch.device("cpu"))
    args, kwargs = random_inputs(graph.inputs, device, torch.Generator().manual_seed(0))
    narrowed = copy_network(result).double().eval()
    first, second = (find_submodule(m, graph.network) for m in (reference, narrowed))
    difference = compare(first, second, args, kwargs)
    if not difference <= TOLERANCE:
        raise NarrowingError(
            f"the pruned network differs by {difference:.1e} (relative) from one that ignores the channels; nothing "
            f"was pruned. Please report the network: the channel graph is wrong about it"
        )
    return result


def _clusters(name: str, group: ChannelGroup | None, kept: Tensor) -> Tensor:
    """Every removed channel joins the kept one before it (the first kept one, if there is none before)."""
    if group is None:
        return kept  # narrow names the groups that there are, and why a layer is pinned
    try:
        index = torch.as_tensor(kept).cpu()
    except (TypeError, ValueError, RuntimeError):
        index = torch.empty(0)  # refused below, by name
    fits = index.dim() == 1 and not index.is_floating_point() and index.dtype != torch.bool and len(index)
    if not fits or int(index.min()) < 0 or int(index.max()) >= group.size or len(index.unique()) < len(index):
        raise ValueError(
            f"keep[{name!r}] must list at least one of the channels 0..{group.size - 1}, each once, as integers; "
            f"got {kept!r}"
        )
    mask = torch.zeros(group.size, dtype=torch.long)
    mask[index] = 1
    return (mask.cumsum(0) - 1).clamp_min(0)


def _removed(group: ChannelGroup, kept: Tensor) -> Tensor:
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask


def _silence(model: nn.Module, groups: Mapping[str, ChannelGroup], keep: Mapping[str, Tensor]) -> None:
    """Set the columns that read removed channels to zero, in place."""
    tensors = named_tensors(model)
    for name, kept in keep.items():
        for part in groups[name].parts if name in groups else ():
            if part.kind == "consumer":
                rows = part.rows[_removed(groups[name], kept)].reshape(-1)
                tensors[part.tensor].index_fill_(part.dim, rows.to(tensors[part.tensor].device), 0)


def _narrow(
    silent: nn.Module, graph: ChannelGraph, clusters: Mapping[str, Tensor], groups: Mapping[str, ChannelGroup],
    keep: Mapping[str, Tensor],
) -> nn.Module:  # fmt: skip
    """Merge silent channels into kept ones: the sum of columns is the kept one's."""
    # Narrowing keeps the first member of a cluster: where that is a removed channel, it becomes a copy of the kept one.
    prepared = copy_network(silent)
    tensors = named_tensors(prepared)
    for name, kept in keep.items():
        first = int(kept.min()) if name in groups else 0
        if not first:
            continue
        for part in groups[name].parts:
            tensor = tensors[part.tensor]
            values = tensor.index_select(part.dim, part.rows[first].to(tensor.device))
            tensor.index_copy_(part.dim, part.rows[0].to(tensor.device), values)
            if part.kind == "consumer":
                tensor.index_fill_(part.dim, part.rows[first].to(tensor.device), 0)
    return narrow(prepared, graph, clusters)
