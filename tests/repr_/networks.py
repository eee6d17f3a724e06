"""Small networks with a second forward that leaves chosen filters out physically: narrower convolutions and norms whose
outputs are scattered into zeros where the full network adds or concatenates them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kept = dict[str, Tensor]


class Reference(nn.Module):
    """``forward(x)`` is the network, ``smaller(x, kept)`` the one that consists of the kept filters only."""

    def rows(self, name: str, kept: Kept) -> Tensor:
        conv = self.get_submodule(name)
        return kept.get(name, torch.arange(conv.out_channels))

    def conv(self, name: str, x: Tensor, kept: Kept, columns: Tensor | None = None) -> Tensor:
        conv = self.get_submodule(name)
        rows = self.rows(name, kept)
        weight = conv.weight[rows]
        if columns is not None:
            weight = weight[:, columns]
        bias = conv.bias[rows] if conv.bias is not None else None
        return F.conv2d(x, weight, bias, conv.stride, conv.padding)

    def norm(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        norm = self.get_submodule(name)
        weight, bias = (p[rows] if p is not None else None for p in (norm.weight, norm.bias))
        mean, var = (None, None) if self.training else (norm.running_mean[rows], norm.running_var[rows])
        return F.batch_norm(x, mean, var, weight, bias, training=self.training, eps=norm.eps)

    @staticmethod
    def scatter(x: Tensor, rows: Tensor, channels: int) -> Tensor:
        full = x.new_zeros(x.shape[0], channels, *x.shape[2:])
        full[:, rows] = x
        return full

    def smaller(self, x: Tensor, kept: Kept) -> Tensor:
        raise NotImplementedError


class Plain(Reference):
    """conv-norm-relu, conv with bias-relu, flatten, linear: consumers are a convolution and H*W columns of a linear."""

    dropped = ("conv1", "conv2")

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6, affine=affine)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1))

    def smaller(self, x: Tensor, kept: Kept) -> Tensor:
        one, two = self.rows("conv1", kept), self.rows("conv2", kept)
        x = F.relu(self.norm("bn1", self.conv("conv1", x, kept), one))
        x = F.max_pool2d(F.relu(self.conv("conv2", x, kept, one)), 2)
        columns = (two[:, None] * 16 + torch.arange(16)).flatten()
        return F.linear(x.flatten(1), self.head.weight[:, columns], self.head.bias)


class Residual(Reference):
    """A block whose second convolution writes into a sum."""

    dropped = ("conv1", "conv2")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)))

    def smaller(self, x: Tensor, kept: Kept) -> Tensor:
        one, two = self.rows("conv1", kept), self.rows("conv2", kept)
        x = F.relu(self.stem(x))
        inner = F.relu(self.norm("bn1", self.conv("conv1", x, kept), one))
        inner = self.norm("bn2", self.conv("conv2", inner, kept, one), two)
        x = F.relu(x + self.scatter(inner, two, 6))
        return self.head(x.mean((2, 3)))


class Mobile(Reference):
    """expand-norm-relu6, depthwise-norm-relu6, project-norm: the region of an expansion filter reaches through."""

    dropped = ("expand",)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.expand = nn.Conv2d(4, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=True)
        self.bn2 = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu6(self.bn1(self.expand(x)))
        y = F.relu6(self.bn2(self.depthwise(y)))
        return self.head((x + self.bn3(self.project(y))).mean((2, 3)))

    def smaller(self, x: Tensor, kept: Kept) -> Tensor:
        rows = self.rows("expand", kept)
        x = self.stem(x)
        y = F.relu6(self.norm("bn1", self.conv("expand", x, kept), rows))
        depthwise = self.depthwise
        y = F.conv2d(y, depthwise.weight[rows], depthwise.bias[rows], padding=1, groups=len(rows))
        y = F.relu6(self.norm("bn2", y, rows))
        y = self.norm("bn3", self.conv("project", y, kept, rows), torch.arange(4))
        return self.head((x + y).mean((2, 3)))


class Dense(Reference):
    """Concatenation and a norm before every convolution: one filter is normed twice, by two later norms."""

    dropped = ("conv1", "conv2")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 5, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(9)
        self.conv2 = nn.Conv2d(9, 5, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(14)
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.bn2(x)))], 1)
        return self.head(F.relu(self.bn3(x)).mean((2, 3)))

    def smaller(self, x: Tensor, kept: Kept) -> Tensor:
        one, two = 4 + self.rows("conv1", kept), 9 + self.rows("conv2", kept)
        first, second = torch.cat([torch.arange(4), one]), torch.cat([torch.arange(4), one, two])
        x = self.stem(x)
        x = torch.cat([x, self.conv("conv1", F.relu(self.bn1(x)), kept)], 1)
        x = torch.cat([x, self.conv("conv2", F.relu(self.norm("bn2", x, first)), kept, first)], 1)
        x = F.relu(self.norm("bn3", x, second))
        return F.linear(x.mean((2, 3)), self.head.weight[:, second], self.head.bias)


NETWORKS = {
    "plain": Plain,
    "norm without affine": lambda: Plain(affine=False),
    "residual": Residual,
    "mobile": Mobile,
    "dense": Dense,
}


def randomized(build: object, seed: int = 0) -> Reference:
    """float64, with norm statistics and affines that differ from their initial values."""
    torch.manual_seed(seed)
    net = build()  # type: ignore[operator]
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias)
    return net.double()  # type: ignore[no-any-return]
