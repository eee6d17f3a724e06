"""The proof every structure has to pass: tie random channels, narrow physically, compare in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.inputs import example_arguments
from lightning_filterdiv.channel_graph.narrow import merging, narrow, tie
from lightning_filterdiv.channel_graph.verify import compare, random_clusters, random_inputs, randomise
from lightning_filterdiv.filters import canonical_name

EXACT = 1e-9


def merge(model: nn.Module, graph: ChannelGraph, clusters: dict[str, torch.Tensor]) -> nn.Module:
    """One channel per cluster, columns summed."""
    return narrow(model, graph, *merging(graph, clusters))


def mergeable(graph: ChannelGraph) -> int:
    return sum(group.size for group in graph.groups)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def expected_count(model: nn.Module, graph: ChannelGraph, clusters: dict[str, torch.Tensor]) -> int:
    """Entries left when every removed channel takes its rows and columns with it."""
    shapes = {canonical_name(name): list(p.shape) for name, p in model.named_parameters()}
    for group in graph.groups:
        removed = group.size - len(clusters[group.name].unique())
        for part in group.parts:
            if part.tensor in shapes:
                shapes[part.tensor][part.dim] -= removed * part.rows.shape[1] // part.groups
    return sum(int(torch.Size(shape).numel()) for shape in shapes.values())


def check_exact(model: nn.Module, inputs: Any, *, seed: int = 0, keep: float = 0.6) -> tuple[ChannelGraph, nn.Module]:
    """Trace, tie, narrow, compare. Returns the graph and the narrowed float64 network."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    randomise(model, generator)
    graph = ChannelGraph.trace(model, inputs)
    args, kwargs = random_inputs(example_arguments(model, inputs), torch.device("cpu"), generator)
    clusters = random_clusters(graph, generator, keep)
    assert any(len(index.unique()) < len(index) for index in clusters.values()), "nothing is merged"
    untied = compare(model, merge(model, graph, clusters), args, kwargs)
    tie(model, graph, clusters)
    narrowed = merge(model, graph, clusters)
    assert compare(model, narrowed, args, kwargs) <= EXACT
    # The same comparison notices channels that are not equal.
    assert untied > 1e-6
    assert type(narrowed) is type(model) or isinstance(narrowed, fx.GraphModule)
    assert parameter_count(narrowed) == expected_count(model, graph, clusters) < parameter_count(model)
    return graph, narrowed
