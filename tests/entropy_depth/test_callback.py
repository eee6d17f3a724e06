"""Measurements, messages, logs, state and refusals of the callback."""

from __future__ import annotations

import logging
import math
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
    assert "48 images: batches of a DataLoader over TensorDataset). Bound: at most 3 convolutions" in caplog.text
    assert "7 convolutions on the longest path: 5 at 8x8, 2 at 4x4; the bound is 3 per stage" in caplog.text
    message = next(str(w.message) for w in warned if "deeper than" in str(w.message))
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


class _TrainsOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("made for training")
        return self.head(self.conv(x).mean((2, 3)))


def test_a_network_that_cannot_be_traced() -> None:
    with pytest.warns(UserWarning, match="cannot count the depth of Classifier"):
        fit([EntropyDepthBound()], model=Classifier(net=_TrainsOnly()), loader=_loader(), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="cannot count the depth"):
        fit([EntropyDepthBound(action="error")], model=Classifier(net=_TrainsOnly()), loader=_loader())


# --------------------------------------------------------------------------- measured once


def test_measured_once_per_fit(tmp_path: Path, counted: list[int]) -> None:
    """Again in a second fit, whose data may be others; not after a resume, unless more images are asked for."""
    first = EntropyDepthBound(action="log")
    fit([first, ModelCheckpoint(dirpath=tmp_path, filename="end")], loader=_loader(), max_epochs=1)
    second = EntropyDepthBound(action="log", unit="bits")
    fit([second], loader=_loader(), max_epochs=2, ckpt_path=str(tmp_path / "end.ckpt"))
    assert len(counted) == 1
    assert first.bound is not None
    assert second.bound is not None
    assert (first.bound.bound, second.bound.bound) == (3, 3)
    assert second.bound.entropy == pytest.approx(first.bound.entropy / math.log(2))
    assert second.bound.notes == first.bound.notes
    fit([EntropyDepthBound(max_images=16)], loader=_loader(), max_epochs=2, ckpt_path=str(tmp_path / "end.ckpt"))
    assert len(counted) == 2
    fit([second], loader=_loader(IMAGES.flip(0) // 2), max_epochs=1)
    assert len(counted) == 3
    assert second.bound.entropy == pytest.approx(2.0)


@pytest.mark.parametrize("measured", [[], [["a5", False, [1.0, 0.1, 9, "raw 8-bit images of A", []]]]])
def test_checkpoints_of_release_0_1_are_resumed(measured: list[Any], tmp_path: Path, counted: list[int]) -> None:
    """They list measurements by a fingerprint of the data; that of their own fit stands last."""
    fit([EntropyDepthBound(), ModelCheckpoint(dirpath=tmp_path, filename="end")], loader=_loader(), max_epochs=1)
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    last = ["0f", False, [2.5, 0.25, 48, "tensors of a TensorDataset", ["a note"]]]
    extra = {"measured": [*measured, last] if measured else []}
    checkpoint["callbacks"][EntropyDepthBound().state_key]["extra"] = extra
    torch.save(checkpoint, tmp_path / "old.ckpt")
    again = EntropyDepthBound()
    fit([again], loader=_loader(), max_epochs=2, ckpt_path=str(tmp_path / "old.ckpt"))
    assert again.bound is not None
    if not measured:
        assert len(counted) == 2
        assert again.bound.entropy == pytest.approx(2.0794, abs=1e-4)
        return
    assert len(counted) == 1
    assert (again.bound.entropy, again.bound.std, again.bound.n_images) == (2.5, 0.25, 48)
    assert (again.bound.source, again.bound.notes) == ("tensors of a TensorDataset", ("a note",))


def test_a_damaged_state_is_refused() -> None:
    state = EntropyDepthBound().state_dict()
    for measured in (3, [1.0, 2.0], ["low", 0.1, 9, "images", []], [["0f", False]]):
        with pytest.raises(ValueError, match="the checkpoint's state of EntropyDepthBound cannot be used"):
            EntropyDepthBound().load_state_dict(state | {"extra": {"measured": measured, "max_images": None}})


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
