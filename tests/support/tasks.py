"""Small trainings of other tasks than classification: detection, segmentation, a GAN, an autoencoder, audio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v3_small
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.training.loader import SeededBatches
from lightning_filterdiv.filters import NoLayersError

STEPS_PER_EPOCH = 4
BATCH = 4
Refusal = tuple[type[Exception], str]


class TaskModule(pl.LightningModule):
    """What the tasks share: seeded weights, randomness that is a function of the step, and a loader."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.build()

    def build(self) -> None:
        raise NotImplementedError

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def data(self, generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def loader(self) -> SeededBatches:
        data = self.data(torch.Generator().manual_seed(11), BATCH * STEPS_PER_EPOCH)
        return SeededBatches(data, BATCH, seed=3)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        # Sampled proposals and latent codes: a resumed run must draw what it would have drawn.
        with torch.random.fork_rng():
            torch.manual_seed(self.trainer.global_step)
            return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class Detection(TaskModule):
    """Faster R-CNN on a feature pyramid of MobileNetV3, one bright box per image."""

    def build(self) -> None:
        # The first blocks: with squeeze-and-excitation, depthwise convolutions and a residual sum.
        body = mobilenet_v3_small(weights=None).features[:5]
        backbone = BackboneWithFPN(body, {"2": "0", "4": "1"}, [24, 40], 16)
        self.detector = FasterRCNN(
            backbone,
            num_classes=None,
            min_size=64,
            max_size=64,
            rpn_anchor_generator=AnchorGenerator(((16, 32),) * 3, ((1.0,),) * 3),
            rpn_pre_nms_top_n_train=50,
            rpn_post_nms_top_n_train=20,
            box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 0),
            box_head=TwoMLPHead(16 * 9, 16),
            box_predictor=_BoxPredictor(16, 2),
            box_batch_size_per_image=16,
        )

    def data(self, generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
        images = 0.2 * torch.rand(count, 3, 64, 64, generator=generator)
        corners = torch.randint(4, 24, (count, 2), generator=generator)
        boxes = torch.cat([corners, corners + 28], dim=1).float()
        for image, (left, top, right, bottom) in zip(images, boxes.int().tolist(), strict=True):
            image[:, top:bottom, left:right] += 0.8
        return images, boxes

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        images, boxes = batch
        targets = [{"boxes": box[None], "labels": torch.ones(1, dtype=torch.int64)} for box in boxes]
        losses: dict[str, Tensor] = self.detector(list(images), targets)
        return torch.stack(list(losses.values())).sum()


class _BoxPredictor(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(channels, classes), nn.Linear(channels, 4 * classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x), self.boxes(x)


def _block(channels: int, filters: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU())


class UNet(nn.Module):
    """Two levels with skips, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bottom = _block(1, 8), _block(8, 12), _block(12, 16)
        self.up_second, self.up_first = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.join_second, self.join_first = _block(24, 12), _block(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        second = self.second(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        up = self.join_second(torch.cat([second, self.up_second(bottom)], dim=1))
        up = self.join_first(torch.cat([first, self.up_first(up)], dim=1))
        scores: Tensor = self.head(up)
        return scores


class Segmentation(TaskModule):
    """A U-Net that finds bright pixels."""

    def build(self) -> None:
        self.net = UNet()

    def data(self, generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
        images = torch.rand(count, 1, 16, 16, generator=generator)
        return images, (F.avg_pool2d(images, 3, 1, 1)[:, 0] > 0.5).long()

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Adversarial(TaskModule):
    """A GAN: two networks, two optimizers, manual optimization."""

    LATENT = 6

    def build(self) -> None:
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(self.LATENT, 12, 4, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 8, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(8, 12, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(12 * 16, 1),
        )

    def data(self, generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
        ramp = torch.linspace(0, 1, 16).expand(count, 1, 16, 16)
        return (ramp * torch.rand(count, 1, 1, 1, generator=generator),)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        with torch.random.fork_rng():
            torch.manual_seed(self.trainer.global_step)
            latent = torch.randn(len(batch[0]), self.LATENT, 1, 1)
        fake = self.generator(latent)
        self.toggle_optimizer(second)
        real_scores, fake_scores = self.discriminator(batch[0]), self.discriminator(fake.detach())
        loss = F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean()
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        loss = F.softplus(-self.discriminator(self.generator(latent))).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
        ]


class Autoencoder(TaskModule):
    """Convolutions down, transposed convolutions up."""

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 1, 1),
        )

    def data(self, generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
        return (torch.rand(count, 1, 16, 16, generator=generator),)

    def forward(self, images: Tensor) -> Tensor:
        restored: Tensor = self.net(images)
        return restored

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return F.mse_loss(self(batch[0]), batch[0])


class Audio(TaskModule):
    """1-D convolutions on a waveform, pitch as the target."""

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Conv1d(1, 8, 9, stride=4, padding=4, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 12, 5, padding=4, dilation=2),
            nn.GroupNorm(3, 12),
            nn.ReLU(),
            nn.Conv1d(12, 12, 3, groups=12),
            nn.Conv1d(12, 16, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(16, 1),
        )

    def data(self, generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
        pitch = torch.rand(count, 1, generator=generator)
        time = torch.arange(128.0)
        return torch.sin(time * (0.2 + pitch))[:, None], pitch

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])


@dataclass(frozen=True)
class Task:
    """A training, and how callbacks are told about it.

    Attributes:
        name: test id.
        module: makes the module; its argument is the seed of the weights.
        arguments: callback -> constructor arguments that replace the registry's.
        refusals: callback that does not apply -> the exception and part of the message by which it says so.
    """

    name: str
    module: Callable[[int], TaskModule]
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)


_BACKBONE = {"network": "detector.backbone", "include": None}
_DISCRIMINATOR = {"network": "discriminator", "include": None}
_TRANSPOSED_TOO = {"include": ["*"]}  # transposed convolutions are meant only where a pattern names them
TASKS: tuple[Task, ...] = (
    Task("detection", Detection, dict.fromkeys(("repr", "csgd", "entropy"), _BACKBONE)),
    Task("segmentation", Segmentation),
    Task(
        "gan",
        Adversarial,
        arguments={
            **dict.fromkeys(("repr", "csgd", "entropy"), _DISCRIMINATOR),
            **dict.fromkeys(("wau", "basis", "monitor"), _TRANSPOSED_TOO),
        },
    ),
    Task("autoencoder", Autoencoder, dict.fromkeys(("wau", "basis", "monitor"), _TRANSPOSED_TOO)),
    Task(
        "audio",
        Audio,
        refusals={
            "expand": (NoLayersError, "no convolution for kind='CL' to expand ('net.0' is a Conv1d)"),
            "importance": (NoLayersError, "whose class is exactly nn.Conv2d: 'net.0' is an nn.Conv1d with 1 group"),
            "entropy": (MisconfigurationException, "this network reads signals ('net.0' is a Conv1d)"),
        },
    ),
)
