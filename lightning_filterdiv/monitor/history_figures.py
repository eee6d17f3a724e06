"""Figures of a whole run: redundancy by epoch, and events and forecasts of other callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from lightning_filterdiv.monitor.events import Deviations, FilterEvent
from lightning_filterdiv.monitor.figures import BLUE, RED, new_figure, shorten, title

__all__ = ["Snapshot", "depth_colour", "deviation_curves", "dropped_filters", "network_summary"]

_CARD = (4.9, 2.7)  # inches
_LABELLED_ROWS = 12
_LEAST = -3  # log2 of |cos| over chance: a layer of orthogonal filters would stretch the scale without end
_LEGEND = 12  # names
_FLOOR = 1e-9  # a deviation of exactly 0 on a log axis


class Snapshot(NamedTuple):
    """Snapshot of the network at one moment.

    Attributes:
        epoch: epochs completed.
        step: global step.
        over_chance: layer name -> mean ``|cos|`` of its filters over that of random ones.
    """

    epoch: int
    step: int
    over_chance: dict[str, float]

    def scaled(self, chance: Mapping[str, float]) -> Snapshot:
        """Divide the numbers of the layers in ``chance`` by it."""
        return self._replace(over_chance={n: value / chance.get(n, 1.0) for n, value in self.over_chance.items()})


def network_summary(
    looks: Sequence[Snapshot], events: Sequence[FilterEvent] = (), deviations: Deviations | None = None
) -> Figure:
    """Draw all layers over the epochs: mean ``|cos|`` over chance as colour, their mean beside it, events as lines.

    The colour scale is logarithmic, so that layers at 1.5 times chance stay visible beside one at 15 times. Chance is
    in its middle: orange layers are more alike than random filters, purple ones more diverse. Grey is a single filter.

    Args:
        looks: at least one snapshot, epochs ascending. Rows are the layers of the last one.
        events: moments to mark.
        deviations: deviations by layer. The largest one and its forecast are drawn on a log axis over the same epochs.
    """
    layers = list(looks[-1].over_chance)
    values = np.array([[look.over_chance.get(layer, np.nan) for look in looks] for layer in layers], dtype=float)
    # A layer without a pair of filters has no ratio.
    paired = np.where((values > 0).any(axis=1))[0]
    totals = values[paired if len(paired) else slice(None)].mean(axis=0)
    # Time Series fits pictures into cards of this shape. A tall picture would be unreadable there.
    figure = new_figure(_CARD[1], width=_CARD[0])
    panels = figure.subplot_mosaic(
        [["layers", "total"], ["layers", "deviation"]] if deviations else [["layers", "total"]],
        sharex=True,
        width_ratios=[1.5, 1],
    )
    axes, total = panels["layers"], panels["total"]
    epochs = np.array([look.epoch for look in looks], dtype=float)
    # A snapshot fills the time since the one before it. Events after epoch e are between the snapshots at e and e + 1.
    edges = np.concatenate([[epochs[0] - 0.5], epochs + 0.5])
    total.plot(epochs, totals, color=BLUE, linewidth=1.6, marker="o", markersize=2.5)
    total.axhline(1.0, color=RED, linestyle=(0, (3, 1.5)), linewidth=1.0)
    total.margins(y=0.25)
    total.set_title("mean of all layers", fontsize=7, loc="right")
    norm = _ratio_scale(values)
    colours = colormaps["PuOr_r"].with_extremes(bad="0.6")
    drawn = np.ma.masked_invalid(np.log2(np.where(values > 0, values, np.nan)))
    mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1), drawn, cmap=colours, norm=norm)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05, ticks=_ratio_ticks(norm), extend="min")
    bar.ax.minorticks_off()
    bar.ax.set_yticklabels([f"{2.0**tick:g} x" for tick in _ratio_ticks(norm)])
    bar.ax.tick_params(labelsize=7)
    stride = -(-len(layers) // _LABELLED_ROWS)
    names = [shorten(name) for name in _own_parts(layers)]
    axes.set_yticks(np.arange(0, len(layers), stride) + 0.5, names[::stride])
    axes.invert_yaxis()
    axes.set_xlim(edges[0], edges[-1])
    if deviations:
        _draw_largest(panels["deviation"], deviations, looks)
    for panel in panels.values():
        panel.tick_params(labelsize=7)
    for panel in list(panels.values())[1:]:
        panel.spines[["top", "right"]].set_visible(False)
    marked = _mark(axes, total, events)
    change = " → ".join(f"{mean:.2f} x" for mean in (totals if len(looks) < 2 else totals[[0, -1]]))
    title(
        figure,
        "How alike are the filters of each layer?",
        "colour: mean |cos| over chance (white, 1 x: random)",
        f"all layers: {change}{f';  {marked}' if marked else ''}",
    )
    figure.supxlabel("epochs completed (0: before training)", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True) if len(looks) > 1 else FixedLocator(epochs.tolist()))
    return figure


def _own_parts(layers: Sequence[str]) -> list[str]:
    """Names without the modules that all layers stand in: ``net.stem``, ``net.head`` -> ``stem``, ``head``."""
    paths = [layer.split(".") for layer in layers]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return [".".join(path[shared:]) for path in paths]


def _ratio_scale(values: npt.NDArray[np.float64]) -> TwoSlopeNorm:
    """Return a colour scale of logarithms to base 2 with chance in the middle: one colour for more alike filters, one
    for more diverse."""
    known = np.log2(values[np.isfinite(values) & (values > 0)])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    return TwoSlopeNorm(0.0, min(-1.0, max(low, _LEAST)), max(high, 1.0))


def _ratio_ticks(norm: TwoSlopeNorm) -> list[float]:
    """Return whole logarithms within the scale, at most six."""
    assert norm.vmin is not None
    assert norm.vmax is not None
    powers = [float(power) for power in range(_LEAST, 12) if norm.vmin <= power <= norm.vmax]
    return powers if len(powers) <= 6 else [power for power in powers if power % 2 == 0]


def _mark(axes: Axes, total: Axes, events: Sequence[FilterEvent]) -> str:
    """Draw vertical lines with a word above each."""
    for event in events:
        axes.axvline(event.epoch + 0.5, color="white", linewidth=2.4)
        for panel in (axes, total):
            panel.axvline(event.epoch + 0.5, color=RED, linewidth=1.2)
        axes.annotate(
            event.kind,
            (event.epoch + 0.5, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            rotation=45 if len(events) > 2 else 0,
            ha="left" if len(events) > 2 else "center",
            fontsize=7,
            color=RED,
        )
    sources = list(dict.fromkeys(event.source for event in events))
    return f"red: {', '.join(sources)}" if sources else ""


def _draw_largest(axes: Axes, deviations: Deviations, looks: Sequence[Snapshot]) -> None:
    steps = np.array([look.step for look in looks], dtype=float)
    epochs = np.array([look.epoch for look in looks], dtype=float)
    worst: dict[int, tuple[float, float]] = {}
    for points in deviations.values():
        for step, measured, forecast in points:
            old = worst.get(step, (0.0, 0.0))
            worst[step] = (max(old[0], measured), max(old[1], forecast))
    at = np.interp(sorted(worst), steps, epochs)
    axes.plot(at, [max(worst[step][0], _FLOOR) for step in sorted(worst)], color=BLUE, linewidth=1.6)
    axes.plot(at, [max(worst[step][1], _FLOOR) for step in sorted(worst)], color="black", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_title("distance from cluster\nmean (dashed: forecast)", fontsize=7, loc="right")


def dropped_filters(events: Sequence[FilterEvent], counts: Mapping[str, int], max_layers: int = 8) -> Figure | None:
    """Draw the filters dropped in each cycle: one strip per layer, one line per cycle, one cell per filter.

    Args:
        events: events; those of kind ``"drop"`` are drawn.
        counts: layer name -> number of filters. A layer that is missing ends at its last dropped filter.
        max_layers: number of layers to draw, those that lost most.

    Returns:
        ``None`` if nothing was dropped.
    """
    drops = [event for event in events if event.kind == "drop" and event.filters]
    if not drops:
        return None
    lost: dict[str, int] = {}
    for event in drops:
        for layer, rows in event.filters.items():
            lost[layer] = lost.get(layer, 0) + len(rows)
    chosen = sorted(lost, key=lambda layer: lost[layer], reverse=True)[:max_layers]
    layers = [layer for layer in lost if layer in chosen]
    strip = 0.3 + 0.13 * len(drops)
    figure = new_figure(1.1 + (strip + 0.2) * len(layers))
    grid = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, layer in zip(grid, layers, strict=True):
        seen = [index for event in drops for index in event.filters.get(layer, [])]
        count = counts.get(layer, max(seen) + 1)
        table = np.zeros((len(drops), count))
        for row, event in enumerate(drops):
            table[row, event.filters.get(layer, [])] = 1.0
        axes.pcolormesh(
            np.arange(count + 1) - 0.5,
            np.arange(len(drops) + 1),
            table,
            cmap=ListedColormap(["#e8edf3", RED]),
            vmin=0,
            vmax=1,
            edgecolors="white",
            linewidth=0.4,
        )
        axes.set_yticks(np.arange(len(drops)) + 0.5, [f"cycle {event.cycle}" for event in drops])
        axes.invert_yaxis()
        axes.tick_params(labelsize=7.5, length=0)
        axes.spines[:].set_visible(False)
        twice = sum(table.sum(axis=0) > 1)
        again = f", {int(twice)} more than once" if len(drops) > 1 else ""
        axes.set_title(
            f"{shorten(layer, 40)}: {len(set(seen))} of {count} filters were dropped{again}", fontsize=7, loc="left"
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
    grid[-1].set_xlabel("filter number", fontsize=8)
    title(figure, f"Which filters did {drops[0].source} drop?", "Each red cell is a filter that was out in that cycle")
    return figure


def deviation_curves(deviations: Deviations, layers: Sequence[str] = ()) -> Figure | None:
    """Draw the deviation of filters from their cluster's mean by layer on a log axis, and the forecast ``exp(-K)``.

    Colours go by depth, from the first layer (dark) to the last (bright).

    Args:
        deviations: layer -> (step, measured, forecast).
        layers: layers in the order of the network; others come last.

    Returns:
        ``None`` if nothing was measured.
    """
    if not deviations:
        return None
    order = [layer for layer in layers if layer in deviations]
    order += [layer for layer in deviations if layer not in order]
    named = {order[round(i * (len(order) - 1) / (_LEGEND - 1))] for i in range(_LEGEND)} if order[_LEGEND:] else order
    figure = new_figure(3.2 + 0.16 * min(len(order), _LEGEND) / 2)
    axes = figure.add_subplot()
    for index, layer in enumerate(order):
        steps, measured, forecast = (np.array(column, dtype=float) for column in zip(*deviations[layer], strict=True))
        colour = depth_colour(index, len(order))
        label = shorten(layer) if layer in named else None
        axes.plot(steps, np.maximum(measured, _FLOOR), color=colour, linewidth=1.4, label=label)
        axes.plot(steps, np.maximum(forecast, _FLOOR), color=colour, linewidth=0.9, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("distance from the cluster's mean,\nrelative to the start", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, color="0.9")
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=2)
    some = f"; {len(named)} of {len(order)} layers are named" if len(named) < len(order) else ""
    title(
        figure,
        "How equal are the filters of a cluster?",
        "solid: measured;  dashed: forecast exp(-K)",
        f"colour: depth, from the first layer (dark) to the last{some}",
    )
    return figure


def depth_colour(index: int, count: int) -> tuple[float, float, float, float]:
    """Return the colour of layer ``index`` of ``count``."""
    return colormaps["viridis"](0.92 * index / max(1, count - 1))
