"""See how alike the filters are while the network trains."""

from lightning_filterdiv.monitor.callback import FilterSimilarityMonitor

__all__ = ["FilterSimilarityMonitor"]
