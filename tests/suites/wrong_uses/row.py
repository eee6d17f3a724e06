"""One wrong use, and what it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row of the table of wrong uses.

    Attributes:
        use: what is done, in words; the test's id.
        act: does it.
        error: the exception, exactly this type.
        message: its message, or the part of it that is not a list of options.
    """

    use: str
    act: Callable[[], Any]
    error: type[BaseException]
    message: str
