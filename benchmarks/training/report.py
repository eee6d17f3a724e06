r"""Tables of a folder of runs: mean accuracy, 95 % interval, paired difference to the baseline and its p-value.

    python -m benchmarks.training.report benchmarks/results/fm5k-c3
    python -m benchmarks.training.report benchmarks/results/fm5k-c3 \
        --csv table.csv --plot curves.png --differences seeds.png

p-values are those of a paired t-test over the seeds that a method shares with the baseline, Holm-corrected over all
methods of the table.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.training.runs import half_interval, read_runs

__all__ = ["Row", "accuracy_cells", "curves", "difference_figure", "event_table", "summary", "table"]


class Row(NamedTuple):
    """One method over its seeds; accuracies in per cent."""

    method: str
    seeds: int
    mean: float
    half: float  # of the 95 % interval; NaN for one seed
    difference: float  # to the baseline, mean over shared seeds; NaN without two of them
    difference_half: float
    p: float  # Holm-corrected
    score_before: float  # mean orthogonality score O over layers
    score_after: float
    effective_rank: float  # after, relative
    parameters: int | None = None  # of the trained network, where recorded


def _holm(p: dict[str, float]) -> dict[str, float]:
    """The smallest p-value times the number of comparisons, the next times one less, never falling."""
    adjusted: dict[str, float] = {}
    floor = 0.0
    for position, name in enumerate(sorted(p, key=lambda name: p[name])):
        floor = adjusted[name] = max(floor, min(1.0, p[name] * (len(p) - position)))
    return adjusted


def _metric(runs: Sequence[dict[str, Any]], when: str, metric: str) -> float:
    values = [row[metric] for run in runs for row in run.get(when, {}).values()]
    return fmean(values) if values else float("nan")


def summary(runs: dict[str, list[dict[str, Any]]], baseline: str = "baseline") -> list[Row]:
    """One row per method.

    Args:
        runs: what :func:`~benchmarks.training.runs.read_runs` returned.
        baseline: what differences are taken to.
    """
    accuracy = {m: {r["seed"]: 100 * r["test_accuracy"] for r in of} for m, of in runs.items()}
    differences: dict[str, list[float]] = {}
    p: dict[str, float] = {}
    for method, by_seed in accuracy.items():
        shared = sorted(by_seed.keys() & accuracy.get(baseline, {}).keys())
        if method != baseline and len(shared) > 1:
            differences[method] = [by_seed[seed] - accuracy[baseline][seed] for seed in shared]
            # Of a method that changes no weight all differences are zero, and t is 0 / 0.
            p[method] = float(stats.ttest_1samp(differences[method], 0.0).pvalue) if any(differences[method]) else 1.0
    adjusted = _holm(p)
    nan = float("nan")
    return [
        Row(
            method,
            len(of),
            fmean(accuracy[method].values()),
            half_interval(list(accuracy[method].values())),
            fmean(differences[method]) if method in differences else nan,
            half_interval(differences.get(method, [])),
            adjusted.get(method, nan),
            _metric(of, "before", "orthogonality_score"),
            _metric(of, "after", "orthogonality_score"),
            _metric(of, "after", "effective_rank"),
            of[0].get("parameters"),
        )
        for method, of in runs.items()
    ]


def _with_half(mean: float, half: float, sign: str = "") -> str:
    if np.isnan(mean):
        return ""
    return f"{mean:{sign}.2f}" + ("" if np.isnan(half) else f" ± {half:.2f}")


def table(rows: Sequence[Row], baseline: str = "baseline", gpu: Sequence[Row] = (), gpu_name: str = "") -> str:
    """Markdown, with a column of parameters where they differ.

    Args:
        rows: from :func:`summary`.
        baseline: what differences were taken to.
        gpu: the same of runs on a GPU, with their own baseline: more columns.
        gpu_name: name of that GPU.
    """
    sizes = len({row.parameters for row in rows}) > 1
    names = ["method", "seeds", *(["parameters"] if sizes else []), "test accuracy %", f"difference to {baseline}", "p",
             "mean O before, after", "effective rank"]  # fmt: skip
    names += [f"{gpu_name}: seeds", "test accuracy %", "difference", "p"] if gpu else []
    there = {row.method: row for row in gpu}
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        scores = "" if np.isnan(row.score_after) else f"{row.score_before:.3f}, {row.score_after:.3f}"
        rank = "" if np.isnan(row.effective_rank) else f"{row.effective_rank:.3f}"
        size = [] if not sizes else ["" if row.parameters is None else f"{row.parameters:,}"]
        cells = [row.method, str(row.seeds), *size, *accuracy_cells(row), scores, rank]
        if gpu:
            other = there.get(row.method)
            cells += [""] * 4 if other is None else [str(other.seeds), *accuracy_cells(other)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def accuracy_cells(row: Row) -> list[str]:
    """Mean, difference and p-value, each with its interval, empty where there is none."""
    p = "" if np.isnan(row.p) else f"{row.p:.3f}"
    return [_with_half(row.mean, row.half), _with_half(row.difference, row.difference_half, "+"), p]


def event_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: accuracy (first test images) around every event of RePr, mean over the runs that recorded a curve."""
    columns = ["method", "event", "epoch", "before (end: best epoch)", "right after (end: last epoch)"]
    lines = [f"| {' | '.join([*columns, 'an epoch later', 'training loss after that epoch'])} |"]
    lines.append("|---|---|---|---|---|---|---|")
    for method, of in runs.items():
        recorded = [run["curve"] for run in of if run.get("curve")]
        for at, row in enumerate(recorded[0] if recorded else []):
            if "event" in row:
                around = [[100 * curve[i]["accuracy"] for i in (at - 1, at, at + 1)] for curve in recorded]
                loss = fmean(curve[at + 1]["loss"] for curve in recorded)
                numbers = " | ".join(f"{fmean(column):.1f}" for column in zip(*around, strict=True))
                lines.append(f"| {method} | {row['event']} | {row['epoch']} | {numbers} | {loss:.3f} |")
        if recorded:
            best = fmean(max(100 * row["accuracy"] for row in curve if "loss" in row) for curve in recorded)
            last = fmean(100 * curve[-1]["accuracy"] for curve in recorded)
            loss = fmean(curve[-1]["loss"] for curve in recorded)
            epoch = recorded[0][-1]["epoch"]
            lines.append(
                f"| {method} | end of the fit (mean of {len(recorded)} runs) | {epoch} | {best:.1f} | {last:.1f} | "
                f"| {loss:.4f} |"
            )
    return "\n".join(lines)


