"""Experiments that keep one file per run."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from benchmarks.training.runs import LockError, exclusive, read_runs, run_missing, run_parser


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(out: Path) -> argparse.Namespace:
    parser = run_parser("", ("start", "rest"), [1, 2, 3], out)
    return parser.parse_args([])


def test_what_is_there_is_kept_and_the_rest_is_made_seed_by_seed(tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []

    def run(arm: str, seed: int) -> dict[str, Any]:
        made.append((arm, seed))
        return {"test_accuracy": 0.5, "arm": arm}

    (tmp_path / "start-seed1.json").write_text("{}")
    run_missing(options(tmp_path), run, str)
    assert made == [("rest", 1), ("start", 2), ("rest", 2), ("start", 3), ("rest", 3)]
    assert json.loads((tmp_path / "start-seed1.json").read_text()) == {}
    assert json.loads((tmp_path / "rest-seed3.json").read_text())["arm"] == "rest"
    run_missing(options(tmp_path), run, str)
    assert len(made) == 5


def test_results_are_read_in_the_order_of_seeds(tmp_path: Path) -> None:
    for name, seed in (("repr", 10), ("repr", 9), ("a", 1), ("baseline", 1), ("repr_zero", 1)):
        (tmp_path / f"{name}-seed{seed}.json").write_text(json.dumps({"seed": seed}))
    found = read_runs(tmp_path)
    assert list(found) == ["baseline", "a", "repr", "repr_zero"]
    assert [run["seed"] for run in found["repr"]] == [9, 10]
    assert list(read_runs(tmp_path, ["repr", "not run", "a"])) == ["repr", "a"]


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no NAME-seedN.json in"):
        read_runs(tmp_path)


@pytest.mark.parametrize("finished", [True, False], ids=["which finishes it", "which gives it up"])
def test_a_seed_in_work_elsewhere_comes_last(tmp_path: Path, finished: bool) -> None:
    made: list[tuple[str, int]] = []
    others = Event()

    def run(arm: str, seed: int) -> dict[str, Any]:
        made.append((arm, seed))
        if (arm, seed) == ("rest", 3):
            others.set()
        return {"test_accuracy": 0.5}

    with ThreadPoolExecutor(1) as pool:
        with exclusive(tmp_path / ".partial" / "seed1.lock", wait=False) as lock:
            assert lock is not None
            process = pool.submit(run_missing, options(tmp_path), run, str)
            assert others.wait(30)
            assert not any(seed == 1 for _, seed in made)
            (tmp_path / "start-seed1.json").write_text("{}")
            if finished:
                (tmp_path / "rest-seed1.json").write_text("{}")
        process.result(30)
    assert made[4:] == ([] if finished else [("rest", 1)])


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LockError, match=r"cannot be locked .*No locks available.*choose an --out"):
        run_missing(options(tmp_path), lambda arm, seed: {"test_accuracy": 0.0}, str)


def test_the_table_is_printed_and_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = options(tmp_path)
    asked.table = True

    def run(arm: str, seed: int) -> dict[str, Any]:
        raise AssertionError("--table runs nothing")

    run_missing(asked, run, lambda folder: f"table of {folder.name}")
    assert "is finished; start them without --table" in capsys.readouterr().out
    (tmp_path / "start-seed1.json").write_text("{}")
    run_missing(asked, run, lambda folder: f"table of {folder.name}")
    assert capsys.readouterr().out == f"table of {tmp_path.name}\n"
