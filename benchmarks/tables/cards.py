"""Write the tables of README and method cards from the result files, so that no number is typed by hand.

The file that ``filterdiv methods`` prints is written too: the package contains no result files.

python -m benchmarks.tables.cards            # fills what stands between "<!-- table: NAME -->" and "<!-- end -->"
python -m benchmarks.tables.cards --check    # only says what is out of date
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.device import read_result
from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.cost import (
    callback_time,
    channel_graph_speed,
    clustering,
    communication,
    events,
    host_time,
    large_steps,
    launches,
    memory,
    merge_time,
    monitor,
    overhead,
    peers,
    prune_zoo,
    scaling,
)
from benchmarks.cost import channel_graph as channel_graph_cost
from benchmarks.cost import entropy as entropy_speed
from benchmarks.cost import structure as structure_cost
from benchmarks.experiments import entropy_depth, prune, reproduced, shared_basis, squeeze, ucp, widen, zoo
from benchmarks.tables import summary
from benchmarks.training import report
from benchmarks.training.runs import read_runs
from lightning_filterdiv import orthonormality

#: Text of ``filterdiv methods``.
METHODS = ROOT / "lightning_filterdiv/command_line/methods.json"
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _overhead(*beginnings: str) -> str:
    """The A/A row and the methods whose names begin like this."""
    records = [read_result(path) for path in ("overhead.json", "gpu/overhead.json")]
    costs, gpu = (
        [overhead.Cost(**c) for c in record["costs"] if c["method"].startswith(("A/A", *beginnings))]
        for record in records
    )
    machines = "; ".join(overhead.machine(record) for record in records)
    return f"{overhead.table(costs, gpu, records[1]['device'])}\n\n{machines}; batch {records[0]['batch']}, 32x32."


def _launches(*beginnings: str) -> str:
    """The methods whose names begin like this."""
    cpu, gpu = read_result("launches.json"), read_result("gpu/launches.json")
    counts = {method: of for method, of in cpu["counts"].items() if method.startswith(beginnings)}
    return launches.table(counts, gpu["counts"], gpu["device"])


def _entropy_depth() -> str:
    speed = json.loads(entropy_speed.RESULT.read_text())
    return entropy_depth.table(entropy_depth.OUT, speed["rows"]["raw 8-bit array"]["bound"])


def _quality(*beginnings: str) -> str:
    """FM5k: the baseline and the methods whose names begin like this, p-values corrected over them."""

    def rows(folder: str) -> list[report.Row]:
        runs = read_runs(RESULTS / folder)
        return report.summary({m: of for m, of in runs.items() if m == "baseline" or m.startswith(beginnings)})

    gpu = "gpu/fm5k-c3"
    if not (RESULTS / gpu).exists():
        return report.table(rows("fm5k-c3"))
    return report.table(rows("fm5k-c3"), "baseline", rows(gpu), _devices(gpu))


def _resnet20(*methods: str) -> str:
    """FM5k with ResNet-20: the baseline and these methods, or all; p-values corrected over all."""
    rows = report.summary(read_runs(RESULTS / "fm5k-resnet20"))
    return report.table([row for row in rows if not methods or row.method in ("baseline", *methods)])


def _devices(folder: str) -> str:
    """Return the names of the devices of the runs in a folder."""
    return ", ".join(sorted({run["device"] for of in read_runs(RESULTS / folder).values() for run in of}))


def _compared(folder: str, *methods: str) -> str:
    """These methods alone, the first of which is the baseline."""
    return report.table(report.summary(read_runs(RESULTS / folder, methods), methods[0]), methods[0])


def _events(*methods: str) -> str:
    return report.event_table(read_runs(RESULTS / "fm5k-c3", methods))


TABLES: dict[str, Callable[[], str]] = {
    "methods_worked": lambda: summary.table("worked"),
    "methods_not_seen": lambda: summary.table("not_seen"),
    "methods_cost": summary.cost_table,
    "fm5k_wau": lambda: _quality("wau", "conv_lr_half"),
    "fm5k_repr": lambda: _quality("repr"),
    "fm5k_orthonormality": lambda: _quality(*orthonormality.DEFAULT_WEIGHTS),
    "fm5k_resnet20": lambda: _resnet20(),
    "fm5k_repr_events": lambda: _events("baseline", "repr", "repr_early"),
    "events": lambda: events.table(read_result("events.json"), None, read_result("gpu/events.json")),
    "events_divided": lambda: events.divided_table(read_result("events_divided.json")),
    "large_steps": lambda: large_steps.table(read_result("gpu/large_steps.json")),
    "channel_graph_cost": lambda: channel_graph_cost.table(
        json.loads(channel_graph_cost.RESULT.read_text())["results"]
    ),
    "channel_graph_peers": lambda: peers.table(json.loads(peers.RESULT.read_text())["rows"]),
    "channel_graph_speed": lambda: channel_graph_speed.summary_table(
        json.loads(channel_graph_speed.RESULT.read_text())["rows"]
    ),
    "prune_zoo": lambda: prune_zoo.table(json.loads(prune_zoo.OUT.read_text())),
    "prune_quality": lambda: prune.table(prune.OUT),
    "zoo_summary": lambda: zoo.summary_table(json.loads(zoo.RESULT.read_text())["rows"]),
    "zoo": lambda: zoo.table(json.loads(zoo.RESULT.read_text())["rows"]),
    "monitor": lambda: monitor.table(json.loads(monitor.RESULT.read_text())),
    "squeeze": lambda: squeeze.table(squeeze.OUT),
    "squeeze_merge": lambda: squeeze.merge_table(squeeze.OUT),
    "squeeze_latency": lambda: squeeze.latency_table(squeeze.OUT / "latency.json"),
    "shared_basis": lambda: shared_basis.table(shared_basis.OUT),
    "shared_basis_gradients": lambda: shared_basis.profile_table(shared_basis.OUT),
    "fm5k_expansion": lambda: _compared("fm5k-c3", "baseline", "expand_third", "lr_third", "expand"),
    "fm5k_anchored": lambda: _compared("fm5k-resnet20-14", "baseline", "anchored", "anchored_regulator"),
    "fm5k_wavelet": lambda: _compared("fm5k-c3", "baseline", "wavelet", "wavelet_edges", "wavelet_maxima"),
    "ucp": lambda: ucp.table(ucp.OUT),
    "reproduced_repr_noisy": lambda: reproduced.table("repr-c3-noisy"),
    "reproduced_repr": lambda: reproduced.table("repr-c3"),
    "reproduced_expand_rates": lambda: "\n\n".join(
        f"Learning rate {rate}:\n\n{reproduced.table(f'small-net-rates/{rate}')}" for rate in reproduced.RATES
    ),
    "reproduced_expand": reproduced.small_net_table,
    "reproduced_widen": lambda: widen.table(widen.OUT),
    "entropy_depth": _entropy_depth,
    "entropy_speed": lambda: entropy_speed.table(json.loads(entropy_speed.RESULT.read_text())),
    "fm5k_c3": lambda: _quality("wau", "conv_lr_half", "repr", *orthonormality.DEFAULT_WEIGHTS),
    "overhead": lambda: _overhead(""),
    "callback_time": lambda: callback_time.table(read_result("callback_time.json")),
    "launches": lambda: _launches(""),
    "host_time": lambda: host_time.table(json.loads(host_time.RESULT.read_text())),
    "clustering": lambda: clustering.table(json.loads(clustering.RESULT.read_text())),
    "merge_time": lambda: merge_time.table(json.loads(merge_time.RESULT.read_text())),
    "memory": lambda: memory.table(json.loads(memory.RESULT.read_text())),
    "communication": lambda: communication.table(json.loads(communication.RESULT.read_text())),
    "structure_cost": lambda: structure_cost.table(
        [structure_cost.Cost(**cost) for cost in json.loads(structure_cost.RESULT.read_text())["costs"]]
    ),
    "composability": summary.composability,
    "reliability": summary.reliability,
    "composability_beside": summary.composability_beside,
    "weak_scaling": lambda: communication.weak_table(json.loads(communication.RESULT.read_text())["weak"]),
    "scaling_check": lambda: scaling.check_table(json.loads(scaling.RESULT.read_text())["check"]),
    "scaling_step": lambda: scaling.step_table(json.loads(scaling.RESULT.read_text())),
    "scaling_events": lambda: scaling.event_table(json.loads(scaling.RESULT.read_text())),
}


def filled(text: str) -> str:
    """``text`` with every table block made anew.

    Raises:
        ValueError: a block asks for a table that nothing makes.
    """

    def made(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"a page asks for the table {match[2]!r}; say in TABLES of {__name__} what makes it")
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return _BLOCK.sub(made, text)


def pages() -> list[Path]:
    """Pages that may hold tables."""
    folders = ("lightning_filterdiv", "benchmarks", "docs")
    return [ROOT / "README.md", *sorted(path for folder in folders for path in (ROOT / folder).rglob("*.md"))]


def stale() -> dict[Path, str]:
    """Return outdated files -> their new text."""
    wanted = {page: filled(page.read_text(encoding="utf-8")) for page in pages()} | {METHODS: summary.methods_file()}
    return {path: text for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text}


def main() -> int:
    """Command line; status 1 if ``--check`` finds a file out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check: bool = parser.parse_args().check
    found = stale()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'updated'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
