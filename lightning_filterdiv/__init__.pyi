from .async_update import WeightAsynchronousUpdate as WeightAsynchronousUpdate
from .centripetal import CentripetalSGD as CentripetalSGD
from .channel_importance import ChannelImportance as ChannelImportance
from .entropy_depth import EntropyDepthBound as EntropyDepthBound
from .expansion import ExpandNet as ExpandNet
from .monitor import FilterSimilarityMonitor as FilterSimilarityMonitor
from .orthonormality import BasisOrthonormality as BasisOrthonormality
from .repr_ import RePr as RePr
from .training import FilterCallback as FilterCallback

__version__: str
__all__: list[str]
