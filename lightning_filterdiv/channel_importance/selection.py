"""Which channels to keep, and the network that has only those."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_filterdiv.arguments import check_choice, check_number
from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup, NarrowingError
from lightning_filterdiv.channel_graph.modules import copy_network, named_tensors
from lightning_filterdiv.channel_graph.narrow import narrow
from lightning_filterdiv.channel_graph.verify import prove
from lightning_filterdiv.channel_importance.gates import gated_layers
from lightning_filterdiv.filters import NoLayersError, check_patterns

__all__ = ["Rule", "prune_channels", "select_channels"]

Rule = Literal["threshold", "uniform"]


def select_channels(
    graph: ChannelGraph,
    importance: Mapping[str, Tensor],
    rule: Rule = "uniform",
    *,
    keep_fraction: float = 0.5,
    threshold: float = 0.999,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """The channels to keep, by how open their gates are.

    Args:
        graph: of the network to prune.
        importance: layer -> ``(C,)`` mean gates, of
            :class:`~lightning_filterdiv.ChannelImportance` or :func:`measure_importance`. Names may be those of the
            network inside a LightningModule or the other way round.
        rule: ``"threshold"`` (the paper's for VGG): channels above ``threshold`` times the layer's mean;
            ``"uniform"`` (for ResNets): the ``keep_fraction`` largest of every layer, so equally many in the layers of
            a stage.
        keep_fraction: of the channels, rounded up.
        threshold: see ``rule``.
        include: patterns of layers. ``None``: layers that write all their channels alone; those that write into a
            residual sum keep their width. The paper prunes the 3x3 of bottlenecks: ``["*.conv2"]``.
        exclude: patterns of layers to keep whole.

    Returns:
        Group name -> ``(n,)`` sorted indices of the channels to keep, at least one, in numbers that the network's
        forward can express. A group of layers that write into one sum is judged by the mean over its layers.

    Raises:
        NoLayersError: no group with a gate is left.
        ValueError: a bad argument, by name, or an importance that is not finite or has another length than the layer
            has channels.
    """
    check_choice("rule", rule, Rule)
    check_number("keep_fraction", keep_fraction, above=0.0, high=1.0)
    check_number("threshold", threshold, low=0.0)
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    scores: dict[str, Tensor] = {}
    known_gates = _relative(importance, graph.layers)
    for group in graph.groups:
        given = [(layer, known_gates.get(layer)) for layer in group.producers]
        if any(fnmatch.fnmatchcase(layer, p) for layer, _ in given for p in exclude or ()):
            continue
        whole = len(given) == 1 and group.size == graph.filter_count(given[0][0])
        if not (whole if include is None else _all_match([layer for layer, _ in given], include)):
            continue
        known = [_rows(graph, group, layer, gates) for layer, gates in given if gates is not None]
        if known:
            scores[group.name] = torch.stack(known).mean(0)
    if not scores:
        gates = ", ".join(list(importance)[:8]) or "none"
        raise NoLayersError(
            f"no layer with a gate can be pruned alone: gates are behind {gates}, the groups are "
            f"{', '.join(group.name for group in graph.groups)}; name layers in include"
        )
    counts = {
        name: int((score > threshold * score.mean()).sum()) if rule == "threshold"
        else math.ceil(keep_fraction * len(score) - 1e-9)
        for name, score in scores.items()
    }  # fmt: skip
    counts = graph.expressible_counts({name: max(1, count) for name, count in counts.items()})
    return {
        name: score.argsort(descending=True, stable=True)[: counts[name]].sort().values
        for name, score in scores.items()
    }


def _all_match(layers: Sequence[str], patterns: Sequence[str]) -> bool:
    return all(any(fnmatch.fnmatchcase(layer, p) for p in patterns) for layer in layers)


def _relative(importance: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """``importance`` by names of ``layers``, which may be those of a network around the measured one, or inside it."""
    if not importance or any(name in layers for name in importance):
        return dict(importance)
    for known, strip in ((next(iter(importance)), True), (layers[0], False)):
        parts = known.split(".")
        for depth in range(1, len(parts)):
            prefix = ".".join(parts[:depth]) + "."
            if strip and not all(name.startswith(prefix) for name in importance):
                continue
            renamed = {n.removeprefix(prefix) if strip else prefix + n: gates for n, gates in importance.items()}
            if all(name in layers for name in renamed):
                return renamed
    return dict(importance)


def _rows(graph: ChannelGraph, group: ChannelGroup, layer: str, gates: Tensor) -> Tensor:
    if len(gates) != graph.filter_count(layer):
        raise ValueError(
            f"importance of {layer!r} is that of {len(gates)} channels, but the layer has {graph.filter_count(layer)}: "
            f"it was measured on another network; measure it on this one"
        )
    values = gates.detach().double().cpu()[group.rows(layer)]
    if not bool(values.isfinite().all()):
        raise ValueError(f"importance of {layer!r} holds NaN or inf: it was measured on a network that diverged")
    return values


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
    if gates := list(gated_layers(model)):
        raise ValueError(f"{gates[0]!r} still has its gate: prune a fresh network, or call remove_gates first")
    groups = {group.name: group for group in graph.groups}
    keep = {name: _checked(name, groups.get(name), kept) for name, kept in keep.items()}
    silent = copy_network(model)
    _silence(silent, groups, keep)
    result = narrow(silent, graph, keep)
    proof = prove(silent, lambda whole: narrow(whole, graph, keep), graph)
    if not proof.exact:
        raise NarrowingError(
            f"the pruned network is not one that ignores the channels: {proof}; nothing was pruned. Please report the "
            f"network: the channel graph is wrong about it"
        )
    return result


def _checked(name: str, group: ChannelGroup | None, kept: Tensor) -> Tensor:
    """The channels to keep, as integers."""
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
