"""The ``CentripetalSGD`` callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_filterdiv.centripetal.checkpoints import inputs_from_state, relative_to, saved_states
from lightning_filterdiv.centripetal.forecast import Forecast
from lightning_filterdiv.centripetal.functional import CentripetalUpdate, relative_deviations
from lightning_filterdiv.centripetal.selection import check_usable, choose_groups
from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup
from lightning_filterdiv.channel_graph.forms import Form
from lightning_filterdiv.filters import Conv, NoLayersError, select_filters
from lightning_filterdiv.narrowing.clusters import (
    ClusteredTensor,
    Clustering,
    check_finite,
    cluster_channels,
    clustered_tensors,
)
from lightning_filterdiv.narrowing.importance import redundancy_scores
from lightning_filterdiv.narrowing.merge import Merged, NotTiedError, merge_channels
from lightning_filterdiv.narrowing.widths import Scope, WidthPlan, WidthRule, plan_widths
from lightning_filterdiv.tensors.arguments import check_choice, check_integer, check_module, check_number
from lightning_filterdiv.training.callback import FilterCallback
from lightning_filterdiv.training.example_inputs import ExampleInputs, check_inputs_state
from lightning_filterdiv.training.steps import gradient_scale
from lightning_filterdiv.training.submodule import check_network, layers_inside

__all__ = ["CentripetalSGD"]


def _nan_last(value: float) -> tuple[bool, float]:
    """Return a sort key that puts NaN above every number."""
    return math.isnan(value), value


def _is_clustering(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1 and bool((index >= 0).all())


class CentripetalSGD(FilterCallback):
    """Train filters of a cluster to become equal (C-SGD), so that they can be merged without any loss.

    Ding, Ding, Guo, Han: "Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated Structure",
    CVPR 2019. Channels are clustered once, after the first forward call. From then on gradients are averaged inside
    each cluster and its members are pulled together, in every tensor that has entries for these channels. After the fit
    :meth:`merge` returns the narrow network.

    Args:
        keep_fraction: share of every layer's channels to keep, in (0, 1], or a dict of layer pattern -> share (layers
            that no pattern matches keep all). ``None``: 0.625, unless a target is given.
        target_macs: share of the multiply-accumulate operations that the merged network keeps, instead of
            ``keep_fraction``. They are counted on the inputs of the trace.
        target_parameters: share of the parameters, likewise.
        scope: ``"layer"``: the same share in every layer; ``"global"``: redundant layers lose more.
        max_layer_fraction: largest share of its channels that a layer may lose; ``None``: all but one.
        channels_multiple: a layer that loses channels keeps a multiple of this number; 8 suits hardware.
        strength: eps, the centripetal strength, or ``"auto"``: the smallest that reaches ``K = 18`` in this fit.
        vector_strength: eps for biases and for scales and shifts of norms; ``None``: ``strength``. The official code
            uses a tenth of it.
        clustering: ``"kmeans"`` on the kernels, ``"even"`` blocks, or ``"imbalanced"``: one large cluster.
        network: trace only this submodule, for example ``"backbone"`` of a detector.
        include: patterns of layers; ``None`` for every convolution. Channels are squeezed where every convolution that
            shares them is chosen.
        exclude: patterns of layers to leave out.
        seed: seed of k-means, which tries to move filters in random order.
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
    refused_beside = {"ModelPruning": "its masks differ inside a cluster, whose members then never become equal"}
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
        #: Layer -> reason why (some of) its channels are left alone.
        self.left_alone: dict[str, str] = {}
        self._seen: list[str] = []  # groups with a decided number of clusters, also those that keep all channels
        self._forecast = Forecast()
        self._changed: set[str] = set()  # strengths that a resume changed
        self._stopped_at: int | None = None  # global step
        self._began: list[int] = []  # epoch and step of the clustering
        self._tensors: list[ClusteredTensor] = []
        self._updates: dict[int, CentripetalUpdate] = {}
        self._inputs: ExampleInputs | None = None
        self._saved_inputs: dict[str, Any] | None = None

    # ------------------------------------------------------------------ what a user may ask

    @property
    def resolved_strength(self) -> float | None:
        """Return the strength in use; ``None`` before the first step."""
        return self._forecast.strength

    @property
    def forecast_k(self) -> float | None:
        """Return the smallest K that is forecast for a tensor of this fit; ``None`` without a forecast."""
        return self._forecast.lowest_k

    @property
    def forecast(self) -> dict[str, float]:
        """Return tensor name -> K. The distance shrinks by ``exp(-K)`` between the clustering and the end of the
        fit."""
        return dict(self._forecast.k)

    def deviations(self) -> dict[str, float]:
        """Return tensor name -> present ``|w - cluster mean| / |w|`` of every clustered tensor, kernels and vectors."""
        return relative_deviations(self._tensors) if self._tensors else dict(self._forecast.measured)

    @property
    def largest_deviation(self) -> float | None:
        """Return the largest of :meth:`deviations`, NaN if one of them is NaN; ``None`` before the first step."""
        return max(self.deviations().values(), default=None, key=_nan_last)

    # ------------------------------------------------------------------ start

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Return every convolution inside ``network``, transposed ones too."""
        chosen = select_filters(pl_module, ["*"] if self.include is None else self.include, self.exclude)
        return layers_inside(self.network, chosen)

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check optimizers and precision. Start at once if example inputs are known, else at the first forward call."""
        check_usable(trainer.optimizers, self.layers)
        self._forecast.clipping.watch(trainer)
        for index in range(len(trainer.optimizers)):
            self.follow_steps(index)
        self._inputs = ExampleInputs(pl_module, self.network, self._saved_inputs)
        if self._inputs.known:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trace, cluster new groups, make the forecast, and prepare to edit gradients."""
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
            plan = self._plan(pl_module, graph, groups)
            rank_zero_info(f"CentripetalSGD will merge\n{plan}")
            clusters = cluster_channels(
                pl_module,
                graph,
                method=self.clustering,
                seed=self.seed,
                groups=new,
                plan=plan,
                among_ranks=trainer.world_size > 1,
            )
            self.clusters |= clusters
            self._seen += new
        active = {name: index for name, index in self.clusters.items() if name in groups}
        self._check_clusters(graph, active)
        if not active:
            raise NoLayersError(
                f"CentripetalSGD would leave every channel as it is: {self._rule.asked} removes none. Ask for fewer "
                f"channels, or choose other layers with include and exclude"
                + "".join(f"; {layer}: {reason}" for layer, reason in list(self.left_alone.items())[:3])
            )
        self._tensors = clustered_tensors(pl_module, graph, active)
        self._start(trainer, first=bool(new))

    def _plan(self, model: nn.Module, graph: ChannelGraph, groups: Mapping[str, ChannelGroup]) -> WidthPlan:
        """Return the number of channels that each group keeps. Groups that were clustered before keep their number."""
        fixed = {name: len(index.unique()) for name, index in self.clusters.items() if name in groups}
        fixed |= {name: group.size for name, group in groups.items() if name in self._seen and name not in fixed}
        chosen = list(groups.values())
        scores = None
        if self.scope == "global":
            scores = redundancy_scores(model, graph, chosen, among_ranks=self.trainer.world_size > 1)
        return plan_widths(graph, self._rule, groups=chosen, scores=scores, fixed=fixed)

    def _check_clusters(self, graph: ChannelGraph, clusters: Mapping[str, Tensor]) -> None:
        wrong = [name for name, index in clusters.items() if index.shape != (graph.group(name).size,)]
        if wrong:
            raise MisconfigurationException(
                f"the clusters in the checkpoint belong to another network: {wrong[0]!r} has "
                f"{len(clusters[wrong[0]])} channels there, {graph.group(wrong[0]).size} here. Resume with the network "
                f"it was saved from, or start a new fit"
            )

    def _start(self, trainer: pl.Trainer, first: bool) -> None:
        changed, self._changed = self._changed, set()
        self._forecast.update(
            trainer, self._tensors, self.strength, self.vector_strength, self.clusters, changed=changed
        )
        assert self.resolved_strength is not None
        self._began = self._began or [trainer.current_epoch, trainer.global_step]
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

    # ------------------------------------------------------------------ steps

    def before_step(self, index: int) -> None:
        """Average gradients inside clusters and add the pull."""
        if not self._tensors:
            if self._inputs is not None and self._inputs.awaited(self.layers.values()):
                return  # training_step skipped the batches so far
            self._begin(self.trainer, self.trainer.lightning_module)
        if (update := self._updates.get(index)) is not None:
            update.before_step(gradient_scale(self.trainer, update.optimizer))
            self._forecast.clipping.before_step(update)

    def after_step(self, index: int) -> None:
        """Apply the pull after the step, for optimizers with decoupled terms."""
        if (update := self._updates.get(index)) is not None:
            self._forecast.clipping.after_step(update)
            update.after_step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the deviation of every tensor, and the forecast corrected for gradient clipping."""
        if not self._tensors:
            return
        numbers = self._forecast.measure(trainer.global_step, self._tensors)
        if trainer.current_epoch == 0:
            self._forecast.warn_of_clipping()
        self.log_metrics(numbers)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how close the members of clusters are."""
        super().on_train_end(trainer, pl_module)
        if self._inputs is not None and not self._inputs.known:
            rank_zero_warn(
                "CentripetalSGD did nothing in this fit: no step had a forward call with gradients before it. Check "
                "training_step and network, or set example_input_array in the LightningModule"
            )
        if self._tensors:
            self._forecast.measure(trainer.global_step, self._tensors)
            measured = self._forecast.measured
            worst = max(measured, key=lambda name: _nan_last(measured[name]))
            rank_zero_info(
                f"CentripetalSGD: the largest deviation from a cluster's mean is {measured[worst]:.1e} of the norm "
                f"({worst})"
            )

    # ------------------------------------------------------------------ for the monitor

    def filterdiv_events(self) -> list[dict[str, Any]]:
        """Return the clustering as an event, for :class:`~lightning_filterdiv.FilterSimilarityMonitor`."""
        if not self._began:
            return []
        epoch, step = self._began
        return [{"kind": "cluster", "cycle": 0, "epoch": epoch, "step": step, "filters": {}}]

    def filterdiv_deviation(self) -> dict[str, list[tuple[int, float, float]]]:
        """Return layer -> (step, measured, forecast) for the monitor, both relative to the start."""
        return self._forecast.for_layers(self.layers)

    # ------------------------------------------------------------------ end, state

    def release(self) -> None:
        """Stop editing gradients and capturing inputs. Clusters stay in the state."""
        if self._tensors and self._trainer is not None:
            self._stopped_at = self._trainer.global_step
        self._updates, self._tensors = {}, []
        self._forecast.clipping.release()
        if self._inputs is not None:
            self._saved_inputs = self._inputs.state() or self._saved_inputs
            self._inputs.close()
            self._inputs = None

    def reset(self) -> None:
        """Forget the clusters of an earlier fit."""
        self.clusters, self._seen, self._saved_inputs, self.left_alone = {}, [], None, {}
        self._forecast, self._changed, self._began, self._stopped_at = Forecast(), set(), [], None

    def touched_tensors(self) -> dict[str, Tensor]:
        """Return every clustered tensor."""
        return {tensor.name: tensor.parameter for tensor in self._tensors}

    def extra_state(self) -> dict[str, Any]:
        """Return clusters, strength, forecast, and the shapes of the example inputs."""
        return {
            "clusters": {name: index.clone() for name, index in self.clusters.items()},
            "seen": list(self._seen),
            "began": list(self._began),
            **self._forecast.state(),
            "inputs": (self._inputs.state() if self._inputs is not None else None) or self._saved_inputs,
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`."""
        clusters = state["clusters"]
        if not isinstance(clusters, dict) or not all(map(_is_clustering, clusters.values())):
            raise TypeError("clusters must be a dict of tensors, the number of each channel's cluster from 0")
        self._forecast, self._changed = Forecast.from_state(state), set()
        self._seen, self._began = [str(name) for name in state["seen"]], [int(number) for number in state["began"]]
        self.clusters = {name: index.clone() for name, index in clusters.items()}
        self._saved_inputs = check_inputs_state(state["inputs"])

    def kept_on_resume(self) -> Mapping[str, str]:
        """Return the arguments that determined the clusters, once there are clusters."""
        return self.fixed_on_resume if self._seen else {}

    def arguments_changed(self, saved: Mapping[str, Any]) -> None:
        """Make a new forecast if a strength changed."""
        self._changed = {"strength", "vector_strength"} & saved.keys()

    @staticmethod
    def clusters_from(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the clusters in a loaded Lightning checkpoint, for
        :func:`~lightning_filterdiv.narrowing.merge_channels`.

        Args:
            checkpoint: result of ``torch.load(path, weights_only=True)``.

        Returns:
            Group name -> ``(size,)`` cluster index, of all callbacks together.

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

    def merge(
        self, model: nn.Module, example_inputs: Any = None, *, tolerance: float = 1e-3, form: Form = "auto"
    ) -> Merged:
        """Merge every cluster into one channel, and print the report.

        Args:
            model: the LightningModule that was trained, or the network inside it. It is left as it was.
            example_inputs: inputs for the trace; ``None``: ``example_input_array``, else the shapes seen in training.
            tolerance: largest relative change of the outputs that setting members to their mean may cause;
                ``float("inf")`` merges in any case.
            form: see :func:`~lightning_filterdiv.narrowing.merge_channels`.

        Returns:
            Network and report, see :func:`~lightning_filterdiv.narrowing.merge_channels`.

        Raises:
            TypeError: ``model`` is no module.
            RuntimeError: nothing was clustered yet.
            NotTiedError, NarrowingError, ExampleInputsError, TraceError: see there.
        """
        check_module("model", model)
        if not self.clusters:
            raise RuntimeError(
                "CentripetalSGD has no clusters to merge: they are made at the first step of a fit. Merge with the "
                "callback of that fit, or give CentripetalSGD.clusters_from(checkpoint) to merge_channels"
            )
        network = self.network
        if example_inputs is None and getattr(model, "example_input_array", None) is None:
            state = (self._inputs.state() if self._inputs is not None else None) or self._saved_inputs
            example_inputs, network = inputs_from_state(state, network)
        clusters, network = relative_to(model, self.clusters, network)
        step = self._trainer.global_step if self._trainer is not None else self._stopped_at
        unfinished = None if step is None else self._forecast.unfinished(step)
        try:
            merged = merge_channels(model, clusters, example_inputs, network=network, tolerance=tolerance, form=form)
        except NotTiedError as error:
            raise (error.before_the_end(unfinished) if unfinished else error) from error
        if unfinished:
            rank_zero_info(f"CentripetalSGD merges {unfinished}")
        rank_zero_info(f"CentripetalSGD merged {type(model).__name__}\n{merged.report}")
        return merged
