"""The README's table of methods: each claim with its number, read from the result files."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from benchmarks.common.device import read_result
from benchmarks.common.paths import RESULTS
from benchmarks.training.runs import interval, read_runs

#: Callback or function, its card, what it does, when it helps.
_METHODS = (
    (
        "BasisOrthonormality",
        "orthonormality",
        "pushes the filters of a layer towards orthonormality; six published penalties in closed form",
        "you want filters as diverse as can be",
    ),
    (
        "CentripetalSGD",
        "centripetal",
        "makes filters of a cluster equal (C-SGD), then merges them: a narrower network with the same outputs",
        "you want a smaller network of the same class, without fine-tuning after the cut",
    ),
    (
        "share_filter_bases",
        "shared_basis",
        "lets the convolutions of a stage share one orthonormal set of filters (DSFB)",
        "parameters are what costs you, not time",
    ),
    (
        "RePr",
        "repr_",
        "drops the filters that overlap most for some epochs, brings them back orthogonal to all others",
        "a small network over-fits (published; not seen in our runs)",
    ),
    (
        "WeightAsynchronousUpdate",
        "async_update",
        "moves only a random subset of each layer's filters at every step (WAU)",
        "you study asynchronous updates; halving the learning rate does the same",
    ),
    (
        "EntropyDepthBound",
        "entropy_depth",
        "asks before training whether stages are deeper than the images' entropy suggests (a reconstructed rule)",
        "you choose an architecture and want a second opinion",
    ),
    (
        "ExpandNet",
        "expansion",
        "over-parameterises layers while they train and contracts them exactly; checkpoints are compact (ExpandNets)",
        "a compact network trains badly (published; not seen in our runs)",
    ),
    (
        "ChannelImportance",
        "channel_importance",
        "measures channels with gates (UCP), then cuts the least open ones through the channel graph",
        "you prune by a measured importance rather than by magnitude",
    ),
    (
        "share_anchored_filters",
        "shared_basis",
        "lets all convolutions of a stage use one kernel, with regulators (DACNN)",
        "parameters are what costs you, even more",
    ),
    (
        "WaveletReconstruction",
        "wavelet",
        "a fixed front layer, or a transform, that enhances edges",
        "edges carry your classes (not seen in our runs)",
    ),
    (
        "FilterSimilarityMonitor",
        "monitor",
        "shows how alike filters are, as scalars and figures in your logger; `filterdiv inspect` for a checkpoint",
        "always, and before any of the others",
    ),
)


def table() -> str:
    """Markdown: what it does, when it helps, time per step, evidence."""
    rows = ["| | what it does | it helps when | time per step | measured |", "|---|---|---|---|---|"]
    for name, room, what, when in _METHODS:
        link = f"[`{name}`](lightning_filterdiv/{room}/README.md)"
        rows.append(f"| {link} | {what} | {when} | {_COST[name]()} | {_EVIDENCE[name]()} |")
    return "\n".join(rows)


def _hooks(method: str) -> str:
    """Share of a ResNet-20 step that the hooks add, on a CPU and, where measured, on a GPU."""
    cpu, gpu = (
        [c["inside_hooks"] for c in record["costs"] if (c["method"], c["depth"]) == (method, 20)]
        for record in (read_result("overhead.json"), read_result("gpu/overhead.json"))
    )
    return f"+{100 * cpu[0]:.1f} %" + (f" (+{100 * gpu[0]:.0f} %)" if gpu else "")


def _changed(name: str) -> str:
    """What a step of the changed ResNet-20 takes beyond that of the plain one."""
    costs = read_result("structure_cost.json")["costs"]
    (cost,) = [c for c in costs if c["change"] == name and c.get("network", "ResNet-20") == "ResNet-20"]
    return f"{100 * (cost['ratio'] - 1):+.0f} %"


def _looks() -> str:
    look = read_result("monitor.json")["looks"]["resnet50"]
    return f"none; {look['seconds']:.1f} s per look at ResNet-50"


def _runs(folder: str, arm: str) -> dict[int, dict[str, Any]]:
    return {run["seed"]: run for run in read_runs(RESULTS / folder, [arm])[arm]}


def _difference(folder: str, arm: str, base: str, base_folder: str = "") -> str:
    """Paired difference of the test accuracy in points, with a 95 % interval where there are several seeds."""
    ours, theirs = _runs(folder, arm), _runs(base_folder or folder, base)
    seeds = sorted(set(ours) & set(theirs))
    points = [100 * (ours[seed]["test_accuracy"] - theirs[seed]["test_accuracy"]) for seed in seeds]
    return f"{interval(points, '+')} points ({len(points)} seed{'s' * (len(points) > 1)})"


def _rank(arm: str) -> str:
    """Effective rank after training, mean over layers and seeds."""
    ranks = [fmean(row["effective_rank"] for row in run["after"].values()) for run in _runs("fm5k-c3", arm).values()]
    return f"{fmean(ranks):.2f}"


def _diverse(arm: str) -> str:
    small, residual = (_difference(folder, arm, "baseline") for folder in ("fm5k-c3", "fm5k-resnet20"))
    ranks = f"effective rank {_rank('baseline')} to {_rank(arm)}"
    return f"three convolutions: {ranks}, accuracy {small}; ResNet-20: {residual}"


def _squeezed() -> str:
    merged = _runs("squeeze", "csgd")
    full, narrow = (next(iter(_runs("squeeze", arm).values())) for arm in ("full", "csgd"))
    changed = sum(run["predictions_that_differ"] for run in merged.values())
    return (
        f"MACs {100 * (narrow['macs'] / full['macs'] - 1):+.0f} %, {changed} of {10_000 * len(merged):,} "
        f"predictions changed by the merge, accuracy {_difference('squeeze', 'csgd', 'full')} against the full width, "
        f"{_difference('squeeze', 'csgd', 'prune')} against pruning"
    )


def _fewer(folder: str, arm: str, base: str) -> str:
    shared, plain = (next(iter(_runs(folder, name).values()))["parameters"] for name in (arm, base))
    return f"{100 * shared / plain:.0f} % of the parameters, accuracy {_difference(folder, arm, base)}"


_COST: dict[str, Callable[[], str]] = {
    "BasisOrthonormality": lambda: _hooks("soft"),
    "CentripetalSGD": lambda: _hooks("csgd"),
    "share_filter_bases": lambda: _changed("share_filter_bases"),
    "RePr": lambda: f"{_hooks('repr sub-network phase')} while filters are out",
    "WeightAsynchronousUpdate": lambda: _hooks("wau"),
    "EntropyDepthBound": lambda: "none",
    **{
        name: lambda name=name: _changed(name)  # type: ignore[misc]
        for name in ("ExpandNet", "ChannelImportance", "share_anchored_filters", "WaveletReconstruction")
    },
    "FilterSimilarityMonitor": _looks,
}
_EVIDENCE: dict[str, Callable[[], str]] = {
    "BasisOrthonormality": lambda: _diverse("soft"),
    "CentripetalSGD": _squeezed,
    "share_filter_bases": lambda: _fewer("shared_basis", "shared_penalty", "plain"),
    "RePr": lambda: _diverse("repr"),
    "WeightAsynchronousUpdate": lambda: _diverse("wau"),
    "EntropyDepthBound": lambda: (
        f"6 convolutions per stage against the bound's 3, equal parameters: "
        f"{_difference('entropy_depth', 'depth6', 'depth3')}"
    ),
    "ExpandNet": lambda: f"accuracy {_difference('fm5k-c3', 'expand_third', 'baseline')}",
    "ChannelImportance": lambda: (
        f"half of the filters, against the narrow network: accuracy {_difference('ucp', 'ucp', 'narrow', 'fm5k-c3')}, "
        f"{_difference('ucp', 'ucp_kept', 'narrow', 'fm5k-c3')} with weights kept, "
        f"{_difference('ucp', 'random_kept', 'narrow', 'fm5k-c3')} with kept ones at random"
    ),
    "share_anchored_filters": lambda: _fewer("fm5k-resnet20-14", "anchored", "baseline"),
    "WaveletReconstruction": lambda: f"accuracy {_difference('fm5k-c3', 'wavelet', 'baseline')}",
    "FilterSimilarityMonitor": lambda: "changes no weight (test)",
}


def composability(part: str) -> str:
    """Markdown: what happens when the row's callback is first in the list and the column's second, or stands beside it.

    Args:
        part: ``"pairs"`` or ``"beside"``.
    """
    found: dict[str, dict[str, str]] = read_result("composability.json")[part]
    columns = list(dict.fromkeys(name for row in found.values() for name in row))
    head = "first, then:" if part == "pairs" else "beside:"
    lines = [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        cells = ["" if c not in row else row[c] if row[c] in ("works", "swap") else "refused" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
