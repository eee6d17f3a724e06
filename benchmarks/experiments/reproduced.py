"""The papers' headline claims under the papers' own settings, scaled to hours on one core: grids of runs, one by one.

    python -m benchmarks.experiments.reproduced                # skips what is done; stop and start it as you like
    python -m benchmarks.experiments.reproduced --list         # what is done, begun, missing
    python -m benchmarks.experiments.reproduced --grids repr   # only those whose name begins so

Every grid is a sweep of ``benchmarks.training.sweep`` with a folder of results of its own; the recipe's file says what
is the paper's and what is scaled. A run that fails, because its training diverged, is a result: ``failures.json`` of
the folder keeps the error, and the run is not tried again unless ``--retry`` asks for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.paths import RESULTS
from benchmarks.training import report, sweep
from benchmarks.training.runs import LockError, read_runs, write_whole

__all__ = ["GRIDS", "Grid", "best_rate", "read_failures", "small_net_table", "table"]


@dataclass(frozen=True)
class Grid:
    """Methods x seeds of one recipe.

    Attributes:
        model: network, by the name of its configuration; likewise ``recipe`` and ``methods``.
        recipe: epochs, optimizer, data.
        methods: the baseline first.
        data: data set.
        seeds: seeds of the runs.
        settings: those that replace the recipe's in all runs.
        tuned: take the learning rate at which the only method did best in the grids of :data:`RATES`.
    """

    model: str
    recipe: str
    methods: tuple[str, ...]
    data: str = "fashion_mnist"
    seeds: tuple[int, ...] = (1, 2, 3)
    settings: tuple[str, ...] = ()
    tuned: bool = False

    def runs(self, folder: Path) -> list[sweep.Run]:
        """Return the runs, seed by seed, with results in ``folder``."""
        overrides = [f"--{setting}" for setting in self.settings]
        if self.tuned:
            overrides.append(f"--model.lr={best_rate(self.methods[0], folder.parents[1])}")
        return sweep.plan(self.data, self.model, self.recipe, self.methods, self.seeds, "cpu", folder, overrides)


_REPR = ("baseline", "repr_c3", "repr_c3_random", "repr_c3_norm", "repr_c3_half_gain")
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
    **{f"small-net/{method}": Grid("small_net", "fm5k_small_net", (method,), tuned=True) for method in _EXPAND},
    "repr-c3": Grid("c3_released", "fm5k_repr_c3", _REPR),
}


def best_rate(method: str, folder: Path = RESULTS) -> float | None:
    """Learning rate of the highest accuracy of a method on SmallNet; ``None`` before every rate was tried."""
    runs = {rate: folder / f"small-net-rates/{rate}" / f"{method}-seed11.json" for rate in RATES}
    if not all(path.exists() or path.stem in read_failures(path.parent) for path in runs.values()):
        return None
    accuracy = {rate: json.loads(path.read_text())["test_accuracy"] for rate, path in runs.items() if path.exists()}
    return max(accuracy, key=lambda rate: accuracy[rate])


def small_net_table(folder: Path = RESULTS) -> str:
    """Markdown: SmallNet's arms, each at its own learning rate, paired by seed."""
    runs = {
        f"{method}, lr {best_rate(method, folder)}" if method != "baseline" else method: found[method]
        for method in _EXPAND
        if any((folder / "small-net" / method).glob("*-seed*.json"))
        and (found := read_runs(folder / "small-net" / method))
    }
    if "baseline" not in runs:
        return "Not yet run."
    return f"{report.table(report.summary(runs))}\n\nLearning rate of the baseline: {best_rate('baseline', folder)}."


def read_failures(folder: Path) -> dict[str, str]:
    """``METHOD-seedN`` -> the error of the run."""
    path = folder / "failures.json"
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return found


def work_through(runs: Sequence[sweep.Run], retry: bool) -> bool:
    """Make the runs one after another; return whether all of them are done or have failed before."""
    folder = runs[0].result.parent
    complete = True
    for run in runs:
        failures = read_failures(folder)
        if run.result.stem in failures and not retry:
            continue
        try:
            print(
                f"{folder.name}: {run.method} seed {run.seed}: {sweep.execute(run, threads=1, wait=True)}", flush=True
            )
            failures.pop(run.result.stem, None)
        except sweep.SweepError as error:
            print(error, file=sys.stderr, flush=True)
            lines = [line for line in str(error).splitlines() if "Error" in line]
            if not lines:  # it was stopped from outside
                return False
            failures[run.result.stem] = lines[-1]
        except LockError as error:
            print(error, file=sys.stderr, flush=True)
            complete = False
        if failures or (folder / "failures.json").exists():
            write_whole(folder / "failures.json", json.dumps(failures, indent=1) + "\n")
    return complete


def table(name: str, folder: Path = RESULTS) -> str:
    """Markdown of a grid's runs, paired by seed, and which of them failed."""
    failures = read_failures(folder / name)
    if not any((folder / name).glob("*-seed*.json")):
        return "Not yet run."
    text = report.table(report.summary(read_runs(folder / name, GRIDS[name].methods)))
    if failures:
        seeds: dict[str, list[str]] = defaultdict(list)
        for run in sorted(failures):
            method, _, seed = run.partition("-seed")
            seeds[method].append(seed)
        text += "\n\nRuns that ended with an error, and that of the first seed:\n"
        for method, failed in seeds.items():
            text += f"\n- {method}, seed {', '.join(failed)}: {failures[f'{method}-seed{failed[0]}']}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; status 1 if a run could not be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="+", default=[""], metavar="START", help="beginnings of their names")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the grids' folders")
    parser.add_argument("--retry", action="store_true", help="try runs that failed again")
    parser.add_argument("--list", action="store_true", help="say what is done and stop")
    options = parser.parse_args(arguments)
    complete = True
    for name, grid in GRIDS.items():
        if not name.startswith(tuple(options.grids)):
            continue
        folder = (options.out / name).resolve()
        if grid.tuned and best_rate(grid.methods[0], folder.parents[1]) is None:
            print(f"{name}: waits for small-net-rates", flush=True)
            complete = False
            continue
        runs = grid.runs(folder)
        if options.list:
            failures = read_failures(folder)
            for run in runs:
                status = "failed" if run.result.stem in failures else run.status()
                print(f"{name}: {run.method} seed {run.seed}: {status}")
            continue
        protocol = sweep.check_protocol(runs)
        sweep.check_results(runs)
        write_whole(folder / "protocol.json", protocol)
        complete &= work_through(runs, options.retry)
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
