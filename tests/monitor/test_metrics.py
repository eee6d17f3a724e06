"""The numbers: redundancy of hand-made layers, and the same as torchmetrics."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics import Metric

from lightning_filterdiv.filters import filter_matrix, select_filters, write_filters
from lightning_filterdiv.monitor import EffectiveRank, FilterCoherence
from lightning_filterdiv.monitor.functional import METRICS, Dropped, live_filters, redundancy_metrics
from lightning_filterdiv.similarity import (
    cosine_similarity,
    effective_rank,
    expected_abs_cosine,
    mutual_coherence,
    orthogonality_score,
)
from tests.support.training import Classifier, fit


def conv_of(rows: list[list[float]]) -> nn.Conv2d:
    matrix = torch.tensor(rows)
    conv = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1)
    write_filters(conv, range(len(rows)), matrix)
    return conv


def test_metrics_of_a_hand_made_layer() -> None:
    """Rows: e1, 2 e1 (duplicate), -e1 (opposite), e2, and a filter 1e-5 long, orthogonal to all."""
    conv = conv_of([[1, 0, 0], [2, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, 1e-5]])
    row = redundancy_metrics({"layer": conv})["layer"]
    assert list(row) == list(METRICS)
    assert row["mean_abs_cosine"] == pytest.approx(3 * 2 / (5 * 4))
    assert row["max_abs_cosine"] == pytest.approx(1)
    assert row["orthogonality_score"] == pytest.approx((3 * 2 / 5) / 5)
    assert row["near_duplicates"] == pytest.approx(3 / 5)
    assert row["dead_filters"] == pytest.approx(1 / 5)
    share = torch.tensor([6**0.5, 1.0, 1e-5]) / (6**0.5 + 1 + 1e-5)
    assert row["effective_rank"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())) / 3, rel=1e-4)


def test_orthogonal_and_degenerate_layers() -> None:
    rows = redundancy_metrics(
        {"eye": conv_of(torch.eye(4).tolist()), "one": conv_of([[3.0, 4.0]]), "zero": conv_of([[0.0]] * 3)}
    )
    assert rows["eye"] == pytest.approx(dict(zip(METRICS, (0, 0, 0, 0, 1, 0, 0), strict=True)), abs=1e-6)
    assert rows["one"]["mean_abs_cosine"] == rows["one"]["max_abs_cosine"] == 0
    assert rows["one"]["effective_rank"] == pytest.approx(1)
    assert rows["zero"]["dead_filters"] == 1
    assert all(value == value for row in rows.values() for value in row.values()), "no NaN"


def test_batches_of_layers_equal_single_layers() -> None:
    layers = select_filters(Classifier())
    together = redundancy_metrics(layers)
    assert list(together) == list(layers)
    for name, conv in layers.items():
        assert redundancy_metrics({name: conv})[name] == pytest.approx(together[name], rel=1e-5)


def one_by_one(matrix: torch.Tensor) -> dict[str, float]:
    """The definitions, each by its own public function, in float64."""
    wide = matrix.double()
    count, fan_in = wide.shape
    overlap = cosine_similarity(wide).abs().fill_diagonal_(0.0)
    norm = wide.norm(dim=1)
    mean = float(overlap.sum() / (count * (count - 1)))
    return {
        "cosine_over_chance": mean / expected_abs_cosine(fan_in),
        "mean_abs_cosine": mean,
        "max_abs_cosine": float(mutual_coherence(wide)),
        "orthogonality_score": float(orthogonality_score(wide).mean()),
        "effective_rank": float(effective_rank(wide)) / min(count, fan_in),
        "near_duplicates": float((overlap.amax(dim=1) > 0.9).double().mean()),
        "dead_filters": float((norm <= 1e-3 * norm.median()).double().mean()),
    }


@pytest.mark.parametrize(
    ("filters", "fan_in", "directions"),
    [(300, 90, 90), (90, 300, 90), (129, 128, 20), (256, 256, 256), (2, 9, 2), (8, 1, 1)],
)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_numbers_equal_their_definitions(filters: int, fan_in: int, directions: int, scale: float) -> None:
    """Blocks, Gram matrices of filters or of weights, layers of low rank, twins, dead filters, and hostile scales."""
    torch.manual_seed(filters)
    matrix = torch.randn(filters, directions) @ torch.randn(directions, fan_in)
    matrix[filters // 2] = -3 * matrix[0]
    matrix[-1] *= 1e-6
    layers = {name: conv_of((scale * part).tolist()) for name, part in (("one", matrix), ("other", matrix.flip(0)))}
    measured = redundancy_metrics(layers)
    for name, conv in layers.items():
        assert measured[name] == pytest.approx(one_by_one(filter_matrix(conv) / scale), rel=1e-5, abs=1e-6)


def test_what_is_dropped_does_not_count() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 9, 3)
    cut = nn.Conv2d(3, 7, 3)
    cut.weight.data = conv.weight.data[[0, 1, 2, 4, 5, 7, 8]][:, [0, 2, 4]].clone()
    measured = redundancy_metrics({"conv": conv}, {"conv": Dropped([3, 6], [1, 3])})["conv"]
    assert measured == pytest.approx(redundancy_metrics({"conv": cut})["conv"])
    transposed = nn.ConvTranspose2d(5, 9, 3)
    smaller = nn.ConvTranspose2d(3, 7, 3)
    smaller.weight.data = transposed.weight.data[[0, 2, 4]][:, [0, 1, 2, 4, 5, 7, 8]].clone()
    assert torch.equal(live_filters(transposed, Dropped([3, 6], [1, 3])), filter_matrix(smaller))
    everything = redundancy_metrics({"conv": conv}, {"conv": Dropped(range(9), [])})["conv"]
    assert set(everything.values()) == {0.0}


def test_a_diverged_layer_is_nan_and_spares_its_neighbours() -> None:
    layers = {"good": nn.Conv2d(3, 4, 3), "bad": nn.Conv2d(3, 4, 3)}
    layers["bad"].weight.data[1, 2, 0, 0] = float("nan")
    rows = redundancy_metrics(layers)
    assert rows["bad"]["effective_rank"] != rows["bad"]["effective_rank"]
    assert rows["good"] == pytest.approx(redundancy_metrics({"good": layers["good"]})["good"])


@pytest.mark.parametrize("shape", [(12, 60), (60, 12), (40, 40), (1, 9), (9, 1)])
def test_long_matrices_agree_with_float64_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(0, -4, shape[1]))
    assert float(effective_rank(matrix)) == pytest.approx(float(effective_rank(matrix.double())), rel=2e-6)


# --------------------------------------------------------------------------- torchmetrics


def test_coherence_and_rank_average_over_layers() -> None:
    mean, largest, share, rank = FilterCoherence(), FilterCoherence("max"), EffectiveRank(), EffectiveRank(False)
    model = Classifier()
    rows = redundancy_metrics(select_filters(model))
    for conv in select_filters(model).values():
        for metric in (mean, largest, share, rank):
            metric.update(conv)
    count = len(rows)
    assert float(mean.compute()) == pytest.approx(sum(row["mean_abs_cosine"] for row in rows.values()) / count)
    assert float(share.compute()) == pytest.approx(sum(row["effective_rank"] for row in rows.values()) / count)
    matrices = [filter_matrix(conv) for conv in select_filters(model).values()]
    assert float(largest.compute()) == pytest.approx(sum(float(mutual_coherence(m)) for m in matrices) / count)
    assert float(rank.compute()) == pytest.approx(sum(float(effective_rank(m)) for m in matrices) / count)
    mean.reset()
    mean.update(torch.stack([torch.eye(3), torch.ones(3, 3)]))
    assert float(mean.compute()) == pytest.approx(0.5), "a batch counts as its layers"


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="an older torchmetrics")
def test_metrics_merge_like_those_of_other_ranks() -> None:
    """What torchmetrics sums across ranks: every rank holds the same layers, so the mean stays."""
    one, two = FilterCoherence(), FilterCoherence()
    one.update(torch.ones(2, 3))
    two.update(torch.ones(2, 3))
    one.merge_state(two)
    assert float(one.compute()) == pytest.approx(1)
    assert {FilterCoherence()._reductions[name].__name__ for name in ("total", "layers")} == {"dim_zero_sum"}


def test_metrics_log_through_lightning() -> None:
    class Logs(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.coherence = FilterCoherence()

        def on_train_epoch_end(self) -> None:
            self.coherence.update(self.net[3])
            self.log("coherence", self.coherence)

    run = fit(model=Logs(), max_epochs=2)
    expected = redundancy_metrics({"net.3": run.model.net[3]})["net.3"]["mean_abs_cosine"]
    assert float(run.trainer.callback_metrics["coherence"]) == pytest.approx(expected, rel=1e-5)
    assert not [key for key in run.model.state_dict() if "coherence" in key]


@pytest.mark.parametrize("metric", [FilterCoherence, EffectiveRank])
def test_wrong_input_of_metrics(metric: type) -> None:
    for wrong, shown in ((nn.Linear(2, 2), "Linear"), (torch.zeros(3), r"shape \(3,\)"), ([1.0], "list")):
        with pytest.raises(TypeError, match=f"takes a convolution.*got {shown}"):
            metric().update(wrong)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'max'"):
        FilterCoherence("median")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="normalize must be True or False"):
        EffectiveRank(1)  # type: ignore[arg-type]
