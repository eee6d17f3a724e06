"""One layer for figures and report: kernels, similarities, and an order that shows groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from lightning_filterdiv.filters import Conv, filter_count
from lightning_filterdiv.monitor.functional import NEAR_DUPLICATE, Dropped, live_filters
from lightning_filterdiv.similarity import cosine_similarity, expected_abs_cosine

__all__ = ["LayerView", "mergeable_filters", "similarity_order", "view_layer"]


@dataclass(frozen=True)
class LayerView:
    """Snapshot of a layer on the CPU.

    Attributes:
        name: name of the layer.
        kernels: ``(J, in/groups, *kernel_size)``, float32 or wider; NaN and infinity are shown as 0.
        signed: ``(J, J)`` cosine, diagonal 1 (0 for a zero filter).
        order: permutation of the filters that puts alike ones side by side.
        numbers: index of each filter in the layer. Dropped filters are not among the J.
        out: number of dropped filters.
    """

    name: str
    kernels: Tensor
    signed: Tensor
    order: list[int]
    numbers: list[int]
    out: int = 0

    @property
    def cosine(self) -> Tensor:
        """``(J, J)`` absolute cosine."""
        return self.signed.abs()

    @property
    def count(self) -> int:
        """J, the number of filters."""
        return len(self.order)

    @property
    def fan_in(self) -> int:
        """d, the number of weights of a filter."""
        return self.kernels[0].numel()

    @property
    def chance(self) -> float:
        """Mean ``|cos|`` of random filters with as many weights."""
        return expected_abs_cosine(max(1, self.fan_in))

    @property
    def mean(self) -> float:
        """Mean ``|cos|`` of two distinct filters; 0 for a single one."""
        return float(self.pairs().mean()) if self.count > 1 else 0.0

    def twins(self, limit: float = NEAR_DUPLICATE) -> list[tuple[int, int, float]]:
        """Return the pairs of filters at ``|cos| > limit``, the most alike first: both positions among the J, and the
        cosine."""
        found = (self.cosine > limit).triu(diagonal=1).nonzero().tolist()
        return sorted(((i, j, float(self.signed[i, j])) for i, j in found), key=lambda twin: -abs(twin[2]))

    def pairs(self) -> npt.NDArray[np.float32]:
        """Absolute cosines of the ``J (J - 1) / 2`` pairs of distinct filters."""
        above = np.triu(np.ones((self.count, self.count), dtype=bool), k=1)
        values: npt.NDArray[np.float32] = self.cosine.numpy()[above]
        return values


@torch.no_grad()
def view_layer(name: str, conv: Conv, dropped: Dropped | None = None) -> LayerView:
    """Return a snapshot of a layer, without ``dropped`` filters. Similarities are computed on the device of its
    weights."""
    matrix = live_filters(conv, dropped)
    matrix = torch.nan_to_num(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), posinf=0.0, neginf=0.0)
    signed = cosine_similarity(matrix).float().cpu()
    kernels = matrix.cpu().view(matrix.shape[0], -1, *conv.kernel_size)
    out = set(dropped.filters) if dropped is not None else set()
    numbers = [index for index in range(filter_count(conv)) if index not in out]
    return LayerView(name, kernels, signed, similarity_order(signed), numbers, len(out))


def _distances(cosine: Tensor) -> npt.NDArray[np.float64]:
    """Return the condensed ``1 - |cos|`` of all pairs."""
    distance = (1.0 - cosine.abs().double().cpu().numpy()).clip(0.0, 1.0)
    distance += distance.T
    distance /= 2
    np.fill_diagonal(distance, 0.0)
    condensed: npt.NDArray[np.float64] = squareform(distance, checks=False)
    return condensed


def similarity_order(cosine: Tensor) -> list[int]:
    """Return an order of the filters that puts alike ones next to each other (average-linkage clustering on ``1 -
    |cos|``).

    Args:
        cosine: ``(J, J)`` cosine similarities.

    Returns:
        A permutation of ``0..J-1``.
    """
    count = cosine.shape[0]
    if count < 3:
        return list(range(count))
    order: list[int] = leaves_list(linkage(_distances(cosine), method="average")).tolist()
    return order


def mergeable_filters(cosine: Tensor, threshold: float) -> int:
    """Return the number of filters that could go if filters at ``cos > threshold`` were merged.

    Groups are formed by complete linkage: in a group *all* pairs are above the threshold. A group of ``n`` filters
    gives ``n - 1``. Opposite filters do not count, because they compute different features behind an activation.

    Args:
        cosine: ``(J, J)`` signed cosine similarities.
        threshold: in [0, 1).
    """
    count = cosine.shape[0]
    if count < 2:
        return 0
    # Merging happens at distance <= t. The next float below makes "above the threshold" strict.
    limit = float(np.nextafter(1.0 - threshold, 0.0))
    groups = fcluster(linkage(_distances(cosine.clamp_min(0.0)), method="complete"), limit, criterion="distance")
    return count - int(groups.max())
