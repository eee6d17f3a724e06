"""Find the cause in an error of jsonargparse, whose list of all types that did not fit buries it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re

__all__ = ["find_cause"]

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_TYPE = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_GIVEN = re.compile(r"Given value: (.*)")
_UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|Key '([^']+)' is not expected")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)|No (?:\S+ attribute|module named) '?([^']+?)'?$")
#: Lines that say nothing about the cause; the one about a path is what a flag gets that names a class.
_STRUCTURE = ("Does not validate", "Subtypes:", "Errors:", "Expected a path but ")


def find_cause(message: str) -> str:
    """Return the cause in one line: where, what is expected, what was given.

    Args:
        message: of an error of jsonargparse.

    Returns:
        For example ``"trainer.callbacks: RePr: full_epochs must be int or float, got 'many'"``. ``""`` if the message
        has another form; it then has to speak for itself.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    where: list[str] = []
    owner = ""
    for index, line in enumerate(lines):
        if key := _KEY.match(line):
            where.append(key[1])
        elif given := _CLASS.match(line):
            owner = given[1]
            where.append(owner.rpartition(".")[2])
        elif line and not line.startswith(_STRUCTURE):
            reason = _reason(lines[index:], owner)
            if not where or not reason:
                return ""
            if reason.startswith("there is no class"):
                return f"{where[0]}: {reason}"
            return f"{': '.join(where)} {reason}"
    return ""


def _reason(lines: list[str], owner: str) -> str:
    if unknown := _UNKNOWN.match(lines[0]):
        return _not_accepted(unknown[1] or unknown[2], owner)
    if missing := _NO_CLASS.match(lines[0]):
        return f"there is no class {(owner or missing[1] or missing[2])!r}" + _similar(owner)
    types: list[str] = []
    for line in lines:
        if expected := _TYPE.match(line):
            types.append(_plain(expected[1]))
            if expected[2] is not None:
                return f"must be {' or '.join(types)}, got {expected[2]!r}"
        elif given := _GIVEN.match(line):
            return f"must be {' or '.join(types)}, got {given[1]!r}" if types else ""
    return ""


def _not_accepted(option: str, owner: str) -> str:
    module, _, name = owner.rpartition(".")
    try:
        known = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        known = []
    near = difflib.get_close_matches(option, known, n=1)
    return f"has no argument {option!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _similar(owner: str) -> str:
    """End of a message about a class that its module does not have."""
    module, _, name = owner.rpartition(".")
    try:
        near = difflib.get_close_matches(name, dir(importlib.import_module(module)), n=1)
    except (ImportError, ValueError):
        near = []
    return f"; did you mean {near[0]!r}?" if near else ""


def _plain(kind: str) -> str:
    """A type as a user writes it."""
    if choices := re.fullmatch(r"typing\.Literal\[(.+)\]", kind):
        return f"one of {choices[1]}"
    name = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind)
    return "null" if name == "NoneType" else name
