"""What the benchmark of traces says of some columns, and of none."""

from __future__ import annotations

from typing import Any

from benchmarks.cost.channel_graph_speed import summary


def test_a_summary_of_the_columns_there_are() -> None:
    trace: dict[str, Any] = {"trace": {"seconds": 2.0, "reads values": False}}
    alone = summary({"a": trace})
    assert (alone["median seconds"], alone["median ratio to torch-pruning"]) == (2.0, None)
    both = summary({"a": trace | {"peer": {"seconds": 0.1}}, "b": {"trace": {"error": "stopped"}}})
    assert both["median ratio to torch-pruning"] == 20.0
    assert both["above 10 x torch-pruning + 0.5 s"] == {"a": 2.0 - 10 * 0.1 - 0.5}
    assert both["errors"] == {"b": "stopped"}
    assert summary({})["median seconds"] is None
