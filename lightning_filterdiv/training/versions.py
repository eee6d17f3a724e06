"""The window of torch and lightning versions that the test suite was run with, and a warning outside it."""

from __future__ import annotations

import re
import warnings

import lightning
import torch

__all__ = ["TESTED", "check_versions"]

#: Package -> (lowest, newest) release, as (major, minor); a patch release counts as its minor one.
TESTED: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "torch": ((2, 6), (2, 15)),
    "lightning": ((2, 5), (2, 6)),
}


def check_versions(found: dict[str, str] | None = None) -> None:
    """Warn about every package that is older or newer than what was tested.

    Args:
        found: package -> version; ``None``: what is imported.

    Warns:
        UserWarning: one per package, with the window.
    """
    for package, version in (found or {"torch": torch.__version__, "lightning": lightning.__version__}).items():
        release = re.match(r"(\d+)\.(\d+)", version)
        low, high = TESTED[package]
        if release is None or low <= (int(release[1]), int(release[2])) <= high:
            continue  # a build from source may call itself anything
        older = (int(release[1]), int(release[2])) < low
        advice = f"install {package}>={low[0]}.{low[1]}" if older else "if a callback misbehaves, try one of these"
        window = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
        warnings.warn(
            f"lightning-filterdiv was tested with {package} {window}, this is {version}: {advice}",
            stacklevel=3,
        )
