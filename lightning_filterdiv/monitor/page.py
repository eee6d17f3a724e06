"""Report as one self-contained HTML page: no other file, no network access, light and dark.

A click on a layer opens its panel: heat map, kernels and twins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from lightning_filterdiv.files import printable
from lightning_filterdiv.monitor.activations import in_function_only
from lightning_filterdiv.monitor.figures import heat_map_top
from lightning_filterdiv.monitor.functional import NEAR_DUPLICATE
from lightning_filterdiv.monitor.pixels import as_data, gradient, heat_map_pixels, kernel_pixels, mosaic_pixels
from lightning_filterdiv.monitor.report import COLUMNS, LayerReport, columns_of, shown, summary
from lightning_filterdiv.monitor.views import LayerView

__all__ = ["Page", "PageCell", "PageRow", "as_html", "cell", "layer_panel", "ratio_cell", "report_page"]

_TWINS = 12  # pairs listed per layer
_BAR = 62  # per cent of a cell that bars may fill; the numbers stand beside them

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --faint: #5b6675; --line: #d8dee6; --page: #fff; --bar: #8fb3d9;
  --mark: #c0392b; --note: #f2f5f9; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --faint: #9aa5b4; --line: #39424f; --page: #14181e;
  --bar: #3f6f9f; --mark: #ff7f6e; --note: #1d232b; --good: #67d69b; --bad: #ff9a8f; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 78rem; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .8rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p.lead { font-size: 1.05rem; background: var(--note); padding: .8rem 1rem; border-radius: 8px; }
.faint { color: var(--faint); } ul.faint { padding-left: 1.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .87rem; } .wide > table { width: 100%; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; }
.wide > table > thead th { cursor: pointer; background: var(--page); } th:hover { text-decoration: underline; }
.wide > table > * > tr > :first-child { position: sticky; left: 0; background: var(--page); z-index: 1; }
tr.layer { cursor: pointer; } tr.layer:hover > * { background: var(--note) !important; }
button.open { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; max-width: 14rem;
  overflow: hidden; text-overflow: ellipsis; vertical-align: bottom; }
button.open::before { content: "\\25B8"; display: inline-block; width: 1.1em; color: var(--faint); }
button.open[aria-expanded=true]::before { content: "\\25BE"; }
td.bar { position: relative; min-width: 8.5rem; } td.bar:has(i.second) { min-width: 13rem; }
td.bar i { position: absolute; left: 0; top: 20%; height: 60%; background: var(--bar); }
td.bar i.second { top: 55%; height: 25%; } td.bar i.first { height: 30%; opacity: .55; }
td.bar b { position: absolute; top: 10%; height: 80%; width: 2px; background: var(--mark); }
td.bar span { position: relative; }
.good { color: var(--good); } .bad { color: var(--bad); }
tr.detail > td { padding: 0; white-space: normal; text-align: left; }
.panel { position: sticky; left: 0; width: min(calc(100vw - 2rem), 76rem); padding: 1rem 0 1.4rem; display: flex;
  flex-wrap: wrap; gap: 1.2rem 1.6rem; }
.panel section { flex: 0 1 19rem; min-width: 0; } .panel section.side { flex: 1 1 100%; margin: 0 0 -.8rem; }
.panel img { display: block; max-width: 100%; image-rendering: pixelated; border-radius: 3px; }
.panel img.map { width: 19rem; height: 19rem; max-height: calc(100vw - 2rem); }
.panel img.mosaic { width: 19rem; max-height: 24rem; object-fit: contain; object-position: left top; }
.panel img.scale, .panel .ends { max-width: 19rem; }
.panel img.scale { width: 100%; height: .6rem; margin-top: .35rem; }
.panel .ends { display: flex; justify-content: space-between; font-size: .8rem; }
.panel p { margin: .35rem 0 0; font-size: .83rem; }
.panel td, .panel th { padding: .15rem .45rem; font-size: .83rem; position: static; background: none; cursor: auto; }
.panel td img { height: 1.7rem; width: auto; max-width: 6rem; min-width: .6rem; display: inline-block;
  vertical-align: middle; }
dl { display: grid; grid-template-columns: max-content auto; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 40rem) { body { margin: 1rem auto; } dl { display: block; } dd { margin: 0 0 .5rem; }
  button.open { max-width: 8.5rem; } .panel section { flex: 1 1 100%; } }
"""
_SCRIPT = """
const body = document.querySelector('.wide > table').tBodies[0];
const detail = row => row.nextElementSibling?.className === 'detail' ? row.nextElementSibling : null;
body.addEventListener('click', event => {
  const row = event.target.closest('tr.layer');
  if (!row) return;
  const button = row.querySelector('button.open'), shown = detail(row);
  button.setAttribute('aria-expanded', shown ? 'false' : 'true');
  if (shown) return shown.remove();
  const line = document.createElement('tr'), cell = line.insertCell();
  line.className = 'detail';
  cell.colSpan = row.cells.length;
  cell.append(document.getElementById(row.dataset.panel).content.cloneNode(true));
  row.after(line);
});
for (const [index, head] of [...document.querySelectorAll('.wide > table > thead th')].entries()) {
  let down = false;
  head.addEventListener('click', () => {
    down = !down;
    const key = row => row.cells[index].dataset.value;
    const compare = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
    const rows = [...body.querySelectorAll('tr.layer')].map(row => [row, detail(row)]);
    rows.sort(([a], [b]) => down ? compare(b, a) : compare(a, b));
    body.append(...rows.flat().filter(Boolean));
  });
}
"""
# An icon in the page, so that the browser does not request favicon.ico.
_ICON = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E"


