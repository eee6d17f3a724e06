"""Networks of the committed list: as many filters are merged as the committed results say, exactly."""

from __future__ import annotations

import json

import pytest

from benchmarks.cost.channel_graph_speed import networks
from benchmarks.experiments import zoo

ROWS = json.loads(zoo.RESULT.read_text())["rows"]
NETWORKS = [network for network in networks() if "share" in ROWS.get(f"{network[1]}@{network[2]}", {}).get("ours", {})]
#: By default: one per kind of structure, small.
QUICK = ("regnety_002", "convnext_atto_ols", "skresnet18")


@pytest.mark.zoo
@pytest.mark.parametrize(
    "network", [pytest.param(n, marks=() if n[1] in QUICK else pytest.mark.soak, id=n[1]) for n in NETWORKS]
)
def test_merges_as_much_as_committed(network: tuple[str, str, int]) -> None:
    library, name, size = network
    row = zoo.ours(library, name, size)
    assert "error" not in row, row
    assert row["share"] >= ROWS[f"{name}@{size}"]["ours"]["share"] - 1e-3
    assert row["deviation"] <= 1e-9


def test_the_hard_list_is_complete() -> None:
    assert set(zoo.HARD) <= {key.partition("@")[0] for key in ROWS}
