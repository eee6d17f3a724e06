"""A small network and real data sets that need no download: for ``filterdiv demo``, first steps and tests."""

from lightning_filterdiv.demo.data import Digits, FashionMNIST
from lightning_filterdiv.demo.model import SmallConvNet, three_convolutions

__all__ = ["Digits", "FashionMNIST", "SmallConvNet", "three_convolutions"]
