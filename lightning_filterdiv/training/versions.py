"""Versions of torch and lightning that the test suite was run with, and a warning outside them."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

__all__ = ["TESTED", "check_versions", "warn_once_about_versions"]

#: Package -> (lowest, newest) release, as (major, minor); a patch release counts as its minor one.
TESTED: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "torch": ((2, 6), (2, 15)),
    "lightning": ((2, 5), (2, 6)),
}


@functools.cache
def warn_once_about_versions() -> None:
    """Warn about installed versions outside the tested ones. Only the first call does something.

    Warns:
        UserWarning: see :func:`check_versions`.
    """
    check_versions(_installed())


def check_versions(found: Mapping[str, str]) -> None:
    """Warn about every package that is older or newer than what was tested.

    Args:
        found: package -> version, for packages of :data:`TESTED`.

    Warns:
        UserWarning: one per package, with the tested versions and what to do.
    """
    for package, text in found.items():
        release = re.match(r"(\d+)\.(\d+)", text)
        low, high = TESTED[package]
        if release is None or low <= (int(release[1]), int(release[2])) <= high:
            continue  # a build from source may have any version string
        older = (int(release[1]), int(release[2])) < low
        advice = f"install {package}>={low[0]}.{low[1]}" if older else "if a callback misbehaves, try one of these"
        window = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
        warnings.warn(f"lightning-filterdiv was tested with {package} {window}, this is {text}: {advice}", stacklevel=2)


def _installed() -> dict[str, str]:
    """Return package -> version, without packages that no installer recorded."""
    found = {}
    for package in TESTED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
