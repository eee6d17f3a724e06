"""Figures reach every logger that takes images, offline; a real TensorBoard serves them."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_filterdiv import BasisOrthonormality, FilterSimilarityMonitor, RePr
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.monitor.functional import METRICS
from lightning_filterdiv.monitor.layout import custom_scalars_layout, tag_names
from lightning_filterdiv.monitor.loggers import ArgumentRecord
from tests.support.training import Classifier, batches, fit, make_trainer

ONE_LAYER: dict[str, Any] = {"max_figures": 1, "include": ["net.3"]}

#: Pixels; the summary is in the shape of a card of Time Series.
WIDTHS = {False: 648, True: 882}


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    try:
        fit([FilterSimilarityMonitor(**ONE_LAYER)], max_epochs=1, logger=WandbLogger(save_dir=tmp_path, offline=True))
    finally:
        wandb.finish()
    images = [path for path in tmp_path.rglob("*.png") if "media" in path.parts]
    kinds = [f"filterdiv_figures/{kind}" for kind in ("similarity/net.3", "kernels/net.3", "distribution")]
    for kind in (*kinds, "Filters/all_layers"):
        of_kind = [path for path in images if f"{kind}_" in str(path)]
        assert len(of_kind) == 2, (kind, images)
        with Image.open(of_kind[0]) as image:
            assert image.width == WIDTHS[kind == "Filters/all_layers"]
    assert not list(tmp_path.rglob("*-step000000.png")), "no files beside the logger"


def test_mlflow_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'store'}")
    fit([FilterSimilarityMonitor(**ONE_LAYER)], max_epochs=1, logger=logger)
    history = logger.experiment.get_metric_history(logger.run_id, "filterdiv_layers/mean_abs_cosine/net.3")
    assert [point.step for point in history] == [0, 6]
    files = [file.path for file in logger.experiment.list_artifacts(logger.run_id, "images")]
    for kind in ("similarity", "kernels", "distribution", "all_layers"):
        pictures = [path for path in files if kind in path and path.endswith(".png")]
        assert len(pictures) == 2, (kind, files)
        local = Path(logger.experiment.download_artifacts(logger.run_id, pictures[0], str(tmp_path)))
        with Image.open(local) as image:
            assert image.width == WIDTHS[kind == "all_layers"]


def test_several_loggers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that takes images gets them, drawn once; a table beside them is no reason for files."""
    from lightning_filterdiv.monitor import loggers as module

    drawn: list[int] = []
    original = module.to_rgb
    monkeypatch.setattr(module, "to_rgb", lambda figure: drawn.append(1) or original(figure))

    class Takes(CSVLogger):
        def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
            taken.append((key, step, images[0].size))

    taken: list[Any] = []
    loggers = [TensorBoardLogger(tmp_path / "tb"), Takes(tmp_path / "a"), CSVLogger(tmp_path / "b")]
    fit([FilterSimilarityMonitor(**ONE_LAYER)], max_epochs=1, logger=loggers)
    assert [entry[:2] for entry in taken[4:]] == [
        ("Filters/all_layers", 6),
        *((f"filterdiv_figures/{kind}", 6) for kind in ("similarity/net.3", "kernels/net.3", "distribution")),
    ]
    assert len(drawn) == len(taken) == 8
    assert not list(tmp_path.rglob("*.png"))


def test_charts_match_the_tags_of_their_layer_only() -> None:
    layout = custom_scalars_layout(["net.1", "net.10", "net1"], repr_runs=True)
    charts = layout["Filters: mean of all layers, and every layer"]
    assert all(len(patterns) == 1 + 3 for _, patterns in charts.values()), "the mean, and one line per layer"
    (pattern,) = [p for p in charts.popitem()[1][1] if "net\\.1$" in p]
    metric = pattern.split("/")[1]
    assert re.match(pattern, f"filterdiv_layers/{metric}/net.1")
    assert not re.match(pattern, f"filterdiv_layers/{metric}/net.10")
    assert not re.match(pattern, f"filterdiv_layers/{metric}/netx1")
    assert "RePr" in layout
    assert list(custom_scalars_layout(["a"])) == ["Filters: mean of all layers, and every layer"]
    assert len(custom_scalars_layout(["a"], activations=True)) == 2


def test_any_name_of_a_layer_becomes_a_tag_of_its_own() -> None:
    names = ["net.conv", "a/b", "a b", "a_b", "x\x1b[2J", "слой", "層", "..", "a/../b", "/", "a\nb"]
    tags = tag_names(names)
    assert list(tags) == names
    assert len(set(tags.values())) == len(names)
    assert [tags[name] for name in ("net.conv", "a/b", "слой", "層")] == ["net.conv", "a/b", "слой", "層"]
    for tag in tags.values():
        assert re.fullmatch(r"[-\w./]+", tag)
        assert all(level.strip(".") for level in tag.split("/"))


class _Odd(Classifier):
    """Layers with names that are no names of files."""

    def __init__(self) -> None:
        super().__init__()
        names = ["слой", "1", "2", "a/b", "4", "x\x1b[2J", "6", "a b", "8", "9", "10"]
        self.net = torch.nn.Sequential(OrderedDict(zip(names, list(self.net), strict=True)))


