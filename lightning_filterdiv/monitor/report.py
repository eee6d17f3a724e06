"""What ``filterdiv inspect`` says about each layer: how redundant it is, what could go, which callback would help."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_filterdiv.files import printable
from lightning_filterdiv.filters import Conv, filter_matrix
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.monitor.views import mergeable_filters
from lightning_filterdiv.similarity import cosine_similarity, expected_abs_cosine

__all__ = ["COLUMNS", "LayerReport", "advice", "as_csv", "as_text", "report_layers"]

# From which share of a layer's filters on a finding is worth an action.
_WORTH_MERGING = 0.05
_WORTH_REVIVING = 0.02
_LOW_RANK = 0.5
_ALIKE = 1.5


@dataclass(frozen=True)
class LayerReport:
    """One row of the report.

    Attributes:
        layer: name.
        filters: J.
        fan_in: d, weights per filter.
        mean_abs_cosine: mean ``|cos|`` of two filters.
        random_abs_cosine: what random filters of that fan-in have.
        max_abs_cosine: of the two most alike filters.
        effective_rank: as a fraction of ``min(J, d)``.
        mergeable: filters that could be merged into others at ``|cos|`` above the threshold.
        dead: share of filters with a norm below 1e-3 of the layer's median.
        advice: which callback would help, or that none is needed.
    """

    layer: str
    filters: int
    fan_in: int
    mean_abs_cosine: float
    random_abs_cosine: float
    max_abs_cosine: float
    effective_rank: float
    mergeable: int
    dead: float
    advice: str


#: Attribute of :class:`LayerReport` -> (heading, what it means).
COLUMNS = {
    "layer": ("layer", "name of the convolution"),
    "filters": ("filters", "J, its number of filters"),
    "fan_in": ("weights", "d, weights per filter"),
    "mean_abs_cosine": ("mean |cos|", "how alike two of its filters are on average: 0 unrelated, 1 the same direction"),
    "random_abs_cosine": ("random", "mean |cos| that random filters of as many weights have: the yardstick"),
    "max_abs_cosine": ("max |cos|", "|cos| of its two most alike filters; 1 means a duplicate"),
    "effective_rank": ("eff. rank", "effective rank over full rank: 1 if filters are as diverse as can be"),
    "mergeable": ("mergeable", "filters that could go if groups above the threshold (all pairs) were merged"),
    "dead": ("dead", "share of filters with a norm below 1e-3 of the layer's median"),
    "advice": ("what would help", "a callback of this package, or nothing"),
}


def advice(filters: int, mean: float, random: float, rank: float, mergeable: int, dead: float) -> str:
    """Which callback would help this layer; a rule of thumb, worst finding first."""
    if mean != mean:
        return "not finite: training diverged"
    if dead >= _WORTH_REVIVING:
        return "RePr to bring dead filters back"
    if mergeable >= max(1.0, _WORTH_MERGING * filters):
        return f"CentripetalSGD to remove {mergeable}, RePr to use them"
    if mean > _ALIKE * random:
        return "BasisOrthonormality or RePr for diversity"
    if rank < _LOW_RANK:
        return "RePr for more directions"
    return "nothing: diverse already"


def report_layers(layers: Mapping[str, Conv], threshold: float) -> list[LayerReport]:
    """Measure every layer.

    Args:
        layers: name -> convolution.
        threshold: filters at ``|cos|`` above it count as mergeable, in [0, 1).
    """
    rows: list[LayerReport] = []
    for name, row in redundancy_metrics(layers).items():
        matrix = filter_matrix(layers[name])
        count, fan_in = matrix.shape
        mean, random = row["mean_abs_cosine"], expected_abs_cosine(fan_in)
        # A layer whose most alike pair is below the threshold needs no clustering, nor does one that is not finite.
        worth = row["max_abs_cosine"] > threshold
        mergeable = mergeable_filters(cosine_similarity(matrix), threshold) if worth else 0
        rank, dead = row["effective_rank"], row["dead_filters"]
        text = advice(count, mean, random, rank, mergeable, dead)
        rows.append(LayerReport(name, count, fan_in, mean, random, row["max_abs_cosine"], rank, mergeable, dead, text))
    return rows


def _cells(row: LayerReport) -> list[str]:
    values = [getattr(row, column) for column in COLUMNS]
    return [f"{value:.3f}" if isinstance(value, float) else printable(str(value)) for value in values]


def as_text(rows: Sequence[LayerReport], heading: str, threshold: float) -> str:
    """Aligned table with a heading and a sum line."""
    table = [[text for text, _ in COLUMNS.values()], *map(_cells, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    right = [i for i, column in enumerate(COLUMNS) if column not in ("layer", "advice")]
    lines = [
        "  ".join(
            f"{cell:>{widths[i]}}" if i in right else f"{cell:{widths[i]}}" for i, cell in enumerate(line)
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([heading, "", *lines, "", summary(rows, threshold)])


def summary(rows: Sequence[LayerReport], threshold: float) -> str:
    """One sentence over the whole network."""
    total, mergeable = sum(row.filters for row in rows), sum(row.mergeable for row in rows)
    alike = sum(row.mean_abs_cosine > _ALIKE * row.random_abs_cosine for row in rows)
    return (
        f"{mergeable} of {total} filters in {len(rows)} layers could be merged at |cos| > {threshold:g}; the filters "
        f"of {alike} layers are more than {_ALIKE:g} times as alike as random ones."
    )


def as_csv(rows: Sequence[LayerReport]) -> str:
    """Comma-separated, one line per layer, columns named like the attributes of :class:`LayerReport`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        values = [getattr(row, column) for column in COLUMNS]
        writer.writerow([printable(value) if isinstance(value, str) else value for value in values])
    return text.getvalue()
