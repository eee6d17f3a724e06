"""Multiply-adds of composing weights, and of the network that uses them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from lightning_filterdiv.expansion.functional import compose_chain
from lightning_filterdiv.expansion.layers import Layer, factor_product, weight_factors

__all__ = ["NetworkMacs", "composing_macs", "is_compiled"]


def composing_macs(layers: Iterable[Layer]) -> int:
    """Count the multiply-adds that compose the weights of expanded layers once, without computing anything."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for layer in layers:
            shapes = [(*factor.shape, 1, 1)[:4] for factor in weight_factors(layer)]
            compose_chain([torch.empty(shape, device="meta") for shape in shapes], groups=factor_product(layer).groups)
    return int(counter.get_total_flops()) // 2


def is_compiled(model: nn.Module) -> bool:
    """Return whether ``torch.compile`` was applied to ``model``, to a part of it, or through Lightning."""
    return getattr(model, "_compiler_ctx", None) is not None or any(
        isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


class NetworkMacs:
    """Count the multiply-adds of convolutions and linear layers in real forward calls, without composing.

    Args:
        network: network to watch until :meth:`close`.

    Attributes:
        total: multiply-adds of the calls so far.
    """

    def __init__(self, network: nn.Module) -> None:
        self.total = 0
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._add)
            for module in network.modules()
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)
        ]

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if isinstance(module, nn.Linear):
            self.total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kernel = torch.Size(module.kernel_size).numel()
            self.total += output.numel() * kernel * module.in_channels // module.groups

    def close(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
