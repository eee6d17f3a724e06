"""Results of a GPU beside those of the CPU: same rows, empty cells where one was not measured, nothing mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.common.device import clock, description, result_path
from benchmarks.cost import events, large_steps, launches, overhead
from benchmarks.cost.overhead import Cost
from benchmarks.cost.scaling import WORKLOADS, Workload
from benchmarks.tables import cards
from benchmarks.training import report


def _rows(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def _cost(method: str, depth: int, inside: float) -> Cost:
    return Cost(method, depth, inside, 1.01, 0.99, 1.03, 7.0, 40)


def test_overhead_keeps_every_row_of_either_device() -> None:
    cpu = [_cost("A/A", 20, 0.0), _cost("wau", 20, 0.004), _cost("soft", 56, 0.006)]
    head, _, *rows = _rows(overhead.table(cpu, [_cost("wau", 20, 0.1), _cost("wau", 110, 0.03)], "Some GPU"))
    assert head[4:] == ["Some GPU: inside hooks / rest", "step with / without (95 %)"]
    assert [row[:2] for row in rows] == [
        ["A/A", "ResNet-20"], ["wau", "ResNet-20"], ["soft", "ResNet-56"], ["wau", "ResNet-110"],
    ]  # fmt: skip
    assert [row[2] for row in rows] == ["", "0.40 %", "0.60 %", ""]
    assert [row[4] for row in rows] == ["", "10.00 %", "", "3.00 %"]
    assert all(len(row) == 6 for row in rows)
    assert "GPU" not in overhead.table(cpu)


def test_overhead_measured_in_parts_keeps_what_the_same_device_measured(tmp_path: Path) -> None:
    path, head = tmp_path / "overhead.json", {"device": "X", "torch": "2", "batch": 64}
    old = [_cost("soft", 20, 0.5)._asdict(), _cost("wau", 20, 0.5)._asdict()]
    path.write_text(json.dumps(head | {"costs": old}))
    merged = overhead._merged(path, head, [_cost("wau", 20, 0.1), _cost("A/A", 20, 0.0)])
    assert [(row["method"], row["inside_hooks"]) for row in merged] == [("A/A", 0.0), ("wau", 0.1), ("soft", 0.5)]
    elsewhere = overhead._merged(path, head | {"device": "Y"}, [_cost("wau", 20, 0.1)])
    assert [row["method"] for row in elsewhere] == ["wau"]


def test_the_steps_behind_a_median_are_said() -> None:
    rows = [_cost("soft", 20, 0.5)._asdict(), _cost("soft", 56, 0.5)._asdict()]
    record = {"device": "X", "torch": "2", "costs": rows}
    assert overhead.machine(record) == "X, torch 2, medians of 40 steps"
    rows.append(_cost("soft", 110, 0.5)._replace(pairs=20)._asdict())
    assert overhead.machine(record) == "X, torch 2, medians of 40 (ResNet-20, 56), 20 (ResNet-110) steps"


def _launches(shallow: int, deep: int) -> dict[str, dict[str, int]]:
    return {depth: {"kernels": n, "operations": 2 * n} for depth, n in (("20", shallow), ("110", deep))}


def test_counts_of_another_device_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["launches", "--methods", "wau", "--device", "cpu", "--out", str(tmp_path / "l.json")]
    )
    old, new = _launches(1, 1), _launches(20, 110)
    monkeypatch.setattr(launches, "measure", lambda methods, revision: {name: {"here": new} for name in methods})
    for device, kept in (("CPU", ["wau", "soft"]), ("Some GPU", ["wau"])):
        counts = {"soft": {"here": old, "abc": old}}
        (tmp_path / "l.json").write_text(json.dumps({"device": device, "counts": counts}))
        launches.main()
        assert list(json.loads((tmp_path / "l.json").read_text())["counts"]) == kept


def test_launches_and_events_leave_gaps() -> None:
    counts = {"wau": {"here": _launches(1, 1)}, "soft": {"here": _launches(2, 3), "abc": _launches(6, 7)}}
    head, _, *rows = _rows(launches.table(counts, {"soft": {"20": 4, "110": 5}}, "G"))
    assert head[1:] == ["kernels, here", "kernels, abc", "operations on a CPU, here", "kernels on an G"]
    assert rows == [["wau", "1 / 1", "", "2 / 2", ""], ["soft", "2 / 3", "6 / 7", "4 / 6", "4 / 5"]]
    cost = {"seconds": 1.0, "MiB": 2.0}
    cpu = {"events": {"net": {"rank": cost, "merge": cost}}, "load": 0.0, "cores": 2, "threads": 1, "torch": "2"}
    gpu = {"events": {"net": {"rank": {"seconds": 0.5, "MiB": 1.0}}}, "device": "G"}
    head, _, *rows = _rows(events.table(cpu, None, gpu))
    assert head[1:] == ["net", "net, G"]
    assert rows == [["rank", "1.00 s, 2 MiB", "0.50 s, 1 MiB"], ["merge", "1.00 s, 2 MiB", ""]]


def test_quality_of_a_gpu_has_its_own_baseline() -> None:
    def runs(baseline: float, other: float) -> list[report.Row]:
        def result(method: str, seed: int, accuracy: float) -> dict[str, object]:
            return {"method": method, "seed": seed, "test_accuracy": accuracy}

        return report.summary(
            {
                "baseline": [result("baseline", seed, baseline + 0.01 * seed) for seed in (1, 2)],
                "soft": [result("soft", seed, other + 0.02 * seed) for seed in (1, 2)],
            }
        )

    head, _, *rows = _rows(report.table(runs(0.5, 0.6), "baseline", runs(0.7, 0.75), "G"))
    assert head[-4:] == ["G: seeds", "test accuracy %", "difference", "p"]
    assert [row[-4] for row in rows] == ["2", "2"]
    assert rows[1][3].startswith("+11.50")
    assert rows[1][-2].startswith("+6.50")
    _, _, *rows = _rows(report.table(runs(0.5, 0.6), "baseline", runs(0.7, 0.75)[:1], "G"))
    assert rows[1][-4:] == [""] * 4


def test_large_steps_measures_what_scaling_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Workload("resnet20", (3, 32, 32), 10, 4, 100)
    monkeypatch.setattr(large_steps, "SHOWN", ("wau", "soft"))
    name = next(iter(WORKLOADS))
    rows = large_steps.measure(small, name, torch.device("cpu"), steps=2)
    assert [(row.method, row.tf32) for row in rows] == [(m, t) for m in ("wau", "soft") for t in (False, True)]
    assert all(0 < row.hooks < row.step for row in rows)
    assert torch.get_float32_matmul_precision() == "highest"
    record = {"device": "NVIDIA H200", "torch": "2", "rows": [row._asdict() for row in rows]}
    counted = json.loads(large_steps.COUNTED.read_text())["counted"]
    table = _rows(large_steps.table(record | {"counted": counted}))
    assert table[2][-1] == f"{100 * rows[0].hooks / rows[0].step:.1f} %"
    with pytest.raises(ValueError, match="Some other GPU"):
        large_steps.table(record | {"counted": counted, "device": "Some other GPU"})


def test_where_results_go() -> None:
    assert result_path("x.json", "cpu") == cards.RESULTS / "x.json"
    assert result_path("x.json", torch.device("cuda")) == cards.RESULTS / "gpu" / "x.json"
    assert description("cpu") == f"CPU, {torch.get_num_threads()} threads"
    assert clock("cpu") <= clock("cpu")