def curves(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Accuracy and training loss after every epoch, mean over seeds, one line per method."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for method, of in runs.items():
        epochs = [[row for row in run["curve"] if "loss" in row] for run in of if run.get("curve")]
        if not epochs:
            continue
        shortest = min(len(rows) for rows in epochs)
        x = [row["epoch"] for row in epochs[0][:shortest]]
        for panel, key, scale in ((accuracy, "accuracy", 100.0), (loss, "loss", 1.0)):
            if key in epochs[0][0]:
                mean = np.mean([[scale * row[key] for row in rows[:shortest]] for rows in epochs], axis=0)
                panel.plot(x, mean, label=method, linewidth=1.2)
    accuracy.set_ylabel("accuracy on test images, %")
    loss.set_ylabel("training loss")
    loss.set_yscale("log")
    for panel in (accuracy, loss):
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    loss.legend(fontsize="x-small", ncols=2)
    return figure


def difference_figure(runs: dict[str, list[dict[str, Any]]], baseline: str = "baseline") -> Figure:
    """Every method's difference to the baseline: seeds as dots, mean and 95 % interval as a bar, best first.

    Args:
        runs: what :func:`~benchmarks.training.runs.read_runs` returned.
        baseline: what differences are taken to.

    Raises:
        ValueError: no method shares two seeds with the baseline.
    """
    rows = sorted(
        (row for row in summary(runs, baseline) if not np.isnan(row.difference)), key=lambda row: row.difference
    )
    if not rows:
        raise ValueError(f"no method shares two seeds with {baseline!r}: there is no interval to draw")
    accuracy = {m: {r["seed"]: 100 * r["test_accuracy"] for r in of} for m, of in runs.items()}
    figure = Figure(figsize=(7.0, 0.9 + 0.27 * len(rows)), layout="constrained")
    panel = figure.subplots()
    for height, row in enumerate(rows):
        color = "C0" if row.p < 0.05 else "0.45"
        seeds = sorted(accuracy[row.method].keys() & accuracy[baseline].keys())
        points = [accuracy[row.method][seed] - accuracy[baseline][seed] for seed in seeds]
        panel.plot(points, [height] * len(points), "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
        panel.errorbar(row.difference, height, xerr=row.difference_half, fmt="|", color=color, markersize=11, capsize=0)
    panel.axvline(0.0, color="black", linewidth=0.8)
    names = [f"{row.method}  ({'p < 0.001' if row.p < 0.0005 else f'p = {row.p:.3f}'})" for row in rows]
    panel.set_yticks(range(len(rows)), names, fontsize="small")
    panel.set_xlabel(
        f"difference to {baseline}, points of test accuracy\n"
        f"dots: seeds; bars: mean and 95 % interval; blue: Holm-corrected p < 0.05",
        fontsize="small",
    )
    panel.grid(axis="x", alpha=0.3)
    return figure


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--baseline", default="baseline")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="picture of accuracy and loss over the epochs")
    parser.add_argument("--differences", type=Path, help="picture of every method's difference to the baseline")
    options = parser.parse_args()
    try:
        runs = read_runs(options.folder, options.methods)
    except FileNotFoundError as error:
        parser.error(str(error))
    rows = summary(runs, options.baseline)
    print(table(rows, options.baseline))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(rows)
    if options.plot:
        curves(runs).savefig(options.plot, dpi=110)
    if options.differences:
        try:
            difference_figure(runs, options.baseline).savefig(options.differences, dpi=110)
        except ValueError as error:
            parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
