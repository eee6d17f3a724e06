from .callback import RePr as RePr
from .network import DroppedFilters as DroppedFilters
from .schedule import RePrEvent as RePrEvent
