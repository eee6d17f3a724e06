"""How deep can the convolutional part usefully be? A bound from the entropy of the training images."""

from lightning_filterdiv.entropy_depth.callback import EntropyDepthBound
from lightning_filterdiv.entropy_depth.depth import NetworkDepth, network_depth
from lightning_filterdiv.entropy_depth.estimate import estimate_depth_bound
from lightning_filterdiv.entropy_depth.functional import DepthBound, image_entropy
from lightning_filterdiv.entropy_depth.images import ImageDataError
from lightning_filterdiv.entropy_depth.plan import DepthPlan, plan_depth

__all__ = [
    "DepthBound",
    "DepthPlan",
    "EntropyDepthBound",
    "ImageDataError",
    "NetworkDepth",
    "estimate_depth_bound",
    "image_entropy",
    "network_depth",
    "plan_depth",
]
