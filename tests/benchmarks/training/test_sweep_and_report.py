"""Grids that can be stopped, and the statistics of their tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.experiments import reproduced
from benchmarks.training import report, sweep
from benchmarks.training.record import run_differences
from benchmarks.training.runs import read_runs
from benchmarks.training.sweep import Run, SweepError

GRID = ["--data", "digits", "--recipe", "quick", "--methods", "baseline", "wau", "--seeds", "1", "2"]


def grid(out: Path) -> list[Run]:
    return sweep.plan("digits", "c3", "quick", ["baseline", "wau"], [1, 2], "cpu", out)


class Scripted(Run):
    """A run whose process is a line of Python instead of a training; ``RESULT`` and ``FOLDER`` stand for its paths."""

    line = ""

    @property
    def command(self) -> list[str]:
        text = self.line.replace("RESULT", repr(str(self.result))).replace("FOLDER", repr(str(self.folder)))
        return [sys.executable, "-c", text]


def scripted(out: Path, line: str, method: str = "a") -> Run:
    made = type("One", (Scripted,), {"line": line})
    return made(method, 1, out / f"{method}-seed1.json", ())  # type: ignore[no-any-return]


def waiting_for(path: str) -> str:
    """Lines that wait for a file: however busy the machine is, the run is still there when a test looks."""
    return f"\nimport os, time\nwhile not os.path.exists({path}): time.sleep(0.05)\n"


class Told(ThreadPoolExecutor):
    """Makes a file when it is told to begin nothing else."""

    file: Path

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        if cancel_futures:
            self.file.touch()


def test_the_grid_goes_seed_by_seed_and_later_files_win(tmp_path: Path) -> None:
    runs = grid(tmp_path)
    assert [(run.method, run.seed) for run in runs] == [("baseline", 1), ("wau", 1), ("baseline", 2), ("wau", 2)]
    assert [path.parent.name for path in runs[0].files] == ["data", "model", "recipe", "method", "trainer"]
    assert runs[1].result == tmp_path / "wau-seed1.json"
    (own,) = sweep.plan("digits", "c3", "quick", ["wau"], [1], "cpu", tmp_path, ["--model.lr=0.7"])
    assert own.settings()["model"]["lr"] == 0.7


def test_methods_of_one_name_are_refused(tmp_path: Path) -> None:
    """A result is called after its method: one of the two would never run."""
    (tmp_path / "wau.yaml").write_text("trainer: {callbacks: [{class_path: RePr}]}\n")
    for methods in (["wau", str(tmp_path / "wau.yaml")], ["wau", "wau"]):
        with pytest.raises(SweepError, match="names wau more than once"):
            sweep.plan("digits", "c3", "quick", methods, [1], "cpu", tmp_path)
    assert len(sweep.plan("digits", "c3", "quick", ["wau"], [1, 2, 1], "cpu", tmp_path)) == 2


def test_a_run_is_made_once(tmp_path: Path) -> None:
    run = scripted(tmp_path, "open(RESULT, 'w').write('{}')")
    assert run.status() == "missing"
    assert sweep.execute(run, 1) == "done"
    assert run.status() == "done"
    assert not run.folder.exists()
    assert sweep.execute(run, 1) == "skipped"


def test_a_failed_run_says_why_and_does_not_stop_the_others(tmp_path: Path) -> None:
    failing = scripted(tmp_path, "raise ValueError('no such thing')", "b")
    other = scripted(tmp_path, "open(RESULT, 'w').write('{}')", "c")
    (message,) = sweep.run_locally([failing, other], jobs=1, threads=1)
    assert "b seed 1 ended with status 1" in message
    assert "no such thing" in message
    assert other.status() == "done"


@pytest.mark.soak
def test_a_run_that_outlives_its_sweep_is_waited_for(tmp_path: Path) -> None:
    """The sweep is killed, its run goes on: the next sweep neither starts it twice nor gives it up."""
    line = "open(FOLDER + '/began', 'a').write('x')" + waiting_for("FOLDER + '/go'") + "open(RESULT, 'w').write('{}')"
    run = scripted(tmp_path, line)
    start = (
        "import sys; from tests.benchmarks.training.test_sweep_and_report import scripted; "
        f"from benchmarks.training import sweep; from pathlib import Path; "
        f"sweep.execute(scripted(Path({str(tmp_path)!r}), {line!r}), 1)"
    )
    first = subprocess.Popen([sys.executable, "-c", start], cwd=sweep.ROOT)
    while not (run.folder / "began").exists():
        time.sleep(0.1)
    first.kill()  # SIGKILL: no clean-up of any kind
    first.wait()
    assert sweep.execute(run, 1) == "in work elsewhere"
    threading.Timer(1.0, (run.folder / "go").touch).start()
    assert sweep.run_locally([run], jobs=1, threads=1) == []
    assert run.status() == "done"


def test_results_of_other_settings_are_named_and_not_mixed_in(tmp_path: Path) -> None:
    runs = grid(tmp_path)
    good = runs[0].settings()
    runs[0].result.write_text(json.dumps({"settings": good}))
    runs[2].result.write_text(json.dumps({"settings": good | {"seed": 2}}))
    sweep.check_results(runs)
    changed = json.loads(json.dumps(good))
    changed["model"]["lr"] = 9.0
    runs[0].result.write_text(json.dumps({"settings": changed}))
    with pytest.raises(SweepError, match=r"baseline-seed1.json was made with other settings: .*model.lr: 0.02, not 9"):
        sweep.check_results(runs)
    runs[0].result.write_text("{}")
    with pytest.raises(SweepError, match="says nothing about its settings"):
        sweep.check_results(runs)


def test_a_run_that_ends_without_a_result_keeps_its_checkpoint(tmp_path: Path) -> None:
    """As Lightning does on SIGTERM: status 0."""
    run = scripted(tmp_path, "open(FOLDER + '/last.ckpt', 'w').write('x')")
    with pytest.raises(SweepError, match=r"(?s)ended with status 0 and no result.*goes on from its last checkpoint"):
        sweep.execute(run, 1)
    assert (run.folder / "last.ckpt").exists()


@pytest.mark.soak
def test_ctrl_c_begins_no_other_run(tmp_path: Path) -> None:
    line = "open(RESULT + '.began', 'w').close()" + waiting_for(repr(str(tmp_path / "cancelled")))
    start = (
        # Ctrl-C is ignored by what is started in the background, as tests may be.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pathlib import Path; "
        "from tests.benchmarks.training.test_sweep_and_report import Told, scripted; "
        "from benchmarks.training import sweep; sweep.ThreadPoolExecutor = Told; "
        f"Told.file = Path({str(tmp_path / 'cancelled')!r}); sweep.run_locally("
        f"[scripted(Path({str(tmp_path)!r}), {line!r}, m) for m in 'abcd'], jobs=1, threads=1)"
    )
    process = subprocess.Popen([sys.executable, "-c", start], cwd=sweep.ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "a-seed1.json.began").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=300)[1]
    assert sorted(path.name for path in tmp_path.glob("*.began")) == ["a-seed1.json.began"]


def test_a_folder_holds_one_protocol(tmp_path: Path) -> None:
    runs = grid(tmp_path)
    text = sweep.check_protocol(runs)
    (tmp_path / "protocol.json").write_text(text)
    assert sweep.check_protocol(runs) == text
    (more,) = sweep.plan("digits", "c3", "quick", ["soft"], [7], "cpu", tmp_path)  # another method, another seed
    assert sweep.check_protocol([more]) == text
    for data, model, overrides, said in (
        ("fashion_mnist", "c3", [], "data.class: 'FashionMNIST', not 'Digits'"),
        ("digits", "c8", [], "model.network: 'c8', not 'c3'"),
        ("digits", "c3", ["--model.lr=0.3"], "model.lr: 0.3, not 0.02"),
        ("digits", "c3", ["--trainer.devices=2"], "processes: 2, not 1"),
    ):
        other = sweep.plan(data, model, "quick", ["soft"], [1], "cpu", tmp_path, overrides)
        with pytest.raises(SweepError, match="holds runs of another protocol") as caught:
            sweep.check_protocol(other)
        assert said in str(caught.value)
    neutral = sweep.plan("digits", "c3", "quick", ["soft"], [1], "cpu", tmp_path, ["--model.channels_last=false"])
    assert sweep.check_protocol(neutral) == text


def test_a_method_that_replaces_the_transform_of_the_data_is_refused(tmp_path: Path) -> None:
    runs = sweep.plan("fashion_mnist_14", "c3", "fm5k", ["baseline", "wavelet"], [1], "cpu", tmp_path)
    with pytest.raises(SweepError, match="method wavelet replaces what the data file says of transform"):
        sweep.check_protocol(runs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--methods", "waus"], "method may be one of anchored, anchored_regulator, baseline, basis"),
        (["--data", "mnist"], "data may be one of cifar10"),
        (["--methods", "mine.yaml"], "no configuration mine.yaml"),
    ],
)
def test_unknown_configurations_list_what_there_is(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(wrong) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "model", "name", "count"),
    [
        ("fashion_mnist", "c3", "fm5k-c3", 17),
        ("fashion_mnist", "resnet20", "fm5k-resnet20", 5),
        ("fashion_mnist_14", "resnet20", "fm5k-resnet20-14", 3),
    ],
)
def test_committed_results_belong_to_the_committed_configurations(data: str, model: str, name: str, count: int) -> None:
    """What the tables show is what the commands beside them would make."""
    folder = sweep.RESULTS / name
    methods = sorted({path.name.rpartition("-seed")[0] for path in folder.glob("*-seed*.json")})
    assert len(methods) >= count
    runs = sweep.plan(data, model, "fm5k", methods, range(1, 11), "cpu", folder)
    sweep.check_results(runs)
    assert sweep.check_protocol(runs) == (folder / "protocol.json").read_text()


def test_an_argument_that_came_later_had_its_default() -> None:
    old = {"callbacks": [{"class": "ExpandNet", "rate": 4}, {"class": "torch.Mine", "rate": 4}]}
    new = {"callbacks": [{"class": "ExpandNet", "rate": 4, "expand_image": False}, {"class": "torch.Mine", "rate": 4}]}
    other = {"callbacks": [{"class": "ExpandNet", "rate": 4, "expand_image": True}, {"class": "torch.Mine", "rate": 4}]}
    assert run_differences(new, old) == []
    assert len(run_differences(other, old)) == 1


@pytest.mark.parametrize("name", reproduced.GRIDS)
def test_committed_results_of_the_papers_experiments_belong_to_their_configurations(name: str) -> None:
    folder = sweep.RESULTS / name
    if not (folder / "protocol.json").exists():
        pytest.skip("not yet run")
    runs = reproduced.GRIDS[name].runs(folder)
    sweep.check_results(runs)
    assert sweep.check_protocol(runs) == (folder / "protocol.json").read_text()
    planned = {run.result.stem for run in runs}
    assert {path.stem for path in folder.glob("*-seed*.json")} | set(reproduced.read_failures(folder)) <= planned


def test_slurm_gets_the_missing_runs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid(tmp_path)
    runs[1].result.write_text("{}")
    script = tmp_path / "sbatch"
    script.write_text('#!/bin/sh\necho "$@"\necho "$PWD:$PYTHONPATH" >where\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "mine")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    said = sweep.submit(runs, GRID, Path("job.sbatch"), ["--time=1:00:00"])
    assert said.split() == ["--array=0,2,3", "--time=1:00:00", "job.sbatch", *GRID]
    assert (tmp_path / "where").read_text().strip() == f"{tmp_path}:{sweep.ROOT}{os.pathsep}mine"
    script.write_text("#!/bin/sh\necho no such partition >&2\nexit 1\n")
    with pytest.raises(SweepError, match="sbatch refuses: no such partition"):
        sweep.submit(runs, GRID, Path("job.sbatch"), [])


def test_a_sweep_of_ones_own_files_runs_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations by relative path, a network, a data set and a callback from modules beside them."""
    (tmp_path / "mine.py").write_text(
        "import lightning.pytorch as pl\n"
        "import torch\n"
        "from benchmarks.training.data import ImagesInMemory\n"
        "def net(channels, size, classes, width=4):\n"
        "    first = torch.nn.Conv2d(channels, width, size)\n"
        "    return torch.nn.Sequential(first, torch.nn.Flatten(), torch.nn.Linear(width, classes))\n"
        "class Stripes(ImagesInMemory):\n"
        "    image_shape, classes = (2, 6, 6), 3\n"
        "    def read(self):\n"
        "        labels = torch.arange(120) % 3\n"
        "        images = torch.rand(120, 2, 6, 6) + labels.view(-1, 1, 1, 1)\n"
        "        return images[:90], labels[:90], images[90:], labels[90:]\n"
        "class Note(pl.Callback):\n"
        "    def on_train_end(self, trainer, pl_module):\n"
        "        open('noted', 'w').close()\n"
    )
    (tmp_path / "stripes.yaml").write_text("data: {class_path: mine.Stripes}\n")
    (tmp_path / "note.yaml").write_text("trainer: {callbacks: [{class_path: mine.Note}]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as "python -m" does
    arguments = [
        "--data",
        "stripes.yaml",
        "--recipe",
        "quick",
        "--methods",
        "note.yaml",
        "--seeds",
        "1",
        "--out",
        "out",
    ]
    arguments += ["--set", "model.network=mine.net", "data.batch_size=8", "trainer.max_epochs=1"]
    assert sweep.main(arguments) == 0
    assert (tmp_path / "noted").exists()
    result = json.loads((tmp_path / "out" / "note-seed1.json").read_text())
    assert result["settings"]["callbacks"] == [{"class": "mine.Note"}]
    assert result["settings"]["data"]["class"] == "mine.Stripes"
    assert result["parameters"] == 4 * 2 * 36 + 4 + 4 * 3 + 3


@pytest.mark.soak
def test_a_sweep_killed_in_the_middle_finishes_without_repeating_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.training.sweep", *GRID, "--out", str(tmp_path), "--set",
               "trainer.max_epochs=40", "checkpoint.every_n_epochs=1"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=sweep.ROOT, env=environment, start_new_session=True)
    begun = tmp_path / ".partial" / "wau-seed1" / "checkpoints" / "last.ckpt"
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the sweep and the run
    process.wait()
    done = tmp_path / "baseline-seed1.json"
    stamp = done.stat().st_mtime_ns
    assert not (tmp_path / "wau-seed1.json").exists()
    subprocess.run(command, cwd=sweep.ROOT, env=environment, check=True)
    assert done.stat().st_mtime_ns == stamp
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*-seed*.json")}
    assert sorted(results) == ["baseline-seed1", "baseline-seed2", "wau-seed1", "wau-seed2"]
    for name, result in results.items():
        assert [row["epoch"] for row in result["curve"]] == list(range(1, 41)), name
    whole = tmp_path / "whole"
    subprocess.run([*command, "--methods", "wau", "--seeds", "1", "--out", str(whole)], cwd=sweep.ROOT, check=True)
    again = json.loads((whole / "wau-seed1.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in results["wau-seed1"].items() if k != "seconds"
    }
    assert not (tmp_path / ".partial" / "wau-seed1").exists()


def runs_of(**accuracy: list[float]) -> dict[str, list[dict[str, Any]]]:
    return {
        method: [{"method": method, "seed": i, "test_accuracy": value} for i, value in enumerate(values)]
        for method, values in accuracy.items()
    }


def test_differences_are_paired_by_seed_and_p_values_corrected() -> None:
    rng = np.random.default_rng(0)
    base = 0.8 + 0.01 * rng.standard_normal(6)
    better, worse = base + 0.01 + 0.002 * rng.standard_normal(6), base - 0.001 * rng.standard_normal(6)
    rows = {row.method: row for row in report.summary(runs_of(baseline=base, a=better, b=worse))}
    raw = {name: stats.ttest_rel(x, base).pvalue for name, x in (("a", better), ("b", worse))}
    assert raw["a"] < raw["b"]
    assert rows["a"].p == pytest.approx(min(1, 2 * raw["a"]))
    assert rows["b"].p == pytest.approx(max(min(1, 2 * raw["a"]), raw["b"]))
    assert rows["a"].difference == pytest.approx(100 * (better - base).mean())
    low, high = stats.t.interval(0.95, 5, 100 * base.mean(), 100 * stats.sem(base))
    assert rows["baseline"].mean - rows["baseline"].half == pytest.approx(low)
    assert rows["baseline"].mean + rows["baseline"].half == pytest.approx(high)


def test_seeds_without_a_partner_do_not_count_in_the_difference() -> None:
    rows = report.summary(runs_of(baseline=[0.5, 0.6], a=[0.51, 0.62, 0.99]))
    assert rows[1].seeds == 3
    assert rows[1].difference == pytest.approx(1.5)
    assert "+1.50" in report.table(rows)


def test_a_method_that_changes_nothing_leaves_the_other_p_values_alone() -> None:
    base, better = [0.80, 0.81, 0.83], [0.81, 0.82, 0.845]
    alone = report.summary(runs_of(baseline=base, soft=better))[1]
    both = {row.method: row for row in report.summary(runs_of(baseline=base, monitor=base, soft=better))}
    assert both["monitor"].p == 1
    assert both["soft"].p == pytest.approx(2 * alone.p)


def test_one_seed_has_no_interval_and_no_p() -> None:
    text = report.table(report.summary(runs_of(baseline=[0.5], a=[0.6])))
    assert "| a | 1 | 60.00 |  |  |" in text


def test_sizes_are_shown_where_they_differ() -> None:
    runs = runs_of(wide=[0.5, 0.6], slim=[0.51, 0.62])
    assert "parameters" not in report.table(report.summary(runs, "wide"), "wide")
    for method, count in (("wide", 34_506), ("slim", 12_650)):
        runs[method] = [run | {"parameters": count} for run in runs[method]]
    text = report.table(report.summary(runs, "wide"), "wide")
    assert "| method | seeds | parameters | test accuracy % | difference to wide |" in text
    assert "| slim | 2 | 12,650 | 56.50 | +1.50 | 0.205 |" in text


def test_differences_are_drawn_with_their_seeds() -> None:
    runs = runs_of(baseline=[0.5, 0.6, 0.7], better=[0.6, 0.7, 0.81], alone=[0.9])
    runs["lost"] = [
        {"method": "lost", "seed": 1, "test_accuracy": 0.5},
        {"method": "lost", "seed": 2, "test_accuracy": 0.4},
    ]
    (panel,) = report.difference_figure(runs).axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert [label.split()[0] for label in labels] == ["lost", "better"]  # the best on top; one seed has no interval
    dots = [np.asarray(line.get_xydata()) for line in panel.get_lines() if len(np.asarray(line.get_xydata())) > 2]
    assert len(dots) == 1  # "lost" shares two seeds
    np.testing.assert_allclose(dots[0][:, 0], [10, 10, 11])
    only = {"baseline": runs["baseline"], "alone": runs["alone"]}
    with pytest.raises(ValueError, match="no method shares two seeds with 'baseline'"):
        report.difference_figure(only)


def test_curves_show_every_method(tmp_path: Path) -> None:
    runs = read_runs(sweep.RESULTS / "fm5k-c3", ["baseline", "repr"])
    accuracy, loss = report.curves(runs).axes
    assert [line.get_label() for line in loss.get_lines()] == [m for m in runs if runs[m][0].get("curve")]
    assert accuracy.get_lines()[-1].get_xdata()[-1] == 60
