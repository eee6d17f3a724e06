"""Measurements of this tree and of a commit in one run, and their tables."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.common.paths import ROOT
from benchmarks.cost import against, clustering, host_time, launches, memory

in_a_clone = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the history")


@in_a_clone
def test_an_unknown_commit_is_named() -> None:
    with pytest.raises(ValueError, match="--against no-such-commit: git knows no such commit"):
        against.short_name("no-such-commit")


@in_a_clone
def test_a_commit_is_measured_with_its_own_package(tmp_path: Path) -> None:
    against._export("HEAD", tmp_path)
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "show", "HEAD:lightning_filterdiv/filters.py"], capture_output=True, check=True
    ).stdout
    assert (tmp_path / "lightning_filterdiv" / "filters.py").read_bytes() == tracked
    # The worker would not start if the package were found elsewhere.
    (tmp_path / "lightning_filterdiv" / "filters.py").write_text("raise RuntimeError('the exported one')\n")
    version = against._Version("benchmarks.cost.host_time", tmp_path, 1)
    with pytest.raises(RuntimeError, match="ended with status 1"):
        version.measure("soft stack-18")
    version.close()


@in_a_clone
def test_both_versions_are_measured_in_turn() -> None:
    found = against.compare("benchmarks.cost.host_time", ["soft stack-18"], 2, "HEAD")
    names = [against.HERE, against.short_name("HEAD")]
    assert list(found) == ["soft stack-18"]
    assert list(found["soft stack-18"]) == names
    assert all(len(of) == 2 and min(one["inside"] for one in of) > 0 for of in found["soft stack-18"].values())
    (row,) = host_time.rows(found)
    assert row["ratio"] > 0
    record = {"rows": [row], "device": "CPU, 1 threads", "torch": "2", "rounds": 2}
    assert host_time.table(record).splitlines()[2].startswith("| soft | stack-18 | ")


def test_tables() -> None:
    ratios = [{"group": "a", "size": 64, "seed": seed, "ratio": 0.9 + 0.01 * seed} for seed in range(3)]
    record = {"seconds": {"here": 1.25, "abc": 20.0}, "ratios": ratios, "device": "CPU", "torch": "2", "seeds": 3}
    assert "| 64 | 3 | 0.910 | 0.920 |" in clustering.table(record)
    rules = {"wau": {"here": {"kept": 0.974, "peak": 1.04}, "abc": {"kept": -0.001, "peak": 2.0}}}
    assert "| wau | 0.97 | 0.00 | 1.04 | 2.00 |" in memory.table({"rules": rules, "device": "CPU", "torch": "2"})


@in_a_clone
def test_launches_of_both_versions() -> None:
    counts = launches.measure(["soft", "per-layer autograd soft"], "HEAD")
    other = against.short_name("HEAD")
    kernels = {
        (method, name, depth): numbers["kernels"]
        for method, of in counts.items()
        for name, depths in of.items()
        for depth, numbers in depths.items()
    }
    assert all(kernels["soft", name, "20"] == kernels["soft", name, "110"] > 0 for name in (against.HERE, other))
    for name in (against.HERE, other):
        assert kernels["per-layer autograd soft", name, "110"] > 5 * kernels["per-layer autograd soft", name, "20"]
    row = launches.table(counts, {"soft": {"20": 7, "110": 8}}, "H200").splitlines()[2]
    both = " / ".join(str(kernels["soft", against.HERE, depth]) for depth in ("20", "110"))
    assert row.startswith(f"| soft | {both} | ")
    assert row.endswith(" | 7 / 8 |")
