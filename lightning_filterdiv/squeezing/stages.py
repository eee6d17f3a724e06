"""Squeezing step by step: a little, merge, a little more."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lightning_filterdiv.centripetal.callback import CentripetalSGD
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.narrowing.widths import kept_count
from lightning_filterdiv.tensors.arguments import check_number

__all__ = ["PUBLISHED_STAGES", "squeeze_in_stages"]

#: Shares of the original widths in the recipe for ResNet-56 on CIFAR-10.
PUBLISHED_STAGES = (13 / 16, 11 / 16, 5 / 8)


def squeeze_in_stages(
    model: nn.Module,
    fit: Callable[[nn.Module, CentripetalSGD], None],
    example_inputs: Any = None,
    *,
    stages: Sequence[float] = PUBLISHED_STAGES,
    tolerance: float = 1e-3,
    **arguments: Any,
) -> nn.Module:
    """Train with :class:`CentripetalSGD` and merge, once per stage.

    Args:
        model: the network or LightningModule to squeeze; the first stage trains it in place.
        fit: ``fit(model, callback)`` trains ``model`` with ``callback`` in a Trainer of its own.
        example_inputs: for the trace; ``None``: ``example_input_array``.
        stages: shares of the *original* widths, from wide to narrow.
        tolerance: see :func:`~lightning_filterdiv.narrowing.merge.merge_channels`.
        **arguments: further arguments of CentripetalSGD; not ``keep_fraction``.

    Returns:
        The network after the last merge.

    Raises:
        ValueError: stages do not shrink, or are outside (0, 1].
        NotTiedError: a stage did not bring its clusters together.
    """
    checked = [check_number(f"stages[{i}]", stage, above=0.0, high=1.0) for i, stage in enumerate(stages)]
    if not checked or any(b >= a for a, b in itertools.pairwise(checked)):
        raise ValueError(f"stages must be shares of the original widths that shrink, got {list(stages)!r}")
    network = arguments.get("network")
    original = {g.name: g.size for g in ChannelGraph.trace(model, example_inputs, network=network).groups}
    for stage in checked:
        fractions: dict[str, float] = {}
        for group in ChannelGraph.trace(model, example_inputs, network=network).groups:
            target = kept_count(original.get(group.name, group.size), stage)
            # By layer name; where a layer is split into several groups, the widest share counts.
            share = min(1.0, target / group.size)
            for layer in group.layers:
                fractions[layer] = max(share, fractions.get(layer, 0.0))
            # Layers that share channels must be given one share.
            widest = max(fractions[layer] for layer in group.layers)
            fractions |= dict.fromkeys(group.layers, widest)
        callback = CentripetalSGD(keep_fraction=fractions, **arguments)
        fit(model, callback)
        model = callback.merge(model, example_inputs, tolerance=tolerance).network
    return model
