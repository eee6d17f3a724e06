"""Choose the channels to keep by their mean gates."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup
from lightning_filterdiv.filters import NoLayersError, check_patterns, find_prefix
from lightning_filterdiv.tensors.arguments import check_choice, check_number

__all__ = ["RELEASED_RULES", "Rule", "select_channels"]

Rule = Literal["threshold", "uniform"]
#: Arguments of :func:`select_channels` that choose as the released code does (JingfeiChang/UCP). ``vgg``
#: (``sevggprune.py``) also leaves a listed few layers alone, by ``exclude``. ``cifar_resnet`` (``seresprune.py``) keeps
#: as many channels in every block of a stage as its list says, by ``keep_fraction``. ``imagenet_basic`` and
#: ``imagenet_bottleneck`` (``imagenet_pruned.py``) keep the channels above a threshold, block by block: .99 there, and
#: .999, 1.01 and 1.1 made the other published networks.
RELEASED_RULES: Mapping[str, Mapping[str, Any]] = {
    "vgg": {"rule": "threshold", "threshold": 0.999},
    "cifar_resnet": {"rule": "uniform", "include": ["*.conv1"]},
    "imagenet_basic": {"rule": "threshold", "threshold": 0.99, "include": ["*.conv1"]},
    "imagenet_bottleneck": {"rule": "threshold", "threshold": 0.99, "include": ["*.conv2"]},
}


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
    """Choose the channels to keep by their mean gates.

    Args:
        graph: channel graph of the network to prune.
        importance: layer -> ``(C,)`` mean gates, from :class:`~lightning_filterdiv.ChannelImportance` or
            :func:`measure_importance`. Names may be those of the LightningModule or of the network inside it.
        rule: ``"threshold"`` (the released code's for VGG and for ResNets on ImageNet): channels above ``threshold``
            times the layer's mean; ``"uniform"`` (for ResNets on CIFAR): the ``keep_fraction`` largest of every layer,
            so equally many in the layers of a stage. :data:`RELEASED_RULES` has all arguments by network.
        keep_fraction: share of the channels to keep, rounded up.
        threshold: see ``rule``.
        include: patterns of layers. ``None``: all layers except those that write into a residual sum, which keep their
            width. The released code prunes the 3x3 of bottlenecks: ``["*.conv2"]``.
        exclude: patterns of layers to keep whole.

    Returns:
        Group name -> ``(n,)`` sorted indices of the channels to keep, at least one. Their number is one that the
        network's forward allows. A group of layers that write into one sum is judged by the mean over its layers.

    Raises:
        NoLayersError: no group with a gate is left.
        ValueError: a bad argument, by name; an importance that is not finite, or whose length is not the number of
            channels.
    """
    check_choice("rule", rule, Rule)
    check_number("keep_fraction", keep_fraction, above=0.0, high=1.0)
    check_number("threshold", threshold, low=0.0)
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    scores: dict[str, Tensor] = {}
    strip, add = (find_prefix(importance, graph.layers) if importance else None) or ("", "")
    known_gates = {add + name.removeprefix(strip): gates for name, gates in importance.items()}
    for group in graph.groups:
        given = [(layer, known_gates.get(layer)) for layer in group.producers]
        if any(fnmatch.fnmatchcase(layer, p) for layer, _ in given for p in exclude or ()):
            continue
        whole = len(given) == 1 and group.rows(given[0][0]).numel() == graph.filter_count(given[0][0])
        if not (whole if include is None else _all_match([layer for layer, _ in given], include)):
            continue
        known = [_rows(graph, group, layer, gates) for layer, gates in given if gates is not None]
        if known:
            scores[group.name] = torch.stack(known).mean(0)
    if not scores:
        gates = ", ".join(list(importance)[:8]) or "none"
        raise NoLayersError(
            f"no group of channels can be chosen by gates: layers with a gate: {gates}; groups: "
            f"{', '.join(group.name for group in graph.groups)}; name layers of a group in include"
        )
    counts = {
        name: int((score > threshold * score.mean()).sum()) if rule == "threshold"
        else math.ceil(keep_fraction * len(score) - 1e-9)
        for name, score in scores.items()
    }  # fmt: skip
    counts = graph.expressible_counts({name: max(1, count) for name, count in counts.items()})
    return {name: _largest(graph.group(name), score, counts[name]) for name, score in scores.items()}


def _largest(group: ChannelGroup, score: Tensor, count: int) -> Tensor:
    """Return the ``count`` channels with the largest score, equally many of every block."""
    each = count // group.block_count
    best = [members[score[members].argsort(descending=True, stable=True)[:each]] for members in group.members()]
    return torch.cat(best).sort().values


def _all_match(layers: Sequence[str], patterns: Sequence[str]) -> bool:
    return all(any(fnmatch.fnmatchcase(layer, p) for p in patterns) for layer in layers)


def _rows(graph: ChannelGraph, group: ChannelGroup, layer: str, gates: Tensor) -> Tensor:
    if len(gates) != graph.filter_count(layer):
        raise ValueError(
            f"importance of {layer!r} is that of {len(gates)} channels, but the layer has {graph.filter_count(layer)}: "
            f"it was measured on another network; measure it on this one"
        )
    values = gates.detach().double().cpu()[group.rows(layer)]
    values = values if values.dim() == 1 else values.mean(1)
    if not bool(values.isfinite().all()):
        raise ValueError(f"importance of {layer!r} holds NaN or inf: it was measured on a network that diverged")
    return values
