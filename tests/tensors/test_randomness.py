"""Draws are functions of their key and leave the global generators alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_filterdiv.tensors.randomness import keyed_generator, stage

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
keys = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=8), max_size=4).map(tuple)


def draw(*key: int | str, n: int = 8) -> list[float]:
    return torch.rand(n, generator=keyed_generator(*key)).tolist()


@PROPERTY
@given(keys, keys)
def test_equal_keys_give_equal_draws_and_other_keys_give_others(
    one: tuple[int | str, ...], two: tuple[int | str, ...]
) -> None:
    assert draw(*one) == draw(*one)
    assert (draw(*one) == draw(*two)) == (one == two)


@pytest.mark.parametrize(
    ("one", "two"),
    [((1, 23), (12, 3)), ((1, 2), (2, 1)), ((1,), ("1",)), (("a", "b"), ("ab",)), ((0,), (2**32,)), ((0, ""), (0,))],
)
def test_keys_that_look_alike_are_told_apart(one: tuple[int | str, ...], two: tuple[int | str, ...]) -> None:
    assert draw(*one) != draw(*two)


def test_known_draw() -> None:
    """Pinned, so that a resumed run on another machine or release draws what the first one drew."""
    assert torch.randint(1000, (5,), generator=keyed_generator(0, "stream", 7)).tolist() == [755, 941, 386, 981, 307]


def test_neighbouring_keys_are_uncorrelated() -> None:
    n = 4000
    draws = torch.stack([torch.rand(2, generator=keyed_generator(0, "", step)) for step in range(n)])
    series = {"first": draws[:, 0], "second": draws[:, 1]}
    for values in series.values():
        assert abs(values.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / n**0.5
        assert abs(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]) < 4 / n**0.5
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 4 / n**0.5


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(3, "x")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert draw(3, "x") == first


def test_generators_live_on_the_cpu() -> None:
    with torch.device("meta"):
        assert keyed_generator(0).device.type == "cpu"


def test_stage_copies_nothing_on_the_cpu_and_moves_elsewhere() -> None:
    tensor = torch.tensor([True, False])
    assert stage(tensor, torch.device("cpu")) is tensor
    moved = stage(tensor, torch.device("meta"))
    assert (moved.device.type, moved.shape, moved.dtype) == ("meta", tensor.shape, tensor.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_stage_does_not_wait_for_the_gpu() -> None:
    tensor = torch.arange(10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = stage(tensor, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.cpu(), tensor)
