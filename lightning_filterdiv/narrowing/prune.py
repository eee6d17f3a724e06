"""Prune to a target: score, plan, remove channels, move their constant part into the next bias, and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.forms import Form
from lightning_filterdiv.channel_graph.inputs import example_arguments
from lightning_filterdiv.channel_graph.modules import bare_module, copy_network, device_of
from lightning_filterdiv.channel_graph.narrow import Narrowing
from lightning_filterdiv.channel_graph.verify import as_type, dtype_of, prove, random_inputs
from lightning_filterdiv.filters import find_submodule
from lightning_filterdiv.narrowing.compensate import Compensation, compensate, constant_contributions
from lightning_filterdiv.narrowing.cutting import check_narrowable, check_same, silence
from lightning_filterdiv.narrowing.importance import (
    Importance,
    Loss,
    ScoreFunction,
    batch_inputs,
    channel_scores,
    gate_means,
    gated_layers,
    known_gate_means,
    limited,
    without_gates,
)
from lightning_filterdiv.narrowing.measure import count_parameters, macs_of_call
from lightning_filterdiv.narrowing.widths import (
    KeepFraction,
    Scope,
    WidthPlan,
    WidthRule,
    choose_groups,
    plan_widths,
    removal_order,
)
from lightning_filterdiv.selection import NoLayersError
from lightning_filterdiv.tensors.arguments import check_integer, check_module

__all__ = ["PruneReport", "Pruned", "classification_accuracy", "prune_channels"]


@dataclass(frozen=True)
class PruneReport:
    """Sizes before and after pruning, and the change of the outputs.

    Attributes:
        plan: channels per group, with the predicted cost.
        importance: measure by which channels were ranked.
        keep: group name -> (n,) channels that are left.
        channels_before: channels of all groups in the plan.
        channels_after: channels that are left.
        parameters_before: parameters of the network.
        parameters_after: parameters of the pruned one.
        macs_before: multiply-accumulate operations of a forward pass on the example inputs.
        macs_after: the same of the pruned network.
        change: largest change of an output, relative to the largest entry of that output.
        difference: relative difference from the wide network whose consumers ignore the removed channels, which is
            rounding.
        compensation: destination of the constant part of removed channels; ``None`` if ``bias`` was off.
        accuracy_before: share of right predictions on ``loader``; ``None`` without one.
        accuracy_after: the same after pruning.
    """

    plan: WidthPlan
    importance: str
    keep: dict[str, Tensor]
    channels_before: int
    channels_after: int
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    change: float
    difference: float
    compensation: Compensation | None
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    def __str__(self) -> str:
        def share(after: int, before: int) -> str:
            return f"{before:,} -> {after:,} ({100 * (after / before - 1):+.1f} %)"

        lines = [
            f"channels      {share(self.channels_after, self.channels_before)}, by {self.importance}",
            f"parameters    {share(self.parameters_after, self.parameters_before)}",
            f"MACs          {share(self.macs_after, self.macs_before)}",
            f"outputs       change by at most {self.change:.1e} (relative). Pruning is not lossless: fine-tune",
            f"trimming      changes the outputs by {self.difference:.1e} (relative), which is rounding",
        ]
        if self.compensation is not None:
            lines.append(f"biases        {self.compensation}")
        if self.accuracy_before is not None and self.accuracy_after is not None:
            lines.append(f"accuracy      {100 * self.accuracy_before:.2f} % -> {100 * self.accuracy_after:.2f} %")
        return "\n".join(lines)


class Pruned(NamedTuple):
    """A narrower network and the report of the pruning."""

    network: nn.Module
    report: PruneReport


def prune_channels(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    importance: Importance | Mapping[str, Tensor] | ScoreFunction = "l2",
    keep_fraction: KeepFraction | None = None,
    target_macs: float | None = None,
    target_parameters: float | None = None,
    scope: Scope = "layer",
    max_layer_fraction: float | None = None,
    channels_multiple: int = 1,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    network: str | None = None,
    form: Form = "auto",
    batches: Iterable[Any] | None = None,
    max_batches: int = 16,
    loss: Loss | None = None,
    bias: bool = True,
    loader: Iterable[Any] | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> Pruned:
    """Remove the least important channels until a target is met. This changes the outputs: fine-tune afterwards.

    Args:
        model: the network; it is left as it was.
        example_inputs: for the trace; see :meth:`~lightning_filterdiv.channel_graph.ChannelGraph.trace`.
        importance: ``"l1"``, ``"l2"``, ``"bn_scale"``, ``"taylor"``, ``"redundancy"``, ``"random"``, a dict of layer ->
            scores, or a function of ``(model, group)``: see
            :func:`~lightning_filterdiv.narrowing.channel_scores`. Also ``"gates"``, for a network trained with
            :class:`~lightning_filterdiv.ChannelImportance`: mean gates on ``batches``. A dict of such means, as
            ``callback.importance``, does the same without batches. The result has no gates, their means are multiplied
            into the filters.
        keep_fraction: share of every layer's channels to keep, or a dict of layer pattern -> share.
        target_macs: share of the full network's multiply-accumulate operations to end at, in (0, 1].
        target_parameters: the same for parameters. One of these three must be given.
        scope: ``"layer"``: every layer keeps the same share; ``"global"``: channels of all layers compete by their
            importance relative to the mean of their group.
        max_layer_fraction: at most this share of a group's channels goes.
        channels_multiple: a group that loses channels keeps a multiple of this.
        include: patterns of layers; ``None``: all. Channels go where every layer that shares them is chosen.
        exclude: patterns of layers to leave out.
        network: trace only this submodule. MACs are counted in it alone.
        form: see :func:`~lightning_filterdiv.narrowing.merge_channels`.
        batches: a few batches, tuples that begin with the inputs of ``model``. They serve ``"taylor"``, ``"gates"`` and
            the mean contribution of removed channels.
        max_batches: largest number of batches to read.
        loss: for ``"taylor"``, of ``(model, batch)``; ``None``: cross-entropy of ``model(batch[0])`` and ``batch[1]``.
        bias: add the mean contribution of removed channels, measured on ``batches``, to the next bias or running mean.
            Without batches this is done only for channels that are constant on the example inputs and on drawn ones.
        loader: batches of (inputs, labels) for the accuracy before and after.
        seed: seed of ``"random"``.
        verbose: print the plan before anything is removed.

    Returns:
        The network, trainable and of the same class, and the report.

    Raises:
        TypeError, ValueError: a bad argument, by name; an importance without the data that it needs.
        TargetError: the target is out of reach.
        NoLayersError: no layer is left to prune.
        NarrowingError: the result does not compute what it should.
        ExampleInputsError, TraceError: the network cannot be traced on these inputs.
    """
    check_module("model", model)
    rule = WidthRule(keep_fraction, target_macs, target_parameters, scope, max_layer_fraction, channels_multiple)
    check_integer("max_batches", max_batches, low=1)
    check_integer("seed", seed, low=0)
    if importance == "taylor" and batches is None:
        raise ValueError("importance='taylor' needs batches=..., a few batches of (inputs, labels)")
    given = limited(batches, max_batches)
    original, source = model, importance
    if importance == "gates":
        importance = gate_means(model, given)
    if isinstance(importance, Mapping) and gated_layers(model):
        importance, source = known_gate_means(model, importance), "gates"
        model = without_gates(model, importance)
    check_narrowable(model)
    graph = ChannelGraph.trace(model, example_inputs, network=network)
    groups, left_alone = choose_groups(graph, include, exclude)
    scores, unscored = channel_scores(model, graph, groups, importance, batches=given, loss=loss, seed=seed)
    groups, left_alone = [group for group in groups if group.name in scores], left_alone | unscored
    if not groups:
        layer, reason = next(iter(unscored.items()))
        raise NoLayersError(f"no layer is left to prune. For {layer!r}: {reason}; choose another importance")
    plan = plan_widths(graph, rule, groups=groups, scores=scores, left_alone=left_alone)
    if verbose:
        print(plan)
    keep = {
        group.name: removal_order(scores[group.name], group.blocks)[group.size - plan.counts[group.name] :]
        .sort()
        .values
        for group in groups
        if plan.counts[group.name] < group.size
    }
    narrowing = Narrowing(graph, keep, form=form)
    shifted, moved = copy_network(model), None
    if bias and keep:
        moved = compensate(shifted, graph, _contributions(model, graph, keep, given))
    silent = silence(copy_network(shifted), graph, keep)
    result = narrowing(shifted)
    arguments = example_arguments(_traced(model, network), example_inputs)
    # Not made of the silent network, because there norms over channels do not count removed channels.
    proof = prove(
        silent, lambda whole: narrowing(as_type(shifted, dtype_of(whole))), graph, arguments, earlier=[original]
    )
    check_same(proof)
    before, after = _accuracies(original, result, loader)
    macs = proof.macs or [macs_of_call(_traced(one, network), *arguments) for one in (original, result)]
    report = PruneReport(
        plan=plan,
        importance=source if isinstance(source, str) else getattr(source, "__name__", "given scores"),
        keep=keep,
        channels_before=sum(plan.sizes.values()),
        channels_after=sum(plan.counts.values()),
        parameters_before=count_parameters(original),
        parameters_after=count_parameters(result),
        macs_before=macs[0],
        macs_after=macs[1],
        change=proof.changes[0],
        difference=proof.difference,
        compensation=moved,
        accuracy_before=before,
        accuracy_after=after,
    )
    return Pruned(result, report)


def _traced(model: nn.Module, network: str | None) -> nn.Module:
    return bare_module(find_submodule(bare_module(model), network))


def _contributions(
    model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor], batches: list[Any] | None
) -> dict[str, tuple[Tensor, bool]]:
    copied = copy_network(model).eval()
    traced = find_submodule(copied, graph.network)
    run: Callable[[], Iterator[None]]
    if batches:

        def run() -> Iterator[None]:
            for batch in batches:
                yield copied(batch_inputs(batch))

    else:
        generator = torch.Generator().manual_seed(0)
        args, kwargs = graph.arguments
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        drawn = random_inputs((args, kwargs), device_of(model), generator)

        def run() -> Iterator[None]:
            for call in ((args, kwargs), drawn):
                one, other = tree_map(lambda value: _as(value, own), call)
                yield traced(*one, **other)

    return constant_contributions(copied, graph, keep, run, constant_only=not batches)


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _accuracies(before: nn.Module, after: nn.Module, loader: Iterable[Any] | None) -> tuple[float | None, float | None]:
    if loader is None:
        return None, None
    return classification_accuracy(before, loader), classification_accuracy(after, loader)


@torch.no_grad()
def classification_accuracy(model: nn.Module, loader: Iterable[Any]) -> float:
    """Return the share of images whose largest output is that of their label, in eval mode.

    Args:
        model: the classifier; it is left in the mode it was in.
        loader: batches of (inputs, labels).

    Raises:
        ValueError: there is no batch, or a batch is no pair.
    """
    modes = {module: module.training for module in model.modules()}
    right = count = 0
    try:
        model.eval()
        for batch in loader:
            if not (isinstance(batch, list | tuple) and len(batch) >= 2 and isinstance(batch[1], Tensor)):
                raise ValueError("loader must give (inputs, labels)")
            predicted = model(batch[0]).argmax(1)
            right += int((predicted == batch[1].to(predicted.device)).sum())
            count += len(predicted)
    finally:
        for module, training in modes.items():
            module.training = training
    if not count:
        raise ValueError("loader holds no images; give batches of (inputs, labels)")
    return right / count
