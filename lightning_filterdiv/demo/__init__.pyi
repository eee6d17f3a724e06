from .data import Digits as Digits
from .data import FashionMNIST as FashionMNIST
from .model import SmallConvNet as SmallConvNet
from .model import three_convolutions as three_convolutions
