"""Networks of the benchmarks."""

from benchmarks.models.cifar_resnet import CifarResNet
from benchmarks.models.networks import NetworkName, build_network, check_network
from benchmarks.models.plain import SmallNet, plain_convolutions, released_c3
from benchmarks.models.staged import StagedDenseNet, StagedResNet, StagedResNeXt
from benchmarks.models.wide_resnet import WideResNet

__all__ = [
    "CifarResNet",
    "NetworkName",
    "SmallNet",
    "StagedDenseNet",
    "StagedResNeXt",
    "StagedResNet",
    "WideResNet",
    "build_network",
    "check_network",
    "plain_convolutions",
    "released_c3",
]
