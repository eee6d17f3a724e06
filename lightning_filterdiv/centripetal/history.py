"""Distances of cluster members from their means over a fit, beside what was forecast for each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["DeviationHistory"]

# Enough for a figure; between them the logarithm of the forecast is interpolated.
_KEPT = 400


@dataclass
class DeviationHistory:
    """Deviations of tensors from their clusters' means over a fit, all relative to its start.

    Attributes:
        points: tensor name -> ``[step, measured, forecast]`` in order; the forecast is NaN where there is none.
    """

    points: dict[str, list[list[float]]] = field(default_factory=dict)
    _start: dict[str, float] = field(default_factory=dict)
    _forecasts: list[tuple[list[str], list[float], list[float]]] = field(default_factory=list)
    _reached: dict[str, float] = field(default_factory=dict)  # deviation at the forecast, where that is not the start

    def begin(
        self, step: int, deviations: Mapping[str, float], paths: Sequence[tuple[Sequence[str], Sequence[float]]]
    ) -> None:
        """Start at ``step``.

        Args:
            step: global step before the first edit.
            deviations: tensor name -> ``|w - Gamma w|``.
            paths: tensor names with their forecast factors after 0, 1, ... steps.
        """
        self.points, self._start, self._reached = {}, dict(deviations), {}
        self._keep(step, paths)
        self.record(step, deviations)

    def forecast_again(
        self, step: int, deviations: Mapping[str, float], paths: Sequence[tuple[Sequence[str], Sequence[float]]]
    ) -> None:
        """Take new forecasts from ``step`` on; see :meth:`begin`. What was measured stays."""
        self._reached = {n: value / self._start[n] for n, value in deviations.items() if self._start.get(n, 0.0) > 0}
        self._keep(step, paths)

    def reached_k(self, deviations: Mapping[str, float]) -> dict[str, float]:
        """Tensor name -> K reached when its deviation is that of ``deviations``."""
        ratios = {n: value / self._start[n] for n, value in deviations.items() if self._start.get(n, 0.0) > 0}
        return {name: -math.log(ratio) for name, ratio in ratios.items() if 0 < ratio < math.inf}

    def _keep(self, step: int, paths: Sequence[tuple[Sequence[str], Sequence[float]]]) -> None:
        self._forecasts = []
        for names, factors in paths:
            kept = np.unique(np.linspace(0, len(factors) - 1, min(len(factors), _KEPT)).astype(np.int64))
            logs = [math.log(max(abs(factors[i]), 1e-300)) for i in kept.tolist()]
            self._forecasts.append((list(names), (step + kept).astype(float).tolist(), logs))

    def record(self, step: int, deviations: Mapping[str, float]) -> None:
        """Add what was measured at ``step``; tensors that were equal at the start have nothing to shrink."""
        for name, value in deviations.items():
            start = self._start.get(name, 0.0)
            if start > 0 and not (self.points.get(name) and self.points[name][-1][0] == step):
                self.points.setdefault(name, []).append([step, value / start, self._forecast(name, step)])

    def _forecast(self, name: str, step: int) -> float:
        for names, steps, logs in self._forecasts:
            if name in names:
                return float(math.exp(np.interp(step, steps, logs)) * self._reached.get(name, 1.0))
        return math.nan

    def for_layers(self, layers: Sequence[str]) -> dict[str, list[tuple[int, float, float]]]:
        """The kernels of ``layers`` only: layer -> (step, measured, forecast)."""
        kernels = {layer: self.points.get(f"{layer}.weight", []) for layer in layers}
        return {layer: [(int(s), m, f) for s, m, f in points] for layer, points in kernels.items() if points}

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "points": {name: [list(point) for point in points] for name, points in self.points.items()},
            "start": dict(self._start),
            "forecasts": [list(entry) for entry in self._forecasts],
            "reached": dict(self._reached),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DeviationHistory:
        """Inverse of :meth:`state`."""
        points = {name: [list(point) for point in points] for name, points in state["points"].items()}
        forecasts = [(names, steps, logs) for names, steps, logs in state["forecasts"]]
        return cls(points, dict(state["start"]), forecasts, dict(state.get("reached", {})))
