"""Callbacks of ``benchmarks.training.train``: record of a run, checkpoints to continue from, repeatable randomness."""

from __future__ import annotations

import os
import time
from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

import lightning_filterdiv
from lightning_filterdiv import RePr
from lightning_filterdiv.filters import named_convolutions
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.tensors.randomness import keyed_generator

__all__ = ["LastCheckpoint", "Record", "SeededSteps", "WholeFiles", "differences", "run_differences"]


def differences(planned: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the differences of two nested settings, such as ``"model.lr: 0.1, not 0.02"``."""
    lines = []
    for key in sorted(planned.keys() | found.keys()):
        one, other = planned.get(key), found.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            lines += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            lines.append(f"{prefix}{key}: {one!r}, not {other!r}")
    return lines


def run_differences(planned: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the differences of the settings of two runs. A record without a number of processes had one process.

    If a record lacks an argument of a callback of this package, the argument is newer and had its default.
    """
    one = {"processes": 1}
    return differences(one | _with_defaults(planned), one | _with_defaults(found))


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with every argument of the package's callbacks, where there are callbacks."""
    if "callbacks" not in settings:
        return settings
    return settings | {"callbacks": [_default_arguments(entry["class"]) | entry for entry in settings["callbacks"]]}


def _default_arguments(name: str) -> dict[str, Any]:
    """Arguments of a callback of the package that have a default; nothing for any other class."""
    found = getattr(lightning_filterdiv, name) if name in lightning_filterdiv.__all__ else None
    if not (isinstance(found, type) and issubclass(found, Callback)):
        return {}
    parameters = signature(found).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _redundancy(model: nn.Module) -> dict[str, dict[str, float]]:
    """Metrics of every convolution, also of one whose weight is computed from others (an expanded one)."""
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return redundancy_metrics({name: conv for name, conv in named_convolutions(model) if isinstance(conv, plain)})


class SeededSteps(Callback):
    """Seed torch's global generators at every step from (seed, step, rank): dropout repeats itself after a resume.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed."""
        key = ("step", self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(keyed_generator(*key).initial_seed())


class LastCheckpoint(ModelCheckpoint):
    """Save ``checkpoints/last.ckpt`` in the run's folder, from which the same command continues.

    Args:
        every_n_epochs: how often.
        every_n_train_steps: how often, in steps; 0 for epochs only.
    """

    def __init__(self, every_n_epochs: int = 1, every_n_train_steps: int = 0) -> None:
        super().__init__(
            filename="last",
            every_n_epochs=None if every_n_train_steps else every_n_epochs,
            every_n_train_steps=every_n_train_steps or None,
            enable_version_counter=False,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the folder, independent of the logger."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)


class WholeFiles(TorchCheckpointIO):
    """Saves beside the old checkpoint and then replaces it: there is a complete one at every moment.

    Lightning writes into the folder of temporary files and moves the file from there; between two file systems that is
    a copy over the only checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save, then replace."""
        scratch = f"{path}.part"
        super().save_checkpoint(checkpoint, scratch, storage_options)
        os.replace(scratch, path)


class Record(Callback):
    """Loss and accuracy after every epoch, accuracy right after an event of RePr, redundancy before and after.

    It is last in the list of callbacks, so that it measures after their events. It draws nothing at random.

    Args:
        settings: settings of the run. A checkpoint of other settings is refused.
        look: number of first test images, of data held in memory, on which accuracy is measured; 0 for none.

    """

    def __init__(self, settings: dict[str, Any], look: int) -> None:
        self.settings, self.look = settings, look
        self.rows: list[dict[str, Any]] = []
        self.before: dict[str, dict[str, float]] = {}
        self.after: dict[str, dict[str, float]] = {}
        self._losses: list[Tensor] = []
        self._epoch = 0  # that the losses are of
        self._events = 0
        self._seconds, self._started = 0.0, time.perf_counter()
        self._batch: tuple[Tensor, Tensor] | None = None

    @property
    def seconds(self) -> float:
        """Of training, from the first start on."""
        return self._seconds + time.perf_counter() - self._started

    def _accuracy(self, module: pl.LightningModule) -> dict[str, float]:
        if self._batch is None:
            return {}
        images, labels = self._batch
        module.eval()
        with torch.no_grad():
            hits = torch.cat([module(part).argmax(dim=1) for part in images.split(2500)]) == labels
        module.train()
        return {"accuracy": round(float(hits.double().mean()), 4)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the filters before the first step; find the images to look at."""
        self._started = time.perf_counter()
        parts = getattr(trainer.datamodule, "parts", None)  # type: ignore[attr-defined]  # set by a connector
        if parts is not None and self.look and trainer.is_global_zero:
            self._batch = parts[2][: self.look].to(pl_module.device), parts[3][: self.look].to(pl_module.device)
        if not self.before and trainer.is_global_zero:
            self.before = _redundancy(pl_module)
        if self._losses and self._epoch != trainer.current_epoch:
            # The run stopped between the last step and the end of an epoch, an end that Lightning leaves out on resume.
            self._close(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look right after an event."""
        if not trainer.is_global_zero:
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        history = [event for c in callbacks if isinstance(c, RePr) for event in c.history]
        for event in history[self._events :]:
            self.rows.append({"epoch": event["epoch"], "event": event["kind"], **self._accuracy(pl_module)})
        self._events = len(history)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the loss."""
        self._losses.append(outputs["loss"].detach())
        self._epoch = trainer.current_epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look after the epoch."""
        self._close(trainer, pl_module)

    def _close(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Those of before a resume come from the checkpoint, on the CPU.
        loss = round(float(torch.stack([loss.to(pl_module.device) for loss in self._losses]).mean()), 4)
        self._losses = []
        if trainer.is_global_zero:
            self.rows.append({"epoch": self._epoch + 1, "loss": loss, **self._accuracy(pl_module)})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the filters after the last step."""
        if trainer.is_global_zero:
            self.after = _redundancy(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """A resumed run continues the record."""
        losses = [float(loss) for loss in self._losses]
        return {
            "rows": self.rows,
            "events": self._events,
            "before": self.before,
            "settings": self.settings,
            "losses": losses,
            "epoch": self._epoch,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: the checkpoint is of a run with other settings.
        """
        if found := run_differences(self.settings, state_dict["settings"]):
            raise ValueError(
                "the checkpoint belongs to another run: this run has " + "; ".join(found) + "; choose another "
                "--trainer.default_root_dir, or --resume false to start over"
            )
        self.rows, self._events, self.before = state_dict["rows"], state_dict["events"], state_dict["before"]
        self._losses = [torch.tensor(loss) for loss in state_dict["losses"]]
        self._epoch, self._seconds = state_dict["epoch"], state_dict["seconds"]
