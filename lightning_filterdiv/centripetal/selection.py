"""Choose the groups of channels that a fit squeezes, with reasons for the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup
from lightning_filterdiv.filters import CONVOLUTIONS, FAKE_QUANTISED, Conv, canonical_name, named_tensors

__all__ = ["check_usable", "choose_groups"]


_HALF = (torch.float16, torch.bfloat16)


def check_usable(optimizers: Sequence[Optimizer], layers: Mapping[str, Conv]) -> None:
    """Refuse optimizers and precisions under which members of a cluster would not become equal.

    Raises:
        MisconfigurationException: it names the optimizer or the layer, and the fix.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "CentripetalSGD edits the gradient of single filters, and LBFGS mixes those of the whole network; "
                "use SGD, or Adam and its relatives"
            )
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise MisconfigurationException(
                f"CentripetalSGD needs {type(optimizer).__name__} with maximize=False: maximizing would push the "
                f"members of a cluster apart; negate the loss instead"
            )
    for name, conv in layers.items():
        if conv.weight.dtype in _HALF:
            raise MisconfigurationException(
                f"CentripetalSGD needs parameters in float32 or float64, {name!r} is {conv.weight.dtype}: the pull "
                f"would be rounded away. Use precision='bf16-mixed' or '16-mixed'"
            )


def choose_groups(
    model: nn.Module, graph: ChannelGraph, layers: Mapping[str, Conv], owned: Collection[int]
) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    """Return the groups whose convolutions are all among ``layers`` and whose tensors are all trained.

    Args:
        model: module whose names ``graph`` and ``layers`` use.
        graph: its channel graph.
        layers: chosen convolutions.
        owned: ``id`` of every parameter that some optimizer updates.

    Returns:
        Group name -> group, and layer name -> reason why (some of) its channels stay.
    """
    tensors = named_tensors(model)
    convolutions = {canonical_name(name) for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}
    left_alone = {name: reason for name, reason in graph.pinned.items() if name in layers}
    chosen: dict[str, ChannelGroup] = {}
    for group in graph.groups:
        own = [layer for layer in group.layers if layer in convolutions]
        outside = [layer for layer in own if layer not in layers]
        frozen = [
            part.tensor
            for part in group.parts
            if part.kind != "consumer"
            and isinstance(parameter := tensors[part.tensor], nn.Parameter)
            and not (parameter.requires_grad and id(parameter) in owned)
        ]
        if not own or len(outside) == len(own):
            continue
        if outside or frozen:
            what = f"{outside[0]!r} is not chosen" if outside else f"{frozen[0]!r} is frozen or in no optimizer"
            left_alone |= {layer: f"it shares channels and {what}" for layer in own if layer in layers}
        else:
            chosen[group.name] = group
    left_alone |= {name: graph.why_absent(name) for name in layers if name not in graph.layers}
    left_alone |= {name: FAKE_QUANTISED for name, conv in layers.items() if hasattr(conv, "weight_fake_quant")}
    return chosen, left_alone
