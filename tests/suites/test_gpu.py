"""Checks that need a real GPU: no synchronisation, training as on the CPU, runs that move between both."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cost.launches import count
from benchmarks.models import CifarResNet
from lightning_filterdiv import WeightAsynchronousUpdate
from lightning_filterdiv.centripetal import cluster_channels
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.narrowing import merge_channels, tie_channels
from tests.registry import CASES, ONE_EACH, Case
from tests.support.training import Classifier, Run, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class _Quiet(Classifier):
    """Reads nothing back, as a training step should not."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class _NoWaiting(Callback):
    """From the second batch of every epoch on, whatever waits for the device raises; events come with the first."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, at: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if at else "default")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_step_waits_for_the_device(case: Case, optimizer: str) -> None:
    fit([_NoWaiting(), case.make()], model=_Quiet(optimizer, lr_scale=case.lr_scale), accelerator="gpu")


class _Reads(WeightAsynchronousUpdate):
    """Mutant: looks at a gradient in every step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        float(pl_module.net[0].weight.grad.sum())
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def test_waiting_is_caught() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        fit([_NoWaiting(), _Reads()], model=_Quiet(), accelerator="gpu")


def _close(left: Run, right: Run) -> None:
    assert left.tensors().keys() == right.tensors().keys()
    for name, value in left.tensors().items():
        torch.testing.assert_close(
            value, right.tensors()[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gpu_and_cpu_agree(case: Case) -> None:
    """The same draws and choices, and the same weights up to rounding, in float64."""
    runs = [
        fit([case.make()], model=Classifier(lr_scale=case.lr_scale), accelerator=where, precision="64-true")
        for where in ("cpu", "gpu")
    ]
    _close(*runs)


@pytest.mark.parametrize("way", [("gpu", "cpu"), ("cpu", "gpu")], ids=["to the CPU", "to the GPU"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_moves_to_another_device(case: Case, way: tuple[str, str], tmp_path: Path) -> None:
    """Saved on one, resumed on the other: the run that had stayed, up to rounding."""
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=8)
    options: dict[str, Any] = {"precision": "64-true", "max_epochs": 3}
    first = Classifier(lr_scale=case.lr_scale)
    whole = fit([case.make(), checkpoint], model=first, accelerator=way[0], **options)
    other = Classifier(seed=1, lr_scale=case.lr_scale).double()  # Lightning converts only after it has loaded
    path = str(tmp_path / "step=8.ckpt")
    moved = fit([case.make()], model=other, accelerator=way[1], ckpt_path=path, **options)
    assert min(other.losses) == 8
    _close(whole, moved)


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_nothing_stays_on_the_device(case: Case) -> None:
    """A callback that outlives its fit keeps no memory of the GPU."""

    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    fit([case.make()], accelerator="gpu")  # handles and workspaces stay with the process
    before = allocated()
    callback = case.make()
    fit([callback], accelerator="gpu")
    assert allocated() == before
    assert callback.layers


def test_merging_on_the_device_is_exact() -> None:
    torch.manual_seed(0)
    model = CifarResNet(20, "projection").double().cuda()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, device="cuda")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    graph = ChannelGraph.trace(model, images)
    clusters = cluster_channels(model, graph, 0.5)
    tie_channels(model, clusters, images)
    model.eval()
    with torch.no_grad():
        expected = model(images)
    merged = merge_channels(model, clusters, images).network.eval()
    assert {p.device.type for p in merged.parameters()} == {"cuda"}
    with torch.no_grad():
        torch.testing.assert_close(merged(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["wau", "csgd", "soft"])
def test_kernels_on_the_device_follow_shapes(method: str) -> None:
    """Five and a half times the layers take at most twice the kernels: a `_foreach` operation is one per chunk."""
    shallow, deep = count(method, 20, "cuda"), count(method, 110, "cuda")
    assert 0 < shallow <= 150
    assert deep <= 2 * shallow
