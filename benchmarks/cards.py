"""Write the tables of README and method cards from the result files, so that no number is typed by hand.

python -m benchmarks.cards            # fills what stands between "<!-- table: NAME -->" and "<!-- end -->"
python -m benchmarks.cards --check    # only says what is out of date
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import events, launches, monitor, overhead, quality

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _overhead() -> str:
    result = json.loads(overhead.RESULT.read_text())
    costs = [overhead.Cost(**cost) for cost in result["costs"]]
    return f"{overhead.table(costs)}\n\n{result['device']}, torch {result['torch']}, batch {result['batch']}, 32x32."


TABLES: dict[str, Callable[[], str]] = {
    "fm5k_wau": lambda: quality.table(quality.RESULTS, [m for m in quality.METHODS if "repr" not in m]),
    "fm5k_repr": lambda: quality.table(quality.RESULTS, [m for m in quality.METHODS if "repr" in m or m == "baseline"]),
    "events": lambda: events.table(json.loads(events.RESULT.read_text())["seconds"]),
    "monitor": lambda: monitor.table(json.loads(monitor.RESULT.read_text())),
    "overhead": _overhead,
    "launches": lambda: launches.table(json.loads(launches.RESULT.read_text())["counts"]),
}


def filled(text: str) -> str:
    """``text`` with every table block made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def pages() -> list[Path]:
    """Pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "lightning_filterdiv").rglob("README.md"))]


def main() -> int:
    """Command line; status 1 if ``--check`` finds a page out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check: bool = parser.parse_args().check
    stale = [page for page in pages() if filled(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'is out of date' if check else 'updated'}")
        if not check:
            page.write_text(filled(page.read_text()))
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
