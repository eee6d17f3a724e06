"""A picture is never worth a training: what cannot be drawn or written is a warning, and training goes on."""

from __future__ import annotations

import re
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_filterdiv import FilterSimilarityMonitor
from lightning_filterdiv.monitor import callback as monitor
from tests.support.training import batches, fit

LAYERS: dict[str, Any] = {"max_figures": 1, "include": ["net.3"], "figures_every_n_looks": 1}


class _FillDisk(Callback):
    """From the second epoch on no file can have more than a few bytes."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def _limits() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


class _Refusing(CSVLogger):
    """Takes no numbers of the monitor, and no image."""

    refused = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if any(name.startswith("Filters") for name in metrics):
            self.refused += 1
            raise ConnectionError("no server")
        super().log_metrics(metrics, step)

    def log_image(self, *_: Any, **__: Any) -> NoReturn:
        self.refused += 1
        raise ConnectionError("no server")


def _fit(callbacks: list[Callback], **options: Any) -> list[str]:
    """Train, and return what the monitor warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(callbacks, max_epochs=3, **options)
    assert run.trainer.current_epoch == 3
    return [str(w.message) for w in caught if "FilterSimilarityMonitor" in str(w.message)]


@pytest.mark.usefixtures("_limits")
def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    said = _fit([_FillDisk(), FilterSimilarityMonitor(**LAYERS)], default_root_dir=tmp_path)
    (line,) = said
    assert re.search(r"could not write figures \(WriteError: .*all_layers.*step0000\d\d.png cannot be written", line)
    assert "free some space" in line
    assert "Training goes on" in line
    kept = list(tmp_path.rglob("*.png"))
    assert {path.stem.rpartition("-")[2] for path in kept} == {"step000000", "step000006"}
    assert all(path.stat().st_size > 1000 for path in kept), "no half picture"
    assert not list(tmp_path.rglob(".filterdiv-*"))


def test_a_logger_that_refuses(tmp_path: Path) -> None:
    bad, good = _Refusing(tmp_path / "bad"), CSVLogger(tmp_path / "good")
    said = _fit([FilterSimilarityMonitor(**LAYERS)], logger=[bad, good])
    assert len(said) == 2
    assert "could not write numbers (ConnectionError: no server)" in said[0]
    assert "scalars=False" in said[0]
    assert "could not write figures (ConnectionError: no server)" in said[1]
    assert "figures=False" in said[1]
    assert bad.refused == 4 + 4 * 4, "it is asked again at every look"
    assert "filterdiv_layers/mean_abs_cosine/net.3" in Path(good.log_dir, "metrics.csv").read_text()


def test_a_picture_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> NoReturn:
        raise ValueError("matplotlib does not like it")

    monkeypatch.setattr(monitor, "kernel_mosaic", fail)
    monkeypatch.setattr(monitor, "dropped_filters", fail)
    said = _fit([FilterSimilarityMonitor(**LAYERS)], default_root_dir=tmp_path)
    assert len(said) == 1
    drawn = {path.name.rpartition("-")[0] for path in tmp_path.rglob("*.png")}
    assert drawn == {"net.3", "distribution", "all_layers"}, "the other figures are there"


def test_a_second_fit_warns_again(tmp_path: Path) -> None:
    callback = FilterSimilarityMonitor(figures=False, **LAYERS)
    for _ in range(2):
        said = _fit([callback], logger=_Refusing(tmp_path))
        assert len(said) == 1


def test_a_folder_without_permission_is_a_warning_too(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    (line,) = _fit([FilterSimilarityMonitor(**LAYERS)], default_root_dir=blocked / "logs")
    assert re.search(r"could not write figures \(.*file/logs", line)
    assert "Training goes on" in line


def test_a_logger_that_takes_no_hyper_parameters(tmp_path: Path) -> None:
    class NoParameters(CSVLogger):
        def log_hyperparams(self, *_: Any, **__: Any) -> NoReturn:
            raise ConnectionError("no server")

    (line,) = _fit([FilterSimilarityMonitor(figures=False)], logger=NoParameters(tmp_path))
    assert "could not write hyper-parameters (ConnectionError: no server)" in line


def test_activations_that_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> NoReturn:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(monitor.FixedBatch, "correlations", fail)
    callback = FilterSimilarityMonitor(activations=True, figures=False)
    (line,) = _fit([callback], logger=CSVLogger(tmp_path), validation=batches(steps=1), num_sanity_val_steps=1)
    assert "could not measure activations (RuntimeError: out of memory)" in line
    assert "activations=False" in line
