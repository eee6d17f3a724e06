"""RePr: drop the most redundant filters for a while, bring them back orthogonal to everything else."""

from lightning_filterdiv.repr_.callback import RePr
from lightning_filterdiv.repr_.network import DroppedFilters

__all__ = ["DroppedFilters", "RePr"]
