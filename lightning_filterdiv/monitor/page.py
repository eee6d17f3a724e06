"""The report as one self-contained HTML page: no file beside it, nothing from the network, light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_filterdiv.files import printable
from lightning_filterdiv.monitor.report import COLUMNS, LayerReport, summary

__all__ = ["Picture", "as_html", "as_png"]

#: (caption, pixels).
Picture = tuple[str, npt.NDArray[np.uint8]]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --faint: #5b6675; --line: #d8dee6; --page: #fff; --bar: #8fb3d9;
  --mark: #c0392b; --note: #f2f5f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --faint: #9aa5b4; --line: #39424f; --page: #14181e;
  --bar: #3f6f9f; --mark: #ff7f6e; --note: #1d232b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { font-size: 1.05rem; background: var(--note); padding: .8rem 1rem; border-radius: 8px; }
p, li { color: var(--ink); } .faint { color: var(--faint); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { cursor: pointer; position: sticky; top: 0; background: var(--page); } th:hover { text-decoration: underline; }
th.text, td.text { text-align: left; } td.bar { position: relative; min-width: 9rem; }
td.bar i { position: absolute; left: 0; top: 20%; height: 60%; background: var(--bar); }
td.bar b { position: absolute; top: 10%; height: 80%; width: 2px; background: var(--mark); }
td.bar span { position: relative; }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }
figure img { background: #fff; border-radius: 8px; border: 1px solid var(--line); max-width: 100%; width: 350px; }
dl { display: grid; grid-template-columns: max-content auto; gap: .2rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
"""
# Sorting by a click on a heading; cells carry the number in data-value.
_SCRIPT = """
for (const [index, head] of [...document.querySelectorAll('th')].entries()) {
  let down = false;
  head.addEventListener('click', () => {
    down = !down;
    const body = document.querySelector('tbody'), key = row => row.cells[index].dataset.value;
    const compare = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
    body.append(...[...body.rows].sort((a, b) => down ? compare(b, a) : compare(a, b)));
  });
}
"""
# An icon of its own, or the browser would ask for favicon.ico.
_ICON = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E"


def as_html(
    rows: Sequence[LayerReport], title: str, notes: Sequence[str], threshold: float, pictures: Sequence[Picture]
) -> str:
    """The whole page.

    Args:
        rows: of the table.
        title: what was inspected.
        notes: where the weights come from and what to keep in mind, a line each.
        threshold: of ``|cos|``, for the text.
        pictures: shown below the table, embedded.
    """
    scale = max([1e-9, *(row.mean_abs_cosine for row in rows if row.mean_abs_cosine == row.mean_abs_cosine)])
    scale = max(scale, *(row.random_abs_cosine for row in rows)) * 1.05
    heads = "".join(
        f'<th title="{escape(meaning)}"{_text_class(column)}>{escape(head)}</th>'
        for column, (head, meaning) in COLUMNS.items()
    )
    body = "\n".join(f"<tr>{''.join(_cell(row, column, scale) for column in COLUMNS)}</tr>" for row in rows)
    meanings = "".join(f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for head, text in COLUMNS.values())
    figures = "\n".join(_figure(*picture) for picture in pictures)
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}: filter redundancy</title><link rel="icon" href="{_ICON}"><style>{_STYLE}</style></head>
<body><h1>How redundant are the filters of {escape(title)}?</h1>
<p class="lead">{escape(summary(rows, threshold))}</p>
<ul class="faint">{listed}</ul>
<h2>Layer by layer</h2>
<p class="faint">The bar is the mean |cos| of two filters, the red mark what random filters have. A click on a heading
sorts.</p>
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>
{body}
</tbody></table></div>
<h2>The filters</h2>
{figures}
<h2>What the columns mean</h2>
<dl>{meanings}</dl>
<p class="faint">Merging counts opposite filters too (cos near -1); behind a ReLU only filters of the same sign can be
merged without loss. What would help is a rule of thumb from these numbers, not a measurement.</p>
<script>{_SCRIPT}</script></body></html>
"""


def _text_class(column: str) -> str:
    return ' class="text"' if column in ("layer", "advice") else ""


def _cell(row: LayerReport, column: str, scale: float) -> str:
    value = getattr(row, column)
    if column == "mean_abs_cosine" and value == value:
        bar = f'<i style="width:{100 * value / scale:.1f}%"></i>'
        mark = f'<b style="left:{100 * row.random_abs_cosine / scale:.1f}%"></b>'
        return f'<td class="bar" data-value="{value}">{bar}{mark}<span>{value:.3f}</span></td>'
    shown = f"{value:.3f}" if isinstance(value, float) else escape(printable(str(value)))
    return f'<td{_text_class(column)} data-value="{escape(printable(str(value)))}">{shown}</td>'


def as_png(pixels: npt.NDArray[np.uint8], *, optimize: bool = False) -> bytes:
    """Content of a PNG file; a smaller one takes longer."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png", optimize=optimize)
    return file.getvalue()


def _figure(caption: str, pixels: npt.NDArray[np.uint8]) -> str:
    source = base64.b64encode(as_png(pixels, optimize=True)).decode()
    return f'<figure><img alt="{escape(printable(caption))}" src="data:image/png;base64,{source}"></figure>'
