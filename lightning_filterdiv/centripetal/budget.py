"""Is there enough learning rate in this fit to pull every cluster together? Asked before the first edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import SGD

from lightning_filterdiv.centripetal.forecast import (
    LOSSLESS_K,
    TARGET_K,
    deviation_factors,
    reached_k,
    safe_strength,
    solve_strength,
)
from lightning_filterdiv.centripetal.functional import CentripetalUpdate
from lightning_filterdiv.narrowing.clusters import ClusteredTensor
from lightning_filterdiv.training.learning_rates import StepSettings, forecast_settings

__all__ = ["Budget", "ClipMeter"]


class _Share(NamedTuple):
    """Clustered tensors with one future: the same parameter group and the same strength."""

    names: list[str]
    vectors: bool
    settings: list[StepSettings] | str  # or why nobody knows them
    now: StepSettings
    decoupled: bool


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


@dataclass
class Budget:
    """K per tensor as forecast at the start, and the deviations measured last."""

    forecast: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    _known: list[tuple[list[StepSettings], float, bool]] = field(default_factory=list)
    _paths: list[tuple[list[str], list[float]]] = field(default_factory=list)

    def resolve(
        self,
        trainer: pl.Trainer,
        tensors: Sequence[ClusteredTensor],
        strength: float | str,
        vector: float | None,
        reached: float = 0.0,
    ) -> float:
        """The strength to use: as given, or the smallest that reaches K = 18 for every tensor that it acts on.

        ``reached`` is the K that earlier steps have reached; K = 1 is the least that is aimed at for the rest.
        """
        if not isinstance(strength, str):
            return strength
        shares = [share for share in _shares(trainer, tensors) if vector is None or not share.vectors]
        decoupled = any(share.decoupled for share in shares)
        reason = next((share.settings for share in shares if isinstance(share.settings, str)), None)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            reason = "fast_dev_run is too short for one"
        known = [share.settings for share in shares if not isinstance(share.settings, str)]
        if reason is None:
            try:
                return solve_strength(known, max(TARGET_K - reached, 1.0), decoupled=decoupled).strength
            except ValueError as error:
                reason = str(error)
        value = min(safe_strength([share.now], decoupled=share.decoupled) for share in shares)
        rank_zero_warn(
            f"CentripetalSGD: strength='auto' needs a forecast, which is unavailable: {reason}. It uses {value:.3g}, "
            f"which does not oscillate at the current learning rate; watch filterdiv/centripetal/deviation, and give a "
            f"number"
        )
        return value

    def announce(
        self,
        trainer: pl.Trainer,
        tensors: Sequence[ClusteredTensor],
        strength: float,
        vector: float | None,
        clusters: Mapping[str, Tensor],
        reached: Mapping[str, float] | None = None,
    ) -> None:
        """Forecast, print it, and warn if merging will not be lossless, with the strength that would do.

        ``reached`` has the K of each tensor that earlier steps have reached.
        """
        before = sum(len(index) for index in clusters.values())
        after = sum(int(index.max()) + 1 for index in clusters.values())
        text = f"CentripetalSGD: {before} channels in {len(clusters)} groups to become {after}, strength {strength:.4g}"
        short: list[_Share] = []
        for share in _shares(trainer, tensors):
            if isinstance(share.settings, str):
                rank_zero_info(f"{text}; forecast unavailable: {share.settings}. The measured deviation is logged")
                return
            eps = vector if vector is not None and share.vectors else strength
            factors = deviation_factors(share.settings, eps, decoupled=share.decoupled)
            self._paths.append((share.names, factors))
            k = -math.log(abs(factors[-1])) if factors[-1] else math.inf
            self.forecast |= {name: k + (reached or {}).get(name, 0.0) for name in share.names}
            self._known.append((share.settings, eps, share.decoupled))
            if min(self.forecast[name] for name in share.names) < LOSSLESS_K:
                short.append(share)
        lowest = min(self.forecast, key=self.forecast.__getitem__)
        rank_zero_info(f"{text}; forecast K {self.forecast[lowest]:.1f} or more for every tensor (least for {lowest})")
        if short and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            rank_zero_warn(self._warning(short, lowest, vector))

    def _warning(self, short: Sequence[_Share], lowest: str, vector: float | None) -> str:
        known = [share.settings for share in short if not isinstance(share.settings, str)]
        only_vectors = vector is not None and all(share.vectors for share in short)
        name = "vector_strength" if only_vectors else "strength"
        steps = len(known[0])
        try:
            solution = solve_strength(known, TARGET_K, decoupled=short[0].decoupled)
        except ValueError as error:
            advice = str(error)
        else:
            if solution.reached:
                advice = f"{name}={solution.strength:.3g} would reach K = {TARGET_K:.0f}"
            else:
                advice = (
                    f"no {name} reaches it in {steps} steps at these learning rates (the best is {name}="
                    f"{solution.strength:.3g} with K = {solution.k:.1f}): train longer or with a larger learning rate"
                )
        return (
            f"the budget of CentripetalSGD is too short: K = {self.forecast[lowest]:.1f} for {lowest}, that is, its "
            f"clusters will be e^-{self.forecast[lowest]:.1f} of their present distance apart, and below K = "
            f"{LOSSLESS_K:.0f} merging is not lossless; {advice}"
        )

    def paths(self) -> list[tuple[list[str], list[float]]]:
        """Tensor names with their forecast factors after 0, 1, ... steps; empty without a forecast."""
        return list(self._paths)

    def corrected(self, coefficient: float) -> float | None:
        """The smallest K if gradient clipping multiplies the pull by ``coefficient`` at every step."""
        reached = [
            reached_k(settings, eps if decoupled else coefficient * eps, decoupled=decoupled)
            for settings, eps, decoupled in self._known
        ]
        return min(reached, default=None)

    def metrics(self, tensors: Sequence[ClusteredTensor]) -> dict[str, float]:
        """What is logged: the deviation of every tensor, the largest of kernels and of vectors, the forecast."""
        numbers = {f"deviation/{name}": value for name, value in self.measured.items()}
        for kind, vectors in (("kernels", False), ("vectors", True)):
            values = [self.measured[t.name] for t in tensors if t.is_vector is vectors]
            if values:
                numbers[f"largest_deviation/{kind}"] = max(values)
        lowest = min(self.forecast.values(), default=math.inf)
        return numbers | ({"forecast_k": lowest} if lowest < math.inf else {})


class ClipMeter:
    """The factor by which gradient clipping scales the edited gradients, averaged over steps, on the device.

    It is read off one gradient of every step, before and after clipping; only fits that clip by norm pay for it.
    """

    def __init__(self) -> None:
        self._active = False
        self._before: Tensor | None = None
        self._sum: Tensor | float = 0.0
        self._count = 0

    def watch(self, trainer: pl.Trainer) -> None:
        """Warn about clipping, and measure it if it is by norm."""
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
        """Remember the norm of a gradient that was just edited."""
        gradient = update.first_gradient() if self._active else None
        self._before = None if gradient is None else torch.linalg.vector_norm(gradient)

    @torch.no_grad()
    def after_step(self, update: CentripetalUpdate) -> None:
        """Compare with the gradient that the optimizer took."""
        gradient = update.first_gradient() if self._before is not None else None
        if gradient is not None and self._before is not None:
            ratio = torch.linalg.vector_norm(gradient) / self._before
            # A gradient that is not finite says nothing about clipping, and would stay in the sum for ever.
            known = (self._before > 0) & ratio.isfinite()
            self._sum = self._sum + torch.where(known, ratio, torch.ones_like(ratio))
            self._count += 1
        self._before = None

    @property
    def mean(self) -> float | None:
        """The mean coefficient so far, at most 1; ``None`` if nothing was measured. Synchronises."""
        return min(1.0, float(self._sum) / self._count) if self._count else None

    def release(self) -> None:
        """Stop measuring; the mean stays."""
        self._active, self._before = False, None

    def state(self) -> list[float]:
        """Sum and count, for a checkpoint."""
        return [float(self._sum), float(self._count)]

    def load(self, state: object) -> None:
        """Restore :meth:`state`.

        Raises:
            TypeError: it is no list of two numbers.
        """
        if not isinstance(state, list) or len(state) != 2:
            raise TypeError(f"clip must be a list of two numbers, got {state!r}")
        self._sum, self._count = float(state[0]), int(state[1])
