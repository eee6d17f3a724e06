"""Does pruning by gates help? UCP end to end under FM5k, beside the narrow network trained from scratch.

C3(32) to C3(16), FM5k's data and 60 epochs in all; schedules are FM5k's, scaled to each part. Arms:

``ucp``           20 epochs with ChannelImportance, then the half of every layer's filters whose gates are most open,
                  drawn anew and trained for 40, as published
``ucp_kept``      the same with the weights that were trained beside the gates
``random_kept``   the same, but half of the filters at random: what the gates' choice is worth

    python -m benchmarks.training.sweep --methods narrow --seeds 1 2 3 4 5    # C3(16) from scratch, to compare with
    python -m benchmarks.experiments.ucp --seeds 1 2 3 4 5                       # skips runs whose file exists
    python -m benchmarks.experiments.ucp --table
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.common.paths import RESULTS
from benchmarks.experiments.fits import accuracy, fit, fm5k
from benchmarks.training import report
from benchmarks.training.classification import Classification
from benchmarks.training.runs import read_runs, run_missing, run_parser
from lightning_filterdiv import ChannelImportance
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_importance import remove_gates, select_channels
from lightning_filterdiv.narrowing import count_parameters, narrow
from lightning_filterdiv.tensors.randomness import keyed_generator

EPOCHS, GATED, KEPT = 60, 20, 0.5
ARMS = ("ucp", "ucp_kept", "random_kept")
OUT = RESULTS / "ucp"
NARROW = RESULTS / "fm5k-c3"


def classifier(epochs: int) -> Classification:
    """C3(32), FM5k's schedule scaled to ``epochs``."""
    return Classification(lr=0.02, milestones=[round(0.8 * epochs), round(0.92 * epochs)], channels_last=True)


def run(arm: str, seed: int) -> dict[str, Any]:
    """One arm of one seed."""
    pl.seed_everything(seed, verbose=False)
    data = fm5k(seed)
    started = time.perf_counter()
    gated, gates = classifier(GATED), ChannelImportance()
    fit(gated, data, GATED, [gates])
    # The same draw for all arms and for all seeds of other programs: the wide network comes first.
    pl.seed_everything(seed, verbose=False)
    small = classifier(EPOCHS - GATED)
    if arm != "ucp":
        small.net.load_state_dict(remove_gates(gated.net).state_dict())
    graph = ChannelGraph.trace(small.net, small.example_input_array)
    importance = {name.removeprefix("net."): values for name, values in gates.importance.items()}
    order = importance
    if arm == "random_kept":
        order = {n: torch.rand(len(gate), generator=keyed_generator("ucp", seed, n)) for n, gate in importance.items()}
    small.net = narrow(small.net, graph, select_channels(graph, order, keep_fraction=KEPT))
    fit(small, data, EPOCHS - GATED)
    return {
        "method": arm,
        "seed": seed,
        "protocol": f"FM5k/C3(32), {GATED} epochs with gates, {EPOCHS - GATED} with {KEPT:.0%} of the filters",
        "test_accuracy": accuracy(small.net, data),
        "parameters": count_parameters(small.net),
        "seconds": round(time.perf_counter() - started, 1),
        "gates": {name: [round(float(g), 3) for g in values] for name, values in importance.items()},
        "torch": torch.__version__,
    }


def table(folder: Path) -> str:
    """Markdown: the arms beside the narrow network from scratch.

    Args:
        folder: folder of the arms' results.
    """
    runs = read_runs(NARROW, ["narrow"]) | read_runs(folder, ARMS)
    return report.table(report.summary(runs, "narrow"), "narrow")


def main() -> None:
    """Command line."""
    options = run_parser(__doc__, ARMS, [1, 2, 3, 4, 5], OUT).parse_args()
    run_missing(options, run, table)


if __name__ == "__main__":
    main()
