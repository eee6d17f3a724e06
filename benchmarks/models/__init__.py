"""Networks of the benchmarks."""

from benchmarks.models.cifar_resnet import CifarResNet

__all__ = ["CifarResNet"]
