"""Numerical proof of a channel graph: tie random channels, narrow, compare outputs in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .capture import find_submodule
from .errors import NarrowingError
from .export import bare_module, example_arguments, find_tensors
from .narrow import copy_network, narrow, tie

if TYPE_CHECKING:
    from .graph import ChannelGraph

__all__ = ["compare", "random_clusters", "random_inputs", "randomise", "verify"]

TOLERANCE = 1e-9


def random_clusters(graph: ChannelGraph, generator: torch.Generator, keep: float = 0.6) -> dict[str, Tensor]:
    """Random clusters of every group, about ``keep`` as many as channels, within what forward can express."""
    wanted = {group.name: max(1, round(keep * group.size)) for group in graph.groups}
    counts = graph.expressible_counts(wanted)
    clusters = {}
    for group in graph.groups:
        index = torch.cat(
            [
                torch.arange(counts[group.name]),
                torch.randint(counts[group.name], (group.size - counts[group.name],), generator=generator),
            ]
        )
        clusters[group.name] = index[torch.randperm(group.size, generator=generator)]
    return clusters


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random norm statistics, affines and biases: fresh ones (0 and 1) would hide mistakes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=1):
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            centred = name.endswith(("bias", "mean"))
            tensor.copy_(0.4 * (values - 0.5) if centred else 0.5 + values)


def random_inputs(inputs: Any, device: torch.device, generator: torch.Generator) -> Any:
    """Inputs shaped like ``inputs``: floating tensors drawn at random in float64, everything else as given."""

    def draw(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(device)
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return tree_map(draw, inputs)


@torch.no_grad()
def compare(first: nn.Module, second: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Largest difference of two networks' outputs, relative to the largest entry of each output.

    Raises:
        NarrowingError: the second network does not run, or its outputs have other shapes.
    """
    expected = list(find_tensors(first(*args, **kwargs)))
    try:
        found = list(find_tensors(second(*args, **kwargs)))
    except (RuntimeError, ValueError, IndexError) as error:
        raise NarrowingError(f"the narrowed network does not run: {str(error).splitlines()[0]}") from error
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise NarrowingError("the narrowed network has outputs of another shape")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        scale = a.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        difference = float((a.double() - b.double()).abs().max() / scale)
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def verify(graph: ChannelGraph, example_inputs: Any = None, *, seed: int = 0) -> float:
    """See :meth:`ChannelGraph.verify`."""
    generator = torch.Generator().manual_seed(seed)
    model = copy_network(graph.model).double().eval()
    randomise(model, generator)
    if example_inputs is None:
        args, kwargs = graph.inputs
    else:
        args, kwargs = example_arguments(bare_module(find_submodule(graph.model, graph.network)), example_inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise NarrowingError("a model on meta has no values to verify with")
    args, kwargs = random_inputs((args, kwargs), device, generator)
    clusters = random_clusters(graph, generator)
    tie(model, graph, clusters)
    first, second = (find_submodule(m, graph.network) for m in (model, narrow(model, graph, clusters)))
    difference = compare(first, second, args, kwargs)
    if not difference <= TOLERANCE:
        raise NarrowingError(f"the narrowed network differs by {difference:.1e} (relative), more than {TOLERANCE:.0e}")
    return difference
