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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from lightning_filterdiv import FilterSimilarityMonitor, RePr
from lightning_filterdiv.monitor.functional import METRICS
from lightning_filterdiv.monitor.layout import custom_scalars_layout
from tests.support.training import fit

ONE_LAYER: dict[str, Any] = {"max_figures": 1, "include": ["net.3"]}


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
    for kind in ("similarity/net.3", "kernels/net.3", "distribution", "timeline"):
        of_kind = [path for path in images if f"filterdiv/figures/{kind}_" in str(path)]
        assert len(of_kind) == 2, (kind, images)
        with Image.open(of_kind[0]) as image:
            assert image.width == 648
    assert not list(tmp_path.rglob("*-step000000.png")), "no files beside the logger"


def test_mlflow_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'store'}")
    fit([FilterSimilarityMonitor(**ONE_LAYER)], max_epochs=1, logger=logger)
    history = logger.experiment.get_metric_history(logger.run_id, "filterdiv/mean_abs_cosine/net.3")
    assert [point.step for point in history] == [0, 6]
    files = [file.path for file in logger.experiment.list_artifacts(logger.run_id, "images")]
    for kind in ("similarity", "kernels", "distribution", "timeline"):
        pictures = [path for path in files if kind in path and path.endswith(".png")]
        assert len(pictures) == 2, (kind, files)
        local = Path(logger.experiment.download_artifacts(logger.run_id, pictures[0], str(tmp_path)))
        with Image.open(local) as image:
            assert image.width == 648


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
        (f"filterdiv/figures/{kind}", 6) for kind in ("similarity/net.3", "kernels/net.3", "distribution", "timeline")
    ]
    assert len(drawn) == len(taken) == 8
    assert not list(tmp_path.rglob("*.png"))


def test_charts_match_the_tags_of_their_layer_only() -> None:
    layout = custom_scalars_layout(["net.1", "net.10", "net1"], repr_runs=True)
    (pattern,) = [p for p in layout["Filter redundancy: one line per layer"].popitem()[1][1] if "net\\.1$" in p]
    metric = pattern.split("/")[1]
    assert re.match(pattern, f"filterdiv/{metric}/net.1")
    assert not re.match(pattern, f"filterdiv/{metric}/net.10")
    assert not re.match(pattern, f"filterdiv/{metric}/netx1")
    assert "RePr" in layout
    assert "RePr" not in custom_scalars_layout(["a"])


# --------------------------------------------------------------------------- a real TensorBoard


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a TensorBoard server on the folder of a run with RePr."""
    folder = tmp_path_factory.mktemp("board")
    monitor = FilterSimilarityMonitor(max_figures=1, figure_layers=["net.3"])
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
    expected = {f"filterdiv/{metric}/{name}" for metric in METRICS for name in ("net.0", "net.3", "network")}
    assert expected <= tags.keys()
    points = _ask(board, "scalars/scalars", run=run, tag="filterdiv/mean_abs_cosine/network")
    assert [step for _, step, _ in points] == [0, 6, 12, 18]


def test_tensorboard_serves_images_that_decode(board: str) -> None:
    ((run, tags),) = _ask(board, "images/tags").items()
    names = {tag.removeprefix("filterdiv/figures/") for tag in tags}
    assert names == {"similarity/net.3", "kernels/net.3", "distribution", "timeline", "dropped"}
    for tag in tags:
        entries = _ask(board, "images/images", run=run, tag=tag, sample=0)
        assert [entry["step"] for entry in entries] == ([12, 18] if tag.endswith("dropped") else [0, 6, 12, 18])
        with Image.open(
            io.BytesIO(_get(f"{board}/data/plugin/images/individualImage?{entries[-1]['query']}"))
        ) as image:
            image.load()
            assert image.width == 648
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
