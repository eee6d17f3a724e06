"""Work divided among ranks, here threads that play them. What processes send is tested with the DDP tests."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_filterdiv.tensors import sharing
from lightning_filterdiv.tensors.rank_check import RankDivergenceError
from lightning_filterdiv.tensors.sharing import divide, share

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
COSTS = st.dictionaries(st.text("abcdef", min_size=1), st.floats(0, 1e6), max_size=7)
T = TypeVar("T")


def loads(costs: dict[str, float], parts: list[list[str]]) -> list[float]:
    return [sum(costs[item] for item in part) for part in parts]


@PROPERTY
@given(COSTS, st.integers(1, 9))
def test_every_item_is_in_one_share_in_order(costs: dict[str, float], shares: int) -> None:
    parts = divide(costs, shares)
    assert len(parts) == shares
    assert sorted(itertools.chain(*parts)) == sorted(costs)
    assert all(part == [item for item in costs if item in part] for part in parts)


@PROPERTY
@given(COSTS, st.integers(1, 3))
def test_the_dearest_share_is_within_four_thirds_of_the_best(costs: dict[str, float], shares: int) -> None:
    best = min(
        (
            max(loads(costs, [[i for i, at in zip(costs, ats, strict=True) if at == share] for share in range(shares)]))
            for ats in itertools.product(range(shares), repeat=len(costs))
        ),
        default=0.0,
    )
    assert max(loads(costs, divide(costs, shares))) <= 4 / 3 * best * (1 + 1e-9)


def test_ties_go_to_the_first() -> None:
    costs = dict.fromkeys("abcdef", 1.0)
    assert divide(costs, 2) == [["a", "c", "e"], ["b", "d", "f"]]
    assert divide({"a": 1.0, "b": 5.0, "c": 2.0, "d": 2.0}, 2) == [["b"], ["a", "c", "d"]]


class Ranks:
    """Threads that each believe to be a rank; what they exchange goes over a board."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
        self.world, self.local = world, threading.local()
        self.board: dict[int, bytes] = {}
        self.barrier = threading.Barrier(world, timeout=20)
        monkeypatch.setattr(sharing.dist, "get_rank", lambda: self.local.rank)
        monkeypatch.setattr(sharing.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(sharing, "_exchange", self.exchange)

    def exchange(self, mine: bytes) -> list[bytes]:
        self.board[self.local.rank] = mine
        self.barrier.wait()
        return [self.board[rank] for rank in range(self.world)]

    def run(self, action: Callable[[int], T]) -> list[T | Exception]:
        answers: list[Any] = [None] * self.world

        def work(rank: int) -> None:
            self.local.rank = rank
            try:
                answers[rank] = action(rank)
            except Exception as error:
                answers[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


COST = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.0}


def test_alone_items_are_computed_in_order_and_errors_pass() -> None:
    seen: list[str] = []
    assert list(share(COST, lambda item: seen.append(item) or item.upper(), among_ranks=False)) == list("abcd")
    assert seen == list("abcd")
    with pytest.raises(ZeroDivisionError):
        share(COST, lambda item: 1 / 0, among_ranks=False)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_rank_gets_everything_and_computes_its_share(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    seen: list[list[str]] = [[] for _ in range(world)]

    def action(rank: int) -> dict[str, torch.Tensor]:
        return share(COST, lambda item: seen[rank].append(item) or torch.full((2,), COST[item]), among_ranks=True)

    for answer in Ranks(monkeypatch, world).run(action):
        assert isinstance(answer, dict)
        assert list(answer) == list(COST)
        assert all(answer[item].tolist() == [cost, cost] for item, cost in COST.items())
    assert seen == divide(COST, world)


class UnpicklableError(Exception):
    """Cannot be made again from its message."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("layer c is broken"), (ValueError, "layer c is broken")),
        (UnpicklableError("layer", "c"), (RuntimeError, "UnpicklableError: layer c")),
    ],
)
def test_all_ranks_raise_the_error_of_the_first_item_that_failed(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: tuple[type[Exception], str]
) -> None:
    def compute(item: str) -> str:
        if item == "c":
            raise error
        if item == "d":
            raise KeyError("a later item")
        return item

    assert divide(COST, 3) == [["a"], ["b", "c"], ["d"]]
    answers = Ranks(monkeypatch, 3).run(lambda rank: share(COST, compute, among_ranks=True))
    assert [(type(answer), str(answer)) for answer in answers] == [expected] * 3
    assert [getattr(answer, "__cause__", None) is error for answer in answers] == [False, True, False]


def test_a_result_that_cannot_be_sent_ends_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = Ranks(monkeypatch, 2).run(lambda rank: share(COST, lambda item: lambda: item, among_ranks=True))
    assert all(isinstance(answer, RuntimeError) and "lambda" in str(answer) for answer in answers), answers


def test_ranks_with_other_layers_are_refused_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def action(rank: int) -> dict[str, str]:
        return share(COST if rank != 1 else COST | {"a": 4.0}, lambda item: item, among_ranks=True)

    answers = Ranks(monkeypatch, 3).run(action)
    assert all(isinstance(answer, RankDivergenceError) for answer in answers), answers
