"""Check that all ranks hold the same bits. For debugging: DDP synchronises parameters once, at construction."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RankDivergenceError", "bit_checksums", "check_ranks_agree"]

# Entries wider than 32 bits are read in halves. A high bit times a position would overflow the 64-bit sum.
_INTEGERS = {1: torch.int8, 2: torch.int16}


class RankDivergenceError(RuntimeError):
    """Tensors that must be identical on all ranks differ. The message names them."""


def bit_checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return two checksums of the bits of each tensor: their sum, and their sum weighted by position.

    Args:
        tensors: ``T`` tensors of any shape and dtype, on one device.

    Returns:
        ``(T, 2)`` int64. A single flipped bit changes the first; swapped entries change the second. NaN compares by
        its bits, so equal NaNs agree.
    """
    sums = []
    for tensor in tensors.values():
        entries = tensor.detach().contiguous().flatten()
        bits = entries.view(_INTEGERS.get(entries.element_size(), torch.int32)).to(torch.int64)
        position = torch.arange(1, bits.numel() + 1, device=bits.device, dtype=torch.int64)
        sums.append(torch.stack([bits.sum(), (bits * position).sum()]))
    return torch.stack(sums)


def check_ranks_agree(tensors: Mapping[str, Tensor], context: str) -> None:
    """Raise on every rank if ``tensors`` are not bit-identical across the default process group.

    It takes one collective of ``16 * T`` bytes per rank and synchronises with the device. Without a process group it
    does nothing.

    Args:
        tensors: name -> tensor, the same names in the same order on all ranks.
        context: when the check ran, for the message, for example ``"after step 120"``.

    Raises:
        RankDivergenceError: naming the first tensors that differ and the ranks that disagree with rank 0.
    """
    if not tensors or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    mine = bit_checksums(tensors)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    all_ranks = torch.stack(gathered).cpu()
    differs = (all_ranks != all_ranks[0]).any(dim=-1)  # (ranks, T)
    if bool(differs.any()):
        names = [name for name, bad in zip(tensors, differs.any(dim=0).tolist(), strict=True) if bad]
        ranks = [rank for rank, bad in enumerate(differs.any(dim=1).tolist()) if bad]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise RankDivergenceError(
            f"ranks hold different weights {context}: {shown} on rank(s) {ranks} differ from rank 0. "
            f"DDP never repairs this. Look for randomness or per-rank data in code that writes to weights or gradients"
        )
