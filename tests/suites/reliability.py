"""Counts what the suites try, for the page "Reliability".

python -m tests.suites.reliability   # writes benchmarks/results/reliability.json; then benchmarks.tables.cards
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.command_line import test_fuzz
from tests.repr_ import test_interruptions
from tests.suites import composability, test_changed_arguments, test_injection, test_kill_and_resume

RESULT = composability.RESULT.with_name("reliability.json")
MESSAGES = Path(__file__).parent / "wrong_uses" / "messages.txt"


def counted() -> list[list[str]]:
    """Rows of the table: what is tried, how often in the default tests, how often with the long ones."""
    faults = test_injection.rows()
    short = [row for row in faults if not row.marks]
    errors = test_injection.logger_errors()
    files = test_fuzz.FILES
    damaged = sum(files.values())
    kills = test_kill_and_resume.MOMENTS * len(test_kill_and_resume.NAMES)
    tables = json.loads(composability.RESULT.read_text())
    cells = [outcome for part in tables.values() for row in part.values() for outcome in row.values()]
    works = sum(outcome == composability.WORKS for outcome in cells)
    changed = len(test_changed_arguments.ROWS) + sum(map(len, test_changed_arguments.REFUSED.values()))
    messages = sum(not line.startswith(" ") and bool(line) for line in MESSAGES.read_text().splitlines())
    rows: list[tuple[str, int, int | str]] = [
        ("errors raised at a hook, and interrupted calls of a logger", len(short), len(faults)),
        ("errors that a logger raises when it gets numbers or images", len(errors), len(errors)),
        ("exceptions inside an event of RePr", len(test_interruptions.POINTS), len(test_interruptions.POINTS)),
        ("processes killed with SIGKILL and resumed, one process and two", 0, 2 * kills),
        ("files damaged at random", damaged, f"{damaged}, and more for {2 * len(files)} minutes"),
        ("arguments changed on resume", changed, changed),
        ("wrong uses, each with its message", messages, messages),
        ("combinations with another callback or option", 0, f"{len(cells)}: {works} work, the others are refused"),
    ]
    return [[what, str(default) if default else "-", str(whole)] for what, default, whole in rows]


def main() -> None:
    """Write the result file."""
    RESULT.write_text(json.dumps(counted(), indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
