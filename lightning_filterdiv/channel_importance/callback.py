"""``ChannelImportance``: train with gates and average them."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_filterdiv.channel_importance.gates import (
    REDUCTION,
    ChannelGate,
    Placement,
    gated_layers,
    insert_gates,
    mean_gates,
)
from lightning_filterdiv.filters import Conv
from lightning_filterdiv.tensors.arguments import check_choice, check_integer
from lightning_filterdiv.training.callback import FilterCallback

__all__ = ["ChannelImportance"]


class ChannelImportance(FilterCallback):
    """Train with squeeze-and-excite gates beside convolutions, and average the gates (UCP).

    Gates are inserted in ``setup``, before ``configure_optimizers``. They stay in the network after the fit, because it
    was trained with them. The importance of a channel is the mean of its gate over the augmented images of the last
    epoch, of all ranks under DDP.

    Args:
        placement: ``"convolution"`` (ours): behind every convolution, no biases. ``"cifar"``, ``"imagenet"``: one gate
            per residual block, with or without biases, as in the released networks for these data; see
            :func:`~lightning_filterdiv.channel_importance.insert_gates`.
        reduction: channels per hidden unit of a gate; smaller numbers keep the gates of narrow layers alive.
        include: patterns of layers; ``None``: all that ``placement`` measures.
        exclude: patterns of layers to leave out.
        seed: seed of the gates' weights.
        check_ranks_every_n_steps: see :class:`~lightning_filterdiv.FilterCallback`.

    Raises:
        TypeError, ValueError: a bad argument, by name; at ``setup`` a layer in ``include`` that cannot have a gate.
        NoLayersError: at ``setup``: no layer is left.
        MisconfigurationException: gates were removed from the network before training, for example by
            ``sync_batchnorm=True``, which replaces the norms that hold the gates of ``placement="imagenet"``.
    """

    lost_in_child_processes = "the gates and the importance of channels"
    fixed_on_resume = {"seed": "the gates have the weights of the checkpoint"}
    trainable_only = False  # the gate of a frozen layer trains

    def __init__(
        self,
        *,
        placement: Placement = "convolution",
        reduction: int = REDUCTION,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        check_ranks_every_n_steps: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude, check_ranks_every_n_steps=check_ranks_every_n_steps)
        self.placement = check_choice("placement", placement, Placement)
        self.reduction = check_integer("reduction", reduction, low=1)
        self.seed = check_integer("seed", seed, low=0)
        self._gates: dict[str, ChannelGate] = {}
        self._inserted: list[str] = []
        self._widths: dict[str, int] = {}
        self._sums: Tensor | None = None
        self._finished: Tensor | None = None
        self._epoch = -1

    @property
    def importance(self) -> dict[str, Tensor]:
        """Return layer -> ``(C,)`` mean gates in (0, 1), float64 on the CPU: over the last whole epoch, else over all
        images so far.

        It is empty before the first step. Images whose gates are not finite do not count. A layer without other images
        is left out.
        """
        sums = self._finished if self._finished is not None else self._sums
        return {} if sums is None else mean_gates(self._widths, sums)

    # ------------------------------------------------------------------ start, end

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Insert the gates before the optimizers are made."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.check_built(pl_module, values=False)
            insert_gates(
                pl_module, self.include, self.exclude,
                placement=self.placement, reduction=self.reduction, seed=self.seed,
            )  # fmt: skip
            self._inserted = list(gated_layers(pl_module))

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Return the gated layers that ``include`` and ``exclude`` leave."""
        hosts = gated_layers(pl_module)
        if lost := [name for name in self._inserted if name not in hosts]:
            raise MisconfigurationException(
                f"the gate of {lost[0]!r} was taken out of the network after ChannelImportance had inserted it; with "
                f"sync_batchnorm=True, which replaces norms, use placement='cifar' or 'convolution'"
            )
        self._gates = {name: cast(ChannelGate, host.gate) for name, host in hosts.items()}
        return {name: conv for name, conv in super().choose(pl_module).items() if name in hosts}

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start averaging the gates."""
        widths = {name: conv.out_channels for name, conv in self.layers.items()}
        if widths != self._widths:
            self._widths, self._sums, self._finished = widths, None, None
        self._gates = {name: self._gates[name] for name in self.layers}
        for name, conv in self.layers.items():
            self._gates[name].total = torch.zeros(conv.out_channels + 1, device=conv.weight.device)
        device = next(iter(self.layers.values())).weight.device
        if self._sums is None:
            self._sums = torch.zeros(sum(widths.values()) + len(widths))
        # A float32 sum over an epoch would lose small changes. MPS has no wider type.
        self._sums = self._sums.to(device, torch.float32 if device.type == "mps" else torch.float64)

    def release(self) -> None:
        """Stop counting. The gates stay in the network, and their sums are kept on the CPU."""
        for gate in self._gates.values():
            gate.total = None
        self._sums = None if self._sums is None else self._sums.cpu()
        self._finished = None if self._finished is None else self._finished.cpu()

    def reset(self) -> None:
        """Forget the sums of an earlier fit."""
        self._widths, self._sums, self._finished, self._epoch = {}, None, None, -1

    # ------------------------------------------------------------------ training

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start a new average at the start of an epoch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.current_epoch != self._epoch:
            self._finish()
            assert self._sums is not None
            self._sums.zero_()
            self._epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the sums of all ranks after every step, so that a checkpoint of rank 0 holds the whole sum."""
        totals = [gate.total for gate in self._gates.values() if gate.total is not None]
        seen = torch.cat(totals)
        if trainer.world_size > 1:
            dist.all_reduce(seen)
        assert self._sums is not None
        self._sums += seen
        torch._foreach_zero_(totals)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Store the complete average of the epoch."""
        self._finish()

    def _finish(self) -> None:
        if self._epoch >= 0 and self._sums is not None:
            self._finished = self._sums.clone()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how far gates differ."""
        super().on_train_end(trainer, pl_module)
        if not self.importance:
            rank_zero_warn(
                "ChannelImportance has nothing to report: no image passed a gate with finite values in this fit. Check "
                "that training_step calls the network, and that training does not diverge"
            )
            return
        spans = {name: (float(gates.min()), float(gates.max())) for name, gates in self.importance.items()}
        listed = ", ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in list(spans.items())[:8])
        rank_zero_info(f"ChannelImportance: mean gates of {listed}")

    def touched_tensors(self) -> dict[str, Tensor]:
        """Return weights, gates and sums."""
        return super().touched_tensors() | ({"sums": self._sums} if self._sums is not None else {})

    # ------------------------------------------------------------------ state

    def extra_state(self) -> dict[str, Any]:
        """Return the sums so far, those of the last whole epoch, and their layers."""
        return {
            "widths": [[name, count] for name, count in self._widths.items()],
            "sums": None if self._sums is None else self._sums.clone(),
            "finished": None if self._finished is None else self._finished.clone(),
            "epoch": self._epoch,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`."""
        if not isinstance(state["widths"], list):
            raise TypeError("widths must be a list of (layer, channels)")
        self._widths = {str(name): int(count) for name, count in state["widths"]}
        size = sum(self._widths.values()) + len(self._widths)
        for key in ("sums", "finished"):
            if not (state[key] is None or (isinstance(state[key], Tensor) and state[key].shape == (size,))):
                raise ValueError(f"{key} must hold {size} numbers or None, got {state[key]!r}")
        self._sums, self._finished, self._epoch = state["sums"], state["finished"], int(state["epoch"])
