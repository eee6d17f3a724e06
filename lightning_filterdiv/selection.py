"""Choose layers by shell-style patterns on their names, and report those that cannot be used.

This module is independent of kinds of layers. The caller passes the candidates by name and a function that finds
obstacles.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["NoLayersError", "Obstacle", "check_patterns", "match_pattern", "quote_names", "select_layers"]

T = TypeVar("T")


class NoLayersError(ValueError):
    """No layer is left to act on. The message lists the available names and the closest match to each pattern."""


class Obstacle(NamedTuple):
    """Reason why a layer cannot be used, and the fix.

    Attributes:
        reason: a predicate whose subject is the layer: "is quantised".
        fix: an instruction to the user: "train the float network".
    """

    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.fix}"


def check_patterns(argument: str, patterns: object) -> list[str] | None:
    """Return ``patterns`` as a list of strings, or raise an error that names ``argument``.

    Raises:
        TypeError: not ``None`` and not a list of strings (a bare string would be read letter by letter).
        ValueError: an empty ``include``, which selects nothing.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise TypeError(
            f"{argument} must be a list of name patterns such as ['layer1.*'], got {patterns!r}; "
            f"write {argument}=[{patterns!r}] for a single pattern"
        )
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} must be a list of strings, got {list(patterns)!r}")
    if not patterns and argument == "include":
        raise ValueError("include=[] selects no layer; use include=None for the default layers")
    return list(patterns)


def quote_names(names: Sequence[str], limit: int = 12) -> str:
    """Return quoted names for a message, at most ``limit`` of them."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    # fnmatch.filter would ignore the case of letters on Windows.
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _no_match(argument: str, pattern: str, noun: str, names: Sequence[str]) -> str:
    """Return the message for a pattern that matches nothing, with the closest name."""
    if any(name.startswith(f"{pattern}.") for name in names):
        hint = f"; '{pattern}' is a parent module, did you mean '{pattern}.*'?"
    elif suffixed := _matching(f"*.{pattern}", names):
        hint = f"; did you mean '*.{pattern}' (it matches {suffixed[0]!r})?"
    else:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
        hint = f"; the closest name is {near[0]!r}" if near else ""
    return f"{argument} pattern {pattern!r} matches no {noun}{hint}"


def match_pattern(
    pattern: str, names: Sequence[str], *, argument: str, noun: str, error: type[ValueError] = NoLayersError
) -> list[str]:
    """Return the names that ``pattern`` matches, in their order.

    Args:
        pattern: shell-style; ``*`` also crosses dots.
        names: the candidates.
        argument: the user's argument that holds the pattern, for the message.
        noun: kind of candidate in the singular, for the message.
        error: class of the error.

    Raises:
        ``error``: it matches nothing. The message gives the closest name and the available names.
    """
    if matched := _matching(pattern, names):
        return matched
    raise error(f"{_no_match(argument, pattern, noun, names)}. Available: {quote_names(names)}")


def select_layers(
    candidates: Mapping[str, T],
    include: object,
    exclude: object,
    *,
    noun: str,
    is_default: Callable[[T], bool],
    no_default: str,
    find_obstacle: Callable[[str, T], Obstacle | None],
) -> dict[str, T]:
    """Select candidates by patterns on their names; those with an obstacle are left out with a warning.

    Args:
        candidates: name -> any description of a layer.
        include: patterns; ``None``: every candidate that ``is_default`` takes.
        exclude: patterns of candidates to leave out.
        noun: kind of candidate in the singular, for messages.
        is_default: tells if ``include=None`` selects a candidate.
        no_default: message for the case that ``include=None`` selects none of the candidates, with the fix.
        find_obstacle: name and candidate -> obstacle; ``None`` if the candidate can be used. It may raise instead.

    Returns:
        The selected candidates, in their order.

    Warns:
        UserWarning: candidates are left out, by name; a pattern of ``exclude`` matches nothing.

    Raises:
        TypeError, ValueError: see :func:`check_patterns`.
        NoLayersError: a pattern of ``include`` matches nothing, or no candidate is left.
    """
    included, excluded = check_patterns("include", include), check_patterns("exclude", exclude)
    names = list(candidates)
    if included is None:
        chosen = {name for name, candidate in candidates.items() if is_default(candidate)}
    else:
        chosen = {n for pattern in included for n in match_pattern(pattern, names, argument="include", noun=noun)}
    nothing = f"exclude leaves no {noun}" if chosen else no_default
    for pattern in excluded or ():
        if not (matched := _matching(pattern, names)):
            warnings.warn(_no_match("exclude", pattern, noun, names), stacklevel=3)
        chosen.difference_update(matched)
    selected: dict[str, T] = {}
    left_out: dict[Obstacle, list[str]] = {}
    for name in names:
        if name in chosen:
            obstacle = find_obstacle(name, candidates[name])
            if obstacle is None:
                selected[name] = candidates[name]
            else:
                left_out.setdefault(obstacle, []).append(name)
    for obstacle, layers in left_out.items():
        warnings.warn(f"left out, because each {obstacle.reason}: {quote_names(layers)}; {obstacle.fix}", stacklevel=3)
    if not selected:
        reason = f"every selected layer {', or '.join(map(str, left_out))}" if left_out else nothing
        raise NoLayersError(f"no layer is left: {reason}" + (f". Available: {quote_names(names)}" if names else ""))
    return selected
