"""Report of ``filterdiv inspect`` about each layer: redundancy, filters that could go, and advice."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_filterdiv.files import printable
from lightning_filterdiv.filters import Conv, filter_matrix
from lightning_filterdiv.monitor.activations import channel_redundancy, in_function_only
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.monitor.views import mergeable_filters
from lightning_filterdiv.similarity import cosine_similarity, expected_abs_cosine

__all__ = [
    "COLUMNS",
    "LayerReport",
    "advice",
    "as_csv",
    "as_text",
    "columns_of",
    "report_layers",
    "shown",
    "summary",
    "table_text",
    "tied_filters",
]

# Share of a layer's filters from which a finding leads to advice.
_WORTH_MERGING = 0.05
_WORTH_REMOVING = 0.02
_ALIKE = 1.5
_TIED = 1e-3  # distance relative to the norm: what `filterdiv merge` tolerates


@dataclass(frozen=True)
class LayerReport:
    """One row of the report.

    Attributes:
        layer: name of the layer.
        filters: J.
        fan_in: d, weights per filter.
        over_chance: mean ``|cos|`` of two filters over that of random ones.
        mean_abs_cosine: mean ``|cos|`` of two filters.
        random_abs_cosine: the same for random filters of that fan-in.
        max_abs_cosine: ``|cos|`` of the two most alike filters.
        twins: filters with another one at ``|cos|`` above the threshold.
        mergeable: filters that could be merged into others of the same sign, at a cosine above the threshold.
        effective_rank: effective rank of the filters, between 1 and :attr:`full_rank`.
        full_rank: ``min(J, d)``.
        dead: share of filters with a norm below 1e-3 of the layer's median.
        mean_abs_correlation: mean ``|correlation|`` between its channels on the data; ``None`` without data, like the
            next three.
        channel_rank: effective rank of the standardised channels.
        channel_twins: channels with another one at ``|correlation|`` above 0.9.
        function_only: pairs of channels alike in function but not in weights.
        advice: a method that would help, or that none is needed; empty if nothing can be advised.
    """

    layer: str
    filters: int
    fan_in: int
    over_chance: float
    mean_abs_cosine: float
    random_abs_cosine: float
    max_abs_cosine: float
    twins: int
    mergeable: int
    effective_rank: float
    full_rank: int
    dead: float
    mean_abs_correlation: float | None = None
    channel_rank: float | None = None
    channel_twins: int | None = None
    function_only: int | None = None
    advice: str = ""


#: Attribute of :class:`LayerReport` -> (heading, meaning, format).
COLUMNS = {
    "layer": ("layer", "name of the convolution", ""),
    "over_chance": (
        "|cos| / chance",
        "mean |cos| of two filters over that of random filters with as many weights: 1 is as diverse as random",
        ".2f",
    ),
    "filters": ("filters", "J, its number of filters", ""),
    "fan_in": ("weights", "d, weights per filter", ""),
    "mean_abs_cosine": ("mean |cos|", "how alike two filters are on average: 0 unrelated, 1 the same direction", ".3f"),
    "max_abs_cosine": ("max |cos|", "|cos| of its two most alike filters; 1 means a duplicate or an opposite", ".3f"),
    "twins": ("twins", "filters with another one at |cos| above the threshold, opposite ones too", ""),
    "mergeable": (
        "mergeable",
        "filters that could go if groups of the same sign, with all pairs above the threshold, were merged",
        "",
    ),
    "effective_rank": (
        "eff. rank",
        "exp of the entropy of the singular values: directions in use",
        ".1f",
    ),
    "full_rank": ("of", "the largest possible rank, min(J, d)", ""),
    "dead": ("dead", "share of filters with a norm below 1e-3 of the layer's median", ".3f"),
    "mean_abs_correlation": ("mean |corr|", "mean |correlation| between its channels on the data", ".3f"),
    "channel_rank": ("channel rank", "effective rank of the standardised channels on the data", ".1f"),
    "channel_twins": ("channel twins", "channels with another one at |correlation| above 0.9", ""),
    "function_only": ("unseen pairs", "pairs of channels at |correlation| above 0.9 whose filters are not alike", ""),
    "advice": ("what would help", "from the numbers in this row and from what our own runs measured", ""),
}


def advice(filters: int, over_chance: float, tied: int, mergeable: int, dead: float) -> str:
    """Return advice for a layer, worst finding first. Methods that lost accuracy in our runs are not named.

    Args:
        filters: J.
        over_chance: mean ``|cos|`` over that of random filters.
        tied: filters that equal another one already.
        mergeable: filters of the same sign that could be merged.
        dead: share of dead filters.
    """
    if over_chance != over_chance:
        return "not finite: training diverged"
    if tied:
        return f"filterdiv merge: {tied} are tied to others"
    if dead >= _WORTH_REMOVING:
        return "prune_channels removes dead filters"
    if mergeable >= max(1.0, _WORTH_MERGING * filters):
        return f"CentripetalSGD to merge {mergeable}"
    if over_chance > _ALIKE:
        return "BasisOrthonormality for diversity"
    return "nothing needed"


def tied_filters(matrix: Tensor) -> int:
    """Return the number of filters that equal an earlier one up to 1e-3 of their norm.

    Args:
        matrix: ``(J, d)``. Zero filters do not count.
    """
    wide = matrix.double()
    norm = wide.norm(dim=1)
    product = wide @ wide.mT
    squares = (norm.square() + norm.square()[:, None] - 2 * product).clamp_min(0.0)
    close = squares.sqrt() <= _TIED * torch.minimum(norm, norm[:, None])
    close &= (norm > 0) & (norm > 0)[:, None]
    return int(close.tril(diagonal=-1).any(dim=1).sum())


def report_layers(
    layers: Mapping[str, Conv],
    threshold: float,
    correlations: Mapping[str, Tensor] | None = None,
    *,
    trained: bool = True,
) -> list[LayerReport]:
    """Measure every layer.

    Args:
        layers: name -> convolution.
        threshold: cosine from which filters count as alike, in [0, 1).
        correlations: name -> ``(C, C)`` correlation between its channels, if the network saw data.
        trained: ``False`` for random weights, which get no advice.
    """
    correlations = correlations or {}
    cosines = {name: cosine_similarity(filter_matrix(layers[name])) for name in correlations}
    channels = channel_redundancy(correlations, cosines) if correlations else {}
    rows: list[LayerReport] = []
    for name, row in redundancy_metrics(layers).items():
        matrix = filter_matrix(layers[name])
        count, fan_in = matrix.shape
        # No clustering is needed if the most alike pair is below the threshold, or if the layer is not finite.
        worth = row["max_abs_cosine"] > threshold
        cosine = cosine_similarity(matrix) if worth else matrix.new_zeros(1, 1)
        overlap = cosine.abs().fill_diagonal_(0.0)
        mergeable = mergeable_filters(cosine, threshold) if worth else 0
        tied = tied_filters(matrix) if worth else 0
        found: dict[str, Any] = {}
        if name in channels:
            measured = channels[name]
            found = {
                "mean_abs_correlation": measured["mean_abs_correlation"],
                "channel_rank": measured["channel_effective_rank"] * count,
                "channel_twins": _rounded(measured["channel_twins"] * count),
                "function_only": len(in_function_only(correlations[name], cosines[name])),
            }
        over_chance = row["cosine_over_chance"]
        rows.append(
            LayerReport(
                layer=name,
                filters=count,
                fan_in=fan_in,
                over_chance=over_chance,
                mean_abs_cosine=row["mean_abs_cosine"],
                random_abs_cosine=expected_abs_cosine(fan_in),
                max_abs_cosine=row["max_abs_cosine"],
                twins=int((overlap.amax(dim=-1) > threshold).sum()),
                mergeable=mergeable,
                effective_rank=row["effective_rank"] * min(count, fan_in),
                full_rank=min(count, fan_in),
                dead=row["dead_filters"],
                advice=advice(count, over_chance, tied, mergeable, row["dead_filters"]) if trained else "",
                **found,
            )
        )
    return rows


def _rounded(value: float) -> int:
    return round(value) if value == value else 0


def columns_of(rows: Sequence[LayerReport]) -> list[str]:
    """Return the columns to show. Columns of channels need data, and random weights get no advice."""
    return [name for name in COLUMNS if any(getattr(row, name) not in (None, "") for row in rows)]


def shown(row: LayerReport, column: str) -> str:
    """Return a cell as text."""
    value = getattr(row, column)
    return "" if value is None else format(value, COLUMNS[column][2]) if COLUMNS[column][2] else printable(str(value))


def table_text(heads: Sequence[str], cells: Sequence[Sequence[str]], left: Callable[[int], bool]) -> str:
    """Return aligned columns under their heads.

    Args:
        heads: heads of the columns.
        cells: lines of the table.
        left: tells if a column is aligned on the left.
    """
    table = [list(heads), *map(list, cells)]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    lines = [
        "  ".join(f"{cell:{'<' if left(i) else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip()
        for line in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def as_text(rows: Sequence[LayerReport], heading: str, threshold: float) -> str:
    """Return an aligned table with a heading and a summary."""
    columns = columns_of(rows)
    cells = [[shown(row, column) for column in columns] for row in rows]
    table = table_text([COLUMNS[c][0] for c in columns], cells, lambda i: columns[i] in ("layer", "advice"))
    return "\n".join([heading, "", table, "", summary(rows, threshold)])


def summary(rows: Sequence[LayerReport], threshold: float) -> str:
    """Return the whole network in four sentences."""
    total, mergeable, twins = (sum(getattr(row, name) for row in rows) for name in ("filters", "mergeable", "twins"))
    paired = [row.over_chance for row in rows if row.filters > 1] or [0.0]
    alike = sum(ratio > _ALIKE for ratio in paired)
    seen = [row.function_only for row in rows if row.function_only is not None]
    unseen = f" {sum(seen)} pairs of channels are alike on the data and not in their weights." if seen else ""
    return (
        f"Two filters of a layer are {sum(paired) / len(paired):.2f} times as alike as random ones, on average. In "
        f"{alike} of {len(rows)} layer{'s' * (len(rows) != 1)} it is more than {_ALIKE:g} times. {twins} of {total} "
        f"filters have a twin at |cos| > {threshold:g}; {mergeable} could be merged into one of the same sign.{unseen}"
    )


def as_csv(rows: Sequence[LayerReport]) -> str:
    """Return comma-separated text, one line per layer, with the attributes of :class:`LayerReport` as columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(LayerReport)]
    writer.writerow(names)
    for row in rows:
        values = [getattr(row, name) for name in names]
        writer.writerow(
            ["" if value is None else printable(value) if isinstance(value, str) else value for value in values]
        )
    return text.getvalue()
