"""Weights and biases that are products of factors while a layer trains, by ``torch.nn.utils.parametrize``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from lightning_filterdiv.expansion.functional import Kind, compose_biases, compose_chain
from lightning_filterdiv.selection import Obstacle

__all__ = [
    "FactorBias",
    "FactorProduct",
    "Factors",
    "Layer",
    "factor_lists",
    "factor_product",
    "factors_of",
    "is_expanded",
    "show_compact",
    "unrolled",
    "weight_factors",
]

Layer = nn.Conv2d | nn.Linear
#: ``weight_1``, ``weight_2``, ... and ``bias_1``, ..., in order of application.
Factors = dict[str, Tensor]


class _Composed(nn.Module):
    """Parametrization by several tensors, which are given when it is registered."""

    def __init__(self, start: Sequence[Tensor]) -> None:
        super().__init__()
        self.start: Sequence[Tensor] | None = start

    def right_inverse(self, composed: Tensor) -> tuple[Tensor, ...]:
        """Return the initial factors. torch calls this once.

        Raises:
            RuntimeError: a tensor is assigned to the expanded layer. Many factors have that product.
        """
        if self.start is None:
            raise RuntimeError("weight and bias of an expanded layer cannot be set; contract it first, expand it again")
        start, self.start = tuple(self.start), None
        return start


class FactorProduct(_Composed):
    """Compose the weight of factors, computed in float32 or wider and returned in the dtype of the factors.

    The weight is composed at every access, and the layer runs as one convolution. Outputs and gradients equal those of
    the paper's chain of layers. The cost does not depend on the size of the images.

    Attributes:
        stale: compact tensors were loaded into the layer and its factors still have their old values
            (:func:`show_compact`).
    """

    #: Read by :func:`~lightning_filterdiv.filters.find_weight_obstacle`.
    obstacle: ClassVar[Obstacle] = Obstacle(
        "is expanded by ExpandNet", "give ExpandNet other layers with its include or exclude"
    )

    def __init__(
        self, start: Sequence[Tensor], kind: Kind, rate: int, groups: int, layout: torch.memory_format
    ) -> None:
        super().__init__(start)
        self.kind, self.rate, self.groups, self.layout = kind, rate, groups, layout
        self.stale = False

    def forward(self, *weights: Tensor) -> Tensor:
        """Compose kernels ``(H_i, H_{i-1}/groups, *k_i)`` to the compact weight."""
        with torch.autocast(weights[0].device.type, enabled=False):
            weight, _ = compose_chain(_kernels(weights), groups=self.groups)
        return (
            weight.to(weights[0].dtype).reshape(*weight.shape[: weights[0].dim()]).contiguous(memory_format=self.layout)
        )

    def extra_repr(self) -> str:
        """The expansion."""
        return f"kind={self.kind!r}, rate={self.rate}"


class FactorBias(_Composed):
    """Compose the bias of a chain of layers, which also depends on the factors of its weight."""

    weights: ParametrizationList

    def __init__(self, start: Sequence[Tensor], groups: int, weights: ParametrizationList) -> None:
        super().__init__(start)
        self.groups = groups
        # A plain reference, so that the factors of the weight have one name in the network.
        object.__setattr__(self, "weights", weights)

    def forward(self, *biases: Tensor) -> Tensor:
        """Compose biases ``(H_i,)`` to the compact bias."""
        weights = _originals(self.weights)
        with torch.autocast(biases[0].device.type, enabled=False):
            bias = compose_biases(_kernels(weights), [b.to(_wide(b)) for b in biases], self.groups)
        return bias.to(biases[0].dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _kernels(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return the factors as kernels of convolutions, in float32 or wider."""
    return [(w if w.dim() == 4 else w[:, :, None, None]).to(_wide(w)) for w in weights]


def _originals(factors: ParametrizationList) -> list[Tensor]:
    return [getattr(factors, f"original{index}") for index in range(factors.ntensors)]


def factor_lists(layer: nn.Module) -> dict[str, ParametrizationList]:
    """Return the lists of factors of an expanded layer, by the tensor that they compose."""
    return dict(cast(nn.ModuleDict, layer.parametrizations).items())  # type: ignore[arg-type]


