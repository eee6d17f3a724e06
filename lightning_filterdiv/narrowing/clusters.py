"""Cluster the channels of a network, and list the tensors whose rows are clustered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup, TensorRows
from lightning_filterdiv.channel_graph.answers import layer_of
from lightning_filterdiv.filters import named_modules, named_tensors
from lightning_filterdiv.narrowing.widths import KeepFraction, WidthPlan, WidthRule, plan_widths
from lightning_filterdiv.tensors.arguments import check_choice, check_tensor
from lightning_filterdiv.tensors.randomness import keyed_generator
from lightning_filterdiv.tensors.sharing import share

__all__ = [
    "ClusteredTensor",
    "Clustering",
    "check_finite",
    "cluster_channels",
    "cluster_filters",
    "clustered_tensors",
    "layer_kernels",
]

Clustering = Literal["kmeans", "even", "imbalanced"]
#: Cost of trying to move one filter between clusters, in multiplications of a Gram matrix.
_MOVES = 4e6
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def cluster_filters(filters: Tensor, n_clusters: int, *, method: Clustering = "kmeans", seed: int = 0) -> Tensor:
    """Partition filters into exactly ``n_clusters`` clusters.

    Args:
        filters: ``(J, d)``, one row per filter. Methods other than ``"kmeans"`` use only its length.
        n_clusters: between 1 and J.
        method: ``"kmeans"``: the k-means objective on the rows, by Ward's hierarchical clustering and then moves of
            single rows; ``"even"``: contiguous blocks, the first ``J mod n`` one longer; ``"imbalanced"``: one cluster
            of ``J - n + 1`` filters, the others alone.
        seed: seed of the order in which k-means tries to move filters.

    Returns:
        ``(J,)`` int64 on the CPU, numbered by first appearance.

    Raises:
        TypeError: ``n_clusters`` is no integer.
        ValueError: the method is unknown, ``filters`` is no matrix or has NaN or inf (k-means), or ``n_clusters`` is
            outside 1..J.
    """
    check_choice("method", method, Clustering)
    check_tensor("filters", filters)
    if not isinstance(n_clusters, int):
        raise TypeError(f"n_clusters must be an integer between 1 and the number of filters, got {n_clusters!r}")
    if filters.dim() != 2:
        raise ValueError(f"filters must be a (J, d) matrix, got shape {tuple(filters.shape)}")
    count = filters.shape[0]
    if not 1 <= n_clusters <= count:
        raise ValueError(f"n_clusters must be between 1 and the {count} filters, got {n_clusters}")
    if method == "kmeans" and not filters.isfinite().all():
        raise ValueError("filters contain NaN or inf, which have no cluster; has the training diverged?")
    if method == "even":
        sizes = torch.full((n_clusters,), count // n_clusters)
        sizes[: count % n_clusters] += 1
        return torch.arange(n_clusters).repeat_interleave(sizes)
    if method == "imbalanced":
        return (torch.arange(count) - (count - n_clusters)).clamp_min(0)
    return _kmeans(filters.detach().double().cpu(), n_clusters, seed)


def _kmeans(filters: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Minimise the sum of squares to the clusters' means: Ward's merges, then moves of single filters.

    Distances, and changes of the sum, follow from the products of filters with filters. After one matrix product the
    cost does not depend on the filters' length, and trying to move a filter costs one operation per cluster.
    """
    peak = filters.abs().max()
    rows = (filters / peak if peak > 0 else filters).numpy()
    products = rows @ rows.T
    index = _ward(products, n_clusters)
    order = torch.randperm(len(rows), generator=keyed_generator(seed, "kmeans"), device="cpu").tolist()
    _exchange(products, index, order)
    seen: dict[int, int] = {}
    return torch.tensor([seen.setdefault(label, len(seen)) for label in index.tolist()])


def _ward(products: Floats, n_clusters: int) -> Ints:
    """Merge the two clusters that add least to the sum of squares until ``n_clusters`` are left."""
    # Importing it takes longer than importing the rest of this package.
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    count = len(products)
    index = np.arange(count)
    if n_clusters == count:
        return index
    norms = products.diagonal()
    squares = np.maximum(norms[:, None] + norms - 2 * products, 0)
    np.fill_diagonal(squares, 0)
    merges = linkage(squareform(np.sqrt(squares), checks=False), "ward")
    members = {i: [i] for i in range(count)}
    for step, (one, two) in enumerate(merges[: count - n_clusters, :2].astype(int).tolist()):
        members[count + step] = members.pop(one) + members.pop(two)
    for label, cluster in enumerate(members.values()):
        index[cluster] = label
    return index


