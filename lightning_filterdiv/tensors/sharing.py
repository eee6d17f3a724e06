"""Divide work on layers among ranks. Each rank computes a part, and all ranks get every result.

A result must depend on its own layer alone. Its bits then do not depend on the number of ranks.
"""

from __future__ import annotations

import heapq
import pickle
import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lightning_filterdiv.tensors.rank_check import RankDivergenceError

__all__ = ["divide", "share"]

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def divide(costs: Mapping[K, float], shares: int) -> list[list[K]]:
    """Divide items into shares that cost about the same.

    Items are taken from the most to the least expensive; each goes to the share with the lowest cost so far (Graham
    1969: the largest share costs at most 4/3 of the optimum). Ties go to the first item and the first share.

    Args:
        costs: item -> estimated cost, in any unit.
        shares: their number, at least 1. With more shares than items some are empty.

    Returns:
        Items of each share, in the order of ``costs``.
    """
    loads = [(0.0, index) for index in range(shares)]
    taken: dict[K, int] = {}
    for item in sorted(costs, key=lambda item: -costs[item]):
        load, index = loads[0]
        taken[item] = index
        heapq.heapreplace(loads, (load + costs[item], index))
    return [[item for item in costs if taken[item] == index] for index in range(shares)]


def share(costs: Mapping[K, float], compute: Callable[[K], T], *, among_ranks: bool) -> dict[K, T]:
    """Compute a result for every item; with ``among_ranks`` each item on one rank only.

    Args:
        costs: item -> estimated cost, the same on all ranks.
        compute: item -> result, which can be pickled. It must depend on the item alone. Tensors in it are on the CPU.
        among_ranks: divide the items among the ranks of the default process group, all of which must call this. It
            sends the results once to every rank. Otherwise everything is computed here.

    Returns:
        Item -> result, in the order of ``costs``, the same on every rank.

    Raises:
        Exception: what ``compute`` raised for the first item that failed, on every rank; one that cannot be pickled
            becomes a RuntimeError.
        RankDivergenceError: on every rank, if ``costs`` differ between ranks.
    """
    if not among_ranks:
        return {item: compute(item) for item in costs}
    results: dict[K, T] = {}
    failure: tuple[int, Exception] | None = None
    for item in divide(costs, dist.get_world_size())[dist.get_rank()]:
        try:
            results[item] = compute(item)
        except Exception as error:  # the other ranks wait for this one and must learn of the error
            failure = (list(costs).index(item), error)
            break
    everything: dict[K, T] = {}
    failures: list[tuple[int, Exception]] = []
    asked = zlib.crc32(repr(list(costs.items())).encode())
    answers = _exchange(_packed((asked, results, failure)))
    for answer in map(pickle.loads, answers):
        if answer[0] != asked:
            raise RankDivergenceError(
                "ranks were to share the work on layers and have different ones; look for code that changes layers, or "
                "what counts of them, on some ranks only"
            )
        everything |= answer[1]
        failures += [answer[2]] if answer[2] is not None else []
    if failures:
        position, first = min(failures, key=lambda found: found[0])
        raise first from (failure[1] if failure is not None and failure[0] == position else None)
    return {item: everything[item] for item in costs}


def _packed(answer: tuple[int, dict[Any, Any], tuple[int, Exception] | None]) -> bytes:
    """Return ``answer`` as bytes for another process. If it cannot be pickled, the bytes hold an error instead."""
    asked, _, failure = answer
    try:
        packed = pickle.dumps(answer)
        if failure is not None:
            pickle.loads(packed)  # some exceptions fail only when they are unpickled
        return packed
    except Exception as error:
        position, reason = failure or (0, error)
        return pickle.dumps((asked, {}, (position, RuntimeError(f"{type(reason).__name__}: {reason}"))))


def _exchange(mine: bytes) -> list[bytes]:
    """Send the bytes of every rank to all ranks.

    Every rank fills its own part of one buffer, and the buffers are added. The buffer is as large as all results
    together; ``all_gather_object`` would pad every part to the largest.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    on_cpu = "cpu:" in dist.get_backend_config()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    counts = torch.zeros(world, dtype=torch.int64, device=device)
    counts[rank] = len(mine)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    room = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
    room.split(sizes)[rank].copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    dist.all_reduce(room)
    return [part.numpy().tobytes() for part in room.cpu().split(sizes)]
