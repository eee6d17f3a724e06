"""Wrong uses, and the words that each gets: the argument, layer or file meant, what was found, and what would do.

The table lies in ``tests/wrong_uses``, so that the messages can be read for what they are: text for a person.
"""

from __future__ import annotations

import re
import warnings

import pytest

from tests.suites.wrong_uses.arguments import CONSTRUCTOR_ARGUMENTS
from tests.suites.wrong_uses.checkpoints import CHECKPOINT
from tests.suites.wrong_uses.command_line import COMMAND_LINE, CONFIGURATION
from tests.suites.wrong_uses.data import DATA
from tests.suites.wrong_uses.functional import FUNCTIONAL
from tests.suites.wrong_uses.row import Row

KINDS = {
    "constructor arguments": CONSTRUCTOR_ARGUMENTS,
    "configuration": CONFIGURATION,
    "command line": COMMAND_LINE,
    "checkpoint": CHECKPOINT,
    "data": DATA,
    "functional": FUNCTIONAL,
}
WRONG_USES = [row for rows in KINDS.values() for row in rows]
#: What no message may show: the innards of Python, torch and of this package.
_INNARDS = re.compile(
    r"NoneType' object|object has no attribute|\[Errno|Traceback|<lambda>|0x[0-9a-f]{6}|KeyError|_\w+Impl"
)


@pytest.mark.parametrize("row", WRONG_USES, ids=lambda row: row.use)
def test_a_wrong_use_gets_these_words(row: Row) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(row.error) as caught:
            row.act()
    assert caught.type is row.error
    said = str(caught.value.args[0]) if isinstance(caught.value, KeyError) else str(caught.value)
    assert row.message in " ".join(said.split())


def test_the_table_is_wide_and_its_messages_are_sentences() -> None:
    assert len(WRONG_USES) >= 60
    assert all(len(rows) >= 5 for rows in KINDS.values())
    uses = [row.use for row in WRONG_USES]
    assert len(set(uses)) == len(uses)
    for row in WRONG_USES:
        assert len(row.message.split()) >= 5, row.use
        assert row.message == " ".join(row.message.split()), row.use
        assert not _INNARDS.search(row.message), row.use
