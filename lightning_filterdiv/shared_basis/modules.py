"""Convolutions that share their filters: a basis, and layers that each use it in their own way.

Kang, Kim: "Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["FilterBasis", "SharedBasisConv2d", "SharedConv2d", "SharedGroupedConv2d", "shared_bases"]


class FilterBasis(nn.Conv2d):
    """A convolution without bias whose filters several layers use.

    Args:
        in_channels: in channels of every layer that uses it.
        filters: number of filters, ``S``.
        kernel_size, padding, dilation, padding_mode: of every layer that uses it; the stride is 1.
        gram: name of the Gram matrix. Bases with one name are made orthonormal *together*. By default each basis has
            its own.
        pool: name of a mean. Grams of one pool are averaged over all their entries (see
            :func:`~lightning_filterdiv.orthonormality.basis_penalty`); the means of several pools are added.
        groups: number of groups of the convolution.

    Raises:
        ValueError: ``filters`` is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        filters: int,
        kernel_size: int | tuple[int, int],
        *,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        gram: str = "",
        pool: str = "",
        groups: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if filters < 1:
            raise ValueError(f"a filter basis needs at least one filter, got filters={filters}")
        super().__init__(
            in_channels,
            filters,
            kernel_size,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            groups=groups,
            bias=False,
            device=device,
            dtype=dtype,
        )
        self.gram, self.pool = gram, pool
        self.has_owner = False

    def apply_filters(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve ``x``, ``(B, in, H, W)``, with ``weight``, ``(n, in, *k)``, padded and dilated as this layer."""
        y: Tensor = self._conv_forward(x, weight, None)
        return y


class BasisUser(nn.Module):
    """Holds a basis; the first of its users registers it, so that it has one name in the network.

    Registered in every layer, it would be in the ``state_dict`` once per layer. The others keep a plain reference: a
    module never changes its identity, unlike a parameter (``to_empty``, ``load_state_dict(assign=True)``).
    """

    shared: FilterBasis

    def __init__(self, basis: FilterBasis) -> None:
        super().__init__()
        if basis.has_owner:
            object.__setattr__(self, "_basis", basis)
        else:
            basis.has_owner = True
            self.shared = basis

    @property
    def basis(self) -> FilterBasis:
        """The shared filters."""
        borrowed: FilterBasis | None = self.__dict__.get("_basis")
        return self.shared if borrowed is None else borrowed

    @property
    def owns_basis(self) -> bool:
        """True if this layer is the one that registers the basis."""
        return "_basis" not in self.__dict__

    def extra_repr(self) -> str:
        """Return where the filters come from."""
        return "" if self.owns_basis else f"shared=({self.basis}) of another layer"


class SharedConv2d(BasisUser):
    """A convolution that *is* the shared one: ``y = shared(x)``, its norm and activation stay the layer's own.

    For networks whose next 1x1 convolution already combines the filters (bottleneck and mobile blocks).

    Args:
        basis: the shared filters, one per output channel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W)`` to ``(B, S, H, W)``."""
        y: Tensor = self.basis(x)
        return y


class SharedGroupedConv2d(BasisUser):
    """A grouped convolution of which some filters are shared: ``y = cat(unique(x), shared(x))``.

    For ResNeXt, whose next 1x1 convolution combines the filters. The two parts may have different numbers of groups.

    Args:
        basis: ``S`` shared filters, grouped.
        unique: ``U`` filters of the layer's own.
        unique_groups: number of groups of those filters.
    """

    def __init__(self, basis: FilterBasis, unique: int, unique_groups: int) -> None:
        super().__init__(basis)
        self.unique = nn.Conv2d(
            basis.in_channels,
            unique,
            (basis.kernel_size[0], basis.kernel_size[1]),
            padding=basis.padding if isinstance(basis.padding, str) else (basis.padding[0], basis.padding[1]),
            dilation=(basis.dilation[0], basis.dilation[1]),
            groups=unique_groups,
            padding_mode=basis.padding_mode,
            bias=False,
            device=basis.weight.device,
            dtype=basis.weight.dtype,
        )
        nn.init.kaiming_normal_(self.unique.weight, mode="fan_out", nonlinearity="relu")

    @property
    def rank(self) -> int:
        """``R = U + S``, channels of the output."""
        return self.unique.out_channels + self.basis.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W)`` to ``(B, U + S, H, W)``."""
        return torch.cat([self.unique(x), self.basis(x)], dim=1)


