"""Methods x seeds of one data set, network and recipe: resumable, skips what is done, in local processes or on Slurm.

    python -m benchmarks.training.sweep --data fashion_mnist --model c3 --recipe fm5k --methods baseline wau repr \\
        --seeds 1 2 3 4 5 --jobs 2
    python -m benchmarks.training.sweep ... --list              # what is done, begun, missing
    python -m benchmarks.training.sweep ... --slurm             # the missing runs as one Slurm array

Every run is a process of ``benchmarks.training.train`` and leaves one file
``METHOD-seedN.json`` in the folder of results. You can stop the sweep at any time. The same command continues from the
last checkpoint of every run that was begun. A file that was made with other settings is reported and never overwritten;
``protocol.json`` keeps sweeps of other data, networks or recipes out of the folder, so that what is compared there is
comparable; two sweeps over one folder share the work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.paths import CONFIGS, RESULTS, ROOT
from benchmarks.training.record import run_differences
from benchmarks.training.runs import LockError, exclusive, write_whole
from benchmarks.training.train import BenchmarkCLI, compact, planned_processes, run_settings

_ELSEWHERE = "in work elsewhere"


def _environment(**more: str) -> dict[str, str]:
    """Return the environment of the processes of a sweep. They run in the folder of the sweep, so that relative paths
    stay valid."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | more


class SweepError(RuntimeError):
    """A run failed, or a result does not belong to this sweep."""


class _Settings(BenchmarkCLI):
    """Parses a command line without building anything."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _set_seed(self) -> None:
        """Leave the generators alone."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        method: name of its configuration.
        seed: seed of everything.
        result: the file it leaves.
        files: configurations, later ones win.
        overrides: further arguments of ``benchmarks.training.train fit``.
    """

    method: str
    seed: int
    result: Path
    files: tuple[Path, ...]
    overrides: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Folder of the unfinished run, for its checkpoint, output and lock."""
        return self.result.parent / ".partial" / f"{self.method}-seed{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """Arguments of ``benchmarks.training.train`` that define the run."""
        files = [part for file in self.files for part in ("-c", str(file))]
        return [*files, "--seed_everything", str(self.seed), *self.overrides]

    @property
    def command(self) -> list[str]:
        """The process to start."""
        places = ["--result", str(self.result), "--trainer.default_root_dir", str(self.folder), "--label", self.method]
        return [sys.executable, "-m", "benchmarks.training.train", "fit", *self.arguments, *places]

    def settings(self) -> dict[str, Any]:
        """Settings that determine the results. ``processes`` is left out if the machine decides.

        Raises:
            SystemExit: the configurations do not fit together; the parser says why.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            config = _Settings(self.arguments, run=False).config
        processes = planned_processes(config)
        return run_settings(config) | ({} if processes is None else {"processes": processes})

    def status(self) -> str:
        """``"done"``, ``"begun"`` or ``"missing"``."""
        if self.result.exists():
            return "done"
        return "begun" if (self.folder / "checkpoints" / "last.ckpt").exists() else "missing"


def plan(
    data: str,
    model: str,
    recipe: str,
    methods: Sequence[str],
    seeds: Sequence[int],
    trainer: str,
    out: Path,
    overrides: Sequence[str] = (),
) -> list[Run]:
    """All runs, seed by seed, so that every method has as many when the sweep is stopped.

    Args:
        data: name of a file in ``configs/data``, without ending; likewise ``model``, ``recipe``, ``methods`` and
            ``trainer``. A path to a YAML file of your own is taken as it is.
        model: network.
        recipe: epochs, optimizer, batch size.
        methods: what is compared.
        seeds: seeds of the runs.
        trainer: where it runs.
        out: folder of the results.
        overrides: further arguments of every run.

    Raises:
        FileNotFoundError: no such configuration; the message lists what there is.
        SweepError: two methods would leave the same file.
    """
    names = [Path(method).stem for method in methods]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SweepError(
            f"--methods names {', '.join(twice)} more than once, and a result is called after its method: give your "
            f"file another name"
        )

    def file(kind: str, name: str) -> Path:
        path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / kind / f"{name}.yaml"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in (CONFIGS / kind).glob("*.yaml")))
            raise FileNotFoundError(f"no configuration {path}; {kind} may be one of {known}, or a YAML file")
        return path

    shared = (file("data", data), file("model", model), file("recipe", recipe))
    last = file("trainer", trainer)
    return [
        Run(
            method=Path(method).stem,
            seed=seed,
            result=out / f"{Path(method).stem}-seed{seed}.json",
            files=(*shared, file("method", method), last),
            overrides=tuple(overrides),
        )
        for seed in dict.fromkeys(seeds)
        for method in methods
    ]


