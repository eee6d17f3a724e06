"""A shallower, broader network with as many parameters: depths cut to the bound, widths solved for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_filterdiv.tensors.arguments import check_integer

__all__ = ["DepthPlan", "chain_parameters", "plan_depth", "widths_at_equal_parameters"]

#: ``(depths, widths) -> number of parameters`` of a network with these stages.
CountParameters = Callable[[Sequence[int], Sequence[int]], float]

# Rounding of widths: combinations within this relative error of the target count as equal, the most even one wins.
_EQUAL = 0.005
# Stages whose rounding is searched jointly: 5 ** 4 combinations.
_SEARCHED = 4


class DepthPlan(NamedTuple):
    """Stages of a network after :func:`plan_depth`.

    Attributes:
        depths: convolutions per stage, none above the bound.
        widths: filters per convolution and stage.
        parameters: of the planned network, as the counting function sees it.
        reference: of the network before.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    parameters: float
    reference: float

    @property
    def change(self) -> float:
        """Relative difference of the parameters, 0.01 for one percent more."""
        return self.parameters / self.reference - 1


def chain_parameters(depths: Sequence[int], widths: Sequence[int], *, channels: int = 3, kernel: int = 9) -> float:
    """Weights of a plain chain of convolutions: each stage has ``depth`` layers of ``width`` filters.

    ``kernel * sum_s (w_{s-1} w_s + (d_s - 1) w_s^2)`` with ``w_{-1} = channels``.

    Args:
        depths: ``(S,)`` convolutions per stage, at least 1 each.
        widths: ``(S,)`` filters per convolution.
        channels: of the input image.
        kernel: positions per filter, 9 for 3x3.
    """
    before = [channels, *widths[:-1]]
    return kernel * sum(b * w + (d - 1) * w * w for d, w, b in zip(depths, widths, before, strict=True))


def plan_depth(
    depths: Sequence[int],
    widths: Sequence[int],
    bound: int,
    *,
    parameters: CountParameters = chain_parameters,
    multiple_of: int = 1,
) -> DepthPlan:
    """Cut every stage to ``bound`` convolutions and broaden what was cut until the parameters are equal.

    Stages within the bound keep depth and width; all others are broadened by one common factor, rounded so that the
    total fits best. That depth beyond the bound is better spent on width is the claim of the EBCLE paper (Gowdra et
    al. 2021); the paper's own width rule could not be read, this one is ours.

    Args:
        depths: ``(S,)`` convolutions per stage.
        widths: ``(S,)`` filters per convolution in each stage.
        bound: most convolutions per stage, from :func:`estimate_depth_bound`.
        parameters: counts the parameters of the network with given depths and widths; default a plain chain.
        multiple_of: widths that were changed are multiples of it (8 suits tensor cores).

    Raises:
        ValueError: no stage, lists of different length, or numbers below 1.
        TypeError: not integers.
    """
    _check_stages(depths, widths)
    check_integer("bound", bound, low=1)
    check_integer("multiple_of", multiple_of, low=1)
    reference = parameters(depths, widths)
    planned = [min(depth, bound) for depth in depths]
    cut = [stage for stage, depth in enumerate(depths) if depth > bound]
    broadened = tuple(widths)
    if cut:
        broadened = widths_at_equal_parameters(
            planned, widths, reference, parameters=parameters, stages=cut, multiple_of=multiple_of
        )
    return DepthPlan(tuple(planned), broadened, parameters(planned, broadened), reference)


def widths_at_equal_parameters(
    depths: Sequence[int],
    widths: Sequence[int],
    target: float,
    *,
    parameters: CountParameters = chain_parameters,
    stages: Sequence[int] | None = None,
    multiple_of: int = 1,
) -> tuple[int, ...]:
    """Scale widths by one common factor so that a network of ``depths`` has ``target`` parameters.

    Args:
        depths: ``(S,)`` convolutions per stage of the new network.
        widths: ``(S,)`` widths to scale; their proportions are kept up to rounding.
        target: number of parameters wanted.
        parameters: counts them; must grow with every width.
        stages: indices of the stages that may change, all by default.
        multiple_of: what changed widths are multiples of.

    Returns:
        ``(S,)`` widths: among the roundings within 0.5 % of ``target`` the one nearest to a common factor, else the one
        nearest to ``target``.
    """
    _check_stages(depths, widths)
    free = list(range(len(widths))) if stages is None else list(stages)

    def rounded(factor: float) -> list[int]:
        scaled = list(widths)
        for stage in free:
            scaled[stage] = multiple_of * max(1, round(widths[stage] * factor / multiple_of))
        return scaled

    low, high = 2.0**-20, 2.0**20
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if parameters(depths, rounded(middle)) < target else (low, middle)
    factor = math.sqrt(low * high)

    def judged(candidate: list[int]) -> tuple[float, float]:
        error = abs(parameters(depths, candidate) / target - 1)
        unevenness = sum(math.log(candidate[stage] / (widths[stage] * factor)) ** 2 for stage in free)
        return (0.0, unevenness) if error <= _EQUAL else (error, unevenness)

    start = rounded(factor)
    # The last stages hold most parameters: rounding them matters most.
    searched = free[-_SEARCHED:]
    candidates = [start]
    for offsets in itertools.product(range(-2, 3), repeat=len(searched)):
        candidate = list(start)
        for stage, offset in zip(searched, offsets, strict=True):
            candidate[stage] = max(multiple_of, start[stage] + offset * multiple_of)
        candidates.append(candidate)
    return tuple(sorted(candidates, key=judged)[0])


def _check_stages(depths: Sequence[int], widths: Sequence[int]) -> None:
    if len(depths) != len(widths) or not depths:
        raise ValueError(f"depths and widths must name the same stages, got {len(depths)} and {len(widths)} of them")
    for name, values in (("depths", depths), ("widths", widths)):
        for value in values:
            check_integer(f"every entry of {name}", value, low=1)
