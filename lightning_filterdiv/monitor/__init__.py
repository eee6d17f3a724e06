"""See how alike the filters are: while the network trains, and in a checkpoint."""

from lightning_filterdiv.monitor.callback import FilterSimilarityMonitor
from lightning_filterdiv.monitor.metrics import EffectiveRank, FilterCoherence

__all__ = ["EffectiveRank", "FilterCoherence", "FilterSimilarityMonitor"]