def factor_product(layer: nn.Module) -> FactorProduct:
    """Return the parametrization that composes the weight of an expanded layer."""
    return cast(FactorProduct, factor_lists(layer)["weight"][0])


def is_expanded(layer: nn.Module) -> bool:
    """True if :func:`~lightning_filterdiv.expansion.expand` made the weight of ``layer`` a product of factors."""
    return is_parametrized(layer, "weight") and isinstance(factor_lists(layer)["weight"][0], FactorProduct)


def weight_factors(layer: nn.Module) -> list[Tensor]:
    """Return the factors of the weight of an expanded layer, in order of application."""
    return _originals(factor_lists(layer)["weight"])


def factors_of(layer: nn.Module) -> Factors:
    """Return the parameters of an expanded layer: ``weight_1``, ... and ``bias_1``, ... in order of application."""
    return {
        f"{name}_{index}": tensor
        for name, factors in factor_lists(layer).items()
        for index, tensor in enumerate(_originals(factors), start=1)
    }


def unrolled(layer: Layer) -> nn.Sequential:
    """Return the chain as the paper draws it: one layer per factor, all padding on the input of the first.

    Args:
        layer: an expanded layer. The parameters of the chain are its own. The stride is on the k x k convolution
            (``CK``: on the last).

    Raises:
        ValueError: the layer is not expanded, or has ``padding="same"`` and a kernel that needs unequal padding.
    """
    if not is_expanded(layer):
        raise ValueError(f"{type(layer).__name__} is not expanded and has no chain; call expand first")
    factors = factors_of(layer)
    count = sum(name.startswith("weight") for name in factors)
    strided = 1 if factor_product(layer).kind == "CL" else count - 1
    chain = nn.Sequential()
    for index in range(count):
        weight, bias = factors[f"weight_{index + 1}"], factors.get(f"bias_{index + 1}")
        outputs, inputs, *kernel = weight.shape
        link: Layer
        if isinstance(layer, nn.Linear):
            link = nn.Linear(inputs, outputs, device="meta")
        else:
            link = nn.Conv2d(
                inputs * layer.groups,
                outputs,
                (kernel[0], kernel[1]),
                (layer.stride[0], layer.stride[1]) if index == strided else 1,
                _padding(layer) if index == 0 else 0,
                (layer.dilation[0], layer.dilation[1]),
                layer.groups,
                padding_mode=layer.padding_mode if index == 0 else "zeros",
                device="meta",
            )
        link.weight, link.bias = weight, bias
        chain.append(link)
    return chain


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(layer.padding, str):
        return layer.padding[0], layer.padding[1]
    total = [
        d * (k - 1) if layer.padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
    ]
    if any(t % 2 for t in total):
        raise ValueError("padding='same' pads this kernel unequally, which one convolution cannot express")
    return total[0] // 2, total[1] // 2


def show_compact(layer: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Let ``state_dict`` show the compact ``weight`` and ``bias`` of an expanded layer instead of its factors.

    Loading such a state changes no factor, because many factors have one product. If the state holds another product
    than the layer's, the layer is marked ``stale`` until the caller has restored the factors.

    Returns:
        Handles that undo it.
    """
    return [
        layer.register_state_dict_post_hook(_save_compact),
        layer.register_load_state_dict_pre_hook(_load_compact),
    ]


@torch.no_grad()
def _save_compact(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, factors in factor_lists(layer).items():
        for key in factors.state_dict():
            del state[f"{prefix}parametrizations.{name}.{key}"]
        state[f"{prefix}{name}"] = getattr(layer, name)


@torch.no_grad()
def _load_compact(
    layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    for name, factors in factor_lists(layer).items():
        given, own = state.pop(f"{prefix}{name}", None), getattr(layer, name)
        if given is None:
            missing.append(f"{prefix}{name}")
        elif given.shape != own.shape:
            errors.append(
                f"size mismatch for {prefix}{name}: {tuple(given.shape)} in the file, {tuple(own.shape)} here"
            )
        elif not torch.equal(given.to(own), own):
            factor_product(layer).stale = True
        state |= {f"{prefix}parametrizations.{name}.{key}": p for key, p in factors.named_parameters()}
