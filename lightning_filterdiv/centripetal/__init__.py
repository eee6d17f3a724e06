"""Centripetal SGD and merging: train channels to become equal, then make the network really narrower without loss."""

from lightning_filterdiv.centripetal.callback import CentripetalSGD
from lightning_filterdiv.centripetal.clusters import (
    ClusteredTensor,
    cluster_channels,
    cluster_filters,
    clustered_tensors,
)
from lightning_filterdiv.centripetal.files import MergedFileError, load_merged, save_merged
from lightning_filterdiv.centripetal.forecast import deviation_factors, reached_k, solve_strength
from lightning_filterdiv.centripetal.functional import CentripetalUpdate, centripetal_gradient
from lightning_filterdiv.centripetal.merge import (
    MergeReport,
    NotTiedError,
    merge_channels,
    merge_with_report,
    tie_channels,
)
from lightning_filterdiv.centripetal.recipes import squeeze_in_stages

__all__ = [
    "CentripetalSGD",
    "CentripetalUpdate",
    "ClusteredTensor",
    "MergeReport",
    "MergedFileError",
    "NotTiedError",
    "centripetal_gradient",
    "cluster_channels",
    "cluster_filters",
    "clustered_tensors",
    "deviation_factors",
    "load_merged",
    "merge_channels",
    "merge_with_report",
    "reached_k",
    "save_merged",
    "solve_strength",
    "squeeze_in_stages",
    "tie_channels",
]
