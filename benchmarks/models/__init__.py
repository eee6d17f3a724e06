"""Networks of the benchmarks."""

from benchmarks.models.cifar_resnet import CifarResNet
from benchmarks.models.staged import StagedDenseNet, StagedResNet, StagedResNeXt, count_parameters

__all__ = ["CifarResNet", "StagedDenseNet", "StagedResNeXt", "StagedResNet", "count_parameters"]
