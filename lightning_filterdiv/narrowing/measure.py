"""Cost of a network: parameters, multiply-accumulate operations, latency."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_filterdiv.channel_graph.inputs import example_arguments

__all__ = ["count_macs", "count_parameters", "latency_ratio", "macs_of_call"]


def count_parameters(model: nn.Module) -> int:
    """Return the number of entries of all parameters. Shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Return the multiply-accumulate operations of one forward pass in eval mode: those of convolutions and matrix
    products.

    Args:
        model: the network; it is left in the mode it was in.
        example_inputs: as for :meth:`~lightning_filterdiv.channel_graph.ChannelGraph.trace`.
    """
    return macs_of_call(model, *example_arguments(model, example_inputs))


def macs_of_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return :func:`count_macs` for the arguments of a call."""
    modes = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # one fused operator, whose work nothing counts
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes.items():
            module.training = training
    return int(counter.get_total_flops()) // 2


def latency_ratio(
    first: nn.Module, second: nn.Module, example_inputs: Any, pairs: int = 30
) -> tuple[float, float, float]:
    """Return the time of a forward pass of ``second`` over that of ``first``, measured in turn.

    Args:
        first: the original, in the mode to measure.
        second: the narrow network, likewise.
        example_inputs: as for :meth:`~lightning_filterdiv.channel_graph.ChannelGraph.trace`.
        pairs: timed calls of each, in random order; three more come before them.

    Returns:
        Median ratio and its bootstrap 95 % interval.
    """
    args, kwargs = example_arguments(first, example_inputs)
    device = next((p.device for p in first.parameters()), torch.device("cpu"))
    order = random.Random(0)
    calls: tuple[Callable[..., Any], Callable[..., Any]] = (first, second)

    def seconds(call: Callable[..., Any]) -> float:
        start = time.perf_counter()
        call(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    ratios: list[float] = []
    with torch.no_grad():
        for number in range(pairs + 3):
            times = {which: seconds(calls[which]) for which in order.sample([0, 1], 2)}
            if number >= 3:  # the first calls allocate
                ratios.append(times[1] / times[0])
    resampled = sorted(median(order.choices(ratios, k=len(ratios))) for _ in range(500))
    return median(ratios), resampled[12], resampled[487]
