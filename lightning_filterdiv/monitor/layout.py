"""TensorBoard's Custom Scalars page: a handful of charts that answer questions, instead of one card per tag."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["custom_scalars_layout"]

_CHARTS = {
    "mean_abs_cosine": "mean |cos| of two filters (0: unrelated)",
    "max_abs_cosine": "two most alike filters, |cos| (1: duplicate)",
    "effective_rank": "effective rank / full rank (1: diverse)",
    "near_duplicates": "share of filters with a twin, |cos| > 0.9",
    "dead_filters": "share of dead filters",
    "orthogonality_score": "RePr's score O (0: orthogonal)",
}


def custom_scalars_layout(layers: Sequence[str], repr_runs: bool = False) -> dict[str, dict[str, list[Any]]]:
    """Layout for ``SummaryWriter.add_custom_scalars``.

    Args:
        layers: names, in the order of the network; one line each.
        repr_runs: also show how many filters RePr has dropped and brought back.

    Returns:
        category -> chart -> ``["Multiline", patterns of tags]``.
    """
    network = {text: ["Multiline", [_exactly(metric, "network")]] for metric, text in _CHARTS.items()}
    by_layer = {
        text: ["Multiline", [_exactly(metric, layer) for layer in layers]]
        for metric, text in _CHARTS.items()
        if metric != "orthogonality_score"
    }
    layout = {"Filter redundancy: whole network": network, "Filter redundancy: one line per layer": by_layer}
    if repr_runs:
        layout["RePr"] = {
            "filters dropped and regrown": ["Multiline", [r"^filterdiv/repr/(dropped|regrew)/network$"]],
            "mean score O before drop, after regrowth": ["Multiline", [r"^filterdiv/repr/score_.*$"]],
        }
    return layout


def _exactly(metric: str, layer: str) -> str:
    return f"^filterdiv/{metric}/{re.escape(layer)}$"
