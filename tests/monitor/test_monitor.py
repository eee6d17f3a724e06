"""Times of snapshots, side effects (none), and destinations of scalars and figures."""

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
from torch import nn

from lightning_filterdiv import CentripetalSGD, FilterSimilarityMonitor, RePr
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.narrow import narrow
from lightning_filterdiv.filters import NoLayersError, filter_matrix, select_filters
from lightning_filterdiv.monitor import callback as callback_module
from lightning_filterdiv.monitor import loggers as loggers_module
from lightning_filterdiv.monitor.figures import kernel_mosaic, similarity_heat_map, to_rgb
from lightning_filterdiv.monitor.functional import METRICS, redundancy_metrics
from lightning_filterdiv.monitor.views import view_layer
from lightning_filterdiv.similarity import expected_abs_cosine
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
        tags = [f"Filters/{metric}", *(f"filterdiv_layers/{metric}/{layer}" for layer in LAYERS)]
        for tag in tags:
            logged = events.Scalars(tag)
            assert [event.step for event in logged] == [0, 12, 24], "before training, then every second epoch"
        layers = [events.Scalars(tag)[-1].value for tag in tags[1:]]
        assert logged_last(events, tags[0]) == pytest.approx(sum(layers) / len(layers), rel=1e-5)
    final = redundancy_metrics(select_filters(run.model))
    last = logged_last(events, "filterdiv_layers/cosine_over_chance/net.5")
    assert last == pytest.approx(final["net.5"]["cosine_over_chance"], rel=1e-5)
    for tag in ("Filters/all_layers", "filterdiv_figures/distribution"):
        assert [image.step for image in events.Images(tag)] == [0, 24], "the first look and the last"
    assert "custom_scalars__config__" in events.Tags()["tensors"], "TensorBoard's Custom Scalars page"
    assert not list(tmp_path.rglob("*.png"))
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        assert "Filters/effective_rank" in next(csv.reader(file))


def logged_last(events: EventAccumulator, tag: str) -> float:
    value: float = events.Scalars(tag)[-1].value
    return value


