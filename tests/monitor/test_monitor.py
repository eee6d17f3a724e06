"""What the monitor measures, and where it puts it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_filterdiv import FilterSimilarityMonitor
from lightning_filterdiv.filters import filter_matrix, select_filters, write_filters
from lightning_filterdiv.monitor.figures import similarity_heat_map, similarity_order
from lightning_filterdiv.monitor.functional import METRICS, redundancy_metrics
from lightning_filterdiv.similarity import cosine_similarity
from tests.support.training import Classifier, batches, fit


def _conv(rows: list[list[float]]) -> nn.Conv2d:
    matrix = torch.tensor(rows)
    conv = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1)
    write_filters(conv, range(len(rows)), matrix)
    return conv


def test_metrics_of_a_hand_made_layer() -> None:
    """Rows: e1, 2 e1 (duplicate), -e1 (opposite), e2, and a filter 1e-5 long, orthogonal to all."""
    conv = _conv([[1, 0, 0], [2, 0, 0], [-1, 0, 0], [0, 1, 0], [0, 0, 1e-5]])
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
        {"eye": _conv(torch.eye(4).tolist()), "one": _conv([[3.0, 4.0]]), "zero": _conv([[0.0]] * 3)}
    )
    assert rows["eye"] == pytest.approx(dict(zip(METRICS, (0, 0, 0, 1, 0, 0), strict=True)), abs=1e-6)
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


def test_order_puts_duplicates_side_by_side() -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 40)
    filters = torch.cat([base, -2 * base])[torch.randperm(12)]
    order = similarity_order(cosine_similarity(filters))
    assert sorted(order) == list(range(12))
    ordered = cosine_similarity(filters).abs()[order][:, order]
    neighbours = ordered.diagonal(offset=1)
    assert int((neighbours > 0.999).sum()) == 6
    assert similarity_order(torch.eye(2)) == [0, 1]


def test_heat_map_says_what_it_shows() -> None:
    figure = similarity_heat_map(torch.eye(4, 9), "stage.conv", "after epoch 3")
    axes, bar = figure.axes
    assert "stage.conv: 4 filters of 9 weights, after epoch 3" in axes.get_title()
    assert "mean |cos| 0.000 (random filters: 0.273)" in axes.get_title()
    assert axes.images[0].get_clim() == (0.0, 1.0)
    assert "|cos|" in bar.get_ylabel()


def _events(folder: Path) -> EventAccumulator:
    (file,) = folder.rglob("events.out.tfevents*")
    return EventAccumulator(str(file.parent)).Reload()


def test_tensorboard_and_csv_at_once(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    run = fit([FilterSimilarityMonitor(every_n_epochs=2, max_figures=1)], max_epochs=4, logger=[board, table])
    events = _events(tmp_path / "tb")
    for metric in METRICS:
        for layer in ("net.0", "net.3", "net.5", "net.7", "network"):
            logged = events.Scalars(f"filterdiv/{metric}/{layer}")
            assert [event.step for event in logged] == [0, 12, 24], "before training, then every second epoch"
    final = redundancy_metrics(select_filters(run.model))
    logged_last = events.Scalars("filterdiv/mean_abs_cosine/net.5")[-1].value
    assert logged_last == pytest.approx(final["net.5"]["mean_abs_cosine"], rel=1e-5)
    images = [tag for tag in events.Tags()["images"] if tag.startswith("filterdiv/figures/similarity/")]
    assert len(images) == 1
    assert len(events.Images(images[0])) == 3
    assert not list(tmp_path.rglob("*.png"))
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        assert "filterdiv/effective_rank/network" in next(csv.reader(file))


@pytest.mark.parametrize("logger", [False, "csv"])
def test_without_tensorboard_figures_are_files(logger: Any, tmp_path: Path) -> None:
    fit(
        [FilterSimilarityMonitor(max_figures=2)],
        max_epochs=1,
        logger=CSVLogger(tmp_path) if logger else False,
        default_root_dir=tmp_path,
    )
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 4
    assert files[0].parts[-2] == "similarity"
    assert imread(files[0]).shape[:2] > (300, 300)


def test_switches(tmp_path: Path) -> None:
    fit([FilterSimilarityMonitor(figures=False)], max_epochs=1, logger=TensorBoardLogger(tmp_path / "a"))
    assert not _events(tmp_path / "a").Tags()["images"]
    fit([FilterSimilarityMonitor(scalars=False)], max_epochs=1, logger=TensorBoardLogger(tmp_path / "b"))
    assert not [tag for tag in _events(tmp_path / "b").Tags()["scalars"] if tag.startswith("filterdiv")]


def test_the_same_layers_are_drawn_throughout_and_after_a_resume(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    first = FilterSimilarityMonitor(max_figures=2)
    fit([first, ModelCheckpoint(dirpath=tmp_path, filename="end")], max_epochs=1)
    drawn = first.extra_state()["figure_layers"]
    assert len(drawn) == 2
    second = FilterSimilarityMonitor(max_figures=2)
    fit([second], max_epochs=2, ckpt_path=str(tmp_path / "end.ckpt"))
    assert second.extra_state()["figure_layers"] == drawn


def test_unwritable_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        fit([FilterSimilarityMonitor()], max_epochs=1, default_root_dir=blocked / "logs")


def test_weight_averaging_does_not_show(tmp_path: Path) -> None:
    """Averages are swapped in during validation; the monitor looks when the training weights are back."""
    seen: list[torch.Tensor] = []

    class Looks(FilterSimilarityMonitor):
        def _look(self, trainer: Any, when: str) -> None:
            seen.append(filter_matrix(self.layers["net.3"]).clone())

    run = fit([EMAWeightAveraging(decay=0.9), Looks()], max_epochs=1, validation=batches(steps=1))
    plain = fit(max_epochs=1, validation=batches(steps=1))
    assert torch.equal(seen[-1], filter_matrix(plain.model.net[3]))
    assert not torch.equal(filter_matrix(run.model.net[3]), seen[-1]), "the average replaced the weights at the end"


def test_frozen_layers_are_shown() -> None:
    model = Classifier()
    model.net[0].requires_grad_(False)
    monitor = FilterSimilarityMonitor(figures=False)
    fit([monitor], model=model, max_epochs=1)
    assert "net.0" in monitor.layers
