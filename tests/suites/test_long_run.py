"""5,000 steps of each callback: nothing piles up in memory, hooks, checkpoints or on disk, and steps stay as fast."""

from __future__ import annotations

import gc
import io
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_filterdiv import FilterSimilarityMonitor, RePr, WeightAsynchronousUpdate
from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, batches, fit

pytestmark = pytest.mark.soak
EPOCH, STEPS, SETTLED = 50, 5_000, 1_500
MIB = 2**20


class Sizes(Callback):
    """What there is, looked at in the middle of an epoch, and the time of every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.looks: dict[int, dict[str, int]] = {}
        self.times: list[float] = []
        self._then = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._then = time.process_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.times.append(time.process_time() - self._then)
        if trainer.global_step in (SETTLED + EPOCH // 2, (SETTLED + STEPS) // 2, STEPS - EPOCH // 2):
            self.looks[trainer.global_step] = self._look(trainer, pl_module)

    def _look(self, trainer: Any, model: nn.Module) -> dict[str, int]:
        gc.collect()
        state = io.BytesIO()
        torch.save([callback.state_dict() for callback in trainer.callbacks if callback is not self], state)
        tables = [value for module in model.modules() for key, value in vars(module).items() if "hooks" in key]
        for optimizer in trainer.optimizers:
            tables += [value for key, value in vars(optimizer).items() if "hooks" in key]
        return {
            "tensors": sum(isinstance(found, Tensor) for found in gc.get_objects()),
            "hooks": sum(len(table) for table in tables if hasattr(table, "__len__")),
            "state": len(state.getvalue()),
            "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
            "disk": sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()),
        }


def check(callbacks: list[Callback], folder: Path, lr_scale: float = 1.0) -> None:
    sizes = Sizes(folder)
    model = Classifier("adamw", lr_scale=0.1 * lr_scale)
    model.losses = _Forgets()  # type: ignore[assignment]
    model.seen = _Forgets()  # type: ignore[assignment]
    fit(
        [*callbacks, sizes], model=model, loader=batches(steps=EPOCH), max_epochs=-1, max_steps=STEPS,
        logger=TensorBoardLogger(folder), log_every_n_steps=EPOCH,
    )  # fmt: skip
    first, middle, last = (sizes.looks[step] for step in sorted(sizes.looks))
    assert len(sizes.times) == STEPS
    assert last["hooks"] == middle["hooks"] == first["hooks"], f"hooks: {sizes.looks}"
    assert last["tensors"] <= first["tensors"] + 2, f"tensors: {sizes.looks}"
    # A history has an entry per epoch or event; nothing has one per step, or entries that grow.
    earlier, later = middle["state"] - first["state"], last["state"] - middle["state"]
    assert later <= 1.2 * earlier + 200, f"state: {sizes.looks}"
    assert later <= 300 * (STEPS - SETTLED) / 2 / EPOCH, f"state: {sizes.looks}"
    assert last["memory"] - first["memory"] < 24 * MIB, f"memory: {sizes.looks}"
    # Twice as many steps later at most twice as much again, and a little for the end of a buffer.
    assert last["disk"] - middle["disk"] <= 1.2 * (middle["disk"] - first["disk"]) + 20_000, f"disk: {sizes.looks}"
    # Of the processor's time, and of the fast steps: what else runs on the machine is not meant.
    early, late = (
        statistics.quantiles(sizes.times[start : start + 1_000], n=10)[0] for start in (SETTLED - 1_000, STEPS - 1_000)
    )
    assert late < 1.3 * early, f"{1e3 * early:.2f} ms a step became {1e3 * late:.2f} ms"


class _Forgets(dict[Any, Any]):
    """The recording of the suite's own model would be what grows."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def _make(case: Case) -> Callback:
    if case.cls is RePr:
        return RePr(full_epochs=10, sub_epochs=5, cycles=6, include=["net.*"])
    return case.make(figures=True, max_figures=1) if case.cls is FilterSimilarityMonitor else case.make()


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_nothing_piles_up(case: Case, tmp_path: Path) -> None:
    check([_make(case)], tmp_path, case.lr_scale)


def test_without_a_callback(tmp_path: Path) -> None:
    check([], tmp_path)


class _Hoards(WeightAsynchronousUpdate):
    """Mutant: keeps a tensor of every step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        vars(self).setdefault("kept", []).append(torch.zeros(1))


class _HooksAgain(WeightAsynchronousUpdate):
    """Mutant: registers a hook at every epoch and forgets it."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(("kind", "what"), [(_Hoards, "tensors"), (_HooksAgain, "hooks")])
def test_what_piles_up_is_noticed(kind: type[Callback], what: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"^{what}"):
        check([kind()], tmp_path)