def protocol_differences(planned: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """:func:`~benchmarks.training.record.run_differences`, but a plan may leave the number of processes open."""
    given = found if "processes" in planned else {key: value for key, value in found.items() if key != "processes"}
    return run_differences(planned, given)


def check_protocol(runs: Sequence[Run]) -> str:
    """Compare what the runs of a grid have in common with what the folder of results holds.

    Args:
        runs: from :func:`plan`.

    Returns:
        The text of ``protocol.json``, to be written before the first run.

    Raises:
        SweepError: the folder holds runs of another protocol, or a method replaces a transform of the data; the message
            says which setting.
    """
    first = runs[0]
    data, model, recipe, _, trainer = first.files
    shared = replace(first, files=(data, model, recipe, trainer))
    common = {key: value for key, value in shared.settings().items() if key not in ("seed", "callbacks")}
    for run in {run.method: run for run in runs}.values():
        own = run.settings()["data"]
        if lost := [key for key, value in common["data"].items() if value is not None and own.get(key) != value]:
            raise SweepError(
                f"method {run.method} replaces what the data file says of {', '.join(lost)}: its runs would not be "
                f"comparable with the others; write a data file that has both"
            )
    path = first.result.parent / "protocol.json"
    if path.exists() and (changed := protocol_differences(common, json.loads(path.read_text()))):
        raise SweepError(
            f"{path.parent} holds runs of another protocol: this sweep has {'; '.join(changed)}. Choose another --out"
        )
    return path.read_text() if path.exists() else compact(common)


def check_results(runs: Sequence[Run]) -> None:
    """Compare the settings in every finished result with those of this sweep.

    Raises:
        SweepError: they differ; the message names the file and the settings.
    """
    planned: dict[str, dict[str, Any]] = {}  # one parse per method: the seed is all that differs between its runs
    for run in runs:
        if not run.result.exists():
            continue
        if run.method not in planned:
            planned[run.method] = run.settings()
        found = json.loads(run.result.read_text()).get("settings")
        if found is None:
            raise SweepError(f"{run.result} says nothing about its settings; move it away or choose another --out")
        if changed := protocol_differences(planned[run.method] | {"seed": run.seed}, found):
            raise SweepError(
                f"{run.result} was made with other settings: this sweep has {'; '.join(changed)}. "
                f"Choose another --out, or move the file away to run it anew"
            )


def execute(run: Run, threads: int, wait: bool = False) -> str:
    """Make one run unless it is done or in work elsewhere.

    Args:
        run: which.
        threads: threads of its process.
        wait: for the process that has it in work, and take over if that leaves it unfinished.

    Returns:
        ``"done"``, ``"skipped"`` or ``"in work elsewhere"``.

    Raises:
        SweepError: the process failed; its last lines are in the message, all of them in its folder.
        LockError: the file system of the results has no locks.
    """
    if run.result.exists():
        return "skipped"
    with exclusive(run.folder / "lock", wait) as lock:
        if lock is None:
            return _ELSEWHERE
        if run.result.exists():  # finished between the look and the lock
            return "skipped"
        log = run.folder / "output.txt"
        with log.open("a") as output:
            # With the lock's descriptor: a run that outlives a killed sweep stays locked.
            process = subprocess.run(
                run.command, env=_environment(OMP_NUM_THREADS=str(threads)), stdout=output, stderr=subprocess.STDOUT,
                pass_fds=(lock,),
            )  # fmt: skip
        if process.returncode or not run.result.exists():  # Lightning ends with status 0 on SIGTERM
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise SweepError(
                f"{run.method} seed {run.seed} ended with status {process.returncode} and no result:\n{tail}\n"
                f"see {log}; the same command goes on from its last checkpoint"
            )
    shutil.rmtree(run.folder, ignore_errors=True)
    return "done"


def run_locally(runs: list[Run], jobs: int, threads: int) -> list[str]:
    """Make all runs, ``jobs`` at a time; a failed run does not stop the others.

    Returns:
        The messages of failed runs.
    """
    failures = []
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit="run", disable=None) as bar:
        for wait in (False, True):  # what another process has in work comes last
            futures = {pool.submit(execute, run, threads, wait): run for run in runs}
            runs = []
            try:
                for future in as_completed(futures):
                    run = futures[future]
                    try:
                        outcome = future.result()
                        bar.set_postfix_str(f"{run.method} seed {run.seed}: {outcome}")
                    except (SweepError, LockError) as error:
                        outcome = "failed"
                        failures.append(str(error))
                        tqdm.write(str(error), file=sys.stderr)
                    if outcome == _ELSEWHERE:
                        runs.append(run)
                    else:
                        bar.update()
            except BaseException:  # Ctrl-C reaches the runs as well; begin no other
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return failures


