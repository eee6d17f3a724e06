"""SIGKILL at random moments, inside a step or a checkpoint's file: the resumed run ends like an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.registry import CASES
from tests.support.killed import PHASES, STEPS, Moment, moments, newest, run
from tests.support.training import differing

pytestmark = pytest.mark.soak
MOMENTS = 20
TOGETHER = [("csgd", "wau"), ("basis", "repr"), ("basis", "repr", "monitor")]
NAMES = [*((case.name,) for case in CASES), *TOGETHER]


def final(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"final{rank}.pt", weights_only=True)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_killed_runs_end_like_whole_ones(names: tuple[str, ...], ranks: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert run(names, whole, ranks=ranks) == [0] * ranks
    for number, moment in enumerate(moments(sum(map(len, names)) + ranks, MOMENTS, ranks)):
        folder = tmp_path / str(number)
        codes = run(names, folder, moment, ranks)
        assert codes[moment.rank] == -9, f"{moment} was not reached: {codes}"
        assert not list(folder.glob("final*.pt"))
        saved = newest(folder)
        assert run(names, folder, ranks=ranks) == [0] * ranks, f"{moment}: the resume failed"
        for rank in range(ranks):
            # Running statistics belong to a rank; after the last checkpoint no step is left, and all have rank 0's.
            ended = saved is not None and saved.stem == f"step={STEPS}"
            wrong = differing(final(whole, 0 if ended else rank), final(folder, rank))
            assert not wrong, f"{moment}, resumed from {saved}: {wrong}"


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)], ids=["one then two", "two then one"])
@pytest.mark.parametrize("names", [(), *NAMES], ids="+".join)
def test_a_run_goes_on_with_another_number_of_ranks(
    names: tuple[str, ...], ranks: tuple[int, int], tmp_path: Path
) -> None:
    """Killed in its second epoch and resumed on fewer or more processes, it ends as if nothing had been."""
    before, after = ranks
    assert run(names, tmp_path / "whole") == [0]
    moment, folder = Moment(9, "batch end", before - 1), tmp_path / "cut"
    assert run(names, folder, moment, before, same_data=True)[moment.rank] == -9
    saved = newest(folder)
    assert saved is not None
    assert saved.stem in ("step=8", "step=10")  # rank 0 may be one step ahead of the other
    assert run(names, folder, ranks=after, same_data=True) == [0] * after
    for rank in range(after):
        wrong = differing(final(tmp_path / "whole", 0), final(folder, rank))
        assert not wrong, wrong


def test_the_harness_kills_where_it_says(tmp_path: Path) -> None:
    """Without a callback every phase is reached, and a half-written checkpoint never bears a checkpoint's name."""
    assert run((), tmp_path / "whole") == [0]
    for phase in PHASES:
        folder = tmp_path / phase.replace(" ", "-")
        assert run((), folder, Moment(7, phase)) == [-9]
        saved = newest(folder)
        assert saved is not None
        assert saved.stem == "step=6"
        assert run((), folder) == [0]
        assert not differing(final(tmp_path / "whole", 0), final(folder, 0))


def test_moments_cover_the_run() -> None:
    drawn = [moment for seed in range(10) for moment in moments(seed, MOMENTS, 2)]
    assert {moment.phase for moment in drawn} == set(PHASES)
    assert {moment.rank for moment in drawn} == {0, 1}
    assert min(m.step for m in drawn) == 0
    assert max(m.step for m in drawn) == STEPS - 1
