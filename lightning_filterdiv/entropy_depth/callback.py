"""The ``EntropyDepthBound`` callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_filterdiv.channel_graph import ChannelGraphError
from lightning_filterdiv.entropy_depth.depth import NetworkDepth, network_depth
from lightning_filterdiv.entropy_depth.estimate import measure, preserve_rng_state
from lightning_filterdiv.entropy_depth.functional import DepthBound, Measurement, Rounding, Unit
from lightning_filterdiv.entropy_depth.images import ImageDataError, loader_source
from lightning_filterdiv.filters import Conv, select_filters
from lightning_filterdiv.tensors.arguments import check_choice, check_integer
from lightning_filterdiv.training.callback import FilterCallback
from lightning_filterdiv.training.example_inputs import ExampleInputs
from lightning_filterdiv.training.submodule import check_network, layers_inside

__all__ = ["Action", "EntropyDepthBound"]

Action = Literal["warn", "error", "log"]
T = TypeVar("T")


class EntropyDepthBound(FilterCallback):
    """Measure the training images at fit start and name the stages of the network that are deeper than they can use.

    The bound is the rounded mean entropy of the images, a heuristic after EBCLE (Gowdra et al., Pattern Recognition
    2021; see the card). It is compared with each stage, the convolutions of one spatial resolution on the longest path;
    the total depth is logged beside it. If stages are deeper, the log proposes a shallower, broader network with as
    many parameters. Training does not change: no weight, no batch, no random number.

    Without an ``example_input_array`` the network is traced after its first training batch. The images
    are measured on rank 0 only. A resumed fit takes the result from the checkpoint.

    Args:
        unit: unit of the entropy that is rounded. For 8-bit images the bound is at most 6 in nats and 8 in bits.
        rounding: rounding of the mean entropy.
        max_images: number of images to measure; ``None`` for all.
        action: reaction to a stage that is too deep.
        network: name of the submodule to trace, ``None`` for the whole module.
        include: patterns of the convolutions that count towards depth; ``None`` for all.
        exclude: patterns of convolutions that do not count.

    Attributes:
        bound: the measured :class:`DepthBound`, from fit start on.
        depth: the :class:`NetworkDepth`, once the network was traced.

    Raises:
        TypeError, ValueError: a bad argument, by name.
        ImageDataError: at fit start, if the training data hold no images or can be read only once.
        MisconfigurationException: all chosen convolutions are ``nn.Conv1d``; with ``action="error"``: a stage is too
            deep, or the network cannot be traced.
    """

    log_prefix = "entropy_depth"
    lost_in_child_processes = "the attributes bound and depth"
    trainable_only = False
    shares_layers = True

    def __init__(
        self,
        *,
        unit: Unit = "nats",
        rounding: Rounding = "ceil",
        max_images: int | None = None,
        action: Action = "warn",
        network: str | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        self.unit = check_choice("unit", unit, Unit)
        self.rounding = check_choice("rounding", rounding, Rounding)
        self.max_images = None if max_images is None else check_integer("max_images", max_images, low=1)
        self.action = check_choice("action", action, Action)
        self.network = check_network(network)
        self.bound: DepthBound | None = None
        self.depth: NetworkDepth | None = None
        self._measured: Measurement | None = None
        self._restored_measurement = False
        self._inputs: ExampleInputs | None = None

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Return the convolutions of ``network`` that ``include`` and ``exclude`` leave."""
        return layers_inside(self.network, select_filters(pl_module, self.include, self.exclude))

    # ------------------------------------------------------------------ the two measurements

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the images. Compare them with the network if it can be traced without a batch."""
        if all(isinstance(conv, nn.Conv1d) for conv in self.layers.values()):
            raise MisconfigurationException(
                f"EntropyDepthBound measures images, and this network reads signals ({next(iter(self.layers))!r} is a "
                f"Conv1d): the rule says nothing about them. Train without it"
            )
        if self._measured is None or not self._restored_measurement:
            self._measured = _from_rank_zero(trainer, lambda: self._measure(trainer))
        self._restored_measurement = False
        self.bound = self._measured.bound(self.unit, self.rounding)
        self.depth = None
        rank_zero_info(f"EntropyDepthBound: {self.bound.describe()}")
        self.log_metrics({"entropy": self.bound.entropy, "entropy_std": self.bound.std, "bound": self.bound.bound})
        self._inputs = ExampleInputs(pl_module, self.network)
        if self._inputs.known:
            self._compare(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Trace the network after the first batch that it saw."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._inputs is not None and not self._inputs.awaited(self.layers.values()):
            self._compare(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the network was never called."""
        super().on_train_end(trainer, pl_module)
        if self._inputs is not None:
            self._compare(trainer, pl_module)

    def _measure(self, trainer: pl.Trainer) -> Measurement:
        loader = trainer.train_dataloader
        _refuse_one_pass(loader)
        with preserve_rng_state():
            source = loader_source(loader, self.max_images)
        measured = measure(source, progress=trainer.progress_bar_callback is not None)
        if trainer.world_size > 1:
            measured = measured._replace(notes=(*measured.notes, "only rank 0 measured; its loader may yield a share"))
        return measured

    def _compare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.bound is not None
        depth = _from_rank_zero(trainer, self._depth_or_reason)
        self._stop_waiting()
        if isinstance(depth, str):
            message = f"EntropyDepthBound cannot count the depth of {type(pl_module).__name__}: {depth}"
            if self.action == "error":
                raise MisconfigurationException(message)
            rank_zero_warn(message)
            return
        self.depth = depth
        numbers: dict[str, float] = {"depth/total": depth.total}
        numbers |= {f"depth/stage{index}": stage.depth for index, stage in enumerate(depth.stages, start=1)}
        self.log_metrics(numbers)
        rank_zero_info(f"EntropyDepthBound: {depth.describe()}; the bound is {self.bound.bound} per stage")
        if advice := depth.advice(self.bound.bound):
            deep = len(depth.beyond(self.bound.bound))
            self._report(
                f"EntropyDepthBound: {deep} of {len(depth.stages)} stages are deeper than {self.bound.bound}, the "
                f"bound from the entropy of the training images. Try a shallower, broader network with as many "
                f"weights: {advice}"
            )

    def _depth_or_reason(self) -> NetworkDepth | str:
        assert self._inputs is not None
        everything = self.include is None and self.exclude is None
        try:
            return network_depth(self._inputs.trace(), None if everything else self.layers)
        except (ChannelGraphError, ValueError) as error:
            return str(error)

    def _report(self, message: str) -> None:
        if self.action == "error":
            raise MisconfigurationException(message)
        (rank_zero_warn if self.action == "warn" else rank_zero_info)(message)

    # ------------------------------------------------------------------ end, state

    def _stop_waiting(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None

    def release(self) -> None:
        """Stop waiting for a forward call."""
        self._stop_waiting()

    def reset(self) -> None:
        """Forget what a previous fit measured."""
        self._measured, self._restored_measurement = None, False
        self.bound, self.depth = None, None

    def extra_state(self) -> dict[str, Any]:
        """Return what was measured, and how many images were asked for."""
        return {"measured": None if self._measured is None else _packed(self._measured), "max_images": self.max_images}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`, also that of release 0.1. Images are measured again if ``max_images`` has
        changed."""
        packed = state["measured"]
        if isinstance(packed, list) and all(isinstance(entry, list) for entry in packed):
            # Release 0.1: a list of [fingerprint, is it a stream, measurement], that of its last fit at the end.
            _, _, packed = packed[-1] if packed else (None, None, None)
        measured = None
        if packed is not None:
            if not isinstance(packed, list) or len(packed) != len(Measurement._fields):
                raise TypeError(f"measured must be a list of {', '.join(Measurement._fields)}, got {packed!r}")
            entropy, std, n_images, source, notes = packed
            if not (math.isfinite(entropy) and math.isfinite(std) and entropy >= 0):
                raise ValueError(f"entropy must be a finite number >= 0, got {entropy!r} (std {std!r})")
            measured = Measurement(float(entropy), float(std), int(n_images), str(source), tuple(notes))
        if state.get("max_images", self.max_images) != self.max_images:
            measured = None
        self._measured, self._restored_measurement = measured, measured is not None


def _packed(measured: Measurement) -> list[Any]:
    """Return plain values for a checkpoint."""
    return [*measured[:-1], list(measured.notes)]


def _refuse_one_pass(loader: object) -> None:
    """Refuse a loader that measuring would use up.

    Raises:
        ImageDataError: every pass over it continues where the last one ended.
    """
    data = loader.dataset if isinstance(loader, DataLoader) else loader
    if isinstance(data, Iterator | IterableDataset) and iter(data) is iter(data):
        raise ImageDataError(
            f"{type(data).__name__} can be read only once, and measuring would leave nothing to train on. Measure "
            f"another copy with estimate_depth_bound, and train without EntropyDepthBound"
        )


def _from_rank_zero(trainer: pl.Trainer, action: Callable[[], T]) -> T:
    """Return the result of ``action`` on rank 0 to every rank. An error on rank 0 is raised everywhere, because the
    others wait."""
    outcome: tuple[T | None, str] = (None, "")
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            outcome = (action(), "")
        except Exception as error:  # passed on to the other ranks, then raised
            failure, outcome = error, (None, f"{type(error).__name__}: {error}")
    result, message = trainer.strategy.broadcast(outcome)
    if failure is not None:
        raise failure
    if message:
        raise RuntimeError(f"EntropyDepthBound failed on rank 0: {message}")
    return cast(T, result)