@dataclass(frozen=True)
class PageCell:
    """One cell: sort key, content as HTML, and classes of its ``td``."""

    value: str
    content: str
    classes: str = ""


@dataclass(frozen=True)
class PageRow:
    """One layer: its name, the cells after it, and the HTML of its panel."""

    name: str
    cells: Sequence[PageCell]
    panel: str


@dataclass(frozen=True)
class Page:
    """Content of a page.

    Attributes:
        title: title of the window.
        question: the heading.
        lead: the answer.
        notes: origin of the weights, and remarks.
        hint: hint on how to read the table.
        heads: (heading, meaning) of every column, the layer's name first.
        rows: rows of the table.
        text_columns: indices of columns that hold words.
        caution: caution at the end.
    """

    title: str
    question: str
    lead: str
    notes: Sequence[str]
    hint: str
    heads: Sequence[tuple[str, str]]
    rows: Sequence[PageRow]
    text_columns: Sequence[int]
    caution: str


def as_html(page: Page) -> str:
    """Return the whole page."""
    heads = "".join(
        f'<th title="{escape(meaning)}"{_text_class(i in page.text_columns)}>{escape(head)}</th>'
        for i, (head, meaning) in enumerate(page.heads)
    )
    body = "\n".join(_row(index, row) for index, row in enumerate(page.rows))
    panels = "\n".join(
        f'<template id="panel-{index}"><div class="panel">{row.panel}</div></template>'
        for index, row in enumerate(page.rows)
    )
    meanings = "".join(f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for head, text in page.heads)
    notes = "".join(f"<li>{escape(printable(note))}</li>" for note in page.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title><link rel="icon" href="{_ICON}"><style>{_STYLE}</style></head>
<body><h1>{escape(page.question)}</h1>
<p class="lead">{escape(page.lead)}</p>
<ul class="faint">{notes}</ul>
<h2>Layer by layer</h2>
<p class="faint">{escape(page.hint)} A click on a layer shows its heat map, its kernels and its twins; a click on a
heading sorts.</p>
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>
{body}
</tbody></table></div>
<h2>What the columns mean</h2>
<dl>{meanings}</dl>
<p class="faint">{escape(page.caution)}</p>
{panels}
<script>{_SCRIPT}</script></body></html>
"""


def _text_class(text: bool) -> str:
    return ' class="text"' if text else ""


def _row(index: int, row: PageRow) -> str:
    name = escape(printable(row.name))
    button = f'<button class="open" aria-expanded="false" title="{name}">{name}</button>'
    cells = "".join(f'<td class="{c.classes}" data-value="{escape(c.value)}">{c.content}</td>' for c in row.cells)
    return (
        f'<tr class="layer" data-panel="panel-{index}"><td class="text" data-value="{name}">{button}</td>{cells}</tr>'
    )


def cell(value: object, content: str, *, text: bool = False, classes: str = "") -> PageCell:
    """Return a plain cell that is sorted by ``value``."""
    return PageCell(printable(str(value)), escape(content), f"{'text ' if text else ''}{classes}".strip())


def ratio_cell(ratios: Sequence[float], scale: float) -> PageCell:
    """Return a cell with bars of one or two ``|cos|`` over chance, with a mark at 1."""
    names = ("first", "second") if len(ratios) > 1 else ("",)
    bars = "".join(
        f'<i class="{name}" style="width:{_BAR * min(1.0, ratio / scale):.1f}%"></i>'
        for name, ratio in zip(names, ratios, strict=True)
        if ratio == ratio
    )
    words = " → ".join(f"{ratio:.2f}" for ratio in ratios)
    mark = f'<b style="left:{_BAR / scale:.1f}%"></b>'
    return PageCell(str(ratios[-1]), f"{bars}{mark}<span>{words}</span>", "bar")


def report_page(
    rows: Sequence[LayerReport],
    title: str,
    notes: Sequence[str],
    threshold: float,
    views: Mapping[str, LayerView],
    correlations: Mapping[str, Tensor] | None = None,
) -> str:
    """Return the page of ``filterdiv inspect``.

    Args:
        rows: rows of the table.
        title: name of the inspected network.
        notes: origin of the weights and remarks, a line each.
        threshold: absolute cosine that makes two filters twins, for the text and the list of twins.
        views: views of every layer.
        correlations: correlations between the channels of layers that saw data.
    """
    columns = columns_of(rows)
    scale = 1.05 * max([2.0, *(row.over_chance for row in rows if row.over_chance == row.over_chance)])
    correlations = correlations or {}

    def cells(row: LayerReport) -> list[PageCell]:
        return [
            ratio_cell([row.over_chance], scale)
            if column == "over_chance"
            else cell(getattr(row, column), shown(row, column), text=column == "advice")
            for column in columns[1:]
        ]

    lines = [
        PageRow(row.layer, cells(row), layer_panel(views[row.layer], threshold, correlations.get(row.layer)))
        for row in rows
    ]
    page = Page(
        title=f"{title}: filter redundancy",
        question=f"How redundant are the filters of {title}?",
        lead=summary(rows, threshold),
        notes=notes,
        hint="The bar is |cos| over chance, the red mark what random filters have (1).",
        heads=[COLUMNS[column][:2] for column in columns],
        rows=lines,
        text_columns=[i for i, column in enumerate(columns) if column in ("layer", "advice")],
        caution=(
            "Mergeable filters have the same sign: behind a ReLU opposite ones compute different things. What would "
            "help names methods that did not lose accuracy in our own runs on small networks; measure it on yours."
        ),
    )
    return as_html(page)


def layer_panel(
    view: LayerView, threshold: float = NEAR_DUPLICATE, correlation: Tensor | None = None, side: str = ""
) -> str:
    """Return the HTML of one layer: heat map, kernels, twins, and with ``correlation`` the same for its channels.

    Args:
        view: the layer.
        threshold: ``|cos|`` above which two filters are twins.
        correlation: ``(J, J)`` correlation between its channels.
        side: heading over the panel, if several are shown.
    """
    heading = f'<section class="side"><h3>{escape(printable(side))}</h3></section>' if side else ""
    top = heat_map_top(view)
    twins = view.twins(threshold)
    parts = [heading, _heat_map(view, top), _mosaic(view), _twins(view, twins, threshold)]
    if correlation is not None:
        correlation = correlation.float().cpu()
        parts += [_channels(view, correlation), _unseen(view, correlation)]
    return "".join(parts)


def _picture(content: bytes, meaning: str, kind: str) -> str:
    return f'<img class="{kind}" alt="{escape(printable(meaning))}" src="{as_data(content)}">'


def _scale(low: str, high: str) -> str:
    bar = _picture(gradient(), f"colour scale from {low} to {high}", "scale")
    return f'{bar}<div class="ends"><span>{escape(low)}</span><span>{escape(high)}</span></div>'


def _heat_map(view: LayerView, top: float) -> str:
    many = "" if top >= 1.0 else " or more"
    return (
        f"<section><h3>Which filters are alike?</h3>"
        f"{_picture(heat_map_pixels(view.cosine, view.order, top), f'heat map of {view.name}', 'map')}"
        f"{_scale('|cos| 0', f'{top:.2f}{many} = {top / view.chance:.1f} x chance')}"
        f'<p class="faint">{view.count} filters of {view.fan_in} weights, alike ones side by side. Mean |cos| '
        f"{view.mean:.3f} = {view.mean / view.chance:.2f} x chance ({view.chance:.3f}).</p></section>"
    )


def _mosaic(view: LayerView) -> str:
    content, what, count = mosaic_pixels(view)
    some = f"{count} of {view.count}" if count < view.count else f"{view.count}"
    size = "x".join(map(str, view.kernels.shape[2:]))
    return (
        f"<section><h3>The kernels</h3>{_picture(content, f'kernels of {view.name}', 'mosaic')}"
        f'<p class="faint">{some} kernels {size} in the order of the heat map, {escape(what)}.</p></section>'
    )


def _pair_table(view: LayerView, pairs: Sequence[tuple[int, int, tuple[str, ...]]], heads: Sequence[str]) -> str:
    pictures = kernel_pixels(view, sorted({position for pair in pairs for position in pair[:2]}))
    lines = []
    for first, second, numbers in pairs:
        both = "".join(
            f"<td>{_picture(pictures[p], f'kernel {view.numbers[p]}', 'kernel')}</td><td>{view.numbers[p]}</td>"
            for p in (first, second)
        )
        lines.append(f"<tr>{both}{''.join(f'<td>{escape(number)}</td>' for number in numbers)}</tr>")
    columns = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return (
        f'<table><tr><th colspan="2">filter</th><th colspan="2">and</th>{columns}</tr>{"".join(lines)}</table>'
        if lines
        else ""
    )


def _listed(count: int, noun: str) -> str:
    pairs = "pair" if count == 1 else "pairs"
    return f"{count} {pairs} {noun}{f'; the first {_TWINS}' if count > _TWINS else ''}."


def _twins(view: LayerView, twins: Sequence[tuple[int, int, float]], threshold: float) -> str:
    table = _pair_table(view, [(i, j, (f"{cosine:+.3f}",)) for i, j, cosine in twins[:_TWINS]], ["cos"])
    note = _listed(len(twins), f"at |cos| > {threshold:g}") + (" A minus sign: opposite filters." if twins else "")
    return f'<section class="twins"><h3>Twins</h3>{table}<p class="faint">{escape(note)}</p></section>'


def _channels(view: LayerView, correlation: Tensor) -> str:
    content = heat_map_pixels(correlation.abs().nan_to_num(), view.order, 1.0)
    return (
        f"<section><h3>Which channels are alike on the data?</h3>"
        f"{_picture(content, f'heat map of the channels of {view.name}', 'map')}{_scale('|correlation| 0', '1')}"
        f'<p class="faint">The outputs of the filters, in the same order.</p></section>'
    )


def _unseen(view: LayerView, correlation: Tensor) -> str:
    pairs = in_function_only(correlation, view.signed)
    lines = [(p.first, p.second, (f"{p.correlation:+.3f}", f"{p.cosine:+.3f}")) for p in pairs[:_TWINS]]
    note = _listed(len(pairs), f"at |correlation| > {NEAR_DUPLICATE:g} whose |cos| is not")
    return (
        f'<section class="unseen"><h3>Alike in function, not in weights</h3>'
        f'{_pair_table(view, lines, ["corr", "cos"])}<p class="faint">{escape(note)}</p></section>'
    )
