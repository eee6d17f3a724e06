from .callback import RePr as RePr
from .network import DroppedFilters as DroppedFilters
