"""What RePr can act on: optimizers, layers that it ranks, filters that a checkpoint says are out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Optimizer

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import FAKE_QUANTISED, Conv, NoLayersError, filter_matrix
from lightning_filterdiv.repr_.functional import regrow_filters
from lightning_filterdiv.repr_.network import DroppedFilters
from lightning_filterdiv.similarity import orthogonality_score

__all__ = [
    "check_dropped",
    "check_optimizers",
    "default_layers",
    "mean_score",
    "rankable",
    "regrown",
    "restore_dropped",
]

_SHORTCUT = re.compile(r"downsample|shortcut|skip|identity", re.IGNORECASE)


def default_layers(layers: Mapping[str, Conv], everyone: Mapping[str, Conv]) -> dict[str, Conv]:
    """Ungrouped convolutions of ``layers`` but the network's first one and 1x1 shortcuts.

    Args:
        layers: what ``exclude`` leaves.
        everyone: every convolution of the network in the order of its modules. A frozen network beside the one that is
            trained (a teacher, a loss network) may be registered first: the first *trainable* one counts.
    """
    first = next((name for name, conv in everyone.items() if conv.weight.requires_grad), "")
    return {
        name: conv
        for name, conv in layers.items()
        if name != first and conv.groups == 1 and not (conv.weight[0, 0].numel() == 1 and _SHORTCUT.search(name))
    }


def rankable(graph: ChannelGraph, layers: Mapping[str, Conv]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Filter matrices of the layers whose filters can be silenced exactly, and why the others' cannot.

    Args:
        graph: of the network that ``layers`` belong to.
        layers: canonical name -> convolution.

    Returns:
        Layer -> ``(J, d)``, and layer -> reason.
    """
    matrices: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, conv in layers.items():
        found = graph.private(name) if name in graph.layers else graph.why_absent(name)
        if hasattr(conv, "weight_fake_quant"):
            found = FAKE_QUANTISED
        if isinstance(found, str):
            reasons[name] = found
        else:
            matrices[name] = filter_matrix(conv)
    return matrices, reasons


def mean_score(layers: Mapping[str, Conv]) -> float:
    """Mean over layers of their filters' mean overlap."""
    return fmean(float(orthogonality_score(filter_matrix(conv)).mean()) for conv in layers.values())


def check_dropped(chosen: Mapping[str, Tensor], scores: Mapping[str, Tensor], prune_fraction: float) -> None:
    """Refuse a drop of no filter at all.

    Raises:
        NoLayersError: every layer has one filter, or the fraction of all filters is below one.
    """
    if any(rows.numel() for rows in chosen.values()):
        return
    raise NoLayersError(
        f"RePr would drop no filter: prune_fraction={prune_fraction:g} of the {sum(map(len, scores.values()))} filters "
        f"of {', '.join(map(repr, list(scores)[:6]))} comes to none, as every layer keeps at least one. Raise "
        f"prune_fraction or max_layer_fraction, or include wider layers"
    )


def regrown(layer: str, old: Tensor, survivors: Tensor, gain: float, generator: torch.Generator) -> tuple[Tensor, int]:
    """:func:`~lightning_filterdiv.repr_.functional.regrow_filters`, with errors that name the layer."""
    try:
        return regrow_filters(old, survivors, gain, generator)
    except ValueError as error:
        raise ValueError(
            f"RePr cannot regrow filters of {layer!r} ({error}): resume from a checkpoint before the training "
            f"diverged, with a smaller learning rate or gain"
        ) from error


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers whose state cannot be told apart filter by filter.

    Raises:
        MisconfigurationException: naming the optimizer and the way out.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS | Adafactor):
            raise MisconfigurationException(
                f"RePr needs optimizer state per filter, and {type(optimizer).__name__} keeps a history of the "
                f"whole network or factors of whole matrices; use SGD, Adam or another element-wise optimizer"
            )


def restore_dropped(model: nn.Module, checkpoint: Mapping[str, Any]) -> int:
    """What :meth:`~lightning_filterdiv.repr_.RePr.restore` does.

    Raises:
        KeyError: the checkpoint holds no state of RePr.
    """
    saved_extras = [
        state["extra"]
        for state in (checkpoint.get("callbacks") or {}).values()
        if isinstance(state, dict) and isinstance(state.get("extra"), dict)
    ]
    states = [extra for extra in saved_extras if "dropped" in extra]
    if not states:
        raise KeyError(
            "the checkpoint holds no state of RePr: there is nothing to bring back; load one of a fit with RePr"
        )
    count = 0
    for state in states:
        if (saved := state["dropped"]) is not None:
            dropped = DroppedFilters.from_state(model, saved)
            dropped.restore()
            count += dropped.count
    return count