def _exchange(products: Floats, index: Ints, order: Sequence[int]) -> None:
    """Move single filters to the cluster where they add least, in place, until no move helps (Hartigan, 1975).

    Unlike Lloyd's iteration it considers that both means move. Otherwise a cluster of two would never lose a filter.
    """
    count, clusters = len(products), int(index.max()) + 1
    norms, sizes = products.diagonal(), np.bincount(index).astype(float)
    sums = np.zeros((count, clusters))  # of the products with the members of a cluster
    np.add.at(sums.T, index, products)
    squares = np.bincount(index, weights=sums[np.arange(count), index])  # of the sum of a cluster's members
    least = 1e-12 * float(norms.mean())
    moved = True
    while moved:
        moved = False
        for i in order:
            old = index[i]
            if sizes[old] == 1:
                continue
            distances = norms[i] - 2 * sums[i] / sizes + squares / sizes**2
            added = distances * sizes / (sizes + 1)
            added[old] = distances[old] * sizes[old] / (sizes[old] - 1)
            new = int(added.argmin())
            if added[new] < added[old] - least:
                squares[old] += norms[i] - 2 * sums[i, old]
                squares[new] += norms[i] + 2 * sums[i, new]
                sums[:, old] -= products[i]
                sums[:, new] += products[i]
                sizes[old] -= 1
                sizes[new] += 1
                index[i], moved = new, True


