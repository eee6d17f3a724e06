"""The papers' headline claims under the papers' own settings, scaled to hours on one core: grids of runs, one by one.

    python -m benchmarks.experiments.reproduced                # skips what is done; stop and start it as you like
    python -m benchmarks.experiments.reproduced --list         # what is done, begun, missing
    python -m benchmarks.experiments.reproduced --grids repr   # only those whose name begins so

Every grid is a sweep of ``benchmarks.training.sweep`` with a folder of results of its own; the recipe's file says what
is the paper's and what is scaled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.paths import RESULTS
from benchmarks.training import sweep
from benchmarks.training.runs import write_whole

__all__ = ["GRIDS", "Grid"]


@dataclass(frozen=True)
class Grid:
    """Methods x seeds of one recipe.

    Attributes:
        model: network, by the name of its configuration; likewise ``recipe`` and ``methods``.
        recipe: epochs, optimizer, data.
        methods: the baseline first.
        data: data set.
        seeds: of the runs.
        settings: of all of them that replace the recipe's.
    """

    model: str
    recipe: str
    methods: tuple[str, ...]
    data: str = "fashion_mnist"
    seeds: tuple[int, ...] = (1, 2, 3)
    settings: tuple[str, ...] = ()

    def runs(self, folder: Path) -> list[sweep.Run]:
        """Return the runs, seed by seed, with results in ``folder``."""
        overrides = [f"--{setting}" for setting in self.settings]
        return sweep.plan(self.data, self.model, self.recipe, self.methods, self.seeds, "cpu", folder, overrides)


_REPR = ("baseline", "repr_c3", "repr_c3_random", "repr_c3_norm")
_EXPAND = ("baseline", "expand_ck", "expand_ck_fc")
#: Learning rates that a further seed tries for each of them.
RATES = (0.003, 0.01, 0.03, 0.1)
#: Folder of results -> grid, in the order of work.
GRIDS: dict[str, Grid] = {
    "repr-c3-noisy": Grid("c3_released", "fm1k_noisy_repr_c3", _REPR),
    **{
        f"small-net-rates/{rate}": Grid(
            "small_net", "fm5k_small_net", _EXPAND, seeds=(11,), settings=(f"model.lr={rate}",)
        )
        for rate in RATES
    },
    "repr-c3": Grid("c3_released", "fm5k_repr_c3", _REPR),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; status 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="+", default=[""], metavar="START", help="beginnings of their names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the grids' folders")
    parser.add_argument("--list", action="store_true", help="say what is done and stop")
    options = parser.parse_args(arguments)
    failed = False
    for name, grid in GRIDS.items():
        if not name.startswith(tuple(options.grids)):
            continue
        runs = grid.runs((options.out / name).resolve())
        if options.list:
            print("\n".join(f"{name}: {run.method} seed {run.seed}: {run.status()}" for run in runs))
            continue
        protocol = sweep.check_protocol(runs)
        sweep.check_results(runs)
        write_whole(options.out / name / "protocol.json", protocol)
        failures = sweep.run_locally(runs, jobs=1, threads=1)
        failed |= bool(failures)
        print(f"{name}: {sum(run.status() == 'done' for run in runs)} of {len(runs)} runs are done", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
