"""Errors of constructor arguments name the argument, what it may be and what was given."""

from __future__ import annotations

import math
import re
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer, check_number

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


@PROPERTY
@given(st.floats(0, 1, exclude_min=True) | st.just(1))
def test_a_number_in_range_comes_back_as_a_float(value: float) -> None:
    checked = check_number("fraction", value, above=0, high=1)
    assert checked == value
    assert type(checked) is float


@PROPERTY
@given(st.floats() | st.integers())
def test_a_number_is_accepted_exactly_inside_its_interval(value: float) -> None:
    inside = math.isfinite(value) and -2 <= value <= 3 if isinstance(value, float) else -2 <= value <= 3
    if inside:
        assert check_number("x", value, low=-2, high=3) == value
    else:
        with pytest.raises(ValueError, match="x must be a finite number with -2 <= x <= 3, got"):
            check_number("x", value, low=-2, high=3)


@pytest.mark.parametrize(
    ("value", "bounds", "allowed"),
    [
        (0, {"above": 0, "high": 1}, "0 < x <= 1"),
        (1.5, {"above": 0, "high": 1}, "0 < x <= 1"),
        (-0.5, {"low": 0}, "0 <= x"),
        (2, {"high": 1}, "x <= 1"),
        (math.nan, {}, "x"),
        (math.inf, {}, "x"),
        (-math.inf, {"high": 1}, "x <= 1"),
        pytest.param(10**400, {"low": 0}, "0 <= x", id="integer-beyond-floats"),
    ],
)
def test_a_number_out_of_range_is_refused(value: float, bounds: dict[str, float], allowed: str) -> None:
    message = f"x must be a finite number with {allowed}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_number("x", value, **bounds)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        check_number("x", value, above=0, high=1)
    assert str(caught.value) == f"x must be a number (0 < x <= 1), got {value!r}"


def test_integers() -> None:
    assert check_integer("n", 0, low=0) == 0
    assert check_integer("n", 2**70, low=1) == 2**70
    with pytest.raises(ValueError, match=r"^n must be an integer >= 1, got 0$"):
        check_integer("n", 0, low=1)


@pytest.mark.parametrize("value", [1.0, "1", None, True])
def test_what_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=f"^n must be an integer >= 0, got {re.escape(repr(value))}$"):
        check_integer("n", value, low=0)


def test_flags() -> None:
    assert check_flag("f", True) is True
    assert check_flag("f", False) is False


@pytest.mark.parametrize("value", [0, 1, None, "false", []])
def test_what_is_no_flag_is_refused(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        check_flag("f", value)
    assert str(caught.value) == f"f must be True or False, got {value!r}"


def test_choices() -> None:
    assert check_choice("axis", "in", Literal["out", "in"]) == "in"


@pytest.mark.parametrize("value", ["OUT", "", None, 0, ["out"]])
def test_what_is_no_choice_is_refused(value: object) -> None:
    message = f"axis must be one of 'out', 'in', got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_choice("axis", value, Literal["out", "in"])
