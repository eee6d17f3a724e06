"""Tables of methods with purpose and measured gain. Numbers are read from the result files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from statistics import fmean
from typing import Any

from benchmarks.common.device import read_result
from benchmarks.common.paths import RESULTS
from benchmarks.training.runs import interval, read_runs

#: Goal, callback or function, its card, what it does. These did in our runs what they are for.
_WORKED = (
    ("a smaller network with the same outputs", "CentripetalSGD", "centripetal", "makes filters equal and merges them"),
    (
        "filters that do not overlap",
        "BasisOrthonormality",
        "orthonormality",
        "adds one of six published penalties; measured with `soft`",
    ),
    (
        "fewer parameters",
        "share_filter_bases",
        "shared_basis",
        "layers of a stage combine one set of filters, each in its own way",
    ),
    ("far fewer parameters", "share_anchored_filters", "shared_basis", "layers of a stage use the same kernel"),
    ("see how alike filters are", "FilterSimilarityMonitor", "monitor", "scalars, figures and reports"),
)
#: Methods whose published gain our runs did not show, or showed for a random choice as well.
_NOT_SEEN = (
    ("diverse filters by dropping some", "RePr", "repr_", "drops the most alike filters for a while and regrows them"),
    ("diverse filters by partial updates", "WeightAsynchronousUpdate", "async_update", "moves a random half each step"),
    ("a compact network that trains better", "ExpandNet", "expansion", "trains a larger one and contracts it exactly"),
    ("a better choice of what to prune", "ChannelImportance", "channel_importance", "measures channels by gates (UCP)"),
    ("images with sharper edges", "WaveletReconstruction", "wavelet", "a fixed layer in front of the network"),
    ("a shallower network", "EntropyDepthBound", "entropy_depth", "bounds the depth by the entropy of the images"),
)
#: Explanation of the numbers for readers who have the package alone.
_NOTE = (
    "Accuracies are differences to the same training without the method, in points with a 95 % interval, on 5,000 "
    "training images of Fashion-MNIST. The repository has the result files and a card for each method."
)


def table(part: str) -> str:
    """Markdown: goal, method, what we measured.

    Args:
        part: ``"worked"`` or ``"not_seen"``.
    """
    rows = ["| you want | use | what we measured |", "|---|---|---|"]
    for goal, name, room, what in _WORKED if part == "worked" else _NOT_SEEN:
        link = f"[`{name}`](lightning_filterdiv/{room}/README.md)"
        rows.append(f"| {goal} | {link}: {what} | {_EVIDENCE[name]()} |")
    return "\n".join(rows)


def methods_file() -> str:
    """JSON for ``filterdiv methods``: the rows of both tables, without links."""
    parts = [
        {
            "title": title,
            "methods": [{"name": name, "does": what, "measured": _EVIDENCE[name]()} for _, name, _, what in rows],
        }
        for title, rows in (("Worked in our runs", _WORKED), ("Published gains that we did not see", _NOT_SEEN))
    ]
    return json.dumps({"parts": parts, "note": _NOTE}, indent=1, ensure_ascii=False) + "\n"


def cost_table() -> str:
    """Markdown: what each method adds to a training step."""
    rows = ["| method | time per step of ResNet-20 |", "|---|---|"]
    for _, name, room, _ in _WORKED + _NOT_SEEN:
        rows.append(f"| [`{name}`](../lightning_filterdiv/{room}/README.md) | {_COST[name]()} |")
    return "\n".join(rows)


def _hooks(method: str) -> str:
    """Share of a ResNet-20 step that the hooks add, on a CPU and, where measured, on a GPU."""
    cpu, gpu = (
        [c["inside_hooks"] for c in record["costs"] if (c["method"], c["depth"]) == (method, 20)]
        for record in (read_result("overhead.json"), read_result("gpu/overhead.json"))
    )
    return f"+{100 * cpu[0]:.1f} %" + (f" (+{100 * gpu[0]:.0f} %)" if gpu else "")


def _changed(name: str) -> str:
    """Return the extra time of a step of the changed ResNet-20, relative to the plain one."""
    costs = read_result("structure_cost.json")["costs"]
    (cost,) = [c for c in costs if c["change"] == name and c.get("network", "ResNet-20") == "ResNet-20"]
    return f"{100 * (cost['ratio'] - 1):+.0f} %"


def _looks() -> str:
    look = read_result("monitor.json")["looks"]["resnet50"]
    return f"none; {look['CPU seconds']:.1f} CPU seconds per snapshot of ResNet-50"


def _runs(folder: str, arm: str) -> dict[int, dict[str, Any]]:
    return {run["seed"]: run for run in read_runs(RESULTS / folder, [arm])[arm]}


def _difference(folder: str, arm: str, base: str, base_folder: str = "") -> str:
    """Paired difference of the test accuracy in points, with a 95 % interval where there are several seeds."""
    ours, theirs = _runs(folder, arm), _runs(base_folder or folder, base)
    seeds = sorted(set(ours) & set(theirs))
    points = [100 * (ours[seed]["test_accuracy"] - theirs[seed]["test_accuracy"]) for seed in seeds]
    return f"{interval(points, '+')} points ({len(points)} seed{'s' * (len(points) > 1)})"


def _rank(arm: str) -> str:
    """Return the effective rank after training in percent of the full rank, mean over layers and seeds."""
    ranks = [fmean(row["effective_rank"] for row in run["after"].values()) for run in _runs("fm5k-c3", arm).values()]
    return f"{100 * fmean(ranks):.0f}"


def _diverse(arm: str) -> str:
    small, residual = (_difference(folder, arm, "baseline") for folder in ("fm5k-c3", "fm5k-resnet20"))
    ranks = f"effective rank {_rank('baseline')} -> {_rank(arm)} % of the full rank"
    return f"{ranks}; accuracy {small} with three convolutions, {residual} with ResNet-20"


def _squeezed() -> str:
    merged = _runs("squeeze", "csgd")
    full, narrow = (next(iter(_runs("squeeze", arm).values())) for arm in ("full", "csgd"))
    changed = sum(run["predictions_that_differ"] for run in merged.values())
    return (
        f"{100 * narrow['macs'] / full['macs']:.0f} % of the MACs; merging changed {changed} of "
        f"{10_000 * len(merged):,} predictions; accuracy {_difference('squeeze', 'csgd', 'full')}"
    )


def _fewer(network: str, folder: str, arm: str, base: str) -> str:
    shared, plain = (next(iter(_runs(folder, name).values()))["parameters"] for name in (arm, base))
    return f"{100 * shared / plain:.0f} % of the parameters of {network}; accuracy {_difference(folder, arm, base)}"


_COST: dict[str, Callable[[], str]] = {
    "BasisOrthonormality": lambda: _hooks("soft"),
    "CentripetalSGD": lambda: _hooks("csgd"),
    "share_filter_bases": lambda: _changed("share_filter_bases"),
    "RePr": lambda: f"{_hooks('repr sub-network phase')} in a phase",
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
    "share_filter_bases": lambda: (
        f"{_fewer('ResNet-32', 'shared_basis', 'shared_penalty', 'plain')}, with `BasisOrthonormality`"
    ),
    "RePr": lambda: _diverse("repr"),
    "WeightAsynchronousUpdate": lambda: _diverse("wau"),
    "EntropyDepthBound": lambda: (
        f"accuracy {_difference('entropy_depth', 'depth3', 'depth6')} against twice that depth at equal parameters"
    ),
    "ExpandNet": lambda: f"accuracy {_difference('fm5k-c3', 'expand_third', 'baseline')}",
    "ChannelImportance": lambda: (
        f"accuracy {_difference('ucp', 'ucp_kept', 'narrow', 'fm5k-c3')} against the narrow network from scratch; "
        f"channels chosen at random: "
        f"{_difference('ucp', 'random_kept', 'narrow', 'fm5k-c3')}"
    ),
    "share_anchored_filters": lambda: _fewer("ResNet-20", "fm5k-resnet20-14", "anchored", "baseline"),
    "WaveletReconstruction": lambda: f"accuracy {_difference('fm5k-c3', 'wavelet', 'baseline')}",
    "FilterSimilarityMonitor": lambda: "training with it is bit-identical to training without it",
}


def composability() -> str:
    """Markdown: for each callback, which others it must follow in the list, and beside which it is refused."""
    pairs: dict[str, dict[str, str]] = read_result("composability.json")["pairs"]
    lines = ["| callback | list it after | refused beside |", "|---|---|---|"]
    for name, row in pairs.items():
        after = [other for other, outcome in row.items() if outcome == "swap"]
        refused = [other for other, outcome in row.items() if outcome not in ("works", "swap")]
        lines.append(f"| {name} | {_listed(after, row)} | {_listed(refused, row)} |")
    return "\n".join(lines)


def composability_beside() -> str:
    """Markdown: for each feature of Lightning or torch that was tried beside all callbacks, which refuse it."""
    beside: dict[str, dict[str, str]] = read_result("composability.json")["beside"]
    features = list(dict.fromkeys(feature for row in beside.values() for feature in row))
    lines = ["| tried beside each callback | refused by |", "|---|---|"]
    for feature in features:
        refused = [name for name, row in beside.items() if row.get(feature) != "works"]
        lines.append(f"| {feature} | {_listed(refused, beside)} |")
    return "\n".join(lines)


def _listed(names: list[str], everything: Collection[str]) -> str:
    """Names for a cell of a table."""
    return "all others" if len(names) == len(everything) else ", ".join(names) or "-"


def reliability() -> str:
    """Markdown: what the suites try, and how often."""
    rows: list[list[str]] = read_result("reliability.json")
    lines = ["| what is tried | default tests | with the long tests |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
