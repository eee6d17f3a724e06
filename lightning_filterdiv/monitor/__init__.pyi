from .callback import FilterSimilarityMonitor as FilterSimilarityMonitor
from .metrics import ChannelRedundancy as ChannelRedundancy
from .metrics import EffectiveRank as EffectiveRank
from .metrics import FilterCoherence as FilterCoherence
