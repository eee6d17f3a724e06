"""Merge equal channels into a narrower network, and verify it numerically."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph, NarrowingError
from lightning_filterdiv.channel_graph.forms import Form, FormChoice
from lightning_filterdiv.channel_graph.inputs import example_arguments
from lightning_filterdiv.channel_graph.modules import bare_module, copy_network, without_collection
from lightning_filterdiv.channel_graph.narrow import Narrowing, merging, tie
from lightning_filterdiv.channel_graph.verify import check_finite, prove
from lightning_filterdiv.filters import find_submodule, named_tensors
from lightning_filterdiv.narrowing.measure import count_parameters, macs_of_call
from lightning_filterdiv.tensors.arguments import check_number

__all__ = ["MergeReport", "Merged", "NotTiedError", "merge_channels", "tie_channels"]


class NotTiedError(NarrowingError):
    """The members of the clusters are not equal: merging them would change what the network computes.

    Attributes:
        reason: a sentence with what differs.
        way_out: instruction to the user.
    """

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(f"{reason}. {way_out}")
        self.reason, self.way_out = reason, way_out

    def before_the_end(self, unfinished: str) -> NotTiedError:
        """Return the error for weights from the middle of a fit. ``unfinished`` is a noun phrase for the moment."""
        return NotTiedError(
            f"{self.reason}. These weights are those of {unfinished}",
            "Merge the checkpoint of the end of the fit (trainer.save_checkpoint after trainer.fit), or pass "
            "tolerance=float('inf') to merge anyway and fine-tune",
        )


class MergeReport(NamedTuple):
    """Sizes before and after a merge, and the errors of its steps.

    Attributes:
        channels_before: channels of all clustered groups.
        channels_after: clusters.
        deviation: largest ``|w - mean| / |w|`` of a clustered parameter before the merge.
        worst: the parameter that it belongs to.
        projection: relative change of the outputs when every parameter is set to its cluster's mean.
        trim: relative change of the outputs when the tied network is narrowed, which is rounding.
        parameters_before: parameters of the original.
        parameters_after: parameters of the narrow network.
        macs_before: multiply-accumulate operations of a forward pass on the example inputs.
        macs_after: the same of the narrow network.
        forms: the form of every submodule whose forward decides by itself where merged channels go, and why.
        lag: ``deviation`` of running statistics, which follow tied weights some steps later.
        lagging: the statistic that it belongs to.
        averaging: relative change of the outputs by averaging running statistics over clusters.
        precision: dtype of the comparison: ``"float64"``, or the network's own where forward casts.
    """

    channels_before: int
    channels_after: int
    deviation: float
    worst: str
    projection: float
    trim: float
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    forms: tuple[FormChoice, ...] = ()
    lag: float = 0.0
    lagging: str = "none"
    averaging: float = 0.0
    precision: str = "float64"

    def __str__(self) -> str:
        def share(after: int, before: int) -> str:
            return f"{before:,} -> {after:,} ({100 * (after / before - 1):+.1f} %)"

        return "\n".join(
            [
                f"channels      {share(self.channels_after, self.channels_before)}",
                f"parameters    {share(self.parameters_after, self.parameters_before)}",
                f"MACs          {share(self.macs_after, self.macs_before)}",
                f"deviation     {self.deviation:.1e} of the norm, the largest of all parameters ({self.worst})",
                f"projection    changes the outputs by {self.projection:.1e} (relative)",
                *(
                    [
                        f"statistics    {self.lag:.1e} of the norm ({self.lagging}); averaging changes the outputs by "
                        f"{self.averaging:.1e}"
                    ]
                    if self.lag  # 0 without running statistics
                    else []
                ),
                f"trimming      changes the outputs by {self.trim:.1e} (relative, {self.precision})",
                *(f"form          {line}" for line in _forms(self.forms)),
            ]
        )


def _forms(forms: tuple[FormChoice, ...]) -> list[str]:
    """Return one line per form and reason, with the number and names of submodules."""
    together: dict[tuple[str, str], list[str]] = {}
    for choice in forms:
        together.setdefault((choice.form, choice.reason), []).append(choice.submodule or "the whole model")
    return [f"{form} ({reason}): {', '.join(names)}" for (form, reason), names in together.items()]


class Merged(NamedTuple):
    """A narrow network and the report of the merge."""

    network: nn.Module
    report: MergeReport


def tie_channels(
    model: nn.Module, clusters: Mapping[str, Tensor], example_inputs: Any = None, *, network: str | None = None
) -> None:
    """Set every filter, per-channel parameter and running statistic to the mean of its cluster, in place.

    Args:
        model: the network.
        clusters: group name -> ``(size,)`` int64 cluster index of each channel.
        example_inputs: for the trace; see :meth:`~lightning_filterdiv.channel_graph.ChannelGraph.trace`.
        network: trace only this submodule.

    Raises:
        NarrowingError: unknown or pinned group (with the reason), clusters of a wrong shape, or weights that are NaN.
        ExampleInputsError, TraceError: the network cannot be traced on these inputs.
    """
    check_finite(model)
    tie(model, ChannelGraph.trace(model, example_inputs, network=network), clusters)


@without_collection()
def merge_channels(
    model: nn.Module,
    clusters: Mapping[str, Tensor],
    example_inputs: Any = None,
    *,
    network: str | None = None,
    tolerance: float = 1e-3,
    form: Form = "auto",
) -> Merged:
    """Make a narrower network with one channel per cluster.

    A copy is first projected: every member is set to its cluster's mean. Then it is narrowed: the kept channel's column
    in every consumer is the sum of its cluster's columns. The narrow network is compared with the projected one on
    random inputs in float64.

    Args:
        model: the network; it is left as it was.
        clusters: group name -> ``(size,)`` int64 cluster index of each channel; other groups stay as they are.
        example_inputs: for the trace; see :meth:`~lightning_filterdiv.channel_graph.ChannelGraph.trace`.
        network: trace only this submodule.
        tolerance: largest relative change of the outputs that setting parameters to their clusters' means may
            cause; ``float("inf")`` merges in any case.
        form: ``"module"`` keeps every class, and allows only widths that need no change of any forward. ``"graph"``
            makes a ``torch.fx.GraphModule`` of every submodule whose forward decides where channels go (a split by
            stored numbers, a slice, a shuffle). ``"auto"`` does so only where module form cannot express the widths.

    Returns:
        The network, a module of the same class (dtype, device, ``requires_grad``, modes and memory format kept), and
        the report of what merging did. Its class is a ``GraphModule`` only where the forward of ``model`` itself takes
        graph form; a LightningModule never does.

    Warns:
        UserWarning: averaging running statistics changes the outputs by more than ``tolerance``. In a checkpoint from
            the middle of a fit they lag behind the tied weights.

    Raises:
        NotTiedError: setting parameters to their clusters' means changes the outputs by more than ``tolerance``.
        NarrowingError: unknown or pinned group (with the reason), clusters of a wrong shape, widths that the network's
            forward cannot express, weights or outputs that are NaN, or a narrow network that does not compute the same.
        ExampleInputsError, TraceError: the network cannot be traced on these inputs.
    """
    if tolerance != float("inf"):
        check_number("tolerance", tolerance, low=0.0)
    check_finite(model)
    graph = ChannelGraph.trace(model, example_inputs, network=network)
    projected = copy_network(model)
    tie(projected, graph, clusters)
    before, after = named_tensors(model), named_tensors(projected)
    parameters = {name for name, tensor in before.items() if isinstance(tensor, nn.Parameter)}
    deviation, worst = _largest_deviation(before, after, parameters)
    lag, lagging = _largest_deviation(before, after, before.keys() - parameters)
    narrowing = Narrowing(graph, *merging(graph, clusters), form=form)
    merged = narrowing(projected)
    arguments = example_arguments(_traced(model, network), example_inputs)
    # Running statistics are compared separately. If only they differ, the weights are tied.
    steps = [{name: before[name] for name in names} for names in (parameters, before.keys() - parameters)]
    proof = prove(projected, narrowing, graph, arguments, earlier=steps if lag > 0 else steps[:1])
    projection, averaging = (*proof.changes, 0.0)[:2]
    if not proof.exact:
        raise NarrowingError(
            f"the narrow network is not the tied one: {proof}; nothing was merged. Please report the network: the "
            f"channel graph is wrong about it"
        )
    if not projection <= tolerance:
        raise NotTiedError(
            f"the clusters are not tied: setting their members to the mean changes the outputs by {projection:.1e} "
            f"(relative), more than tolerance={tolerance:g}; {worst} differs from its mean by {deviation:.1e} of its "
            f"norm",
            "Train longer or with a larger strength (CentripetalSGD logs a forecast at the start), or pass "
            "tolerance=float('inf') to merge anyway and fine-tune",
        )
    if averaging > tolerance:
        warnings.warn(
            f"running statistics lag behind the tied weights ({lagging} differs from its mean by {lag:.1e} of its "
            f"norm). They were averaged over each cluster, which changes the outputs by {averaging:.1e} (relative). To "
            f"renew them, run some batches through the merged network in train mode",
            stacklevel=3,  # the caller, beyond the decorator
        )
    macs = proof.macs or [macs_of_call(_traced(one, network), *arguments) for one in (model, merged)]
    report = MergeReport(
        channels_before=sum(len(index) for index in clusters.values()),
        channels_after=sum(len(index.unique()) for index in clusters.values()),
        deviation=deviation,
        worst=worst,
        projection=projection,
        trim=proof.difference,
        precision=proof.precision,
        parameters_before=count_parameters(model),
        parameters_after=count_parameters(merged),
        macs_before=macs[0],
        macs_after=macs[1],
        lag=lag,
        lagging=lagging,
        averaging=averaging,
        forms=narrowing.forms,
    )
    return Merged(merged, report)


def _traced(model: nn.Module, network: str | None) -> nn.Module:
    return bare_module(find_submodule(bare_module(model), network))


@torch.no_grad()
def _largest_deviation(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[float, str]:
    worst = (0.0, "none")
    for name in names:
        tensor = before[name]
        if tensor.is_floating_point():
            # The difference of close numbers is exact in their own type.
            off = _norm(tensor - after[name])
            if off > 0:
                worst = max(worst, (off / _norm(tensor), name))
    return worst


def _norm(tensor: Tensor) -> float:
    """Return the Euclidean norm, of rows in the tensor's own type where it has the range: five times as fast."""
    rows = torch.linalg.vector_norm(tensor.flatten(1), dim=1) if tensor.ndim > 1 else tensor
    norm = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
    small = tensor.element_size() < 4 or not 1e-12 < norm < 1e12
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) if small else norm
