"""Messages of wrong uses, word for word, in ``messages.txt``, so that a change of wording shows as prose in a diff.

python -m tests.suites.wrong_uses.messages   # writes the file anew
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from pathlib import Path

import torch

from tests.suites.wrong_uses.arguments import CONSTRUCTOR_ARGUMENTS
from tests.suites.wrong_uses.checkpoints import CHECKPOINT
from tests.suites.wrong_uses.command_line import COMMAND_LINE, CONFIGURATION
from tests.suites.wrong_uses.data import DATA
from tests.suites.wrong_uses.functional import FUNCTIONAL
from tests.suites.wrong_uses.row import Row

FILE = Path(__file__).with_name("messages.txt")
KINDS: dict[str, list[Row]] = {
    "constructor arguments": CONSTRUCTOR_ARGUMENTS,
    "configuration": CONFIGURATION,
    "command line": COMMAND_LINE,
    "checkpoint": CHECKPOINT,
    "data": DATA,
    "functional": FUNCTIONAL,
}
WRONG_USES = [row for rows in KINDS.values() for row in rows]


def caught(row: Row) -> BaseException:
    """The exception that the wrong use ends with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row.act()
        except (Exception, SystemExit) as error:
            return error
    raise AssertionError(f"{row.use} is not refused")


def wording(error: BaseException) -> str:
    """Its message in one line; a measured number, which rounding decides, as #."""
    said = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    said = " ".join(said.split())
    return re.sub(r"\b\d\.\de-\d\d\b", "#", said)


def stored() -> dict[str, str]:
    """Wrong use -> the message in the file."""
    paragraphs = FILE.read_text().strip().split("\n\n")
    return dict(paragraph.split("\n    ") for paragraph in paragraphs)  # type: ignore[misc]


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    paragraphs = []
    for row in WRONG_USES:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            if not row.foreign:
                paragraphs.append(f"{row.use}\n    {wording(caught(row))}\n")
    FILE.write_text("\n".join(paragraphs))


if __name__ == "__main__":
    main()
