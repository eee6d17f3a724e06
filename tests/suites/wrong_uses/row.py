"""One wrong use, and what it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row of the table of wrong uses. The whole wording of its message is in ``messages.txt``.

    Attributes:
        use: what is done, in words; the test's id.
        act: does it.
        error: the exception, exactly this type.
        about: the argument, layer or file that the message names.
        fix: words of the way out that it names.
        foreign: the wording belongs to another package, and is not in ``messages.txt``.
    """

    use: str
    act: Callable[[], Any]
    error: type[BaseException]
    about: str
    fix: str
    foreign: bool = False