def test_layers_with_odd_names_reach_every_logger(tmp_path: Path) -> None:
    board, table = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FilterSimilarityMonitor")
        fit([FilterSimilarityMonitor()], model=_Odd(), max_epochs=1, logger=[board, table])
        fit([FilterSimilarityMonitor()], model=_Odd(), max_epochs=1, logger=False, default_root_dir=tmp_path / "files")
    (file,) = (tmp_path / "tb").rglob("events.out.tfevents*")
    tags = EventAccumulator(str(file.parent), size_guidance={"images": 0}).Reload().Tags()
    ranks = [tag for tag in tags["scalars"] if "effective_rank" in tag]
    layers = {tag.removeprefix("filterdiv_layers/effective_rank/") for tag in ranks}
    assert layers == {"Filters/effective_rank", "net.слой", "net.a/b", "net.x__2J", "net.a_b"}
    assert "filterdiv_figures/similarity/net.слой" in tags["images"]
    pictures = {path.name for path in (tmp_path / "files").rglob("similarity/*.png")}
    assert len(pictures) == 4 * 2


# --------------------------------------------------------------------------- hyper-parameters


def _hyper_parameters(folder: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """What TensorBoard's view shows of a run: values, columns of metrics, and tags of all scalars."""
    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    content = events.PluginTagToContent("hparams")
    start = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment.metric_infos
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    return values, [info.name.tag for info in metrics], events.Tags()["scalars"]


def test_hyper_parameters_say_which_callbacks_ran_with_which_arguments(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, default_hp_metric=True)
    model = SmallConvNet(image_size=8, lr=0.01)
    callbacks = [RePr(full_epochs=1, sub_epochs=1, cycles=1), FilterSimilarityMonitor(figures=False)]
    trainer = make_trainer(callbacks, logger=logger, max_epochs=3)
    trainer.fit(model, batches())
    values, metrics, scalars = _hyper_parameters(tmp_path)
    assert values["callbacks/RePr"] == "full_epochs=1, sub_epochs=1, cycles=1"
    assert values["callbacks/FilterSimilarityMonitor"] == "figures=False"
    assert values["settings/RePr/prune_fraction"] == pytest.approx(0.3)
    assert values["settings/FilterSimilarityMonitor/figures"] == "False"
    assert values["lr"] == pytest.approx(0.01), "the module's own are there too"
    assert "Filters/cosine_over_chance" in metrics
    assert "hp_metric" not in scalars, "no placeholder of -1"
    assert logger._default_hp_metric is True, "the logger is as it was"


def test_two_callbacks_of_a_class_are_told_apart() -> None:
    class Module:
        _log_hyperparams = False

    callbacks = [BasisOrthonormality(include=["a"]), BasisOrthonormality(include=["b"]), object()]
    arguments = ArgumentRecord(callbacks, Module(), None).arguments
    assert arguments["callbacks/BasisOrthonormality"] == "include=['a']"
    assert arguments["callbacks/BasisOrthonormality_2"] == "include=['b']"
    assert arguments["settings/BasisOrthonormality_2/include"] == "['b']"
    assert all(isinstance(value, str | int | float) for value in arguments.values())


def test_other_loggers_get_the_arguments(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit([FilterSimilarityMonitor(figures=False, every_n_epochs=3)], max_epochs=1, logger=logger)
    assert "settings/FilterSimilarityMonitor/every_n_epochs: 3" in (Path(logger.log_dir) / "hparams.yaml").read_text()


# --------------------------------------------------------------------------- a real TensorBoard


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard server on the folder of a run with RePr."""
    folder = tmp_path_factory.mktemp("board")
    monitor = FilterSimilarityMonitor(max_figures=1, figure_layers=["net.3"], figures_every_n_looks=1)
    fit([RePr(full_epochs=1, sub_epochs=1, cycles=1), monitor], max_epochs=3, logger=TensorBoardLogger(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--load_fast", "false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                if json.loads(_get(f"{address}/data/plugin/images/tags")):
                    break
            except OSError:
                assert server.poll() is None, "TensorBoard ended"
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def _get(address: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=60) as response:
        content: bytes = response.read()
    return content


def _ask(board: str, path: str, **query: Any) -> Any:
    return json.loads(_get(f"{board}/data/plugin/{path}?{urllib.parse.urlencode(query)}"))


def test_tensorboard_serves_the_scalars(board: str) -> None:
    ((run, tags),) = _ask(board, "scalars/tags").items()
    expected = {f"filterdiv_layers/{metric}/{name}" for metric in METRICS for name in ("net.0", "net.3")}
    assert expected | {f"Filters/{metric}" for metric in METRICS} <= tags.keys()
    points = _ask(board, "scalars/scalars", run=run, tag="Filters/cosine_over_chance")
    assert [step for _, step, _ in points] == [0, 6, 12, 18]


def test_tensorboard_serves_images_that_decode(board: str) -> None:
    ((run, tags),) = _ask(board, "images/tags").items()
    names = {tag.removeprefix("filterdiv_figures/") for tag in tags}
    assert names == {"similarity/net.3", "kernels/net.3", "distribution", "Filters/all_layers", "dropped"}
    for tag in tags:
        entries = _ask(board, "images/images", run=run, tag=tag, sample=0)
        assert [entry["step"] for entry in entries] == ([12, 18] if tag.endswith("dropped") else [0, 6, 12, 18])
        with Image.open(
            io.BytesIO(_get(f"{board}/data/plugin/images/individualImage?{entries[-1]['query']}"))
        ) as image:
            image.load()
            assert image.width == WIDTHS[tag == "Filters/all_layers"]
            assert image.convert("L").getextrema() == (0, 255)


def test_tensorboard_serves_the_custom_page(board: str) -> None:
    layout = _ask(board, "custom_scalars/layout")
    assert [category["title"] for category in layout["category"]] == list(custom_scalars_layout([], True))
    ((run, _),) = _ask(board, "scalars/tags").items()
    for category in layout["category"]:
        for chart in category["chart"]:
            found: set[str] = set()
            for pattern in chart["multiline"]["tag"]:
                found |= _ask(board, "custom_scalars/scalars", run=run, tag=pattern)["tag_to_events"].keys()
            assert found, f"{chart['title']} is empty"