def cluster_channels(
    model: nn.Module,
    graph: ChannelGraph,
    keep_fraction: KeepFraction = 0.625,
    *,
    method: Clustering = "kmeans",
    seed: int = 0,
    groups: Iterable[str] | None = None,
    plan: WidthPlan | None = None,
    among_ranks: bool = False,
) -> dict[str, Tensor]:
    """Cluster every group of channels on the concatenated kernels of all its layers, each block separately.

    Args:
        model: the traced network.
        graph: its channel graph.
        keep_fraction: share of the channels to keep, or a dict of layer pattern -> share. If a forward body fixes
            widths, the nearest one that it allows is used.
        method: see :func:`cluster_filters`.
        seed: seed of k-means.
        groups: names of the groups to cluster; ``None`` for all.
        plan: result of :func:`~lightning_filterdiv.narrowing.plan_widths`, instead of ``keep_fraction``.
        among_ranks: divide the groups among the ranks of the default process group, all of which must call this.

    Returns:
        Group name -> ``(size,)`` int64 cluster index, for groups that lose channels.

    Raises:
        TypeError, ValueError: see :func:`~lightning_filterdiv.narrowing.plan_widths` and :func:`check_finite`.
    """
    chosen = [group for group in graph.groups if groups is None or group.name in set(groups)]
    check_finite(model, chosen)
    counts = (plan or plan_widths(graph, WidthRule(keep_fraction), groups=chosen)).counts
    tensors = named_tensors(model)
    squeezed = {group.name: group for group in chosen if counts.get(group.name, group.size) < group.size}

    def cluster(name: str) -> Tensor:
        group = squeezed[name]
        kernels, each = kernels_of(model, group), counts[name] // group.block_count
        index = torch.empty(group.size, dtype=torch.int64)
        for block, members in enumerate(group.members()):
            index[members] = cluster_filters(kernels[members], each, method=method, seed=seed) + block * each
        return index

    lengths = {
        name: sum(_kernel_rows(model, tensors, group, layer)[1].numel() // group.size for layer in group.layers)
        for name, group in squeezed.items()
    }
    costs = {name: group.size**2 * lengths[name] + _MOVES * group.size for name, group in squeezed.items()}
    return share(costs, cluster, among_ranks=among_ranks)


def check_finite(model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
    """Raise an error if a kernel to be clustered holds NaN or inf.

    Raises:
        ValueError: it names the layer.
    """
    tensors = named_tensors(model)
    for group in groups:
        for layer in group.layers:
            broken = int((~layer_kernels(model, tensors, group, layer).isfinite().all(dim=1)).sum())
            if broken:
                raise ValueError(
                    f"{layer!r}: {broken} of {group.size} filters contain NaN or inf and cannot be clustered; the "
                    f"training has diverged: start from a checkpoint before that, with a smaller learning rate"
                )


def kernels_of(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return the concatenated kernels of all layers of a group, ``(size, d)`` float64 on the CPU, as they are
    clustered."""
    tensors = named_tensors(model)
    return torch.cat([layer_kernels(model, tensors, group, layer) for layer in group.layers], dim=1)


def layer_kernels(model: nn.Module, tensors: Mapping[str, Tensor], group: ChannelGroup, layer: str) -> Tensor:
    """Return the kernels of ``layer`` for the channels of ``group``, ``(size, d)`` float64 on the CPU.

    Those of a parametrized layer (``weight_norm``) are what its parametrization computes.

    Args:
        model: the traced network.
        tensors: its named tensors.
        group: a group of its channel graph.
        layer: name of a layer with rows in the group.
    """
    rows, values = _kernel_rows(model, tensors, group, layer)
    return rows.entries(values.detach()).flatten(1).double().cpu()


def _kernel_rows(
    model: nn.Module, tensors: Mapping[str, Tensor], group: ChannelGroup, layer: str
) -> tuple[TensorRows, Tensor]:
    """Return the rows of the channels in the weight of ``layer``, and that weight."""
    parts = [part for part in group.parts if part.kind != "consumer" and layer_of(part.tensor) == layer]
    part = max(parts, key=lambda p: (p.tensor == f"{layer}.weight", tensors[p.tensor].numel()))
    values = tensors[part.tensor]
    if part.tensor != f"{layer}.weight":
        computed = getattr(named_modules(model)[layer], "weight", None)
        values = computed if isinstance(computed, Tensor) and computed.shape == values.shape else values
    return part, values


class ClusteredTensor(NamedTuple):
    """Parameter whose rows along ``dim`` are clustered: row ``i`` is in ``clusters[i]``, alone if it is in no group.

    With ``groups`` above 1 rows count through the blocks of a grouped transposed convolution, see
    :class:`~lightning_filterdiv.channel_graph.TensorRows`.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    clusters: tuple[int, ...]
    groups: int = 1

    @property
    def is_vector(self) -> bool:
        """True if a row is a single number: a bias, or the scale or shift of a norm."""
        return self.parameter.numel() == len(self.clusters)

    def rows_first(self, values: Tensor, start: int = 0) -> Tensor:
        """Return a view of ``values``, shaped like the parameter after ``start`` dimensions, with its rows in front.

        Rows are one dimension. With ``groups`` above 1 they are two: blocks, and rows of a block.
        """
        if self.groups == 1:
            return values.movedim(self.dim + start, start)
        blocks: Tensor = values.unflatten(start, (self.groups, -1))
        return blocks.movedim(start + self.dim + 1, start + 1)


def clustered_tensors(model: nn.Module, graph: ChannelGraph, clusters: Mapping[str, Tensor]) -> list[ClusteredTensor]:
    """Return every parameter that holds filters or per-channel entries of clustered channels.

    Running statistics are not among them, because they become equal when the activations do.

    Args:
        model: the traced network.
        graph: its channel graph.
        clusters: group name -> ``(size,)`` cluster index.
    """
    parameters = {name: t for name, t in named_tensors(model).items() if isinstance(t, nn.Parameter)}
    found: dict[tuple[str, int, int], list[int]] = {}
    for group in graph.groups:
        if group.name not in clusters:
            continue
        for part in group.parts:
            if part.kind == "consumer" or part.tensor not in parameters:
                continue
            length = parameters[part.tensor].shape[part.dim] * part.groups
            index = found.setdefault((part.tensor, part.dim, part.groups), list(range(length)))
            base, width = max(index) + 1, part.rows.shape[1]
            for rows, cluster in zip(part.rows.tolist(), clusters[group.name].tolist(), strict=True):
                for position, row in enumerate(rows):
                    index[row] = base + cluster * width + position
    return [
        ClusteredTensor(name, parameters[name], dim, tuple(_renumbered(index)), parts)
        for (name, dim, parts), index in found.items()
    ]


def _renumbered(index: Iterable[int]) -> Iterable[int]:
    seen: dict[int, int] = {}
    return [seen.setdefault(i, len(seen)) for i in index]
