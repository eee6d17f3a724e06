"""C-SGD from the first step to an exported file: grouped convolutions, norms over channels, bodies that fix widths."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models.convnext import ConvNeXt
from timm.models.regnet import RegNet, RegNetCfg
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.channel_graph.counted import CountedNorm
from lightning_filterdiv.narrowing import load_merged, save_merged


class Ghost(nn.Module):
    """GhostNet's module: cheap copies of the channels, and only as many as wanted."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        half = (writes + 1) // 2
        self.writes = writes
        self.primary = nn.Sequential(nn.Conv2d(reads, half, 3, padding=1, bias=False), nn.BatchNorm2d(half), nn.ReLU())
        self.cheap = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.primary(x)
        return torch.cat([y, self.cheap(y)], 1)[:, : self.writes]


def ghost() -> nn.Module:
    return nn.Sequential(
        Ghost(1, 15), Ghost(15, 21), nn.MaxPool2d(2), Ghost(21, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 10),
    )  # fmt: skip


def regnet() -> nn.Module:
    """Four stages of 16, 24, 48 and 80 channels, in blocks of 8, with squeeze and excitation."""
    configuration = RegNetCfg(depth=4, w0=16, wa=16.0, wm=1.7, group_size=8, se_ratio=0.25, stem_width=16)
    return nn.Sequential(nn.Upsample(scale_factor=2), RegNet(configuration, in_chans=1, num_classes=10))


def convnext() -> nn.Module:
    sizes = {"depths": (1, 1, 1, 1), "dims": (12, 16, 24, 32)}
    network = ConvNeXt(in_chans=1, num_classes=10, stem_type="overlap", ls_init_value=0.5, **sizes)
    return nn.Sequential(nn.Upsample(scale_factor=4), network)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"ghost": ghost, "regnet": regnet, "convnext": convnext}


#: Accuracy on digits of other writers. This RegNet overfits.
LEAST = {"ghost": 0.9, "regnet": 0.8, "convnext": 0.9}


class Digits(pl.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        self.name, self.net = name, NETWORKS[name]()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.name == "convnext":
            return torch.optim.AdamW(self.parameters(), lr=3e-3)
        return torch.optim.SGD(self.parameters(), lr=0.05 if self.name == "ghost" else 0.02, momentum=0.9)


def _trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def _check_what_it_became(name: str, model: Digits, merged: Digits) -> None:
    if name == "ghost":
        assert isinstance(merged.net[0], fx.GraphModule)
        assert isinstance(merged.net[1], fx.GraphModule)
    elif name == "regnet":
        wide, narrow = (net.get_submodule("net.1.s4.b1.conv2.conv") for net in (model, merged))
        assert isinstance(wide, nn.Conv2d)
        assert isinstance(narrow, nn.Conv2d)
        assert narrow.groups == wide.groups > 1
        assert narrow.out_channels < wide.out_channels
    else:
        assert any(isinstance(module, CountedNorm) for module in merged.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_trained_merged_and_exported(name: str, tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    images, classes = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = (images.float() / 16).reshape(-1, 1, 8, 8)
    data = DataLoader(TensorDataset(images[:1500], classes[:1500]), batch_size=50, shuffle=True)
    model, callback = Digits(name), CentripetalSGD(keep_fraction=0.6)
    _trainer(8, callback).fit(model, data)
    merged, report = callback.merge(model.eval())
    assert isinstance(merged, Digits)
    assert report.trim <= 1e-9
    assert report.parameters_after < 0.6 * report.parameters_before
    _check_what_it_became(name, model, merged)
    with torch.no_grad():
        before, after = model(images), merged(images)
    assert (before.argmax(1) != after.argmax(1)).sum() == 0
    assert (after[1500:].argmax(1) == classes[1500:]).float().mean() > LEAST[name], "it reads digits"

    save_merged(merged, tmp_path / "narrow.pt")
    loaded = load_merged(Digits(name).eval(), tmp_path / "narrow.pt")
    assert torch.equal(loaded(images), merged(images))
    _trainer(1).fit(loaded, data)  # and goes on
    assert not torch.equal(loaded.eval()(images), merged(images))

    file = io.BytesIO()
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(merged.net, (images[:2],), file, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (result,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.equal(torch.from_numpy(result).argmax(1), after.argmax(1))
    torch.testing.assert_close(torch.from_numpy(result), after, rtol=1e-4, atol=1e-4)
