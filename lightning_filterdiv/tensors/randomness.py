"""Private, seeded randomness: equal on every rank, without state, and independent of the global generators.

A draw is a function of its key, ``(seed, stream, step)`` or ``(seed, event, layer)``. One ``torch.manual_seed(rank)``
in user code therefore cannot make replicas disagree, and a resumed run draws what the uninterrupted run drew.
Generators live on the CPU, so that the draws do not depend on the device type. :func:`stage` copies the draws to the
device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["keyed_generator", "stage"]


def keyed_generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator seeded by a hash of ``key``, for example ``(seed, stream, step)``.

    Args:
        key: integers and strings; equal keys give equal draws, neighbouring keys unrelated ones.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # torch seeds its Mersenne twister with the low 32 bits only. A hash spreads every key over all of them.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def stage(cpu_tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to ``device`` without waiting for it: pinned and non-blocking on CUDA, as is on the CPU.

    Every host-to-device copy of a per-step path goes through here, so that tests can tell it from an accidental one.
    The caching pinned allocator keeps the source alive until the copy has run.
    """
    if device.type == "cpu":
        return cpu_tensor
    if device.type == "cuda":
        return cpu_tensor.pin_memory().to(device, non_blocking=True)
    return cpu_tensor.to(device)
