"""Names and layout of the numbers in TensorBoard: few groups, and a page with one card per metric."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["custom_scalars_layout", "tag_names"]

_CHARTS = {
    "cosine_over_chance": "mean |cos| of two filters / that of random ones (1: as diverse as random)",
    "effective_rank": "effective rank / full rank (1: as diverse as can be)",
    "near_duplicates": "share of filters with a twin, |cos| > 0.9",
    "max_abs_cosine": "|cos| of the two most alike filters (1: a duplicate)",
    "dead_filters": "share of dead filters",
}
_CHANNEL_CHARTS = {
    "mean_abs_correlation": "mean |correlation| of two channels on a fixed batch",
    "channel_effective_rank": "effective rank of the channels / their number",
    "channel_twins": "share of channels with a twin, |correlation| > 0.9",
    "twins_in_function_only": "share of channels with a twin that their weights do not show",
}


def tag_names(layers: Iterable[str]) -> dict[str, str]:
    """Return layer -> its part of a tag. Characters that a logger refuses become ``_``, and different layers keep
    different tags."""
    tags: dict[str, str] = {}
    taken: set[str] = set()
    for layer in layers:
        # Loggers use names as paths, so no level may be empty or lead upwards.
        levels = [re.sub(r"[^-\w.]", "_", level) for level in layer.split("/")]
        tag = "/".join(level if level.strip(".") else "_" * max(1, len(level)) for level in levels)
        unique, count = tag, 1
        while unique in taken:
            count += 1
            unique = f"{tag}_{count}"
        taken.add(unique)
        tags[layer] = unique
    return tags


def custom_scalars_layout(
    layers: Sequence[str], repr_runs: bool = False, activations: bool = False
) -> dict[str, dict[str, list[Any]]]:
    """Return a layout for ``SummaryWriter.add_custom_scalars``: one card per metric, with the network's mean and all
    layers.

    Args:
        layers: parts of tags of the layers, in the order of the network; one line each.
        repr_runs: also show how many filters RePr has dropped and brought back.
        activations: also show the numbers of channels.

    Returns:
        category -> chart -> ``["Multiline", patterns of tags]``.
    """
    layout = {"Filters: mean of all layers, and every layer": _cards(_CHARTS, layers)}
    if activations:
        layout["Channels: mean of all layers, and every layer"] = _cards(_CHANNEL_CHARTS, layers)
    if repr_runs:
        layout["RePr"] = {
            "filters dropped and regrown": ["Multiline", [r"^filterdiv/repr/(dropped|regrew)/network$"]],
            "mean score O before drop, after regrowth": ["Multiline", [r"^filterdiv/repr/score_.*$"]],
        }
    return layout


def _cards(charts: dict[str, str], layers: Sequence[str]) -> dict[str, list[Any]]:
    return {
        text: [
            "Multiline",
            [f"^Filters/{metric}$", *(f"^filterdiv_layers/{metric}/{re.escape(tag)}$" for tag in layers)],
        ]
        for metric, text in charts.items()
    }
