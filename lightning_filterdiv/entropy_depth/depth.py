"""Depth of a network: convolutions on the longest path of its channel graph, per stage and in total."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from lightning_filterdiv.channel_graph import ChannelGraph, Operation
from lightning_filterdiv.entropy_depth.plan import DepthPlan, plan_depth
from lightning_filterdiv.filters import CONVOLUTIONS, named_modules

__all__ = ["NetworkDepth", "Stage", "network_depth"]


class Stage(NamedTuple):
    """Neighbouring convolutions of the longest path whose outputs have one spatial resolution.

    Attributes:
        resolution: resolution of the outputs, ``(H, W)`` for images.
        layers: names of the convolutions in order. A convolution that is called twice appears twice.
        width: most frequent number of output channels (the larger one if two are equally frequent).
        weights: number of weights of these layers.
        entry_weights: weights of the first layer, whose input has the width of the stage before.
    """

    resolution: tuple[int, ...]
    layers: tuple[str, ...]
    width: int
    weights: int
    entry_weights: int

    @property
    def depth(self) -> int:
        """Number of convolutions in the stage."""
        return len(self.layers)

    @property
    def name(self) -> str:
        """Resolution as text, such as ``28x28``."""
        return "x".join(map(str, self.resolution))


class NetworkDepth(NamedTuple):
    """Stages along the longest path, in order."""

    stages: tuple[Stage, ...]

    @property
    def total(self) -> int:
        """Number of convolutions on the longest path."""
        return sum(stage.depth for stage in self.stages)

    def beyond(self, bound: int) -> list[int]:
        """Return the indices of stages deeper than ``bound``."""
        return [index for index, stage in enumerate(self.stages) if stage.depth > bound]

    def plan(self, bound: int) -> DepthPlan:
        """A shallower, broader plan with as many weights on the longest path.

        A stage broadened by ``f`` has ``f_before * f`` times the weights in its entry layer, ``f^2`` in all others.
        """

        def parameters(depths: Sequence[int], widths: Sequence[int]) -> float:
            total, before = 0.0, 1.0
            for stage, depth, width in zip(self.stages, depths, widths, strict=True):
                factor = width / stage.width
                rest = (stage.weights - stage.entry_weights) / max(1, stage.depth - 1)
                total += stage.entry_weights * before * factor + rest * (depth - 1) * factor * factor
                before = factor
            return total

        depths = [stage.depth for stage in self.stages]
        return plan_depth(depths, [stage.width for stage in self.stages], bound, parameters=parameters)

    def advice(self, bound: int) -> str:
        """Return the plan in words, one clause per stage that is too deep; empty if there is none."""
        deep = self.beyond(bound)
        if not deep:
            return ""
        plan = self.plan(bound)
        clauses = []
        for index in deep:
            stage, width = self.stages[index], plan.widths[index]
            clauses.append(
                f"stage {index + 1} ({stage.name}, {stage.layers[0]} to {stage.layers[-1]}): {stage.depth} "
                f"convolutions of width {stage.width} -> {plan.depths[index]} of width {width} "
                f"({width / stage.width:.2f} times as broad)"
            )
        return "; ".join(clauses)

    def describe(self) -> str:
        """Return the depth of each stage and in total, on one line."""
        stages = ", ".join(f"{stage.depth} at {stage.name}" for stage in self.stages)
        return f"{self.total} convolutions on the longest path: {stages}"


def network_depth(graph: ChannelGraph, layers: Collection[str] | None = None) -> NetworkDepth:
    """Count convolutions along the longest path from any input to any output.

    Every convolution counts one, also 1x1 and depthwise ones. Of equally long paths the first in order of execution is
    used. A new stage begins where the resolution of the outputs changes.

    Args:
        graph: channel graph of a network that still exists.
        layers: names of the convolutions that count; ``None`` for all.

    Raises:
        ValueError: none of ``layers`` is on the traced path.
    """
    modules = named_modules(graph.model)
    longest: dict[str, int] = {}
    previous: dict[str, str | None] = {}
    counts: dict[str, bool] = {}
    operations = {operation.name: operation for operation in graph.operations}
    for name, operation in operations.items():
        before = [source for source in operation.inputs if source in longest]
        best = max(before, key=lambda source: longest[source]) if before else None
        # ATen's names: conv2d, conv_transpose2d, convolution. Functional calls inside other modules count too.
        counts[name] = operation.operator.startswith("conv") and (layers is None or operation.module in layers)
        longest[name] = (longest[best] if best is not None else 0) + counts[name]
        previous[name] = best
    path: list[Operation] = []
    at: str | None = max(longest, key=lambda name: longest[name]) if longest else None
    while at is not None:
        if counts[at]:
            path.append(operations[at])
        at = previous[at]
    if not path:
        raise ValueError("no convolution that counts is on the path of the traced network: check include and exclude")
    return NetworkDepth(tuple(_stages(path[::-1], modules)))


def _stages(path: list[Operation], modules: dict[str, nn.Module]) -> list[Stage]:
    runs: list[list[Operation]] = []
    for operation in path:
        assert operation.shape is not None
        if not runs or _resolution(runs[-1][-1]) != _resolution(operation):
            runs.append([])
        runs[-1].append(operation)
    stages = []
    for run in runs:
        channels = Counter(operation.shape[1] for operation in run if operation.shape is not None)
        width = max(channels, key=lambda value: (channels[value], value))
        weights = [_weights(modules.get(operation.module)) for operation in run]
        layers = tuple(operation.module for operation in run)
        stages.append(Stage(_resolution(run[0]), layers, width, sum(weights), weights[0]))
    return stages


def _weights(module: nn.Module | None) -> int:
    if isinstance(module, CONVOLUTIONS):
        # Not read from ``weight``: under spectral_norm, reading it runs a step of power iteration.
        return module.out_channels * module.in_channels // module.groups * math.prod(module.kernel_size)
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def _resolution(operation: Operation) -> tuple[int, ...]:
    shape = operation.shape or ()
    return tuple(shape[2:])
