"""Forecast of a fit with C-SGD, compared with the measured distances."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import SGD

from lightning_filterdiv.centripetal.functional import CentripetalUpdate, cluster_distances, relative
from lightning_filterdiv.centripetal.recursion import (
    LOSSLESS_K,
    TARGET_K,
    deviation_factors,
    reached_k,
    safe_strength,
    solve_strength,
    steps_until,
)
from lightning_filterdiv.narrowing.clusters import ClusteredTensor
from lightning_filterdiv.training.learning_rates import StepSettings, forecast_settings, steps_per_epoch

__all__ = ["ClipMeter", "Forecast"]

# Points of a curve, enough for a figure. Between them the logarithm of the forecast is interpolated.
_KEPT = 400
# K of a tensor that is exactly tied: finite, and so is its exponential.
_TIED_K = 500.0
# Strength times learning rate that leaves nine tenths of a distance in a step without momentum.
_ABRUPT = 0.1


class _Share(NamedTuple):
    """Clustered tensors with the same forecast: one parameter group and one strength."""

    names: list[str]
    vectors: bool
    settings: list[StepSettings] | str  # or the reason why they are unknown
    now: StepSettings
    decoupled: bool


class _Curve(NamedTuple):
    """Forecast of some tensors: logarithms of their distances at global steps, relative to the first of these."""

    names: list[str]
    steps: list[float]
    logs: list[float]


class Forecast:
    """Forecast distances in clusters, measured distances, and the strength that follows from them.

    :meth:`update` runs the recursion of the optimizer over the remaining steps. It does so before the first edit, and
    again if a resume has another number of steps, another strength, or new tensors. :meth:`measure` stores measured
    distances. :attr:`clipping` measures by how much gradient clipping weakens the pull, and :meth:`corrected_k` applies
    that factor.

    Attributes:
        strength: eps in use; ``None`` before the first step.
        k: tensor name -> K at the end of the fit. The distance shrinks by ``exp(-K)`` from the clustering on. Empty
            without a forecast.
        measured: tensor name -> last measured ``|w - Gamma w| / |w|``.
        points: tensor name -> ``[step, measured, forecast]`` in order, both relative to the clustering; the forecast is
            NaN if there is none. Tensors that were equal from the start have no points.
        clipping: meter of gradient clipping by norm.
    """

    def __init__(self) -> None:
        self.strength: float | None = None
        self.k: dict[str, float] = {}
        self.measured: dict[str, float] = {}
        self.points: dict[str, list[list[float]]] = {}
        self.clipping = ClipMeter()
        self._start: dict[str, float] = {}  # distances when the clusters were made
        self._reached: dict[str, float] = {}  # distances at the present forecast, relative to the start
        self._curves: list[_Curve] = []
        self._shares: list[_Share] = []  # for the steps since training last started
        self._now: dict[str, float] = {}  # K that had been reached then
        self._vector: float | None = None

    # ------------------------------------------------------------------ budget

    def update(
        self,
        trainer: pl.Trainer,
        tensors: Sequence[ClusteredTensor],
        strength: float | str,
        vector_strength: float | None,
        clusters: Mapping[str, Tensor],
        *,
        changed: Collection[str] = (),
    ) -> None:
        """Make a forecast for the remaining steps, unless an earlier one still holds. Print it and warn about a low K.

        Args:
            trainer: trainer of the fit, before the next step.
            tensors: what is clustered.
            strength: eps, or ``"auto"`` for the smallest that reaches K = 18 for every tensor that it acts on.
            vector_strength: eps of vectors; ``None``: the same.
            clusters: group name -> cluster index, for the message.
            changed: those of ``"strength"`` and ``"vector_strength"`` that differ from the last forecast.
        """
        step, distances = trainer.global_step, self._distances(tensors)
        joined = [name for name in distances if name not in self._start]
        self._start |= {name: distances[name] for name in joined}
        reached = {n: 0.0 if n in joined else _reached(d, self._start[n]) for n, d in distances.items()}
        self._shares, self._now, self._vector = _shares(trainer, tensors), reached, vector_strength
        unknown = self._unknown
        end = None if unknown else step + max(len(share.settings) for share in self._shares)
        if not joined and not changed and end == self.planned_end:
            return
        earlier = self.strength
        # With "auto" the strength of the kernels does not follow from that of the vectors.
        if earlier is None or joined or end != self.planned_end or "strength" in changed:
            self.strength = self._resolve(trainer, strength, reached)
        self._reached = {name: math.exp(-k) for name, k in reached.items()}
        self.k, self._curves = {}, []
        if unknown is None:
            for share in self._shares:
                factors = deviation_factors(self._settings(share), self._eps(share), decoupled=share.decoupled)
                self._curves.append(_curve(share.names, factors, step))
                self.k |= {name: reached[name] + _k(factors[-1]) for name in share.names}
        self._announce(trainer, clusters, strength, earlier, unknown)
        self._record(step, distances)

    @property
    def planned_end(self) -> int | None:
        """Return the global step at which the fit ends in the last forecast; ``None`` without a forecast."""
        return max((int(curve.steps[-1]) for curve in self._curves), default=None)

    @property
    def lowest_k(self) -> float | None:
        """Return the smallest K; ``None`` without a forecast."""
        return min(self.k.values(), default=None)

    @property
    def _unknown(self) -> str | None:
        """Return the reason why there is no forecast."""
        return next((share.settings for share in self._shares if isinstance(share.settings, str)), None)

    @staticmethod
    def _settings(share: _Share) -> list[StepSettings]:
        assert not isinstance(share.settings, str)
        return share.settings

    def _eps(self, share: _Share) -> float:
        assert self.strength is not None
        return self._vector if self._vector is not None and share.vectors else self.strength

    def _resolve(self, trainer: pl.Trainer, strength: float | str, reached: Mapping[str, float]) -> float:
        """Return the given strength, or the smallest that reaches the missing part of K = 18 (at least 1)."""
        if not isinstance(strength, str):
            return strength
        shares = [share for share in self._shares if self._vector is None or not share.vectors]
        reason = next((share.settings for share in shares if isinstance(share.settings, str)), None)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            reason = "fast_dev_run is too short for one"
        if reason is None:
            missing = max(TARGET_K - min((reached[n] for share in shares for n in share.names), default=0.0), 1.0)
            decoupled = any(share.decoupled for share in shares)
            try:
                found = solve_strength([self._settings(share) for share in shares], missing, decoupled=decoupled)
            except ValueError as error:
                reason = str(error)
            else:
                self._warn_of_haste(trainer, shares, found.strength, missing, decoupled)
                return found.strength
        value = min((safe_strength([s.now], decoupled=s.decoupled) for s in shares or self._shares), default=0.05)
        rank_zero_warn(
            f"CentripetalSGD: strength='auto' needs a forecast, which is unavailable: {reason}. It uses {value:.3g}, "
            f"which does not oscillate at the current learning rate; watch filterdiv/centripetal/deviation, and give a "
            f"number"
        )
        return value

    def _warn_of_haste(
        self, trainer: pl.Trainer, shares: Sequence[_Share], strength: float, missing: float, decoupled: bool
    ) -> None:
        settings = [self._settings(share) for share in shares]
        limit = _ABRUPT / max(at.lr for future in settings for at in future)
        if strength <= limit:
            return
        steps = max(len(future) for future in settings)
        needed = steps_until(settings, limit, missing, decoupled=decoupled)
        per_epoch = steps_per_epoch(trainer)
        length = f"About {needed} steps"
        if per_epoch is not None:
            length = f"About {math.ceil(needed / per_epoch)} epochs ({needed} steps)"
        rank_zero_warn(
            f"strength='auto' of CentripetalSGD resolves to {strength:.4g}, above a tenth of 1 / learning rate "
            f"({limit:.3g}): in the {steps} steps that are left, clusters are tied within a few steps, and accuracy "
            f"may suffer. {length} with this schedule stretched over them would avoid it"
        )

    def _announce(
        self,
        trainer: pl.Trainer,
        clusters: Mapping[str, Tensor],
        given: float | str,
        earlier: float | None,
        unknown: str | None,
    ) -> None:
        before = sum(len(index) for index in clusters.values())
        after = sum(int(index.max()) + 1 for index in clusters.values())
        auto = " (auto)" if isinstance(given, str) else ""
        groups = f"{len(clusters)} group{'s' if len(clusters) != 1 else ''}"
        text = f"CentripetalSGD: merging {before} channels to {after} ({groups}), strength {self.strength:.4g}{auto}"
        if earlier is not None and earlier != self.strength:
            text += f", {earlier:.4g} before"
        if unknown is not None:
            rank_zero_info(f"{text}. No forecast: {unknown}. The measured deviation is logged")
            return
        lowest = min(self.k, key=self.k.__getitem__)
        rank_zero_info(
            f"{text}. Forecast for step {self.planned_end}, the end of the fit: distances inside clusters shrink to "
            f"{math.exp(min(-self.k[lowest], 99)):.1e} or less of what they were (K = {self.k[lowest]:.1f}, {lowest})"
        )
        short = [share for share in self._shares if min(self.k[name] for name in share.names) < LOSSLESS_K]
        if short and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            rank_zero_warn(self._shortage(short, lowest))

    def _shortage(self, short: Sequence[_Share], lowest: str) -> str:
        """Return a warning about a K below 15, with a strength that suffices."""
        only_vectors = self._vector is not None and all(share.vectors for share in short)
        name = "vector_strength" if only_vectors else "strength"
        settings = [self._settings(share) for share in short]
        steps = len(settings[0])
        missing = TARGET_K + math.log(max(self._reached[n] for share in short for n in share.names))
        try:
            solution = solve_strength(settings, max(missing, 1.0), decoupled=short[0].decoupled)
        except ValueError as error:
            advice = str(error)
        else:
            if solution.reached:
                advice = f"{name}={solution.strength:.3g} would reach K = {TARGET_K:.0f}"
            else:
                reaches = solution.k + TARGET_K - missing
                advice = (
                    f"no {name} reaches it in {steps} steps at these learning rates (the best is {name}="
                    f"{solution.strength:.3g} with K = {reaches:.1f}): train longer or with a larger learning rate"
                )
        k = self.k[lowest]
        return (
            f"this fit is too short for CentripetalSGD: K = {k:.1f} for {lowest}, so distances inside its clusters "
            f"shrink to {math.exp(min(-k, 99)):.1e} of what they were, and below K = {LOSSLESS_K:.0f} merging is not "
            f"lossless; {advice}"
        )

    # ------------------------------------------------------------------ clipping

    def corrected_k(self) -> float | None:
        """Return the smallest K if clipping continues to scale the pull by the mean factor measured so far."""
        coefficient = self.clipping.mean
        if coefficient is None or self._unknown is not None or not self._curves:
            return None
        corrected = []
        for share in self._shares:
            eps = self._eps(share) * (1.0 if share.decoupled else coefficient)
            k = reached_k(self._settings(share), eps, decoupled=share.decoupled)
            corrected.append(k + min(self._now[name] for name in share.names))
        return min(corrected, default=None)

    def warn_of_clipping(self) -> None:
        """Warn if clipping lowers K below the limit for a lossless merge."""
        corrected, lowest = self.corrected_k(), self.lowest_k
        if corrected is not None and lowest is not None and corrected < LOSSLESS_K <= lowest:
            rank_zero_warn(
                f"gradient clipping multiplies the pull of CentripetalSGD by {self.clipping.mean:.2f} on average: K "
                f"will be about {corrected:.1f}, not {lowest:.1f}, and below {LOSSLESS_K:.0f} merging is not lossless. "
                f"Raise gradient_clip_val, the strength or the number of epochs"
            )

    # ------------------------------------------------------------------ curve

    def measure(self, step: int, tensors: Sequence[ClusteredTensor]) -> dict[str, float]:
        """Measure and store all distances, and return the numbers to log.

        Args:
            step: global step.
            tensors: what is clustered.

        Returns:
            Deviation of every tensor, the largest of kernels and of vectors, the forecast and its correction.
        """
        self._record(step, self._distances(tensors))
        numbers = {f"deviation/{name}": value for name, value in self.measured.items()}
        for kind, vectors in (("kernels", False), ("vectors", True)):
            values = [self.measured[t.name] for t in tensors if t.is_vector is vectors]
            if values:
                numbers[f"largest_deviation/{kind}"] = max(values)
        optional = {
            "forecast_k": self.lowest_k,
            "clip_coefficient": self.clipping.mean,
            "forecast_k_clipped": self.corrected_k(),
        }
        return numbers | {name: k for name, k in optional.items() if k is not None and k < math.inf}

    def _distances(self, tensors: Sequence[ClusteredTensor]) -> dict[str, float]:
        distances = cluster_distances(tensors)
        self.measured = {name: relative(off, norm) for name, (off, norm) in distances.items()}
        return {name: off for name, (off, _) in distances.items()}

    def _record(self, step: int, distances: Mapping[str, float]) -> None:
        for name, value in distances.items():
            start = self._start.get(name, 0.0)
            if start > 0 and not (self.points.get(name) and self.points[name][-1][0] == step):
                self.points.setdefault(name, []).append([step, value / start, self._factor(name, step)])

    def _factor(self, name: str, step: int) -> float:
        """Return the forecast distance of a tensor at a step, relative to its start."""
        for names, steps, logs in self._curves:
            if name in names:
                return float(math.exp(np.interp(step, steps, logs)) * self._reached.get(name, 1.0))
        return math.nan

    def for_layers(self, layers: Iterable[str]) -> dict[str, list[tuple[int, float, float]]]:
        """Return the points of the kernels of ``layers`` alone: layer -> (step, measured, forecast)."""
        kernels = {layer: self.points.get(f"{layer}.weight", []) for layer in layers}
        return {layer: [(int(s), m, f) for s, m, f in points] for layer, points in kernels.items() if points}

    def unfinished(self, step: int) -> str | None:
        """Return a noun phrase for weights of ``step`` if it lies before the planned end; ``None`` if not, or without a
        forecast."""
        end = self.planned_end
        if end is None or step >= end:
            return None
        names = [name for curve in self._curves for name in curve.names]
        here = max(self._factor(name, step) for name in names)
        there = max(self._factor(name, end) for name in names)
        return (
            f"step {step} of a planned {end}: by the forecast, distances inside clusters are {here:.1e} of what they "
            f"were at first, and {there:.1e} at the end of the fit"
        )

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "strength": self.strength,
            "forecast": dict(self.k),
            "course": {
                "points": {name: [list(point) for point in points] for name, points in self.points.items()},
                "start": dict(self._start),
                "forecasts": [list(curve) for curve in self._curves],
                "reached": dict(self._reached),
            },
            "clip": self.clipping.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Forecast:
        """Inverse of :meth:`state`; states of release 0.1 too.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or is of another kind.
        """
        forecast, course = cls(), state["course"]
        strength = state["strength"]
        if strength is not None and not isinstance(strength, float):
            raise TypeError(f"strength must be a number or None, got {strength!r}")
        forecast.strength = strength
        forecast.clipping.load(state["clip"])
        if not isinstance(course, Mapping) or not isinstance(course["points"], Mapping):
            raise TypeError("course must be a dict of what was measured and forecast")
        forecast.k = _numbers(state["forecast"])
        forecast.points = {
            str(name): [[int(step), float(measured), float(expected)] for step, measured, expected in points]
            for name, points in course["points"].items()
        }
        forecast._start, forecast._reached = _numbers(course["start"]), _numbers(course.get("reached", {}))
        for names, steps, logs in course["forecasts"]:
            curve = _Curve([*map(str, names)], [*map(float, steps)], [*map(float, logs)])
            if not curve.steps or len(curve.steps) != len(curve.logs):
                raise ValueError("course has a forecast without steps, or with another number of values")
            forecast._curves.append(curve)
        return forecast


def _shares(trainer: pl.Trainer, tensors: Sequence[ClusteredTensor]) -> list[_Share]:
    shares: list[_Share] = []
    for index, optimizer in enumerate(trainer.optimizers):
        future = forecast_settings(trainer, index)
        for position, group in enumerate(optimizer.param_groups):
            owned = {id(p) for p in group["params"]}
            settings = future if isinstance(future, str) else [step[position] for step in future]
            for vectors in (False, True):
                names = [t.name for t in tensors if id(t.parameter) in owned and t.is_vector is vectors]
                if names:
                    decoupled = not isinstance(optimizer, SGD)
                    shares.append(_Share(names, vectors, settings, StepSettings.of(group), decoupled))
    return shares


def _numbers(entries: Mapping[Any, Any]) -> dict[str, float]:
    """Return name -> number from a state. Anything else is an error."""
    return {str(name): float(value) for name, value in entries.items()}


def _k(factor: float) -> float:
    return -math.log(abs(factor)) if factor else math.inf


def _reached(distance: float, start: float) -> float:
    """Return the K that a tensor has reached; 0 if unknown."""
    if distance == 0:
        return _TIED_K
    ratio = distance / start if start > 0 else 1.0
    return -math.log(ratio) if 0 < ratio < math.inf else 0.0


def _curve(names: list[str], factors: Sequence[float], step: int) -> _Curve:
    kept = np.unique(np.linspace(0, len(factors) - 1, min(len(factors), _KEPT)).astype(np.int64))
    logs = [math.log(max(abs(factors[i]), 1e-300)) for i in kept.tolist()]
    return _Curve(list(names), (step + kept).astype(float).tolist(), logs)


class ClipMeter:
    """Mean factor over steps by which gradient clipping scales the edited gradients, kept on the device.

    It is measured on one gradient of every step, before and after clipping. Only fits that clip by norm measure it.
    """

    def __init__(self) -> None:
        self._active = False
        self._before: Tensor | None = None
        self._sum: Tensor | float = 0.0
        self._count = 0

    def watch(self, trainer: pl.Trainer) -> None:
        """Warn about clipping by value. Measure clipping by norm."""
        if not trainer.gradient_clip_val:
            return
        if "value" in str(getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)):
            rank_zero_warn(
                "gradient_clip_algorithm='value' clips the members of a cluster differently once the pull makes their "
                "gradients differ: CentripetalSGD is no longer exact. Clip by norm, or not at all"
            )
            return
        self._active = True
        rank_zero_warn(
            "gradient clipping by norm also shrinks the pull of CentripetalSGD: the forecast is an upper bound. The "
            "measured mean clip coefficient and the corrected K are logged after every epoch"
        )

    @torch.no_grad()
    def before_step(self, update: CentripetalUpdate) -> None:
        """Remember the norm of an edited gradient."""
        gradient = update.first_gradient() if self._active else None
        self._before = None if gradient is None else torch.linalg.vector_norm(gradient)

    @torch.no_grad()
    def after_step(self, update: CentripetalUpdate) -> None:
        """Compare it with the gradient that the optimizer used."""
        gradient = update.first_gradient() if self._before is not None else None
        if gradient is not None and self._before is not None:
            ratio = torch.linalg.vector_norm(gradient) / self._before
            # A gradient that is not finite would spoil the sum for the rest of the fit.
            known = (self._before > 0) & ratio.isfinite()
            self._sum = self._sum + torch.where(known, ratio, torch.ones_like(ratio))
            self._count += 1
        self._before = None

    @property
    def mean(self) -> float | None:
        """Return the mean factor so far, at most 1; ``None`` if nothing was measured. Synchronises with the device."""
        return min(1.0, float(self._sum) / self._count) if self._count else None

    def release(self) -> None:
        """Stop measuring; the mean stays."""
        self._active, self._before = False, None

    def state(self) -> list[float]:
        """Return sum and count for a checkpoint."""
        return [float(self._sum), float(self._count)]

    def load(self, state: object) -> None:
        """Restore :meth:`state`.

        Raises:
            TypeError: the state is not a list of two numbers.
        """
        if not isinstance(state, list) or len(state) != 2:
            raise TypeError(f"clip must be a list of two numbers, got {state!r}")
        self._sum, self._count = float(state[0]), int(state[1])
