"""C-SGD from the first step to an exported file, on a network whose forward fixes widths."""

from __future__ import annotations

import io
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_filterdiv import CentripetalSGD
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


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        self.net = nn.Sequential(
            Ghost(1, 15), Ghost(15, 21), nn.MaxPool2d(2), Ghost(21, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(24, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def test_a_ghost_network_is_trained_merged_and_exported(tmp_path: Path) -> None:
    import onnxruntime

    pl.seed_everything(0, verbose=False)
    images, classes = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = (images.float() / 16).reshape(-1, 1, 8, 8)
    data = DataLoader(TensorDataset(images[:1500], classes[:1500]), batch_size=50, shuffle=True)
    model, callback = Digits(), CentripetalSGD(keep_fraction=0.6)
    trainer = pl.Trainer(
        max_epochs=8, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    merged, report = callback.merge(model.eval())
    assert isinstance(merged, Digits)
    assert {choice.submodule for choice in report.forms if choice.form == "graph"} >= {"net.0", "net.1"}
    assert report.trim <= 1e-9
    assert report.parameters_after < 0.6 * report.parameters_before
    with torch.no_grad():
        before, after = model(images), merged(images)
    assert (before.argmax(1) != after.argmax(1)).sum() == 0
    assert (after[1500:].argmax(1) == classes[1500:]).float().mean() > 0.9, "it reads digits"

    save_merged(merged, tmp_path / "narrow.pt")
    loaded = load_merged(Digits().eval(), tmp_path / "narrow.pt")
    assert isinstance(loaded.net[0], fx.GraphModule)
    assert torch.equal(loaded(images), merged(images))
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(loaded, data)  # and goes on
    assert not torch.equal(loaded.eval()(images), merged(images))

    file = io.BytesIO()
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(merged.net, (images[:2],), file, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (result,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.equal(torch.from_numpy(result).argmax(1), after.argmax(1))
    torch.testing.assert_close(torch.from_numpy(result), after, rtol=1e-4, atol=1e-4)
