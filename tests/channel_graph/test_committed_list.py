"""Networks of the committed list: as many filters are merged as the committed results say, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx

from benchmarks.cost.channel_graph_speed import build, networks
from benchmarks.experiments import zoo
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.narrow import tie
from lightning_filterdiv.channel_graph.verify import random_clusters, randomise
from lightning_filterdiv.narrowing import merge_channels
from lightning_filterdiv.narrowing.export import export_onnx

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
    committed = ROWS[f"{name}@{size}"]["ours"]
    assert row["share"] >= committed["share"] - 1e-3
    assert row.get("precision") == committed.get("precision")  # None: float64
    # The forward of RAFT casts to float32, where a proof allows the square root of the rounding unit.
    assert row["deviation"] <= (1e-9 if "precision" not in row else torch.finfo(torch.float32).eps ** 0.5)


@pytest.mark.soak
@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", ["mobilevit_xxs", "levit_128s", "pvt_v2_b0", "coatnet_pico_rw_224", "swin_tiny_patch4_window7_224"]
)
def test_narrow_attention_is_the_same_in_onnxruntime(name: str, tmp_path: Path) -> None:
    library, _, size = next(network for network in NETWORKS if network[1] == name)
    model, images = build(library, name, size)
    randomise(model, torch.Generator().manual_seed(0))
    graph = ChannelGraph.trace(model, images)
    clusters = random_clusters(graph, torch.Generator().manual_seed(0), keep=0.5)
    tie(model, graph, clusters)
    narrow = merge_channels(model, clusters, images, tolerance=float("inf")).network
    assert any(isinstance(module, fx.GraphModule) for module in narrow.modules())
    assert export_onnx(narrow, tmp_path / "narrow.onnx", images) <= 1e-5


def test_the_hard_list_is_complete() -> None:
    assert set(zoo.HARD) <= {key.partition("@")[0] for key in ROWS}