def test_few_groups_and_the_summary_comes_first(tmp_path: Path) -> None:
    """TensorBoard groups tags by their first level, and sorts groups and cards."""
    methods = [
        CentripetalSGD(include=["net.5"]),
        RePr(full_epochs=1, sub_epochs=1, cycles=1, include=["net.3"]),
        FilterSimilarityMonitor(),
    ]
    fit(methods, max_epochs=3, logger=TensorBoardLogger(tmp_path), limit_val_batches=0)
    events = _events(tmp_path)
    scalars, images = events.Tags()["scalars"], events.Tags()["images"]
    ours = [tag for tag in [*scalars, *images] if tag.startswith(("filterdiv", "Filters"))]
    assert {tag.partition("/")[0] for tag in ours} == {"Filters", "filterdiv", "filterdiv_figures", "filterdiv_layers"}
    assert min(ours) == min(images) == "Filters/all_layers", "a picture"
    first_page = sorted(tag for tag in ours if tag.startswith("Filters/"))
    assert first_page[1:] == sorted(f"Filters/{metric}" for metric in METRICS), "twelve cards fit on it"
    assert not {"epoch", "hp_metric"} & set(scalars)


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
    assert {file.parent.name for file in files} == {"similarity", "kernels", "Filters", "filterdiv_figures"}
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
    assert "Filters/all_layers" in tags["images"]
    fit([FilterSimilarityMonitor()], fast_dev_run=True, default_root_dir=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.png")), "fast_dev_run writes nothing"


# --------------------------------------------------------------------------- which layers


def test_the_same_layers_are_drawn_for_a_whole_fit_and_after_a_resume(tmp_path: Path) -> None:
    """Evenly spaced from the first layer to the last; every one of them has its first and its last look."""
    first = FilterSimilarityMonitor(max_figures=2, figures_every_n_looks=1)
    fit([first, ModelCheckpoint(dirpath=tmp_path, filename="end")], max_epochs=1, default_root_dir=tmp_path)
    assert first.layers_to_draw() == ["net.0", "net.7"]
    second = FilterSimilarityMonitor(max_figures=2, figures_every_n_looks=1)
    fit([second], max_epochs=3, ckpt_path=str(tmp_path / "end.ckpt"), default_root_dir=tmp_path)
    assert second.layers_to_draw() == first.layers_to_draw()
    assert [look.epoch for look in second._snapshots] == [0, 1, 2, 3], "the summary goes on"
    assert second._snapshots[:2] == first._snapshots
    for kind in ("similarity", "kernels"):
        drawn = sorted(path.name for path in (tmp_path / "filterdiv_figures" / kind).iterdir())
        assert drawn == [f"{name}-step{step:06d}.png" for name in ("net.0", "net.7") for step in (0, 6, 12, 18)]


def test_as_many_layers_as_asked_for() -> None:
    monitor = FilterSimilarityMonitor()
    for asked, count, chosen in ((3, 4, [0, 2, 3]), (8, 4, [0, 1, 2, 3]), (1, 4, [0]), (4, 20, [0, 6, 13, 19])):
        monitor.max_figures, monitor.layers = asked, {str(index): nn.Conv2d(1, 2, 1) for index in range(count)}
        assert monitor.layers_to_draw() == [str(index) for index in chosen]


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
    for name in ("redundancy_metrics", "view_layer", "similarity_heat_map", "collect_events", "collect_dropped"):
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

    monitor = FilterSimilarityMonitor(max_figures=1, scalars=False, include=["net.3"], figures_every_n_looks=1)
    fit([monitor, Counts()], max_epochs=200, loader=batches(steps=1), logger=TensorBoardLogger(tmp_path))
    assert len(monitor._snapshots) == 201
    assert len(_events(tmp_path).Images("Filters/all_layers")) == 201
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
    monitor, trained = FilterSimilarityMonitor(figure_layers=["net.3"], figures_every_n_looks=1), _LastTrained()
    callbacks = [monitor, averaging] if monitor_first else [averaging, monitor]
    run = fit([*callbacks, trained], max_epochs=3, validation=batches(steps=1), default_root_dir=tmp_path)
    assert not torch.equal(run.model.net[3].weight, trained.model.net[3].weight), "the average replaced them at the end"
    view = view_layer("net.3", trained.model.net[3])
    assert [look.epoch for look in monitor._snapshots] == [0, 1, 2, 3]
    for name, draw in (("similarity", similarity_heat_map), ("kernels", kernel_mosaic)):
        with Image.open(tmp_path / "filterdiv_figures" / name / f"net.3-step{trained.step:06d}.png") as image:
            assert np.array_equal(np.asarray(image), to_rgb(draw(view, "after epoch 3")))
    expected = redundancy_metrics({"net.3": trained.model.net[3]})["net.3"]["cosine_over_chance"]
    assert monitor._snapshots[-1].over_chance["net.3"] == pytest.approx(expected, rel=1e-6)


def test_events_of_repr_are_drawn(tmp_path: Path) -> None:
    drawn: dict[str, list[int]] = {}
    original = callback_module.network_summary

    def spy(looks: Any, events: Any, deviations: Any) -> Figure:
        drawn[str(looks[-1].epoch)] = [event.epoch for event in events]
        return original(looks, events, deviations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback_module, "network_summary", spy)
        method, monitor = RePr(full_epochs=1, sub_epochs=1, cycles=1), FilterSimilarityMonitor(figures_every_n_looks=1)
        fit([monitor, method], max_epochs=3, logger=TensorBoardLogger(tmp_path))
    assert drawn == {"0": [], "1": [], "2": [1], "3": [1, 2]}
    events = _events(tmp_path)
    assert [image.step for image in events.Images("filterdiv_figures/dropped")] == [12, 18]
    (layout,) = events.Tensors("custom_scalars__config__")
    assert b"filterdiv/repr/" in layout.tensor_proto.string_val[0]


def test_deviation_of_another_callback_is_drawn(tmp_path: Path) -> None:
    class Pulls(Callback):
        def filterdiv_deviation(self) -> dict[str, list[tuple[int, float, float]]]:
            return {"net.3": [(0, 1.0, 1.0), (6, 0.1, 0.12)]}

    fit([Pulls(), FilterSimilarityMonitor(max_figures=1)], max_epochs=1, default_root_dir=tmp_path)
    assert len(list(tmp_path.rglob("deviation-step*.png"))) == 2


# --------------------------------------------------------------------------- wrong input


class _OtherArguments(Callback):
    """Somebody else's, with a method that happens to have our name."""

    def arguments(self, of: str) -> dict[str, Any]:
        return {of: 0}


def test_what_others_raise_costs_no_training(tmp_path: Path) -> None:
    message = r"FilterSimilarityMonitor could not write hyper-parameters \(TypeError: .*'of'\)\. Training goes on"
    with pytest.warns(UserWarning, match=message):
        run = fit(
            [FilterSimilarityMonitor(max_figures=1), _OtherArguments()],
            logger=CSVLogger(tmp_path),
            default_root_dir=tmp_path,
            max_epochs=1,
        )
    assert run.trainer.global_step == 6


def test_damaged_state_is_named(tmp_path: Path) -> None:
    monitor = FilterSimilarityMonitor()
    state = monitor.state_dict()
    for extra, message in (
        ({"snapshots": "net.3"}, "snapshots must be a list of epoch, step and numbers"),
        ({"snapshots": [[0, 1]]}, "snapshots must be a list of epoch, step and numbers"),
        ({}, "missing entry 'snapshots'"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor.load_state_dict(state | {"extra": extra})


def test_looks_of_a_checkpoint_of_0_1_go_on(tmp_path: Path) -> None:
    """It held the mean |cos| itself; the summary shows it over chance."""
    written, checkpoint = FilterSimilarityMonitor(figures=False), ModelCheckpoint(dirpath=tmp_path, filename="end")
    fit([written, checkpoint], max_epochs=1)
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    extra = content["callbacks"][written.state_key]["extra"]
    snapshots = extra.pop("snapshots")
    chance = {name: expected_abs_cosine(filter_matrix(conv).shape[1]) for name, conv in written.layers.items()}
    old = [[epoch, step, {n: value * chance[n] for n, value in over.items()}] for epoch, step, over in snapshots]
    extra |= {"looks": old, "drawn": ["net.3"]}
    torch.save(content, tmp_path / "old.ckpt")
    resumed = FilterSimilarityMonitor(figures=False)
    fit([resumed], max_epochs=2, ckpt_path=str(tmp_path / "old.ckpt"))
    assert [look.epoch for look in resumed._snapshots] == [0, 1, 2]
    for look, before in zip(resumed._snapshots, written._snapshots, strict=False):
        assert look.over_chance == pytest.approx(before.over_chance)


# --------------------------------------------------------------------------- when figures are drawn


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.stem[-6:]) // 6 for path in (folder / "Filters").glob("all_layers-step*.png"))


@pytest.mark.parametrize(
    ("options", "epochs", "drawn"),
    [
        ({}, 12, [0, 10, 12]),
        ({"figures_every_n_looks": 3}, 5, [0, 3, 5]),
        ({"every_n_epochs": 2}, 5, [0, 4]),
        ({"figures_every_n_looks": 2, "every_n_epochs": 2}, 8, [0, 4, 8]),
    ],
)
def test_figures_at_the_first_every_so_manieth_and_the_last_look(
    options: dict[str, int], epochs: int, drawn: list[int], tmp_path: Path
) -> None:
    monitor = FilterSimilarityMonitor(max_figures=1, include=["net.0"], **options)
    fit([monitor], max_epochs=epochs, default_root_dir=tmp_path)
    assert _steps(tmp_path) == drawn
    assert len(monitor._snapshots) == epochs // monitor.every_n_epochs + 1, "numbers at every look"


@pytest.mark.parametrize("stops_last", [True, False], ids=["known", "not known in time"])
def test_the_last_look_of_a_fit_that_is_stopped_is_drawn(stops_last: bool, tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    monitor = FilterSimilarityMonitor(max_figures=1, include=["net.0"])
    fit([monitor, Stops()] if stops_last else [Stops(), monitor], max_epochs=9, default_root_dir=tmp_path)
    assert _steps(tmp_path) == [0, 3]


# --------------------------------------------------------------------------- filters that are out


class _Narrowed(Callback):
    """The numbers of the network without the filters that RePr has out, made by cutting them away."""

    def __init__(self, method: RePr) -> None:
        self.method = method
        self.expected: dict[int, dict[str, dict[str, float]]] = {}
        self.plain: dict[int, dict[str, dict[str, float]]] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.method.dropped:
            return
        model = Classifier()
        model.load_state_dict(pl_module.state_dict())
        graph = ChannelGraph.trace(model, torch.randn(2, 1, 8, 8))
        layers = select_filters(model)
        keep = {}
        for group in graph.groups:
            out = {
                channel
                for layer in group.layers
                for channel, row in enumerate(group.rows(layer).tolist())
                if row in self.method.dropped.get(layer, torch.tensor([])).tolist()
            }
            keep[group.name] = torch.tensor([c for c in range(group.size) if c not in out])
        self.plain[trainer.global_step] = redundancy_metrics(layers)
        self.expected[trainer.global_step] = redundancy_metrics(select_filters(narrow(model, graph, keep)))


def test_numbers_in_a_phase_of_repr_are_those_of_the_network_without_the_dropped_filters(tmp_path: Path) -> None:
    method = RePr(full_epochs=1, sub_epochs=2, cycles=1, prune_fraction=0.4)
    narrowed = _Narrowed(method)
    fit([method, FilterSimilarityMonitor(figures=False), narrowed], max_epochs=4, logger=TensorBoardLogger(tmp_path))
    events = _events(tmp_path)
    logged = {
        (metric, layer): {e.step: e.value for e in events.Scalars(f"filterdiv_layers/{metric}/{layer}")}
        for metric in METRICS
        for layer in LAYERS
    }
    assert list(narrowed.expected) == [12, 18], "two looks inside the phase"
    for step, rows in narrowed.expected.items():
        for (metric, layer), values in logged.items():
            assert values[step] == pytest.approx(rows[layer][metric], rel=1e-5, abs=1e-7), (metric, layer)
        network = sum(row["effective_rank"] for row in rows.values()) / len(rows)
        by_step = {e.step: e.value for e in events.Scalars("Filters/effective_rank")}
        assert by_step[step] == pytest.approx(network, rel=1e-5)
        # With the dropped filters counted, as before, the numbers were others.
        assert narrowed.plain[step]["net.5"]["dead_filters"] > 0 == rows["net.5"]["dead_filters"]
        assert abs(narrowed.plain[step]["net.5"]["effective_rank"] - rows["net.5"]["effective_rank"]) > 0.01


def test_heat_maps_leave_out_what_is_out(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    original = callback_module.similarity_heat_map

    def spy(view: Any, when: str) -> Figure:
        seen.append((view.count, view.out))
        return original(view, when)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback_module, "similarity_heat_map", spy)
        method = RePr(full_epochs=1, sub_epochs=1, cycles=1, prune_fraction=0.4, include=["net.5"])
        monitor = FilterSimilarityMonitor(figure_layers=["net.5"], figures_every_n_looks=1)
        fit([method, monitor], max_epochs=3, default_root_dir=tmp_path)
    assert seen == [(8, 0), (8, 0), (5, 3), (8, 0)]
