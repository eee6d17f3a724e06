"""Recursion for the distance inside a cluster at the end of a fit.

Under SGD the deviation of a filter from its cluster's mean is independent of the loss. It follows exactly the scalar
recursion of the same optimizer on the gradient ``(eps + eta) w``, with learning-rate schedule, momentum, dampening and
Nesterov. Its limit for small steps is ``exp(-K)`` with ``K = (eps + eta) / (1 - mu) * sum of lr``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_filterdiv.training.learning_rates import StepSettings

__all__ = [
    "LOSSLESS_K",
    "TARGET_K",
    "Solution",
    "deviation_factors",
    "reached_k",
    "safe_strength",
    "solve_strength",
    "steps_until",
]

#: K from which we call a merge lossless: the deviation of every tensor shrinks by exp(-15) or more.
LOSSLESS_K = 15.0
#: K that ``strength="auto"`` aims at.
TARGET_K = 18.0
_GRID = 96
Floats = npt.NDArray[np.float64]


class Solution(NamedTuple):
    """A strength and its K by the recursion. ``reached`` is true if K is at least the target."""

    strength: float
    k: float
    reached: bool


def deviation_factors(settings: Sequence[StepSettings], strength: float, *, decoupled: bool = False) -> list[float]:
    """Return the deviation inside a cluster after 0, 1, ..., n steps, as a multiple of the first one (it may change
    sign).

    Args:
        settings: settings of the tensor's parameter group, one per step.
        strength: eps, the centripetal strength.
        decoupled: the pull follows the step of an optimizer that is not SGD, ``w -= lr * eps * (w - Gamma w)``.
    """
    path = _simulate(settings, np.array([strength]), decoupled)
    return [float(values[0]) for values in path]


def reached_k(settings: Sequence[StepSettings], strength: float, *, decoupled: bool = False) -> float:
    """Return ``-ln`` of the absolute value of the last of :func:`deviation_factors`; infinity if that is exactly
    zero."""
    last = abs(deviation_factors(settings, strength, decoupled=decoupled)[-1])
    return -math.log(last) if last > 0 else math.inf


def _simulate(settings: Sequence[StepSettings], strengths: Floats, decoupled: bool) -> list[Floats]:
    """Return ``(S,)`` deviations after every step, for S strengths at once."""
    deviation = np.ones_like(strengths)
    buffer: Floats | None = None
    path = [deviation]
    with np.errstate(over="ignore", invalid="ignore"):
        for at in settings:
            if decoupled:
                decay = 1 - at.lr * at.weight_decay if at.decoupled_weight_decay else 1.0
                deviation = deviation * decay * (1 - at.lr * strengths)
            else:
                gradient = (strengths + at.weight_decay) * deviation
                if at.momentum:
                    buffer = gradient if buffer is None else at.momentum * buffer + (1 - at.dampening) * gradient
                    gradient = gradient + at.momentum * buffer if at.nesterov else buffer
                deviation = deviation - at.lr * gradient
            path.append(deviation)
    return path


def _envelope(groups: Sequence[Sequence[StepSettings]], strengths: Floats, decoupled: bool) -> Floats:
    """Return ``(S,)`` smallest K of all groups, from the largest deviation near the end, so that a zero crossing does
    not count."""
    worst = np.full(strengths.shape, np.inf)
    for settings in groups:
        window = min(20, len(settings) // 100) + 1
        last = np.max(np.abs(_simulate(settings, strengths, decoupled)[-window:]), axis=0)
        with np.errstate(divide="ignore"):
            worst = np.minimum(worst, np.where(np.isfinite(last), -np.log(last), -np.inf))
    return worst


def solve_strength(
    groups: Sequence[Sequence[StepSettings]], target: float = TARGET_K, *, decoupled: bool = False
) -> Solution:
    """Find the smallest strength whose recursion reaches ``K = target`` in every group.

    Above ``lr * (eps + eta) = (1 - sqrt(mu))^2`` momentum makes the deviation oscillate; heavy-ball momentum then
    shrinks it by at most about ``sqrt(mu)`` a step for every strength, so that a short fit may have no solution.
    Nesterov's shrinks it by ``sqrt(mu * (1 - lr * (eps + eta)))``, so that a strength near ``1 / lr`` ties clusters
    almost at once.

    Args:
        groups: settings of the parameter groups that hold clustered tensors, step by step.
        target: the K to reach.
        decoupled: see :func:`deviation_factors`.

    Returns:
        The solution, or, with ``reached=False``, the smallest strength that comes within 2 % of the best K.

    Raises:
        ValueError: no step remains, or every learning rate is zero.
    """
    groups = list(dict.fromkeys(tuple(settings) for settings in groups))
    rates = [sum(at.lr for at in settings) for settings in groups]
    if not rates or min(rates) <= 0:
        raise ValueError("no learning rate is left in this fit: nothing can pull filters together. Train for longer")
    highest = max(at.lr for settings in groups for at in settings)
    # Range around the small-step limit: from well below it (weight decay helps) to strengths at which every optimizer
    # diverges.
    lowest = min(target * (1 - max(at.momentum for at in s)) / r for s, r in zip(groups, rates, strict=True))
    strengths: Floats = np.geomspace(1e-2 * lowest, max(4 / highest, 2 * lowest), _GRID)
    for _ in range(3):
        k = _envelope(groups, strengths, decoupled)
        good = np.flatnonzero(k >= target)
        if len(good) == 0:
            best = np.flatnonzero(k >= 0.98 * k.max())[0]
            return Solution(float(strengths[best]), float(k[best]), False)
        if good[0] == 0:
            break
        strengths = np.linspace(strengths[good[0] - 1], strengths[good[0]], 16)
    return Solution(float(strengths[good[0]]), float(k[good[0]]), True)


def safe_strength(now: Sequence[StepSettings], *, decoupled: bool = False) -> float:
    """Return a strength for fits of unknown schedule: the fastest that does not oscillate, at most 1 % a step.

    Args:
        now: current settings of the parameter groups.
        decoupled: see :func:`deviation_factors`.
    """
    limits = []
    for at in now:
        if at.lr > 0:
            critical = 1.0 if decoupled else (1 - math.sqrt(at.momentum)) ** 2
            limits.append(min(0.01, critical) / at.lr)
    return min(limits, default=0.05)


def steps_until(
    groups: Sequence[Sequence[StepSettings]], strength: float, target: float = TARGET_K, *, decoupled: bool = False
) -> int:
    """Return the number of steps after which ``strength`` reaches ``K = target``, with the schedule stretched over
    them.

    Args:
        groups: settings of the parameter groups that hold clustered tensors, step by step.
        strength: eps.
        target: the K to reach.
        decoupled: see :func:`deviation_factors`.

    Raises:
        ValueError: there are no steps, or every learning rate is zero.
    """
    groups = list(dict.fromkeys(tuple(settings) for settings in groups))
    rates = [sum(at.lr for at in settings) for settings in groups]
    if not rates or min(rates) <= 0:
        raise ValueError("no learning rate is left in this fit: nothing can pull filters together. Train for longer")
    steps = max(map(len, groups))

    def reaches(length: int) -> float:
        places = (np.arange(length) * steps // length).tolist()
        stretched = [[settings[min(i, len(settings) - 1)] for i in places] for settings in groups]
        return float(_envelope(stretched, np.array([strength]), decoupled)[0])

    # K is proportional to the number of steps, except for the first steps, in which momentum builds up.
    length = steps
    for _ in range(8):
        k = reaches(length)
        if k >= target:
            break
        length = math.ceil(length * max(target / k if k > 0 else 2.0, 1.05))
    return length
