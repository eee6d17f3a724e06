"""Checks of constructor arguments: every error names the argument, what it may be, and what was given."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TypeVar, get_args

from torch import Tensor, nn

T = TypeVar("T")

__all__ = [
    "check_checkpoint",
    "check_choice",
    "check_flag",
    "check_integer",
    "check_module",
    "check_number",
    "check_tensor",
]


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    low: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
) -> float:
    """Return ``value`` as a float if it is a finite number with ``above < value < below``, ``low <= value <= high``.

    Raises:
        TypeError: not a number.
        ValueError: NaN, infinite or out of range.
    """
    lower = f"{above:g} < {name}" if above > -math.inf else f"{low:g} <= {name}" if low > -math.inf else name
    allowed = lower + (f" <= {high:g}" if high < math.inf else f" < {below:g}" if below < math.inf else "")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number ({allowed}), got {_in_one_line(value)}")
    # Unlike math.isfinite, the comparison also takes integers that are too large for a float; NaN fails it.
    if not abs(value) <= sys.float_info.max or not (above < value < below and low <= value <= high):
        raise ValueError(f"{name} must be a finite number with {allowed}, got {_in_one_line(value)}")
    return float(value)


def check_integer(name: str, value: object, *, low: int) -> int:
    """Return ``value`` if it is an integer ``>= low``.

    Raises:
        TypeError: not an integer.
        ValueError: below ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer >= {low}, got {_in_one_line(value)}")
    if value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {_in_one_line(value)}")
    return value


def check_flag(name: str, value: object) -> bool:
    """Return ``value`` if it is ``True`` or ``False``.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_in_one_line(value)}")
    return value


def _in_one_line(value: object) -> str:
    """Return ``repr(value)`` without the line breaks of a tensor."""
    return " ".join(repr(value).split())


def check_choice(name: str, value: T, choices: object) -> T:
    """Return ``value`` if it is one of the values of the ``Literal`` type ``choices``.

    Raises:
        ValueError: it is not; the message lists the choices.
    """
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {_in_one_line(value)}")
    return value


def check_module(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a ``torch.nn.Module``."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}; build the network first")


def check_checkpoint(value: object) -> None:
    """Raise TypeError unless ``value`` is a loaded checkpoint."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"checkpoint must be what torch.load(path, weights_only=True) returns, got {type(value).__name__}"
        )


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}; torch.as_tensor(...) makes one of numbers"
        )
