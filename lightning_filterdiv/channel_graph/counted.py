"""Norms over channels of unequal weight, for networks in which clusters of unequal sizes are merged.

Reductions that forward makes itself (``x.mean(1)``) become :class:`CountedReduction` in its graph form.

A norm over N channels, of which clusters of n_c equal ones are merged, has the mean ``sum n_c x_c / N``. If all
clusters are equally large the plain norm computes the same. Otherwise one of these modules replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modules import copy_network

__all__ = [
    "COUNTED",
    "CountedGroupNorm",
    "CountedLayerNorm",
    "CountedNorm",
    "CountedRMSNorm",
    "CountedReduction",
    "CountedResponseNorm",
    "counted",
    "counted_form",
]


class CountedNorm(nn.Module):
    """Base of norms that count channel ``c`` as ``counts[c]`` channels.

    Args:
        counts: (C,) integers: the original channels that each channel stands for.
        weight: (C,) scale, or None.
        bias: (C,) shift, or None.
        eps: added to the denominator, as in the plain norm; None: the rounding unit of the input's type.
        dim: the dimension of channels.
        groups: number of blocks of channels that are normalised on their own.
    """

    counts: Tensor
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        counts: Tensor,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        *,
        eps: float | None = 1e-5,
        dim: int = -1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.eps, self.dim, self.groups = eps, dim, groups
        self.register_buffer("counts", counts)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the constructor."""
        return {"eps": self.eps, "dim": self.dim, "groups": self.groups}

    def extra_repr(self) -> str:
        """Return the number of channels, and of the original ones."""
        parts = [f"{len(self.counts)} for {int(self.counts.sum())}" if not self.counts.is_meta else "counts on meta"]
        parts += [f"eps={self.eps}", f"dim={self.dim}"] + ([f"groups={self.groups}"] if self.groups > 1 else [])
        return ", ".join(parts)

    def normalise(self, input: Tensor) -> Tensor:
        """Return the input normalised, scaled and shifted."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, and run the children: an activation that the plain norm has behind it."""
        result = self.normalise(input)
        for child in self.children():
            result = child(result)
        return result

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the last dimension, which holds channels."""
        return (values * self.counts).sum(-1, keepdim=True) / self.counts.sum()

    def affine(self, values: Tensor) -> Tensor:
        """Scale and shift of the last dimension."""
        if self.weight is not None:
            values = values * self.weight
        return values if self.bias is None else values + self.bias

    def least(self, input: Tensor) -> float:
        """Value of eps for this input."""
        return torch.finfo(input.dtype).eps if self.eps is None else self.eps


def _wide(input: Tensor) -> Tensor:
    """Return the input in float32 or wider, because half precision has too few digits for sums over channels."""
    return input if input.dtype == torch.float64 else input.float()


class CountedLayerNorm(CountedNorm):
    """Layer norm over one dimension, with each channel counted ``counts`` times.

    Shape: ``(*, C, *)`` with C at ``dim``, unchanged.
    """

    def normalise(self, input: Tensor) -> Tensor:
        """Return the input normalised, scaled and shifted."""
        values = _wide(input).movedim(self.dim, -1)
        values = values - self.mean(values)
        values = values * (self.mean(values.square()) + self.least(input)).rsqrt()
        return self.affine(values).movedim(-1, self.dim).to(input.dtype)


class CountedRMSNorm(CountedNorm):
    """Root-mean-square norm over one dimension; see :class:`CountedLayerNorm`."""

    def normalise(self, input: Tensor) -> Tensor:
        """Return the input normalised, scaled and shifted."""
        values = _wide(input).movedim(self.dim, -1)
        values = values * (self.mean(values.square()) + self.least(input)).rsqrt()
        return self.affine(values).movedim(-1, self.dim).to(input.dtype)


class CountedGroupNorm(CountedNorm):
    """Group norm over blocks of channels, with each channel counted ``counts`` times.

    Shape: ``(N, C, *)``, unchanged.

    Args:
        counts: see :class:`CountedNorm`; likewise all that is not named here.
        sizes: channels of each block where these are not equally many.
    """

    def __init__(
        self,
        counts: Tensor,
        weight: nn.Parameter | None = None,
        bias: nn.Parameter | None = None,
        *,
        sizes: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(counts, weight, bias, **options)
        self.sizes = None if sizes is None else tuple(sizes)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the constructor."""
        return super().options | ({} if self.sizes is None else {"sizes": self.sizes})

    def extra_repr(self) -> str:
        """Channels, those that they stand for, and the sizes of unequal blocks."""
        return super().extra_repr() + (f", sizes={self.sizes}" if self.sizes else "")

    def normalise(self, input: Tensor) -> Tensor:
        """Return the input normalised, scaled and shifted."""
        values = _wide(input).reshape(input.shape[0], input.shape[1], -1)
        values = values - self._mean(values)
        values = values * (self._mean(values.square()) + self.least(input)).rsqrt()
        return self.affine(values.transpose(1, 2)).transpose(1, 2).reshape(input.shape).to(input.dtype)

    def _mean(self, values: Tensor) -> Tensor:
        """(N, C, 1) mean of the block of each channel."""
        weighed = values.mean(2) * self.counts
        if self.sizes is not None:
            parts = zip(weighed.split(self.sizes, 1), self.counts.split(self.sizes), strict=True)
            return torch.cat([(w.sum(1, keepdim=True) / c.sum()).expand_as(w) for w, c in parts], 1).unsqueeze(2)
        means = weighed.unflatten(1, (self.groups, -1)).sum(2) / self.counts.unflatten(0, (self.groups, -1)).sum(1)
        wide: Tensor = means.repeat_interleave(values.shape[1] // self.groups, dim=1)
        return wide.unsqueeze(2)


class CountedResponseNorm(CountedNorm):
    """Global response normalisation (ConvNeXt V2) of images; the mean over channels is weighed by ``counts``.

    Shape: ``(N, C, H, W)`` with ``dim=1``, ``(N, H, W, C)`` with ``dim=-1``, unchanged.
    """

    def normalise(self, input: Tensor) -> Tensor:
        """Return the input normalised, scaled and shifted."""
        values = _wide(input).movedim(self.dim, -1)
        norms = values.square().sum((1, 2), keepdim=True).sqrt()
        result = values + self.affine(values * (norms / (self.mean(norms) + self.least(input))))
        return result.movedim(-1, self.dim).to(input.dtype)


class CountedReduction(CountedNorm):
    """Reduction over channels, with each channel counted ``counts`` times, which may be 0.

    Args:
        counts: (C,) integers.
        kind: ``"mean"``, ``"sum"``, ``"norm"`` (the Euclidean one), ``"amax"``, ``"amin"``, or ``"product"`` of a batch
            of matrices, which adds up over the last dimension of the first one.
        dim: the dimension of channels.
        dims: all dimensions that are reduced, ``dim`` among them.
        keepdim: they keep their place, with size one.
    """

    def __init__(self, counts: Tensor, *, kind: str, dim: int, dims: Sequence[int], keepdim: bool) -> None:
        super().__init__(counts, dim=dim)
        self.kind, self.dims, self.keepdim = kind, tuple(dims), keepdim

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the constructor."""
        return {"kind": self.kind, "dim": self.dim, "dims": self.dims, "keepdim": self.keepdim}

    def extra_repr(self) -> str:
        """Kind, channels, and those that they stand for."""
        return f"{self.kind}, {super().extra_repr()}"

    @staticmethod
    def plain(kind: str, counts: Tensor) -> bool:
        """True if the plain operator gives the same result with one channel for each of ``counts``."""
        if kind in ("amax", "amin"):
            return bool((counts > 0).all())
        return bool((counts == (counts[0] if kind == "mean" else 1)).all())

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        """Reduce; ``other`` is the second factor of a product."""
        if other is not None:
            return torch.bmm(input * self.counts, other)
        values = self._reduced(_wide(input).movedim(self.dim, -1)).movedim(-1, self.dim)
        dims = [d for d in self.dims if d != self.dim]
        if dims:
            values = getattr(values, self._plain_kind)(dims, keepdim=True)
        if self.kind == "norm":
            values = values.sqrt()
        return (values if self.keepdim else values.squeeze(self.dims)).to(input.dtype)

    @property
    def _plain_kind(self) -> str:
        return "sum" if self.kind == "norm" else self.kind

    def _reduced(self, values: Tensor) -> Tensor:
        """Over the last dimension."""
        if self.kind == "mean":
            return self.mean(values)
        if self.kind in ("amax", "amin"):
            nothing = -torch.inf if self.kind == "amax" else torch.inf
            values = values.masked_fill(self.counts == 0, nothing)
            return values.amax(-1, keepdim=True) if self.kind == "amax" else values.amin(-1, keepdim=True)
        values = values.square() if self.kind == "norm" else values
        return (values * self.counts).sum(-1, keepdim=True)


#: By class name, as files of merged networks name them.
COUNTED: dict[str, type[CountedNorm]] = {
    kind.__name__: kind for kind in (CountedLayerNorm, CountedRMSNorm, CountedGroupNorm, CountedResponseNorm)
}


@torch.no_grad()
def counted_form(module: nn.Module, shape: Sequence[int], dim: int) -> tuple[type[CountedNorm], dict[str, Any]] | None:
    """Return the class that equals ``module`` if all counts are one, and its options; None if there is none.

    It is found by comparing both on numbers, so that anything else in a subclass's forward is noticed.

    Args:
        module: a norm, with or without an activation behind it.
        shape: shape of its input.
        dim: the dimension of channels in it.
    """
    if isinstance(module, CountedNorm):
        return type(module), module.options
    numeric = isinstance(getattr(module, "eps", ""), (int, float, type(None)))
    # The order of children is compared in eval mode, where dropout is an identity: one of them may do something.
    acting = [child for child in module.children() if not isinstance(child, nn.Identity)]
    if not numeric or len(acting) > 1 or any(True for child in acting for _ in child.parameters()):
        return None
    generator = torch.Generator().manual_seed(0)

    def drawn(size: Sequence[int]) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64) + 0.25

    count = shape[dim]
    tensors = {id(t): drawn(t.shape) for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()}
    same: dict[int, object] = {
        id(p): nn.Parameter(tensors[id(p)]) if isinstance(p, nn.Parameter) else tensors[id(p)]
        for p in [*module.parameters(), *module.buffers()]
        if id(p) in tensors
    }
    input = drawn([n if d == dim else min(n, 2) for d, n in enumerate(shape)])
    try:
        replica = copy_network(module, same).eval()
        expected = replica(input)
    except Exception:  # not a norm that can be called like one
        return None
    if not isinstance(expected, Tensor) or expected.shape != input.shape:
        return None
    weight, bias = getattr(replica, "weight", None), getattr(replica, "bias", None)
    options: dict[str, Any] = {"eps": module.eps, "dim": dim - len(shape) if dim > 1 else dim}
    candidates: list[tuple[type[CountedNorm], int]] = [(CountedLayerNorm, 1), (CountedRMSNorm, 1)]
    if len(shape) == 4:
        candidates.append((CountedResponseNorm, 1))
    if isinstance(groups := getattr(module, "num_groups", None), int):
        candidates = [(CountedGroupNorm, groups)]
    for kind, blocks in candidates:
        try:
            plain = kind(torch.ones(count, dtype=torch.int64), weight, bias, groups=blocks, **options)
            found = _with_children(plain, replica)(input)
        except (RuntimeError, TypeError):
            continue
        if float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max()):
            return kind, {**options, "groups": blocks}
    return None


def counted(module: nn.Module, form: tuple[type[CountedNorm], dict[str, Any]], counts: Tensor) -> CountedNorm:
    """``module`` with ``counts``, its parameters and children kept."""
    kind, options = form
    new = kind(counts, module._parameters.get("weight"), module._parameters.get("bias"), **options)
    return _with_children(new, module).train(module.training)


def _with_children(new: CountedNorm, module: nn.Module) -> CountedNorm:
    for name, child in module.named_children():
        new.add_module(name, child)
    return new
