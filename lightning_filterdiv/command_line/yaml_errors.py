"""Find the cause in an error of jsonargparse, which lists every type that a value failed to match."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re

import yaml

__all__ = ["find_cause"]

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_SUBTYPES = re.compile(r"Subtypes: \[(.*)\]$")
_GIVEN = re.compile(r"Given value: (.*)")
_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_UNKNOWN = re.compile(r"Option '([^']+)' is not accepted|Key '([^']+)' is not expected")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)|No (?:\S+ attribute|module named) '?([^']+?)'?$")
_NO_MAPPING = re.compile(r"'(\w+)' object has no attribute 'keys'")
#: Names by which a class is written in YAML.
_CLASS_ENTRIES = {"class_path", "init_args", "dict_kwargs"}
_MIXED = "an entry with class_path and other names; write the arguments of the class under init_args"
#: Types that are written as a plain value. Where one is allowed, a word need not be the name of a class.
_PLAIN = {f"<class '{name}'>" for name in ("int", "float", "str")}
#: Characters of a given value that a message shows.
_LONGEST = 200


def find_cause(message: str) -> str:
    """Return the cause in one line: where, what is expected, what was given.

    jsonargparse indents its message. Below a key stands the error of its value. If several types are allowed, one error
    of each follows. We follow the first class that was found, down to the innermost key.

    Args:
        message: text of an error of jsonargparse.

    Returns:
        For example ``"trainer.callbacks: RePr: full_epochs must be int or float, got 'many'"``. ``""`` if the message
        has another form; it then has to speak for itself.
    """
    block = message.splitlines()
    where: list[str] = []
    owner = ""
    while block and (key := _KEY.match(_bare(block[0]))):
        where.append(key[1])
        block = _below(block, 0)
        at = next((at for at, line in enumerate(block) if _CLASS.match(_bare(line))), None)
        if at is not None:
            owner = _CLASS.match(_bare(block[at]))[1]  # type: ignore[index]
            where.append(owner.rpartition(".")[2])
            block = _below(block, at)
    reason = _reason([_bare(line) for line in block], owner) if where else ""
    if reason.startswith("there is no class"):
        return f"{where[0]}: {reason}"
    return f"{': '.join(where)} {reason}" if reason else ""


def _bare(line: str) -> str:
    return line.strip().removeprefix("- ")


def _below(lines: list[str], at: int) -> list[str]:
    """Return the lines after ``at`` that are indented further, without empty ones."""
    indent = len(lines[at]) - len(lines[at].lstrip(" -"))
    below = []
    for line in filter(str.strip, lines[at + 1 :]):
        if len(line) - len(line.lstrip(" ")) < indent:
            break
        below.append(line)
    return below


def _reason(lines: list[str], owner: str) -> str:
    """Return what is wrong with the value of the innermost key, or ``""``."""
    first = lines[0] if lines else ""
    if unknown := _UNKNOWN.match(first):
        return _not_accepted(unknown[1] or unknown[2], owner)
    if missing := _NO_CLASS.match(first):
        return f"there is no class {(owner or missing[1] or missing[2])!r}" + _similar(owner)
    if mapping := _NO_MAPPING.match(first):
        return f"needs a mapping of argument names to values as init_args, got a {mapping[1]}"
    if expected := _TYPE.match(first):
        return f"must be {_types([expected[1]])}, got {_value(expected[2])}"
    subtypes = [match[1] for line in lines if (match := _SUBTYPES.match(line))]
    given = [match[1] for line in lines if (match := _GIVEN.match(line))]
    if not subtypes or not given:
        return ""
    allowed = _split(subtypes[0])
    missed = [match[1] or match[2] for line in lines if (match := _NO_CLASS.match(line))]
    if missed and not {*allowed} & _PLAIN:
        return f"there is no class {missed[0]!r}"
    if _has_further_names(given[-1]):
        return f"has {_MIXED}"
    return f"must be {_types(allowed)}, got {_value(given[-1])}"


def _has_further_names(text: str) -> bool:
    """True if a class in a list, or alone, has entries beside those by which a class is written."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    entries = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, dict)]
    return any("class_path" in entry and {*entry} - _CLASS_ENTRIES for entry in entries)


def _not_accepted(option: str, owner: str) -> str:
    if option == "class_path":  # beside names that are no part of how a class is written
        return f"is {_MIXED}"
    module, _, name = owner.rpartition(".")
    try:
        known = [*inspect.signature(getattr(importlib.import_module(module), name)).parameters]
    except (ImportError, AttributeError, TypeError, ValueError):
        known = []
    near = difflib.get_close_matches(option, [*known, "class_path", "init_args"], n=1)
    return f"has no argument {option!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _similar(owner: str) -> str:
    """Return the end of a message about a class that its module does not have."""
    module, _, name = owner.rpartition(".")
    try:
        near = difflib.get_close_matches(name, dir(importlib.import_module(module)), n=1)
    except (ImportError, ValueError):
        near = []
    return f"; did you mean {near[0]!r}?" if near else ""


def _split(types: str) -> list[str]:
    """Return the types of a list, which are separated by commas outside brackets."""
    parts, depth = [""], 0
    for character in types:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _types(types: list[str]) -> str:
    """Return types as a user writes them; the choices of several ``Literal`` types as one list."""
    choices: list[str] = []
    names: list[str] = []
    for kind in types:
        if literal := re.fullmatch(r"(?:typing\.)?Literal\[(.+)\]", kind):
            choices += literal[1].split(", ")
        else:
            name = re.sub(r"<class '([\w.]+)'>", r"\1", kind)
            names.append(re.sub(r"(?:\w+\.)+(\w+)", r"\1", name).replace("NoneType", "null"))
    return " or ".join([*([f"one of {', '.join(choices)}"] if choices else []), *names])


def _value(text: str) -> str:
    """Return a value as it stands in YAML, words in quotes."""
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    try:
        return repr(shown) if isinstance(yaml.safe_load(shown), str) else shown
    except yaml.YAMLError:
        return shown
