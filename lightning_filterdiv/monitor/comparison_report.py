"""Report of ``filterdiv compare``: two networks side by side, layer by layer."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_filterdiv.files import printable
from lightning_filterdiv.filters import find_prefix
from lightning_filterdiv.monitor.page import Page, PageCell, PageRow, as_html, cell, layer_panel, ratio_cell
from lightning_filterdiv.monitor.report import COLUMNS, LayerReport, shown, summary, table_text
from lightning_filterdiv.monitor.views import LayerView

__all__ = ["Both", "Side", "comparison_csv", "comparison_page", "comparison_summary", "comparison_text", "pair_layers"]

# Smaller is better, except for ranks.
_LESS_IS_DIVERSE = {"over_chance", "max_abs_cosine", "twins", "mean_abs_correlation", "channel_twins"}
_MORE_IS_DIVERSE = {"effective_rank", "channel_rank"}
_COMPARED = ("over_chance", "filters", "fan_in", "max_abs_cosine", "twins", "mergeable", "effective_rank", "dead")
_ON_DATA = ("mean_abs_correlation", "channel_rank", "channel_twins", "function_only")


class Side(NamedTuple):
    """One of the two networks: name, rows, views, and correlations of layers that saw data."""

    title: str
    note: str
    rows: Sequence[LayerReport]
    views: Mapping[str, LayerView]
    correlations: Mapping[str, Tensor]


class Both(NamedTuple):
    """A layer in both networks; ``None`` for a network that lacks it."""

    name: str
    first: LayerReport | None
    second: LayerReport | None


def pair_layers(first: Sequence[LayerReport], second: Sequence[LayerReport]) -> list[Both]:
    """Match layers by name. A prefix of all names of one side (``net.``) is ignored.

    Returns:
        Layers of the first network in its order, with their partners, then those that only the second has.
    """
    ours, theirs = ({row.layer: row for row in rows} for rows in (first, second))
    off, on = find_prefix(ours, theirs) or ("", "")
    partners = {name: on + name.removeprefix(off) for name in ours}
    pairs = [Both(name, row, theirs.get(partners[name])) for name, row in ours.items()]
    taken = set(partners.values())
    return pairs + [Both(name, None, row) for name, row in theirs.items() if name not in taken]


def _columns(pairs: Sequence[Both]) -> list[str]:
    rows = [row for pair in pairs for row in pair[1:] if row is not None]
    return [*_COMPARED, *(name for name in _ON_DATA if any(getattr(row, name) is not None for row in rows))]


def _words(pair: Both, column: str) -> str:
    """Return ``A → B``, or one value if both look equal."""
    values = [shown(row, column) if row is not None else "-" for row in pair[1:]]
    return values[0] if values[0] == values[1] else " → ".join(values)


def comparison_summary(pairs: Sequence[Both]) -> str:
    """Return the difference over the common layers in a few sentences."""
    common = [(a, b) for _, a, b in pairs if a is not None and b is not None and min(a.filters, b.filters) > 1]
    lonely = [sum(pair[1 + side] is None for pair in pairs) for side in (1, 0)]
    tail = (
        f" {_layers(lonely[0])} {'is' if lonely[0] == 1 else 'are'} only in A, {lonely[1]} only in B."
        if any(lonely)
        else ""
    )
    if not common:
        return f"The networks have no layer of one name in common.{tail}"
    ratios = [[row.over_chance for row in side] for side in zip(*common, strict=True)]
    means = [sum(side) / len(side) for side in ratios]
    more, less = (sum(s * (b - a) > 0.1 * a for a, b in zip(*ratios, strict=True)) for s in (1, -1))
    twins = [sum(row.twins for row in side) for side in zip(*common, strict=True)]
    return (
        f"Two filters of a layer are {means[0]:.2f} times as alike as random ones in A and {means[1]:.2f} times in B "
        f"(mean of {len(common)} layers). The filters of {_layers(more)} are over a tenth more alike in B, those of "
        f"{_layers(less)} over a tenth less. {twins[0]} filters of A and {twins[1]} of B have a twin.{tail}"
    )


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def comparison_text(pairs: Sequence[Both], heading: str) -> str:
    """Return an aligned table with heading and summary, with ``A → B`` where the networks differ."""
    columns = _columns(pairs)
    cells = [[printable(pair.name), *(_words(pair, column) for column in columns)] for pair in pairs]
    table = table_text(["layer", *(COLUMNS[column][0] for column in columns)], cells, lambda i: i == 0)
    return "\n".join([heading, "", table, "", comparison_summary(pairs)])


def comparison_csv(pairs: Sequence[Both]) -> str:
    """Return comma-separated text, one line per layer, with ``<attribute>_a`` and ``<attribute>_b`` of
    :class:`LayerReport`."""
    columns = _columns(pairs)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", *(f"{column}_{side}" for column in columns for side in "ab")])
    for pair in pairs:
        values = [getattr(row, column) if row is not None else None for column in columns for row in pair[1:]]
        writer.writerow([printable(pair.name), *("" if value is None else value for value in values)])
    return text.getvalue()


def comparison_page(pairs: Sequence[Both], first: Side, second: Side, threshold: float) -> str:
    """Return the page of ``filterdiv compare``. A click on a layer shows it in both networks."""
    columns = _columns(pairs)
    ratios = [row.over_chance for pair in pairs for row in pair[1:] if row is not None]
    scale = 1.05 * max([2.0, *(ratio for ratio in ratios if ratio == ratio)])
    lines = [
        PageRow(
            pair.name,
            [_cell(pair, column, scale) for column in columns],
            _panel(pair.first, "A", first, threshold) + _panel(pair.second, "B", second, threshold),
        )
        for pair in pairs
    ]
    page = Page(
        title=f"{first.title} and {second.title}: filter redundancy",
        question=f"How do the filters of {first.title} and {second.title} differ?",
        lead=comparison_summary(pairs),
        notes=[
            f"{letter}: {side.title}. {side.note} {summary(side.rows, threshold)}"
            for letter, side in (("A", first), ("B", second))
        ],
        hint="A → B. The upper bar is |cos| over chance in A, the lower one in B, the red mark that of random filters.",
        heads=[COLUMNS["layer"][:2], *(COLUMNS[column][:2] for column in columns)],
        rows=lines,
        text_columns=[0],
        caution="Green: more diverse in B; red: less. These numbers do not say which of the two is the better network.",
    )
    return as_html(page)


def _cell(pair: Both, column: str, scale: float) -> PageCell:
    found = [getattr(row, column) if row is not None else None for row in pair[1:]]
    values = [float(value) for value in found if value is not None]
    both = len(values) == len(found)
    if column == "over_chance" and both:
        return ratio_cell(values, scale)
    change = values[1] - values[0] if both else 0.0
    better = (column in _LESS_IS_DIVERSE and change < 0) or (column in _MORE_IS_DIVERSE and change > 0)
    worse = (column in _LESS_IS_DIVERSE and change > 0) or (column in _MORE_IS_DIVERSE and change < 0)
    differs = "→" in _words(pair, column)
    colour = "good" if better and differs else "bad" if worse and differs else ""
    return cell(change, _words(pair, column), classes=colour)


def _panel(row: LayerReport | None, letter: str, side: Side, threshold: float) -> str:
    if row is None:
        return f'<section class="side"><h3>{letter}: no such layer</h3></section>'
    name = f"{letter}: {row.layer} of {side.title}"
    return layer_panel(side.views[row.layer], threshold, side.correlations.get(row.layer), name)
