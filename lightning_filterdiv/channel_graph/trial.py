"""Whether forward runs at other widths at all: ``x.view(-1, 400)`` looks like a flatten until it is narrower."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from .capture import find_submodule
from .classes import ChannelGroup
from .export import find_tensors, quiet
from .narrow import copy_network, narrow

if TYPE_CHECKING:
    from .graph import ChannelGraph

__all__ = ["groups_that_do_not_run"]


def groups_that_do_not_run(graph: ChannelGraph) -> list[ChannelGroup]:
    """Groups without which every other group can be narrowed. Runs on shapes alone; no weight is copied.

    Groups whose counts forward ties together are left out: they have been traced at other widths already.
    """
    # Several times faster on meta; fake tensors also let forward make tensors of its own on the model's device, and let
    # a channel map keep its index.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for mode in (fake,) if graph.map_sites else (None, fake):
        with quiet():
            stuck = _stuck(graph, mode)
        if stuck is not None:
            return stuck
    return []  # forward insists on real values; the numerical check of a merge has the last word


def _stuck(graph: ChannelGraph, mode: FakeTensorMode | None) -> list[ChannelGroup] | None:
    """The groups on fake tensors of ``mode``, or on meta tensors; None if forward does not run on them at all."""
    blank = _weightless(graph.model, mode)
    expected = _shapes(graph, blank, mode)
    if expected is None:
        return None

    def culprits(part: Sequence[ChannelGroup]) -> list[ChannelGroup]:
        # Keep two thirds: a count that rarely divides what the full one divides.
        clusters = {g.name: torch.arange(g.size) % (g.size - max(1, g.size // 3)) for g in part}
        if not part or _shapes(graph, narrow(blank, graph, clusters), mode) == expected:
            return []
        if len(part) == 1:
            return list(part)
        return culprits(part[: len(part) // 2]) + culprits(part[len(part) // 2 :])

    bound = frozenset().union(*graph.constrained)
    return culprits([g for g in graph.groups if g.size > 1 and int(g.channels[0]) not in bound])


def _weightless(model: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """A copy whose floating tensors have shapes but no memory: fake ones of the same device, or on meta."""
    blank: dict[int, object] = {}
    with mode or nullcontext():
        for tensor in [*model.parameters(), *model.buffers()]:
            device = torch.device("meta") if mode is None else tensor.device
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                blank[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad)
            elif tensor.is_floating_point():
                blank[id(tensor)] = new
    return copy_network(model, blank).eval()


def _shapes(graph: ChannelGraph, model: nn.Module, mode: FakeTensorMode | None) -> list[torch.Size] | None:
    """Shapes of the network's outputs; None if it does not run."""
    network = find_submodule(model, graph.network)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def fake(leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=device) if isinstance(leaf, Tensor) else leaf

    try:
        with mode or nullcontext(), torch.no_grad():
            args, kwargs = tree_map(fake, graph.inputs)
            return [tensor.shape for tensor in find_tensors(network(*args, **kwargs))]
    except Exception:  # whatever it is, forward does not run at these widths
        return None
