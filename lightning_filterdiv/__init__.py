"""PyTorch Lightning callbacks that control how diverse and how redundant the filters of a network become."""

from importlib.metadata import version

from lightning_filterdiv.async_update import WeightAsynchronousUpdate
from lightning_filterdiv.callback import FilterCallback
from lightning_filterdiv.centripetal import CentripetalSGD
from lightning_filterdiv.channel_importance import ChannelImportance
from lightning_filterdiv.entropy_depth import EntropyDepthBound
from lightning_filterdiv.expansion import ExpandNet
from lightning_filterdiv.monitor import FilterSimilarityMonitor
from lightning_filterdiv.orthonormality import BasisOrthonormality
from lightning_filterdiv.repr_ import RePr
from lightning_filterdiv.versions import check_versions

__version__ = version("lightning-filterdiv")
check_versions()

__all__ = [
    "BasisOrthonormality",
    "CentripetalSGD",
    "ChannelImportance",
    "EntropyDepthBound",
    "ExpandNet",
    "FilterCallback",
    "FilterSimilarityMonitor",
    "RePr",
    "WeightAsynchronousUpdate",
    "__version__",
]
