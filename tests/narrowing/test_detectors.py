"""torchvision's detectors, whole: trained with C-SGD for a few steps without ``network=``, then merged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_filterdiv import CentripetalSGD

#: Channels free to merge: the backbone and the inner channels of what follows it, up to the first value that is read.
DETECTORS: dict[str, tuple[dict[str, Any], int]] = {
    "ssdlite320_mobilenet_v3_large": ({}, 7384),
    "retinanet_resnet50_fpn": ({"min_size": 96, "max_size": 96}, 14016),
    "fasterrcnn_resnet50_fpn": ({"min_size": 96, "max_size": 96}, 11968),
}


class Detector(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, targets = batch
        return sum(self.model(images, targets).values(), torch.zeros(()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4, momentum=0.9)


class Images(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            images = [torch.rand(3, 96, 96, generator=generator) for _ in range(2)]
            target = {"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
            yield images, [target, target]


@pytest.mark.soak
@pytest.mark.parametrize("name", DETECTORS)
def test_trained_and_merged_whole(name: str) -> None:
    options, channels = DETECTORS[name]
    torch.manual_seed(0)
    build = getattr(torchvision.models.detection, name)
    module = Detector(build(weights=None, weights_backbone=None, num_classes=3, **options))
    callback = CentripetalSGD(strength=0.1, keep_fraction=0.5, clustering="even")
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Images(), batch_size=None))
    assert trainer.global_step == 2
    assert sum(map(len, callback.clusters.values())) == channels
    merged = callback.merge(module.eval(), tolerance=float("inf"))
    assert merged.report.trim <= 1e-9
    assert merged.report.parameters_after < 0.6 * merged.report.parameters_before
    network = merged.network.eval()
    assert type(network) is type(module)
    with torch.no_grad():
        (prediction,) = network.model([torch.rand(3, 96, 96)])
    assert prediction["boxes"].shape[1] == 4
