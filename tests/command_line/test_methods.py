"""``filterdiv methods``: what it lists, and that it needs no torch."""

from __future__ import annotations

import json

import pytest

import lightning_filterdiv
from benchmarks.tables import summary
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.command_line.methods import describe_methods
from tests.command_line.test_main import light


def test_it_needs_no_torch() -> None:
    done = light("methods")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nCentripetalSGD: makes filters equal and merges them\n" in done.stdout


def test_it_lists_every_callback_with_the_numbers_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    for name in set(lightning_filterdiv.__all__) - {"FilterCallback", "__version__"}:
        assert f"\n{name}: " in text
    flat = " ".join(text.split())
    for part in json.loads(summary.methods_file())["parts"]:
        assert part["title"] in text
        for method in part["methods"]:
            assert f"{method['name']}: {method['does']} measured: {method['measured']}" in flat
            assert f"{method['does']} | {method['measured']} |" in summary.table("worked") + summary.table("not_seen")


@pytest.mark.parametrize("width", [40, 80, 120])
def test_it_fits_the_terminal(width: int) -> None:
    assert max(map(len, describe_methods(width).splitlines())) <= width
