"""Wrong uses: the exception's type, the argument, layer or file that its message names, and the fix.

``wrong_uses/messages.txt`` holds the whole wording, so that people can read it as text.
"""

from __future__ import annotations

import re

import pytest

from tests.suites.wrong_uses.messages import KINDS, WRONG_USES, caught, stored, wording
from tests.suites.wrong_uses.row import Row

#: What no message may show: the innards of Python, torch and of this package.
_INNARDS = re.compile(
    r"NoneType' object|object has no attribute|\[Errno|Traceback|<lambda>|0x[0-9a-f]{6}|KeyError|_\w+Impl"
)
STORED = stored()


@pytest.mark.parametrize("row", WRONG_USES, ids=lambda row: row.use)
def test_a_wrong_use_gets_these_words(row: Row) -> None:
    error = caught(row)
    assert type(error) is row.error
    said = wording(error)
    assert row.about in said
    assert row.fix in said
    assert not _INNARDS.search(said)
    if not row.foreign:
        assert said == STORED[row.use], "read the new words, then run python -m tests.suites.wrong_uses.messages"


def test_the_table_is_wide_and_its_messages_are_sentences() -> None:
    assert all(len(rows) >= 5 for rows in KINDS.values())
    uses = [row.use for row in WRONG_USES]
    assert len(set(uses)) == len(uses)
    assert STORED.keys() == {row.use for row in WRONG_USES if not row.foreign}
    assert all(len(message.split()) >= 5 for message in STORED.values())
    assert sum(row.foreign for row in WRONG_USES) <= 10
