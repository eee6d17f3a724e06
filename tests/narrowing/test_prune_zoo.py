"""Half of the MACs by every importance; a part by default, the rest in ``soak``."""

from __future__ import annotations

import pytest

from benchmarks.cost.prune_zoo import IMPORTANCES, NETWORKS, beside, check

_NO_NORM = {("convnext_tiny", "bn_scale")}


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_small_network_by_every_importance(importance: str) -> None:
    verdict = check("resnet20", importance, onnx=importance == "l2")
    assert verdict.startswith("works ("), verdict
    assert float(verdict[7:].rstrip(")")) == pytest.approx(0.5, rel=0.01)


@pytest.mark.soak
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnet20"])
def test_networks_people_have_by_every_importance(name: str, importance: str) -> None:
    if name == "yolov8n":
        pytest.importorskip("ultralytics")
    answer = check(name, importance)
    if (name, importance) in _NO_NORM:
        assert answer.startswith("refused: no layer is left to prune")
        assert "reads; choose another importance" in answer
    else:
        assert answer.startswith(("works (0.5", "works (0.4")), answer


@pytest.mark.soak
def test_torch_pruning_answers_too() -> None:
    assert beside("resnet18").startswith("works")
