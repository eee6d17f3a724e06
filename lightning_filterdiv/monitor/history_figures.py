"""Figures of what happened over a run: redundancy by epoch, and the events and forecasts of other callbacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lightning_filterdiv.monitor.events import Deviations, FilterEvent
from lightning_filterdiv.monitor.figures import BLUE, RED, new_figure, shorten, title

__all__ = ["Snapshot", "deviation_curves", "dropped_filters", "redundancy_timeline"]

_LABELLED_ROWS = 40
_FLOOR = 1e-9  # a deviation of exactly 0 on a log axis


class Snapshot(NamedTuple):
    """One look at the network.

    Attributes:
        epoch: epochs completed.
        step: global step.
        means: layer name -> mean ``|cos|``.
    """

    epoch: int
    step: int
    means: dict[str, float]


def redundancy_timeline(
    looks: Sequence[Snapshot], events: Sequence[FilterEvent] = (), deviations: Deviations | None = None
) -> Figure:
    """Mean ``|cos|`` of every layer over the epochs as colour, events as lines, C-SGD's deviation below it.

    Args:
        looks: at least one, epochs ascending; rows are the layers of the last one.
        events: moments to mark.
        deviations: by layer; the largest one and its forecast are drawn on a log axis under the same epochs.
    """
    layers = list(looks[-1].means)
    values = np.array([[look.means.get(layer, np.nan) for look in looks] for layer in layers])
    below = 1.1 if deviations else 0.0
    figure = new_figure(min(9.5, 1.5 + 0.17 * max(5, len(layers))) + below)
    if deviations:
        axes, lower = figure.subplots(2, 1, sharex=True, height_ratios=[max(1.0, 0.2 * len(layers)), below])
    else:
        axes, lower = figure.add_subplot(), None
    epochs = np.array([look.epoch for look in looks], dtype=float)
    # A look fills the time since the one before it; what happens after epoch e stands between the looks at e and e + 1.
    edges = np.concatenate([[epochs[0] - 0.5], epochs + 0.5])
    mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1), values, cmap="viridis", vmin=0.0)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("mean |cos| of its filters", fontsize=8)
    stride = -(-len(layers) // _LABELLED_ROWS)
    axes.set_yticks(np.arange(0, len(layers), stride) + 0.5, [shorten(layer) for layer in layers[::stride]])
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlim(edges[0], edges[-1])
    marked = _mark(axes, events)
    title(
        figure,
        "How alike are the filters of each layer over the epochs?",
        f"dark: diverse filters, bright: alike ones{f';  {marked}' if marked else ''}",
    )
    last = axes if lower is None else lower
    last.set_xlabel("epochs completed (0: before training)", fontsize=8)
    last.xaxis.get_major_locator().set_params(integer=True)
    if lower is not None and deviations:
        _draw_largest(lower, deviations, looks)
    return figure


def _mark(axes: Axes, events: Sequence[FilterEvent]) -> str:
    """Vertical lines with a word above each."""
    for event in events:
        axes.axvline(event.epoch + 0.5, color="white", linewidth=2.4)
        axes.axvline(event.epoch + 0.5, color=RED, linewidth=1.2)
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
    axes.set_ylabel("distance from\ncluster mean,\ndashed: forecast", fontsize=7)
    axes.tick_params(labelsize=7)


def dropped_filters(events: Sequence[FilterEvent], counts: Mapping[str, int], max_layers: int = 8) -> Figure | None:
    """Which filters were dropped in which cycle: one strip per layer, one line per cycle, one cell per filter.

    Args:
        events: those of kind ``"drop"`` are drawn.
        counts: layer name -> number of filters; a layer that is not named ends at its last dropped filter.
        max_layers: layers drawn, those that lost most.

    Returns:
        ``None`` when nothing was dropped.
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


def deviation_curves(deviations: Deviations, max_layers: int = 8) -> Figure | None:
    """Deviation of filters from their cluster's mean by layer on a log axis, against the forecast ``exp(-K)``.

    Args:
        deviations: layer -> (step, measured, forecast).
        max_layers: layers drawn, those with the largest deviation at the end.

    Returns:
        ``None`` when nothing was measured.
    """
    if not deviations:
        return None
    chosen = sorted(deviations, key=lambda layer: deviations[layer][-1][1], reverse=True)[:max_layers]
    layers = [layer for layer in deviations if layer in chosen]
    figure = new_figure(3.2 + 0.16 * len(layers) / 2)
    axes = figure.add_subplot()
    colours = [f"C{index}" for index in range(10)]
    for index, layer in enumerate(layers):
        steps, measured, forecast = (np.array(column, dtype=float) for column in zip(*deviations[layer], strict=True))
        colour = colours[index % len(colours)]
        axes.plot(steps, np.maximum(measured, _FLOOR), color=colour, linewidth=1.6, label=shorten(layer))
        axes.plot(steps, np.maximum(forecast, _FLOOR), color=colour, linewidth=1.0, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("distance from the cluster's mean,\nrelative to the start", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, color="0.9")
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=2)
    title(figure, "How equal are the filters of a cluster?", "solid: measured;  dashed: forecast exp(-K)")
    return figure
