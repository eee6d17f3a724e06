"""Make the network that has only the channels to keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup, NarrowingError
from lightning_filterdiv.channel_graph.forms import Form
from lightning_filterdiv.channel_graph.modules import copy_network
from lightning_filterdiv.channel_graph.narrow import Narrowing, count_in_bodies, weigh
from lightning_filterdiv.channel_graph.verify import Proof, as_type, check_finite, dtype_of, prove
from lightning_filterdiv.filters import canonical_name, named_tensors

__all__ = ["check_narrowable", "check_same", "narrow", "removed_mask", "silence"]


@torch.no_grad()
def narrow(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor], *, form: Form = "auto") -> nn.Module:
    """Return a copy of ``model`` that has only the channels in ``keep``.

    The filters and norm entries of all other channels are removed, and so are the columns that read them.

    The result is compared with ``model``, with consumers that ignore those channels, on random inputs in float64.

    Args:
        model: the traced network, or another with the same tensors. It is left as it was.
        graph: its channel graph.
        keep: group name -> ``(n,)`` indices of channels to keep, of
            :func:`~lightning_filterdiv.channel_importance.select_channels`; other groups stay whole.
        form: see :func:`~lightning_filterdiv.narrowing.merge_channels`.

    Returns:
        A narrower module of the same class, trainable, in the order of the kept channels.

    Raises:
        NarrowingError: an unknown or pinned group (with the reason), widths that forward cannot express, or a result
            that does not compute the same.
        ValueError: indices are out of range, repeated or empty, or the network still has gates.
    """
    check_narrowable(model)
    groups = {group.name: group for group in graph.groups}
    keep = {name: _checked(name, groups.get(name), kept) for name, kept in keep.items()}
    silent = silence(copy_network(model), graph, keep)
    narrowing = Narrowing(graph, keep, form=form)
    result = narrowing(model)
    # Not made of the silent network, because there norms over channels do not count removed channels.
    check_same(prove(silent, lambda whole: narrowing(as_type(model, dtype_of(whole))), graph))
    return result


def check_narrowable(model: nn.Module) -> None:
    """Raise ValueError if a module forbids narrowing the network, or weights are NaN."""
    check_finite(model)
    for name, module in model.named_modules():
        if obstacle := getattr(module, "narrowing_obstacle", None):
            raise ValueError(f"{canonical_name(name)!r} {obstacle}")


def check_same(proof: Proof) -> None:
    """Raise NarrowingError if the narrow network differs from the one that ignores the channels."""
    if not proof.exact:
        raise NarrowingError(
            f"the pruned network is not one that ignores the channels: {proof}; nothing was pruned. Please report the "
            f"network: the channel graph is wrong about it"
        )


def _checked(name: str, group: ChannelGroup | None, kept: Tensor) -> Tensor:
    """Return the channels to keep as integers."""
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
    return index


def removed_mask(group: ChannelGroup, kept: Tensor) -> Tensor:
    """Return a ``(size,)`` mask of the removed channels."""
    mask = torch.ones(group.size, dtype=torch.bool)
    mask[kept.cpu()] = False
    return mask


@torch.no_grad()
def silence(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> nn.Module:
    """Set the columns that read removed channels to zero, in place. Norms and means over channels do not count them.

    Returns:
        ``model``, or its replacement if its own forward takes graph form.
    """
    groups = {group.name: group for group in graph.groups}
    tensors = named_tensors(model)
    counts: dict[str, Tensor] = {}
    for name, kept in keep.items():
        for part in groups[name].counted if name in groups else ():
            norm = part.tensor.rpartition(".")[0]
            numbers = tensors.get(part.tensor)
            if numbers is None:
                numbers = counts.setdefault(norm, torch.ones(graph.counted_sizes[norm], dtype=torch.int64))
            numbers[part.rows[removed_mask(groups[name], kept)].reshape(-1).to(numbers.device)] = 0
    weigh(model, graph, {name: numbers for name, numbers in counts.items() if name in graph.norms})
    for name, kept in keep.items():
        for part in groups[name].parts if name in groups else ():
            if part.kind == "consumer":
                tensor = tensors[part.tensor]
                rows = part.rows[removed_mask(groups[name], kept)].reshape(-1).to(tensor.device)
                if part.groups > 1:
                    blocks = tensor.unflatten(0, (part.groups, -1)).transpose(1, 2)
                    blocks[rows // tensor.shape[1], rows % tensor.shape[1]] = 0
                else:
                    tensor.index_fill_(part.dim, rows, 0)
    return count_in_bodies(model, graph, counts)
