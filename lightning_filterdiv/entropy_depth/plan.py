"""Plan a shallower, broader network with as many parameters: cut depths to the bound and solve for the widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_filterdiv.tensors.arguments import check_integer

__all__ = ["DepthPlan", "chain_parameters", "plan_depth"]

#: ``(depths, widths) -> number of parameters`` of a network with these stages.
CountParameters = Callable[[Sequence[int], Sequence[int]], float]


class DepthPlan(NamedTuple):
    """Stages of a network after :func:`plan_depth`.

    Attributes:
        depths: convolutions per stage, none above the bound.
        widths: filters per convolution and stage.
        parameters: parameters of the planned network, by the counting function.
        reference: parameters of the network before.
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
        channels: channels of the input image.
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

    Stages within the bound keep depth and width. All others are broadened by one common factor ``f``, then rounded. The
    parameters of a network of convolutions are a quadratic function of ``f``, which three counts determine. The EBCLE
    paper (Gowdra et al. 2021) claims that depth beyond the bound is better spent on width. This width rule is ours.

    Args:
        depths: ``(S,)`` convolutions per stage.
        widths: ``(S,)`` filters per convolution in each stage.
        bound: largest number of convolutions per stage, from :func:`estimate_depth_bound`.
        parameters: function that counts the parameters for given depths and widths; the default counts a plain chain.
        multiple_of: changed widths are multiples of this number (8 suits tensor cores). Rounding a width ``w`` to it
            changes its share of the parameters by up to ``multiple_of / w``.

    Raises:
        ValueError: no stage, lists of different length, or numbers below 1.
        TypeError: not integers.
    """
    if len(depths) != len(widths) or not depths:
        raise ValueError(f"depths and widths must name the same stages, got {len(depths)} and {len(widths)} of them")
    for name, values in (("depths", depths), ("widths", widths)):
        for value in values:
            check_integer(f"every entry of {name}", value, low=1)
    check_integer("bound", bound, low=1)
    check_integer("multiple_of", multiple_of, low=1)
    planned = [min(depth, bound) for depth in depths]

    def broadened(factor: float, multiple: int = 1) -> list[int]:
        return [
            width if depth <= bound else multiple * max(1, round(width * factor / multiple))
            for depth, width in zip(depths, widths, strict=True)
        ]

    reference = parameters(depths, widths)
    if max(depths) <= bound:
        return DepthPlan(tuple(planned), tuple(widths), reference, reference)
    # a + b f + c f^2, from f = 1, 2, 3. This form of the root also holds for c = 0.
    once, twice, thrice = (parameters(planned, broadened(factor)) for factor in (1, 2, 3))
    c = (thrice - 2 * twice + once) / 2
    b = twice - once - 3 * c
    missing = reference - (once - b - c)
    factor = 2 * missing / (b + math.sqrt(b * b + 4 * c * missing))
    new_widths = broadened(factor, multiple_of)
    return DepthPlan(tuple(planned), tuple(new_widths), parameters(planned, new_widths), reference)
