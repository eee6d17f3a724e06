"""What the callback measures, says, logs, keeps and refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from benchmarks.models import StagedResNet
from lightning_filterdiv import EntropyDepthBound
from lightning_filterdiv.entropy_depth import ImageDataError, callback, estimate_depth_bound
from lightning_filterdiv.entropy_depth.functional import RULE
from tests.support.training import Classifier, batches, differing, fit

# Values 0 to 7 equally often in every image: entropy ln 8 = 2.079.
IMAGES = torch.stack(
    [torch.randperm(64, generator=torch.Generator().manual_seed(i)).view(1, 8, 8) % 8 for i in range(48)]
)
LABELS = torch.arange(48) % 4


def _loader(images: Tensor = IMAGES) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images.float(), LABELS), batch_size=16, shuffle=True)


def _network() -> StagedResNet:
    return StagedResNet((5, 2), (6, 8), channels=1, classes=4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = callback.measure

    def measure(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(callback, "measure", measure)
    return calls


def test_a_stage_that_is_too_deep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bound = EntropyDepthBound()
    model = Classifier(net=_network())
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match="1 of 2 stages are deeper than 3") as warned:
        fit([bound], model=model, loader=_loader(), max_epochs=1, logger=CSVLogger(tmp_path))
    assert bound.bound is not None
    assert bound.bound == estimate_depth_bound(_loader())
    assert bound.bound.entropy == pytest.approx(2.0794, abs=1e-4)
    assert bound.depth is not None
    assert [stage.depth for stage in bound.depth.stages] == [5, 2]
    assert RULE in caplog.text
    assert "48 images: tensors of a TensorDataset" in caplog.text
    assert "7 convolutions on the longest path: 5 at 8x8, 2 at 4x4; the bound is 3 per stage" in caplog.text
    message = next(str(w.message) for w in warned if "deeper than" in str(w.message))
    assert RULE in message
    assert "stage 1 (8x8, net.stem.0 to " in message
    assert "5 convolutions of width 6 -> 3 of width" in message
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    for name in ("entropy", "entropy_std", "bound", "depth/total", "depth/stage1", "depth/stage2"):
        assert f"filterdiv/entropy_depth/{name}" in text


def test_actions(recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit([EntropyDepthBound(action="log")], model=Classifier(net=_network()), loader=_loader(), max_epochs=1)
    assert "1 of 2 stages are deeper than 3" in caplog.text
    assert not [w for w in recwarn if "deeper" in str(w.message)]
    error = EntropyDepthBound(action="error")
    model = Classifier(net=_network())
    model.example_input_array = torch.zeros(2, 1, 8, 8)
    with pytest.raises(MisconfigurationException, match="1 of 2 stages are deeper than 3"):
        fit([error], model=model, loader=_loader())
    assert not model.losses, "with example_input_array it is known before the first step"
    late = Classifier(net=_network())
    with pytest.raises(MisconfigurationException, match="deeper than 3"):
        fit([EntropyDepthBound(action="error")], model=late, loader=_loader())
    assert len(late.losses) == 1, "without, after the first batch"
    shallow = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fit([EntropyDepthBound(action="error")], model=Classifier(net=shallow), loader=_loader(), max_epochs=1)


def test_include_chooses_what_counts() -> None:
    bound = EntropyDepthBound(action="error", exclude=["net.stages.0.1*"])
    fit([bound], model=Classifier(net=_network()), loader=_loader(), max_epochs=1)
    assert bound.depth is not None
    assert [stage.depth for stage in bound.depth.stages] == [3, 2]
    inner = EntropyDepthBound(network="net", action="log")
    fit([inner], model=Classifier(net=_network()), loader=_loader(), max_epochs=1)
    assert inner.depth is not None
    assert inner.depth.total == 7
    with pytest.raises(ValueError, match="network='nowhere' is no submodule with convolutions"):
        fit([EntropyDepthBound(network="nowhere")], loader=_loader())


class _DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) if float(x.sum()) > -1e9 else self.conv(-x)
        return self.head(x.mean((2, 3)))


def test_a_network_that_cannot_be_traced() -> None:
    with pytest.warns(UserWarning, match="cannot count the depth of Classifier"):
        fit([EntropyDepthBound()], model=Classifier(net=_DataDependent()), loader=_loader(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="cannot count the depth"):
        fit([EntropyDepthBound(action="error")], model=Classifier(net=_DataDependent()), loader=_loader())


# --------------------------------------------------------------------------- measured once


def test_measured_once_per_data_set(tmp_path: Path, counted: list[int]) -> None:
    """Not again in a second fit, not after a resume; again for other data."""
    first = EntropyDepthBound(action="log")
    fit([first, ModelCheckpoint(dirpath=tmp_path, filename="end")], loader=_loader(), max_epochs=1)
    fit([first], loader=_loader(), max_epochs=1)
    assert len(counted) == 1
    second = EntropyDepthBound(action="log")
    fit([second], loader=_loader(), max_epochs=2, ckpt_path=str(tmp_path / "end.ckpt"))
    assert len(counted) == 1
    assert second.bound == first.bound
    fit([first], loader=_loader(IMAGES.flip(0) // 2), max_epochs=1)
    assert len(counted) == 2
    assert first.bound is not None
    assert first.bound.bound == 2


def test_streams_are_measured_in_every_new_fit(counted: list[int], tmp_path: Path) -> None:
    """Nothing tells two of one type and length apart; in a resumed run it is taken to be the same one."""
    bound = EntropyDepthBound()
    fit([bound, ModelCheckpoint(dirpath=tmp_path, filename="end")], max_epochs=1)
    fit([bound], max_epochs=1)
    assert len(counted) == 2
    fit([EntropyDepthBound()], max_epochs=2, ckpt_path=str(tmp_path / "end.ckpt"))
    assert len(counted) == 2


def test_training_is_not_disturbed() -> None:
    """Shuffling draws from the global generator: bit-identical weights mean that measuring put it back."""

    def shuffled(callbacks: list[Any]) -> Any:
        torch.manual_seed(3)
        model = Classifier()
        torch.manual_seed(4)
        return fit(callbacks, model=model, loader=_loader(), max_epochs=2)

    assert not differing(shuffled([]).tensors(), shuffled([EntropyDepthBound()]).tensors())


# --------------------------------------------------------------------------- wrong data


class _Text(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([("a sentence", 1)] * 32)


class _Once(IterableDataset[Any]):
    def __init__(self) -> None:
        self.rows = iter(zip(IMAGES.float(), LABELS, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return self.rows


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(_Text(), batch_size=4), "hold no images"),
        (DataLoader(_Once(), batch_size=4), "can be read only once"),
        (DataLoader(TensorDataset(torch.full((8, 1, 8, 8), torch.nan), LABELS[:8])), "image 0 holds NaN"),
    ],
    ids=["text", "once", "nan"],
)
def test_wrong_data(loader: Any, message: str) -> None:
    model = Classifier()
    with pytest.raises(ImageDataError, match=message):
        fit([EntropyDepthBound()], model=model, loader=loader)
    assert not model.losses


def test_a_step_that_never_calls_forward() -> None:
    class Silent(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0]
            for layer in self.net:
                x = layer(x)
            return x.square().mean()

    with pytest.warns(UserWarning, match="set example_input_array"):
        fit([EntropyDepthBound()], model=Silent(), max_epochs=1)


def test_custom_loaders_are_batches() -> None:
    bound = EntropyDepthBound()
    fit([bound], loader=batches(), max_epochs=1)
    assert bound.bound is not None
    assert bound.bound.n_images == 96
    assert bound.bound.source == "batches of SeededBatches"
