"""Constructor arguments that are refused: those that all callbacks have, once, and each callback's own."""

from __future__ import annotations

from typing import Any

from lightning_filterdiv import FilterCallback, RePr, WeightAsynchronousUpdate
from tests.registry import ONE_EACH, Wrong
from tests.suites.wrong_uses.row import Row
from tests.suites.wrong_uses.support import net

#: ``FilterCallback`` checks these for every callback.
SHARED: tuple[Wrong, ...] = (
    ({"include": "layer1.*"}, TypeError, "write include=['layer1.*']"),
    ({"include": []}, ValueError, "use include=None"),
    ({"include": [3]}, TypeError, "a list of strings"),
    ({"exclude": "conv1"}, TypeError, "write exclude=['conv1']"),
    ({"check_ranks_every_n_steps": -5}, ValueError, ">= 0"),
)


def _refused(cls: type[FilterCallback], arguments: dict[str, Any], error: type[Exception], fix: str) -> Row:
    call = f"{cls.__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    return Row(call, lambda: cls(**arguments), error, next(iter(arguments)), fix)


CONSTRUCTOR_ARGUMENTS: list[Row] = [
    *(_refused(WeightAsynchronousUpdate, *wrong) for wrong in SHARED),
    *(_refused(case.cls, *wrong) for case in ONE_EACH for wrong in case.wrong),
    Row("RePr(network=net)", lambda: RePr(network=net()), TypeError, "network", "the name of a submodule"),
]
