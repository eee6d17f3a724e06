"""The long tests in parts of at most twenty minutes on two cores: ``pytest -m soak_kill``; ``pytest -m soak`` runs all.

A test marked ``soak`` belongs to the one part that has a pattern for its id. ``conftest.py`` adds the part's marker.
"""

from __future__ import annotations

import re

KILL = "tests/suites/test_kill_and_resume.py::"
DDP = r"tests/test_two_processes.py::test_ddp_suite_in_full\["
FIRST = "(wau|repr|csgd|basis|entropy)"
#: Part -> regular expressions that ids of its tests begin with.
PARTS: dict[str, tuple[str, ...]] = {
    # Networks through the channel graph, narrowed, expanded and pruned.
    "soak_graph": ("tests/channel_graph/", "tests/narrowing/", "tests/expansion/", "tests/channel_importance/"),
    # Every configuration of every callback in the suites; what composes; other tasks.
    "soak_suites": (r"tests/suites/test_(?!resume|kill_and_resume|long_run|injection|damaged)",),
    # A fault at every hook and in every call of a logger.
    "soak_injection": ("tests/suites/test_injection.py::.*(wau|basis|monitor|expand|importance)-",),
    "soak_injection_traced": ("tests/suites/test_injection.py::.*(repr|csgd|entropy)-",),
    "soak_resume": ("tests/suites/test_resume.py::",),
    # 5,000 steps; figures over 200 epochs.
    "soak_long": ("tests/suites/test_long_run.py::", "tests/monitor/"),
    # Runs of one process, or of two, killed at twenty moments each; resumed on another number of processes.
    "soak_kill": (KILL + r"(?!test_killed_runs|test_a_run_goes_on)", KILL + r"test_killed_runs.*-1\]$"),
    "soak_kill_ddp_a": (KILL + rf"test_killed_runs[^\[]*\[{FIRST}.*-2\]$",),
    "soak_kill_ddp_b": (KILL + rf"test_killed_runs[^\[]*\[(?!{FIRST}).*-2\]$",),
    "soak_kill_world": (KILL + "test_a_run_goes_on",),
    # Two ranks in every mode of training, a part for each precision, and what else runs on two ranks.
    "soak_ddp": (DDP + r"other\]",),
    "soak_ddp_32": (DDP + r"32\]",),
    "soak_ddp_bf16": (DDP + r"bf16\]",),
    "soak_ddp_fp16": (DDP + r"fp16\]",),
    # Clusters, sweeps and commands, in processes of their own.
    "soak_processes": ("tests/benchmarks/", "tests/command_line/(?!test_fuzz)", "tests/training/"),
    # Files of every kind, damaged at random; states of callbacks, entry by entry.
    "soak_fuzz": ("tests/command_line/test_fuzz.py::", "tests/suites/test_damaged_state.py::"),
}


def part(nodeid: str) -> str:
    """The part of a soak test.

    Raises:
        ValueError: it belongs to none, or to several.
    """
    found = [name for name, patterns in PARTS.items() if any(re.match(pattern, nodeid) for pattern in patterns)]
    if len(found) != 1:
        raise ValueError(f"{nodeid} must belong to one part of tests/soak.py, not to {found}")
    return found[0]
