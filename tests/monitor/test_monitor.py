"""When the monitor looks, what it leaves alone, and where scalars and figures go."""

from __future__ import annotations

import csv
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_filterdiv import FilterSimilarityMonitor, RePr
from lightning_filterdiv.filters import NoLayersError, select_filters
from lightning_filterdiv.monitor import callback as callback_module
from lightning_filterdiv.monitor import loggers as loggers_module
from lightning_filterdiv.monitor.figures import kernel_mosaic, similarity_heat_map, to_rgb
from lightning_filterdiv.monitor.functional import METRICS, redundancy_metrics
from lightning_filterdiv.monitor.views import view_layer
from tests.suites.test_resume import KINDS
from tests.support.training import Classifier, batches, fit, since_lightning_2_6

LAYERS = ("net.0", "net.3", "net.5", "net.7")


def _events(folder: Path) -> EventAccumulator:
    (file,) = folder.rglob("events.out.tfevents*")
    return EventAccumulator(str(file.parent), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_tensorboard_and_csv_at_once(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    run = fit([FilterSimilarityMonitor(every_n_epochs=2, max_figures=1)], max_epochs=4, logger=[board, table])
    events = _events(tmp_path / "tb")
    for metric in METRICS:
        for layer in (*LAYERS, "network"):
            logged = events.Scalars(f"filterdiv/{metric}/{layer}")
            assert [event.step for event in logged] == [0, 12, 24], "before training, then every second epoch"
    final = redundancy_metrics(select_filters(run.model))
    logged_last = events.Scalars("filterdiv/mean_abs_cosine/net.5")[-1].value
    assert logged_last == pytest.approx(final["net.5"]["mean_abs_cosine"], rel=1e-5)
    for tag in ("distribution", "timeline"):
        assert [image.step for image in events.Images(f"filterdiv/figures/{tag}")] == [0, 12, 24]
    assert "custom_scalars__config__" in events.Tags()["tensors"], "TensorBoard's Custom Scalars page"
    assert not list(tmp_path.rglob("*.png"))
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        assert "filterdiv/effective_rank/network" in next(csv.reader(file))


@pytest.mark.parametrize("logger", [False, "csv"])
def test_without_a_logger_for_figures_they_are_files(
    logger: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        fit(
            [FilterSimilarityMonitor(max_figures=2)],
            max_epochs=1,
            logger=CSVLogger(tmp_path) if logger else False,
            default_root_dir=tmp_path,
        )
    files = sorted(tmp_path.rglob("*.png"))
    assert {file.parent.name for file in files} == {"similarity", "kernels", "figures"}
    for kind in ("similarity", "kernels"):
        steps = [file.stem.rpartition("-step")[2] for file in files if file.parent.name == kind]
        assert sorted(steps) == ["000000"] * 2 + ["000006"] * 2
    assert imread(files[0]).shape[:2] > (300, 300)
    assert "no logger takes figures, PNG files go to" in caplog.text


def test_switches(tmp_path: Path) -> None:
    fit([FilterSimilarityMonitor(figures=False)], max_epochs=1, logger=TensorBoardLogger(tmp_path / "a"))
    assert not _events(tmp_path / "a").Tags()["images"]
    fit([FilterSimilarityMonitor(scalars=False)], max_epochs=1, logger=TensorBoardLogger(tmp_path / "b"))
    tags = _events(tmp_path / "b").Tags()
    assert not [tag for tag in tags["scalars"] if tag.startswith("filterdiv")]
    assert "filterdiv/figures/timeline" in tags["images"]
    fit([FilterSimilarityMonitor()], fast_dev_run=True, default_root_dir=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.png")), "fast_dev_run writes nothing"


# --------------------------------------------------------------------------- which layers


def test_layers_that_changed_most_are_drawn_until_the_end_and_after_a_resume(tmp_path: Path) -> None:
    first = FilterSimilarityMonitor(max_figures=2, figures=True)
    fit([first, ModelCheckpoint(dirpath=tmp_path, filename="end")], max_epochs=1, default_root_dir=tmp_path)
    start, end = (look.means for look in first._snapshots)
    changed = sorted(LAYERS, key=lambda name: abs(end[name] - start[name]), reverse=True)[:2]
    assert first.layers_to_draw() == [name for name in LAYERS if name in changed]
    second = FilterSimilarityMonitor(max_figures=2)
    fit([second], max_epochs=3, ckpt_path=str(tmp_path / "end.ckpt"), default_root_dir=tmp_path)
    assert second.layers_to_draw() == first.layers_to_draw()
    assert [look.epoch for look in second._snapshots] == [0, 1, 2, 3], "the timeline goes on"
    assert second._snapshots[:2] == first._snapshots


def test_named_layers_are_drawn(tmp_path: Path) -> None:
    fit([FilterSimilarityMonitor(figure_layers=["net.7", "net.3"])], max_epochs=1, default_root_dir=tmp_path)
    assert {file.name[:5] for file in tmp_path.rglob("similarity/*.png")} == {"net.3", "net.7"}
    with pytest.raises(NoLayersError, match=r"include pattern 'net\.9' matches no convolution; the closest name is"):
        fit([FilterSimilarityMonitor(figure_layers=["net.9"])], max_epochs=1, default_root_dir=tmp_path)
    with pytest.raises(NoLayersError, match="names only layers that include and exclude leave out"):
        fit([FilterSimilarityMonitor(figure_layers=["net.3"], exclude=["net.3"])], default_root_dir=tmp_path)


def test_frozen_layers_are_shown() -> None:
    model = Classifier()
    model.net[0].requires_grad_(False)
    monitor = FilterSimilarityMonitor(figures=False)
    fit([monitor], model=model, max_epochs=1)
    assert "net.0" in monitor.layers


# --------------------------------------------------------------------------- when


@pytest.mark.parametrize("kind", KINDS)
def test_no_look_is_lost_or_doubled_by_a_resume(kind: str, tmp_path: Path) -> None:
    arguments, step = KINDS[kind]
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **arguments)
    whole = FilterSimilarityMonitor(figures=False)
    fit([whole, checkpoint], max_epochs=3, validation=batches(steps=1))
    resumed = FilterSimilarityMonitor(figures=False)
    fit([resumed], max_epochs=3, validation=batches(steps=1), ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert resumed._snapshots == whole._snapshots
    assert [look.epoch for look in whole._snapshots] == [0, 1, 2, 3]


def test_epochs_between_cost_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counted, not timed: no tensor operation, no figure and no logger call outside the looks."""
    calls: list[str] = []
    for name in ("redundancy_metrics", "view_layer", "similarity_heat_map", "collect_events", "filter_matrix"):
        original = getattr(callback_module, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(callback_module, name, counted)

    class Records(Callback):
        def __init__(self) -> None:
            self.counts: list[int] = []

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.counts.append(len(calls))

    records = Records()
    fit([FilterSimilarityMonitor(every_n_epochs=3), records], max_epochs=6, default_root_dir=tmp_path)
    counts = records.counts
    assert counts[0] == counts[1] < counts[2] == counts[3] == counts[4] < counts[5]


def test_the_decision_can_be_overridden() -> None:
    class Early(FilterSimilarityMonitor):
        def should_log(self, completed: int) -> bool:
            return completed in (1, 3)

    monitor = Early(figures=False)
    fit([monitor], max_epochs=4)
    assert [look.epoch for look in monitor._snapshots] == [0, 1, 3]


@pytest.mark.soak
def test_memory_of_figures_does_not_grow_over_200_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are built, handed over and let go 800 times; that drawing keeps none is shown in test_figures.py."""
    alive: list[int] = []
    monkeypatch.setattr(loggers_module, "to_rgb", lambda figure: np.full((4, 4, 3), len(figure.axes), np.uint8))

    class Counts(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch in (5, 199):
                gc.collect()
                alive.append(sum(type(thing) is Figure for thing in gc.get_objects()))

    monitor = FilterSimilarityMonitor(max_figures=1, scalars=False, include=["net.3"])
    fit([monitor, Counts()], max_epochs=200, loader=batches(steps=1), logger=TensorBoardLogger(tmp_path))
    assert len(monitor._snapshots) == 201
    assert len(_events(tmp_path).Images("filterdiv/figures/timeline")) == 201
    assert alive[0] == alive[1]


# --------------------------------------------------------------------------- with other callbacks


class _LastTrained(Callback):
    """The weights after the last optimizer step, before anybody averages them."""

    step = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.fit_loop._skip_backward:  # not in the epoch that SWA appends for its norms
            self.model, self.step = Classifier(), trainer.global_step
            self.model.load_state_dict(pl_module.state_dict())


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("monitor_first", [True, False])
def test_weight_averages_do_not_show(kind: str, monitor_first: bool, tmp_path: Path) -> None:
    """Averages are swapped in during validation and at the end; figures and scalars show the training weights."""
    if kind == "ema":
        averaging: Callback = since_lightning_2_6("EMAWeightAveraging")(decay=0.9)
    else:
        averaging = StochasticWeightAveraging(0.01, 1)
    monitor, trained = FilterSimilarityMonitor(figure_layers=["net.3"]), _LastTrained()
    callbacks = [monitor, averaging] if monitor_first else [averaging, monitor]
    run = fit([*callbacks, trained], max_epochs=3, validation=batches(steps=1), default_root_dir=tmp_path)
    assert not torch.equal(run.model.net[3].weight, trained.model.net[3].weight), "the average replaced them at the end"
    view = view_layer("net.3", trained.model.net[3])
    assert [look.epoch for look in monitor._snapshots] == [0, 1, 2, 3]
    for name, draw in (("similarity", similarity_heat_map), ("kernels", kernel_mosaic)):
        with Image.open(tmp_path / "filterdiv" / "figures" / name / f"net.3-step{trained.step:06d}.png") as image:
            assert np.array_equal(np.asarray(image), to_rgb(draw(view, "after epoch 3")))
    expected = redundancy_metrics({"net.3": trained.model.net[3]})["net.3"]["mean_abs_cosine"]
    assert monitor._snapshots[-1].means["net.3"] == pytest.approx(expected, rel=1e-6)


def test_events_of_repr_are_drawn(tmp_path: Path) -> None:
    drawn: dict[str, list[int]] = {}
    original = callback_module.redundancy_timeline

    def spy(looks: Any, events: Any, deviations: Any) -> Figure:
        drawn[str(looks[-1].epoch)] = [event.epoch for event in events]
        return original(looks, events, deviations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback_module, "redundancy_timeline", spy)
        method = RePr(full_epochs=1, sub_epochs=1, cycles=1)
        fit([FilterSimilarityMonitor(max_figures=1), method], max_epochs=3, logger=TensorBoardLogger(tmp_path))
    assert drawn == {"0": [], "1": [], "2": [1], "3": [1, 2]}
    events = _events(tmp_path)
    assert [image.step for image in events.Images("filterdiv/figures/dropped")] == [12, 18]
    (layout,) = events.Tensors("custom_scalars__config__")
    assert b"filterdiv/repr/" in layout.tensor_proto.string_val[0]


def test_deviation_of_another_callback_is_drawn(tmp_path: Path) -> None:
    class Pulls(Callback):
        def filterdiv_deviation(self) -> dict[str, list[tuple[int, float, float]]]:
            return {"net.3": [(0, 1.0, 1.0), (6, 0.1, 0.12)]}

    fit([Pulls(), FilterSimilarityMonitor(max_figures=1)], max_epochs=1, default_root_dir=tmp_path)
    assert len(list(tmp_path.rglob("deviation-step*.png"))) == 2


# --------------------------------------------------------------------------- wrong input


def test_unwritable_folder_is_an_error_that_names_it_and_the_fix(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot write figures to .*file/logs \(.*Set default_root_dir.*figures=False"):
        fit([FilterSimilarityMonitor()], max_epochs=1, default_root_dir=blocked / "logs")
    with pytest.raises(OSError, match="file"):
        fit([FilterSimilarityMonitor()], max_epochs=1, logger=TensorBoardLogger(blocked / "logs"))


def test_damaged_state_is_named(tmp_path: Path) -> None:
    monitor = FilterSimilarityMonitor()
    state = monitor.state_dict()
    for extra, message in (
        ({"drawn": "net.3", "looks": []}, "drawn must be a list of names"),
        ({"drawn": [], "looks": [[0, 1]]}, "looks must be a list of epoch, step and means"),
        ({"drawn": []}, "missing entry 'looks'"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor.load_state_dict(state | {"extra": extra})