class SharedBasisConv2d(BasisUser):
    """A convolution made of shared filters, some of its own, and coefficients.

    ``y = coefficients(BN(cat(unique(x), shared(x))))``: section 3 of the paper, without a non-linearity between, so
    that in evaluation the layer is a convolution of rank ``R = U + S``. Unique and shared filters run as one.

    Args:
        basis: ``S`` shared filters.
        out_channels: output channels of the layer.
        unique: ``U >= 0`` filters of the layer's own.
        bias: give the coefficients a bias. The paper's layers have none.

    Raises:
        ValueError: ``unique`` is negative.
    """

    def __init__(self, basis: FilterBasis, out_channels: int, *, unique: int = 0, bias: bool = False) -> None:
        super().__init__(basis)
        if unique < 0:
            raise ValueError(f"unique must be >= 0, got {unique}")
        at: dict[str, Any] = {"device": basis.weight.device, "dtype": basis.weight.dtype}
        self.unique: nn.Conv2d | None = None
        if unique:
            # This layer only holds weights. They run in one convolution with the basis, with its padding and dilation.
            kernel = (basis.kernel_size[0], basis.kernel_size[1])
            self.unique = nn.Conv2d(basis.in_channels, unique, kernel, bias=False, **at)
        self.norm = nn.BatchNorm2d(unique + basis.out_channels, **at)
        self.coefficients = nn.Conv2d(unique + basis.out_channels, out_channels, 1, bias=bias, **at)
        nn.init.kaiming_normal_(self.coefficients.weight, mode="fan_out", nonlinearity="relu")
        if self.unique is not None:
            nn.init.kaiming_normal_(self.unique.weight, mode="fan_out", nonlinearity="relu")

    @property
    def rank(self) -> int:
        """``R = U + S``."""
        return self.coefficients.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W)`` to ``(B, out, H, W)``."""
        weight = self.basis.weight
        if self.unique is not None:
            weight = torch.cat([self.unique.weight, weight])
        y: Tensor = self.coefficients(self.norm(self.basis.apply_filters(x, weight)))
        return y

    @torch.no_grad()
    def composed_weight(self) -> tuple[Tensor, Tensor]:
        """Weight ``(out, in, *k)`` and bias ``(out,)`` of the one convolution that the layer is in evaluation."""
        filters = self.basis.weight if self.unique is None else torch.cat([self.unique.weight, self.basis.weight])
        norm, mixing = self.norm, self.coefficients.weight.flatten(1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = torch.einsum("or,rcij->ocij", mixing * scale, filters)
        bias = mixing @ (norm.bias - norm.running_mean * scale)
        return weight, bias if self.coefficients.bias is None else bias + self.coefficients.bias


def shared_bases(model: nn.Module) -> Iterator[tuple[str, FilterBasis, list[tuple[str, SharedBasisConv2d]]]]:
    """Every shared basis of ``model`` with its name and the layers that add filters of their own to it.

    Args:
        model: any network.

    Yields:
        ``(name of the basis, basis, [(name of a layer, layer), ...])``, in the order of ``named_modules``; layers
        without unique filters are not listed.
    """
    found: dict[int, tuple[str, FilterBasis, list[tuple[str, SharedBasisConv2d]]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BasisUser):
            basis = module.basis
            found.setdefault(id(basis), ("", basis, []))
            if module.owns_basis:
                _, _, layers = found[id(basis)]
                found[id(basis)] = (f"{name}.shared" if name else "shared", basis, layers)
            if isinstance(module, SharedBasisConv2d) and module.unique is not None:
                found[id(basis)][2].append((name, module))
    yield from found.values()
