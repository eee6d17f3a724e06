"""Figures of filter similarity. Plain matplotlib objects: no pyplot, no global state, safe in any thread."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from lightning_filterdiv.similarity import cosine_similarity, expected_abs_cosine

__all__ = ["similarity_heat_map", "similarity_order"]


def similarity_order(cosine: Tensor) -> list[int]:
    """Order of the filters that puts alike ones next to each other (average-linkage clustering on ``1 - |cos|``).

    Args:
        cosine: ``(J, J)`` cosine similarities.

    Returns:
        A permutation of ``0..J-1``.
    """
    count = cosine.shape[0]
    if count < 3:
        return list(range(count))
    distance = (1.0 - cosine.abs().double().cpu().numpy()).clip(0.0, 1.0)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0.0)
    order: list[int] = leaves_list(linkage(squareform(distance, checks=False), method="average")).tolist()
    return order


@torch.no_grad()
def similarity_heat_map(filters: Tensor, name: str, subtitle: str = "") -> Figure:
    """Heat map of ``|cos|`` between the filters of one layer; duplicates show as bright blocks on the diagonal.

    Args:
        filters: ``(J, d)``.
        name: layer name, for the title.
        subtitle: a second title line, for example the epoch.

    Returns:
        A figure of 3.9 x 3.5 inches with a white background: legible at TensorBoard's default size, light and dark.
    """
    cosine = cosine_similarity(filters).cpu()
    count, fan_in = filters.shape
    order = similarity_order(cosine)
    ordered = cosine.abs()[order][:, order].numpy()
    figure = Figure(figsize=(3.9, 3.5), dpi=130, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(ordered, vmin=0.0, vmax=1.0, cmap="magma", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("|cos| (1: same direction)", fontsize=8)
    off_diagonal = (cosine.abs().sum() - cosine.abs().diagonal().sum()) / max(1, count * (count - 1))
    axes.set_title(
        f"{name}: {count} filters of {fan_in} weights{f', {subtitle}' if subtitle else ''}\n"
        f"mean |cos| {float(off_diagonal):.3f} (random filters: {expected_abs_cosine(fan_in):.3f})",
        fontsize=8.5,
    )
    axes.set_xlabel("filters, alike ones side by side", fontsize=8.5)
    axes.set_ylabel("same order", fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.locator_params(integer=True, nbins=8)
    return figure
