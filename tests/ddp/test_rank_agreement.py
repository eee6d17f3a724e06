"""Run inside ``torchrun --nproc-per-node 2``: ranks agree bit by bit in every mode of training; one bit is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.nn import functional as reductions

from lightning_filterdiv.tensors.rank_check import RankDivergenceError
from tests.ddp import test_two_ranks as two
from tests.ddp.test_two_ranks import SeedsPerRank, Witness, fit_ddp, raises_on_every_rank, setup_module
from tests.registry import CASES, ONE_EACH, Case
from tests.support.training import Classifier, Run

__all__ = ["setup_module"]  # pytest calls it: the process group, and the rank

STEPS = 100
MODES = {
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "SyncBN": {},
}


class Unused(Classifier):
    """Has a convolution that no loss depends on, for which DDP must look."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.unused = nn.Conv2d(3, 5, 3)
        # Two children have convolutions, and DDP calls training_step instead of forward.
        self.example_input_array = torch.zeros(2, 1, 8, 8)


def synchronised(self: nn.SyncBatchNorm, images: torch.Tensor) -> torch.Tensor:
    """What ``nn.SyncBatchNorm`` computes; torch has kernels for it on accelerators only."""
    if not self.training:
        return nn.functional.batch_norm(
            images, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )
    wide = images.float()
    count = images.numel() // images.shape[1] * dist.get_world_size()
    sums = reductions.all_reduce(torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]))
    mean = sums[0] / count
    variance = sums[1] / count - mean.square()
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)
    scale = self.weight * (variance + self.eps).rsqrt()
    return (wide * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(images.dtype)


class BuffersToo(Witness):
    """Compares running statistics as well: synchronised norms have the same on all ranks."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *rest)
        norms = [m for m in pl_module.modules() if isinstance(m, nn.SyncBatchNorm)]
        assert len(norms) == 2
        two.check_ranks_agree({str(i): m.running_mean for i, m in enumerate(norms)}, "running means")


def fit_in_a_mode(callbacks: list[Callback], mode: str, lr_scale: float = 1.0, **options: Any) -> Run:
    kind = Unused if mode == "find_unused_parameters" else Classifier
    return fit_ddp(
        callbacks, max_steps=STEPS, model=kind(lr_scale=lr_scale), sync_batchnorm=mode == "SyncBN",
        strategy=DDPStrategy(process_group_backend="gloo", **MODES[mode]), **options,
    )  # fmt: skip


def test_a_static_graph_does_not_accumulate() -> None:
    """torch's own limit, and why the grid below has no such cells."""
    message = raises_on_every_rank(lambda: fit_in_a_mode([], "static_graph", accumulate_grad_batches=4), RuntimeError)
    assert "INTERNAL ASSERT" in message


@pytest.mark.soak
@pytest.mark.parametrize(
    ("mode", "accumulate"),
    [(mode, accumulate) for mode in MODES for accumulate in (1, 4) if (mode, accumulate) != ("static_graph", 4)],
)
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_agree_after_every_step(
    case: Case, precision: str, accumulate: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", synchronised)
    # DDP refuses them on a CPU, for the lack of kernels.
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None)
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": accumulate}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=40)  # overflows first, and again later
    if precision == "16-mixed":
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "accumulate_grad_batches": accumulate}
    witness = BuffersToo() if mode == "SyncBN" else Witness()
    # The rate of the short suites is too high for a hundred steps of an expanded network: it would diverge.
    run = fit_in_a_mode([SeedsPerRank(), case.make(), witness], mode, case.lr_scale**2, **options)
    assert run.trainer.global_step == STEPS
    # Six batches an epoch: with four per step, a step follows the fourth and the last.
    assert witness.steps == STEPS * (1 if accumulate == 1 else 3)
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    if precision == "16-mixed":
        assert scaler.get_scale() < 2.0**40, "no step overflowed"


class FlipsABit(Callback):
    """One bit of one weight of rank 1."""

    def __init__(self) -> None:
        self.name = ""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            self.name, weight = next((n, p) for n, p in pl_module.named_parameters() if n.startswith("net.5"))
            if trainer.global_rank == 1:
                bits = weight.detach().clone(memory_format=torch.contiguous_format).view(torch.int32)
                bits.view(-1)[7] ^= 1
                weight.data.copy_(bits.view(torch.float32))


@pytest.mark.parametrize("case", [c for c in ONE_EACH if c.trains_differently], ids=lambda case: case.name)
def test_one_flipped_bit_is_named(case: Case) -> None:
    flips = FlipsABit()
    callbacks = [flips, case.make(check_ranks_every_n_steps=2)]
    message = raises_on_every_rank(
        lambda: fit_ddp(callbacks, max_steps=18, model=Classifier(lr_scale=case.lr_scale)), RankDivergenceError
    )
    assert flips.name.startswith("net.5.")
    assert flips.name in message
    assert "after step 4" in message
    assert "rank(s) [1]" in message
    fit_ddp(
        [case.make(check_ranks_every_n_steps=2)], max_steps=18, model=Classifier(lr_scale=case.lr_scale),
    )  # fmt: skip
