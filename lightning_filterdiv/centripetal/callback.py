"""The ``CentripetalSGD`` callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_filterdiv.centripetal.budget import Budget, ClipMeter
from lightning_filterdiv.centripetal.checkpoints import inputs_from_state, relative_to, saved_states
from lightning_filterdiv.centripetal.forecast import LOSSLESS_K
from lightning_filterdiv.centripetal.functional import (
    CentripetalUpdate,
    cluster_distances,
    relative,
    relative_deviations,
)
from lightning_filterdiv.centripetal.history import DeviationHistory
from lightning_filterdiv.centripetal.selection import check_usable, choose_groups
from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup
from lightning_filterdiv.filters import Conv, NoLayersError, select_filters
from lightning_filterdiv.narrowing.clusters import (
    ClusteredTensor,
    Clustering,
    check_finite,
    cluster_channels,
    clustered_tensors,
)
from lightning_filterdiv.narrowing.importance import redundancy_scores
from lightning_filterdiv.narrowing.merge import Merged, merge_channels
from lightning_filterdiv.narrowing.widths import Scope, WidthPlan, WidthRule, plan_widths
from lightning_filterdiv.tensors.arguments import check_choice, check_integer, check_number
from lightning_filterdiv.training.callback import FilterCallback
from lightning_filterdiv.training.example_inputs import ExampleInputs
from lightning_filterdiv.training.steps import gradient_scale
from lightning_filterdiv.training.submodule import check_network, layers_inside

__all__ = ["CentripetalSGD"]


def _nan_last(value: float) -> tuple[bool, float]:
    """Sorts NaN above every number."""
    return math.isnan(value), value


class CentripetalSGD(FilterCallback):
    """Train filters of a cluster to become equal (C-SGD), so that they can be merged without any loss.

    Ding, Ding, Guo, Han: "Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated Structure",
    CVPR 2019. Channels are clustered once, after the first forward call; from then on every gradient is averaged inside
    its cluster and its members are pulled together, in every tensor that holds something for that channel. After the
    fit :meth:`merge` returns the narrow network.

    Args:
        keep_fraction: share of every layer's channels to keep, in (0, 1], or a dict of layer pattern -> share (layers
            that no pattern matches keep all). ``None``: 0.625, unless a target is given.
        target_macs: share of the full network's multiply-accumulate operations to end at, in the place of
            ``keep_fraction``. They are counted on the inputs that the graph is traced with.
        target_parameters: the same for parameters.
        scope: ``"layer"``: the same share in every layer; ``"global"``: layers whose filters express one another well
            lose more.
        max_layer_fraction: at most this share of a layer's channels goes; ``None``: all but one may.
        channels_multiple: a layer that loses channels keeps a multiple of this; 8 suits hardware.
        strength: eps, the centripetal strength, or ``"auto"``: the smallest that reaches ``K = 18`` in this fit.
        vector_strength: eps for biases and for scales and shifts of norms; ``None``: the same (the official code: a
            tenth).
        clustering: ``"kmeans"`` on the kernels, ``"even"`` blocks, or ``"imbalanced"``: one large cluster.
        network: trace only this submodule, for example ``"backbone"`` of a detector.
        include: patterns of layers; ``None`` for every convolution. Channels are squeezed where every convolution that
            shares them is chosen.
        exclude: patterns of layers to leave out.
        seed: of k-means.
        check_ranks_every_n_steps: see :class:`~lightning_filterdiv.training.callback.FilterCallback`.

    Raises:
        TypeError, ValueError: a bad argument, by name; at the first step a kernel that is not finite, by layer.
    """

    gradient_stage = 20
    waits_for_layers = True
    log_prefix = "centripetal"
    fixed_on_resume = dict.fromkeys(
        (
            "keep_fraction",
            "target_macs",
            "target_parameters",
            "scope",
            "max_layer_fraction",
            "channels_multiple",
            "clustering",
            "seed",
        ),
        "clusters stay as in the checkpoint; start a new fit to change them",
    )
    lost_in_child_processes = "the clusters that merge() needs"

    def __init__(
        self,
        *,
        keep_fraction: float | dict[str, float] | None = None,
        target_macs: float | None = None,
        target_parameters: float | None = None,
        scope: Scope = "layer",
        max_layer_fraction: float | None = None,
        channels_multiple: int = 1,
        strength: float | Literal["auto"] = "auto",
        vector_strength: float | None = None,
        clustering: Clustering = "kmeans",
        network: str | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        check_ranks_every_n_steps: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude, check_ranks_every_n_steps=check_ranks_every_n_steps)
        if keep_fraction is None and target_macs is None and target_parameters is None:
            keep_fraction = 0.625
        self._rule = WidthRule(
            keep_fraction, target_macs, target_parameters, scope, max_layer_fraction, channels_multiple
        )
        self.keep_fraction, self.target_macs = self._rule.keep_fraction, self._rule.target_macs
        self.target_parameters, self.scope = self._rule.target_parameters, self._rule.scope
        self.max_layer_fraction, self.channels_multiple = self._rule.max_layer_fraction, self._rule.channels_multiple
        if isinstance(strength, str) and strength != "auto":
            raise ValueError(f"strength must be a number > 0 or 'auto', got {strength!r}")
        self.strength: float | str = (
            strength if isinstance(strength, str) else check_number("strength", strength, above=0)
        )
        self.vector_strength = (
            None if vector_strength is None else check_number("vector_strength", vector_strength, above=0.0)
        )
        self.clustering = check_choice("clustering", clustering, Clustering)
        self.network = check_network(network)
        self.seed = check_integer("seed", seed, low=0)
        #: Group name -> (size,) cluster index of each channel; empty before the first forward call.
        self.clusters: dict[str, Tensor] = {}
        #: The strength in use; ``None`` before the first step.
        self.resolved_strength: float | None = None
        #: Layer -> why (some of) its channels are left alone.
        self.left_alone: dict[str, str] = {}
        self._length: list[int | None] = []  # of the fit that "auto" was resolved for: max_epochs, max_steps
        self._strengths_changed = self._resolves_anew = False
        self._seen: list[str] = []  # groups that a clustering was decided for, also those that keep all channels
        self._budget = Budget()
        self._clip = ClipMeter()
        self._history = DeviationHistory()
        self._began: list[int] = []  # epoch and step of the clustering
        self._tensors: list[ClusteredTensor] = []
        self._updates: dict[int, CentripetalUpdate] = {}
        self._inputs: ExampleInputs | None = None
        self._saved_inputs: dict[str, Any] | None = None

    # ------------------------------------------------------------------ what a user may ask

    @property
    def forecast_k(self) -> float | None:
        """The smallest K forecast for a tensor of this fit; ``None``: no forecast."""
        return min(self._budget.forecast.values(), default=None)

    @property
    def forecast(self) -> dict[str, float]:
        """Tensor name -> K forecast at the start: its deviation shrinks by ``exp(-K)`` over the fit."""
        return dict(self._budget.forecast)

    def deviations(self) -> dict[str, float]:
        """Tensor name -> ``|w - cluster mean| / |w|`` now, of every clustered tensor, kernels and vectors."""
        return relative_deviations(self._tensors) if self._tensors else dict(self._budget.measured)

    @property
    def largest_deviation(self) -> float | None:
        """The largest of :meth:`deviations`, NaN if one is; ``None`` before the first step."""
        return max(self.deviations().values(), default=None, key=_nan_last)

    # ------------------------------------------------------------------ start

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Every convolution, transposed ones too, inside ``network``."""
        chosen = select_filters(pl_module, ["*"] if self.include is None else self.include, self.exclude)
        return layers_inside(self.network, chosen)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check optimizers and precision, wait for the first forward call or start at once if its inputs are known."""
        check_usable(trainer.optimizers, self.layers)
        self._clip.watch(trainer)
        for index in range(len(trainer.optimizers)):
            self.follow_steps(index)
        self._inputs = ExampleInputs(pl_module, self.network, self._saved_inputs)
        if self._inputs.known:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trace, cluster what is not clustered yet, forecast, and get ready to edit gradients."""
        assert self._inputs is not None
        graph = self._inputs.trace()
        owned = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        groups, self.left_alone = choose_groups(pl_module, graph, self.layers, owned)
        if self.left_alone:
            listed = "; ".join(f"{layer}: {reason}" for layer, reason in self.left_alone.items())
            rank_zero_info(f"CentripetalSGD leaves channels of these layers alone: {listed}")
        new = [name for name in groups if name not in self._seen]
        check_finite(pl_module, [groups[name] for name in new])
        if new:
            # On every rank: an error on one of them alone would leave the others waiting.
            plan = self._plan(pl_module, graph, groups)
            rank_zero_info(f"CentripetalSGD will merge\n{plan}")
            clusters: dict[str, Tensor] | None = None
            if trainer.is_global_zero:
                clusters = cluster_channels(
                    pl_module, graph, method=self.clustering, seed=self.seed, groups=new, plan=plan
                )
            clusters = trainer.strategy.broadcast(clusters)
            assert clusters is not None
            self.clusters |= {name: index.cpu() for name, index in clusters.items()}
            self._seen += new
        active = {name: index for name, index in self.clusters.items() if name in groups}
        self._check_clusters(graph, active)
        if not active:
            raise NoLayersError(
                f"CentripetalSGD would leave every channel as it is: {self._rule.asked} removes none"
                + "".join(f"; {layer}: {reason}" for layer, reason in list(self.left_alone.items())[:3])
            )
        self._tensors = clustered_tensors(pl_module, graph, active)
        self._start(trainer, first=bool(new))

    def _plan(self, model: nn.Module, graph: ChannelGraph, groups: Mapping[str, ChannelGroup]) -> WidthPlan:
        """How many channels each group is to keep; those that were clustered before keep their number."""
        fixed = {name: len(index.unique()) for name, index in self.clusters.items() if name in groups}
        fixed |= {name: group.size for name, group in groups.items() if name in self._seen and name not in fixed}
        chosen = list(groups.values())
        scores = redundancy_scores(model, graph, chosen) if self.scope == "global" else None
        return plan_widths(graph, self._rule, groups=chosen, scores=scores, fixed=fixed)

    def _check_clusters(self, graph: ChannelGraph, clusters: Mapping[str, Tensor]) -> None:
        wrong = [name for name, index in clusters.items() if index.shape != (graph.group(name).size,)]
        if wrong:
            raise MisconfigurationException(
                f"the clusters in the checkpoint belong to another network: {wrong[0]!r} has "
                f"{len(clusters[wrong[0]])} channels there, {graph.group(wrong[0]).size} here"
            )

    def _start(self, trainer: pl.Trainer, first: bool) -> None:
        length = [trainer.max_epochs, trainer.max_steps]
        longer = self.strength == "auto" and bool(self._length) and self._length != length
        if self.resolved_strength is None or longer or self._strengths_changed:
            anew = self.resolved_strength is not None and not first
            distances = self._distances() if anew else {}
            reached = self._history.reached_k(distances)
            if self.resolved_strength is None or longer or self._resolves_anew:
                self.resolved_strength = self._budget.resolve(
                    trainer, self._tensors, self.strength, self.vector_strength, min(reached.values(), default=0.0)
                )
            if anew:
                self._forecast_again(trainer, distances, reached)
        self._length, self._strengths_changed, self._resolves_anew = length, False, False
        if first:
            self._budget.announce(trainer, self._tensors, self.resolved_strength, self.vector_strength, self.clusters)
            self._began = [trainer.current_epoch, trainer.global_step]
            self._history.begin(trainer.global_step, self._distances(), self._budget.paths())
        for index, optimizer in enumerate(trainer.optimizers):
            update = CentripetalUpdate(
                self._tensors, optimizer, strength=self.resolved_strength, vector_strength=self.vector_strength
            )
            if not update.tensors:
                continue
            self._updates[index] = update
            if first:
                try:
                    update.equalise_state()
                except ValueError as error:
                    raise MisconfigurationException(f"CentripetalSGD cannot use this optimizer: {error}") from error

    def _forecast_again(
        self, trainer: pl.Trainer, distances: Mapping[str, float], reached: Mapping[str, float]
    ) -> None:
        """Forecast the steps left, with a strength or a length of the fit that is not that of the first forecast."""
        assert self.resolved_strength is not None
        self._budget = Budget(measured=self._budget.measured)
        self._budget.announce(
            trainer, self._tensors, self.resolved_strength, self.vector_strength, self.clusters, reached
        )
        self._history.forecast_again(trainer.global_step, distances, self._budget.paths())

    # ------------------------------------------------------------------ steps

    def before_step(self, index: int) -> None:
        """Average gradients inside clusters and add the pull."""
        if not self._tensors:
            if self._inputs is not None and self._inputs.awaited(self.layers.values()):
                return  # training_step skipped the batches so far
            self._begin(self.trainer, self.trainer.lightning_module)
        if (update := self._updates.get(index)) is not None:
            update.before_step(gradient_scale(self.trainer, update.optimizer))
            self._clip.before_step(update)

    def after_step(self, index: int) -> None:
        """Apply the part of the pull that an optimizer with decoupled terms takes after its step."""
        if (update := self._updates.get(index)) is not None:
            self._clip.after_step(update)
            update.after_step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the deviation of every tensor, and the forecast corrected for gradient clipping."""
        if not self._tensors:
            return
        self._history.record(trainer.global_step, self._distances())
        numbers = self._budget.metrics(self._tensors)
        if (coefficient := self._clip.mean) is not None:
            numbers["clip_coefficient"] = coefficient
            corrected = self._budget.corrected(coefficient)
            if corrected is not None:
                numbers["forecast_k_clipped"] = corrected
                if trainer.current_epoch == 0 and corrected < LOSSLESS_K <= (self.forecast_k or 0.0):
                    rank_zero_warn(
                        f"gradient clipping multiplies the pull of CentripetalSGD by {coefficient:.2f} on average: K "
                        f"will be about {corrected:.1f}, not {self.forecast_k:.1f}, and below {LOSSLESS_K:.0f} merging "
                        f"is not lossless. Raise gradient_clip_val, the strength or the number of epochs"
                    )
        self.log_metrics(numbers)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say how far the clusters got."""
        super().on_train_end(trainer, pl_module)
        if self._inputs is not None and not self._inputs.known:
            rank_zero_warn(
                "CentripetalSGD did nothing in this fit: no step had a forward call with gradients before it. Check "
                "training_step and network, or set example_input_array in the LightningModule"
            )
        if self._tensors:
            self._history.record(trainer.global_step, self._distances())
            worst = max(self._budget.measured, key=lambda name: _nan_last(self._budget.measured[name]))
            rank_zero_info(
                f"CentripetalSGD: the largest deviation from a cluster's mean is {self._budget.measured[worst]:.1e} of "
                f"the norm ({worst})"
            )

    def _distances(self) -> dict[str, float]:
        """Distance of every tensor from its clusters' means; the relative ones are kept as measured last."""
        distances = cluster_distances(self._tensors)
        self._budget.measured = {name: relative(off, norm) for name, (off, norm) in distances.items()}
        return {name: off for name, (off, _) in distances.items()}

    # ------------------------------------------------------------------ for the monitor

    def filterdiv_events(self) -> list[dict[str, Any]]:
        """When filters were clustered, for :class:`~lightning_filterdiv.FilterSimilarityMonitor`."""
        if not self._began:
            return []
        epoch, step = self._began
        return [{"kind": "cluster", "cycle": 0, "epoch": epoch, "step": step, "filters": {}}]

    def filterdiv_deviation(self) -> dict[str, list[tuple[int, float, float]]]:
        """Layer -> (step, measured, forecast), both relative to the start, for the monitor."""
        return self._history.for_layers(list(self.layers))

    # ------------------------------------------------------------------ end, state

    def release(self) -> None:
        """Stop editing and capturing; clusters stay in the state."""
        self._updates, self._tensors = {}, []
        self._clip.release()
        if self._inputs is not None:
            self._saved_inputs = self._inputs.state() or self._saved_inputs
            self._inputs.close()
            self._inputs = None

    def reset(self) -> None:
        """Forget the clusters of an earlier fit."""
        self.clusters, self._seen, self.resolved_strength, self._saved_inputs = {}, [], None, None
        self.left_alone, self._length, self._strengths_changed, self._resolves_anew = {}, [], False, False
        self._budget, self._clip, self._history, self._began = Budget(), ClipMeter(), DeviationHistory(), []

    def touched_tensors(self) -> dict[str, Tensor]:
        """Every clustered tensor."""
        return {tensor.name: tensor.parameter for tensor in self._tensors}

    def extra_state(self) -> dict[str, Any]:
        """Clusters, strength, forecast, and the shapes to trace with."""
        return {
            "clusters": {name: index.clone() for name, index in self.clusters.items()},
            "seen": list(self._seen),
            "strength": self.resolved_strength,
            "length": list(self._length),
            "forecast": dict(self._budget.forecast),
            "course": self._history.state(),
            "began": list(self._began),
            "clip": self._clip.state(),
            "inputs": (self._inputs.state() if self._inputs is not None else None) or self._saved_inputs,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`."""
        clusters, strength = state["clusters"], state["strength"]
        if not isinstance(clusters, dict) or not all(isinstance(index, Tensor) for index in clusters.values()):
            raise TypeError("clusters must be a dict of tensors, and clip must be a list of two numbers")
        if strength is not None and not isinstance(strength, float):
            raise TypeError(f"strength must be a number or None, got {strength!r}")
        self._clip.load(state["clip"])
        self._length = list(state.get("length", []))
        self._strengths_changed = self._resolves_anew = False
        self._seen = [str(name) for name in state["seen"]]
        self.clusters, self.resolved_strength = {name: index.clone() for name, index in clusters.items()}, strength
        self._budget = Budget(forecast=dict(state["forecast"]))
        self._history, self._began = (
            DeviationHistory.from_state(state["course"]),
            [int(number) for number in state["began"]],
        )
        self._saved_inputs = state["inputs"]

    def kept_on_resume(self) -> Mapping[str, str]:
        """What made the clusters, once there are some."""
        return self.fixed_on_resume if self._seen else {}

    def arguments_changed(self, saved: Mapping[str, Any]) -> None:
        """Use other strengths from now on."""
        self._strengths_changed = bool({"strength", "vector_strength"} & saved.keys())
        # With "auto" the strength of the kernels does not follow from that of the vectors.
        self._resolves_anew = "strength" in saved

    @staticmethod
    def clusters_from(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """The clusters in a loaded Lightning checkpoint, for :func:`~lightning_filterdiv.narrowing.merge_channels`.

        Args:
            checkpoint: what ``torch.load(path, weights_only=True)`` returns.

        Returns:
            Group name -> ``(size,)`` cluster index; those of several callbacks together.

        Raises:
            KeyError: the checkpoint holds no clusters of CentripetalSGD.
        """
        clusters: dict[str, Tensor] = {}
        for state in saved_states(checkpoint):
            clusters |= state["extra"]["clusters"]
        if not clusters:
            raise KeyError(
                "the checkpoint holds no clusters of CentripetalSGD: it must be saved in a fit with that callback, "
                "after its first step"
            )
        return clusters

    # ------------------------------------------------------------------ merge

    def merge(self, model: nn.Module, example_inputs: Any = None, *, tolerance: float = 1e-3) -> Merged:
        """Merge every cluster into one channel; print what that did.

        Args:
            model: the LightningModule that was trained, or the network inside it. It is left as it was.
            example_inputs: for the trace; ``None``: ``example_input_array``, else the shapes seen in training.
            tolerance: largest relative change of the outputs by setting members to their mean; ``float("inf")`` to
                merge whatever it does.

        Returns:
            Network and report, see :func:`~lightning_filterdiv.narrowing.merge_channels`.

        Raises:
            RuntimeError: nothing was clustered yet.
            NotTiedError, NarrowingError, ExampleInputsError, TraceError: see there.
        """
        if not self.clusters:
            raise RuntimeError("CentripetalSGD has no clusters to merge: they are made at the first step of a fit")
        network = self.network
        if example_inputs is None and getattr(model, "example_input_array", None) is None:
            state = (self._inputs.state() if self._inputs is not None else None) or self._saved_inputs
            example_inputs, network = inputs_from_state(state, network)
        clusters, network = relative_to(model, self.clusters, network)
        merged = merge_channels(model, clusters, example_inputs, network=network, tolerance=tolerance)
        rank_zero_info(f"CentripetalSGD merged {type(model).__name__}\n{merged.report}")
        return merged