def submit(runs: Sequence[Run], arguments: Sequence[str], script: Path, options: Sequence[str]) -> str:
    """Hand the missing runs to Slurm as one array; task ``i`` makes run ``i`` of the grid.

    Args:
        runs: the whole grid.
        arguments: arguments of this sweep, without ``--slurm``.
        script: batch script that passes its arguments on to this command.
        options: options of ``sbatch``, such as ``--partition=gpu``.

    Returns:
        What ``sbatch`` printed; empty when nothing is missing.

    Raises:
        SweepError: ``sbatch`` is absent or refuses.
    """
    missing = [str(index) for index, run in enumerate(runs) if run.status() != "done"]
    if not missing:
        return ""
    command = ["sbatch", f"--array={','.join(missing)}", *options, str(script), *arguments]
    try:
        process = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SweepError("there is no sbatch here: start --slurm on a login node of the cluster") from error
    if process.returncode:
        raise SweepError(f"sbatch refuses: {process.stderr.strip()}")
    return process.stdout.strip()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    # No abbreviations: --slurm is taken out of what the tasks of an array are given.
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--data", default="fashion_mnist")
    made.add_argument("--model", default="c3")
    made.add_argument("--recipe", default="fm5k")
    made.add_argument("--methods", nargs="+", default=["baseline"])
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    made.add_argument("--trainer", default="cpu")
    made.add_argument("--out", type=Path, help="folder of the results; benchmarks/results/RECIPE-MODEL")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override a setting of every run")
    made.add_argument("--jobs", type=int, default=1, help="runs at a time, on this machine")
    made.add_argument("--threads", type=int, default=1, help="of every run")
    made.add_argument("--list", action="store_true", help="say what is done and stop")
    made.add_argument("--only", type=int, help="make only the run of this index (a Slurm array sets it)")
    made.add_argument("--slurm", action="store_true", help="submit the missing runs as a Slurm array")
    made.add_argument("--sbatch", nargs="+", default=[], metavar="OPTION", help="for sbatch, such as time=2:00:00")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; status 1 if a run failed, 2 if the grid cannot be run."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    out = options.out or RESULTS / f"{options.recipe}-{options.model}"
    try:
        runs = plan(
            options.data, options.model, options.recipe, options.methods, options.seeds, options.trainer,
            out.resolve(), [f"--{entry}" for entry in options.set],
        )  # fmt: skip
        protocol = check_protocol(runs)
        if options.only is not None:
            runs = [runs[options.only]]
        check_results(runs)
        if options.list:
            for run in runs:
                print(f"{run.method} seed {run.seed}: {run.status()}")
            return 0
        if not (out / "protocol.json").exists():
            write_whole(out / "protocol.json", protocol)
        if options.slurm:
            rest = [part for part in given if part != "--slurm"]
            script = ROOT / "benchmarks" / "slurm" / "sweep.sbatch"
            print(submit(runs, rest, script, [f"--{entry}" for entry in options.sbatch]) or "nothing is missing")
            return 0
    except (SweepError, FileNotFoundError) as error:
        print(f"benchmarks.training.sweep: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    failures = run_locally(runs, options.jobs, options.threads)
    done = sum(run.status() == "done" for run in runs)
    print(f"{done} of {len(runs)} runs are done, results in {out} ({time.monotonic() - started:.0f} s)")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
