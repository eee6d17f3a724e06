"""Replace weights by factors, and factors by weights."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from lightning_filterdiv.expansion.functional import Kind, UnreachableKernelError, draw_factors, reads_image
from lightning_filterdiv.expansion.layers import FactorBias, FactorProduct, Factors, Layer, factor_lists, is_expanded
from lightning_filterdiv.filters import (
    PACKED,
    NoLayersError,
    find_weight_obstacle,
    named_convolutions,
    named_modules,
    quantised_modules,
)
from lightning_filterdiv.selection import Obstacle, quote_names, select_layers
from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer, check_module
from lightning_filterdiv.tensors.randomness import keyed_generator

__all__ = [
    "ExpansionError", "Initial", "Kinds", "choose_layers", "contract", "draw_all", "expand", "set_factors",
]  # fmt: skip

Kinds = Literal["CL", "CK", "FC", "CL+FC", "CK+FC"]
Initial = Literal["keep", "fresh"]


class ExpansionError(ValueError):
    """A layer cannot be expanded as asked. The message names the layer and the fix."""


class UnreachableImageKernelError(ExpansionError):
    """``CK`` factors cannot compose to a layer's weight because the first one keeps the channels of an image."""


def _find_obstacle(layer: nn.Module, kind: Kind, shared: Counter[int]) -> Obstacle | None:
    """Return why ``layer`` cannot be expanded; ``None`` if it can."""
    leave = "leave it out with exclude"
    if is_expanded(layer):
        return Obstacle("is expanded already", f"contract it first, or {leave}")
    if not isinstance(layer, Layer):
        return PACKED  # the only other candidates
    if (obstacle := find_weight_obstacle(layer)) is not None:
        return obstacle
    weight = layer._parameters["weight"]
    assert weight is not None
    if is_lazy(weight) or weight.is_meta:
        return Obstacle("has no weight yet (lazy or on meta)", f"run one forward pass before expanding, or {leave}")
    if type(layer) not in (nn.Conv2d, nn.Linear):
        cls = type(layer)
        name = f"{cls.__module__}.{cls.__name__}" if cls.__module__.startswith("torch.") else cls.__name__
        return Obstacle(f"is a {name}", f"only nn.Conv2d and nn.Linear themselves can be expanded, {leave}")
    if shared[id(weight)] > 1:
        return Obstacle(
            "shares its weight with another layer, which would keep the old one", "leave both out with exclude"
        )
    if kind == "CK" and not _is_odd_square(cast(nn.Conv2d, layer)):
        height, width = cast(nn.Conv2d, layer).kernel_size
        return Obstacle(
            f"has kernel {height}x{width}, and kind='CK' needs an odd square kernel of 5 or more", "take kind='CL'"
        )
    return None


def _is_odd_square(layer: nn.Conv2d) -> bool:
    height, width = layer.kernel_size
    return height == width and height % 2 == 1 and height >= 5


def _is_default(layer: nn.Module, kind: Kind) -> bool:
    """True if ``include=None`` selects this layer, by its kernel."""
    if not isinstance(layer, nn.Conv2d):
        return True
    return _is_odd_square(layer) if kind == "CK" else layer.kernel_size != (1, 1)


def _candidates(model: nn.Module, kinds: str) -> Iterator[tuple[str, tuple[nn.Module, Kind]]]:
    """Yield the layers of these kinds, each once even if it has two names, and quantised layers."""
    seen: set[nn.Module] = set()
    packed = quantised_modules(model)
    for name, module in named_modules(model).items():
        for kind in cast(list[Kind], kinds.split("+")):
            cls, mark = (nn.Linear, "in_features") if kind == "FC" else (nn.Conv2d, "kernel_size")
            if module not in seen and (isinstance(module, cls) or (name in packed and hasattr(module, mark))):
                seen.add(module)
                yield name, (module, kind)


def _other_convolution(model: nn.Module) -> str:
    """Return the first convolution of another class than ``nn.Conv2d``, for a message."""
    others = ((name, conv) for name, conv in named_convolutions(model) if not isinstance(conv, nn.Conv2d))
    return next((f" ({name!r} is a {type(conv).__name__})" for name, conv in others), "")


def choose_layers(
    model: nn.Module,
    kinds: Kinds,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, tuple[Layer, Kind]]:
    """Choose the layers for an expansion of ``kinds``: canonical name -> (layer, kind).

    Args:
        model: the network.
        kinds: see :func:`expand`.
        include, exclude: patterns of canonical names.

    Warns:
        UserWarning: layers that ``include=None`` selects cannot be expanded and are left as they are, by name; a
            pattern of ``exclude`` matches nothing.

    Raises:
        NoLayersError: a pattern of ``include`` matches nothing, or no layer is left.
        ExpansionError: a layer that is named in ``include`` cannot be expanded, is expanded already or is lazy.
    """
    check_module("model", model)
    candidates = dict(_candidates(model, kinds))
    noun = {"C": "convolution", "F": "linear layer"}[kinds[0]] + (" or linear layer" if "+" in kinds else "")
    if not candidates:
        raise NoLayersError(
            f"{type(model).__name__} has no {noun} for kind={kinds!r} to expand{_other_convolution(model)}; build the "
            f"network in __init__, of nn.Conv2d and nn.Linear layers"
        )
    weights = (m._parameters.get("weight") for m in model.modules())
    shared = Counter(id(weight) for weight in weights if weight is not None)

    def find_obstacle(name: str, candidate: tuple[nn.Module, Kind]) -> Obstacle | None:
        layer, kind = candidate
        obstacle = _find_obstacle(layer, kind, shared)
        weight = layer._parameters.get("weight")
        # Also by default, a lazy layer may be meant and an expanded one is. Expanding twice is an error.
        meant = include is not None or is_expanded(layer) or (weight is not None and is_lazy(weight))
        if obstacle is not None and meant:
            raise ExpansionError(f"layer {name!r} {obstacle}")
        return obstacle

    selected = select_layers(
        candidates,
        include,
        exclude,
        noun=noun,
        is_default=lambda candidate: _is_default(*candidate),
        no_default=f"by default kind={kinds!r} takes none of them; choose another kind, or name layers in include",
        find_obstacle=find_obstacle,
    )
    return cast(dict[str, tuple[Layer, Kind]], selected)


def draw(
    name: str, layer: Layer, kind: Kind, rate: int, initial: Initial, seed: int, expand_image: bool = False
) -> Factors:
    """Draw the initial factors, in the dtype and on the device of the layer called ``name``.

    Raises:
        UnreachableImageKernelError: ``CK`` factors whose first one keeps the channels of an image cannot reproduce the
            weight, at any rate.
        ExpansionError: the weight is not finite, or ``CK`` factors cannot reproduce it.
    """
    generator = keyed_generator("expand", seed, name)
    kernel = layer.weight.detach().double().cpu()
    outputs, inputs, height, width = shape = (*kernel.shape, 1, 1)[:4]
    target = kernel.reshape(shape) if initial == "keep" else None
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    try:
        weights = draw_factors(kind, shape, groups, rate, generator, target, expand_image)
    except UnreachableKernelError as error:
        if reads_image(shape, groups) and not expand_image:
            raise UnreachableImageKernelError(
                f"layer {name!r} cannot keep its weight: {error}. Take kind='CL', initial='fresh' or expand_image=True"
            ) from error
        raise ExpansionError(
            f"layer {name!r} cannot keep its weight: {error}. Take a larger rate, kind='CL', or initial='fresh'"
        ) from error
    except ValueError as error:
        raise ExpansionError(f"layer {name!r} cannot keep its weight: {error}") from error
    biases: list[Tensor] = []
    if layer.bias is not None:
        last = layer.bias.detach()
        if initial == "fresh":
            bound = (inputs * height * width) ** -0.5
            last = (2 * torch.rand(outputs, generator=generator, dtype=torch.float64) - 1) * bound
        biases = [*(torch.zeros(len(w), dtype=torch.float64) for w in weights[:-1]), last]
    if kernel.dim() == 2:
        weights = [w.flatten(1) for w in weights]
    parts = (("weight", weights), ("bias", biases))
    return {
        f"{part}_{index}": tensor.to(layer.weight.device, layer.weight.dtype)
        for part, tensors in parts
        for index, tensor in enumerate(tensors, start=1)
    }


def draw_all(
    chosen: Mapping[str, tuple[Layer, Kind]],
    rate: int,
    initial: Initial,
    seed: int,
    expand_image: bool = False,
    trained: Collection[str] = (),
) -> dict[str, Factors]:
    """Draw the factors of all layers before any layer changes, so that an error leaves the network as it was.

    Args:
        chosen: from :func:`choose_layers`.
        rate, initial, seed, expand_image: see :func:`expand`.
        trained: layers whose weights come from training. They are kept for every ``initial``, like those of frozen
            layers.

    Returns:
        Name -> factors. Frozen layers that read an image are missing if their weights cannot be kept.

    Warns:
        UserWarning: layers that read an image start from new weights or are left as they are, by name.

    Raises:
        ExpansionError: see :func:`draw`.
    """
    drawn: dict[str, Factors] = {}
    fresh, left = [], []
    for name, (layer, kind) in chosen.items():
        trains = any(p.requires_grad for p in layer.parameters())
        start = "keep" if name in trained or not trains else initial
        try:
            drawn[name] = draw(name, layer, kind, rate, start, seed, expand_image)
        except UnreachableImageKernelError:
            if name in trained:
                raise
            if trains:
                fresh.append(name)
                drawn[name] = draw(name, layer, kind, rate, "fresh", seed)
            else:
                left.append(name)
    reason = "3x3 factors that keep the channels of an image cannot compose to the kernels of"
    if fresh:
        warnings.warn(
            f"{reason} {quote_names(fresh)}: expanded, they start from new weights. To keep the weights, give "
            f"expand_image=True or kind='CL', or leave the layers out with exclude",
            stacklevel=3,
        )
    if left:
        warnings.warn(
            f"{reason} {quote_names(left)}: frozen, they are left as they are. To expand them, give expand_image=True "
            f"or kind='CL'",
            stacklevel=3,
        )
    if not drawn:
        raise NoLayersError(f"no layer is left to expand; {quote_names(left)} cannot be. Give expand_image=True")
    return drawn


def set_factors(layer: Layer, kind: Kind, rate: int, factors: Factors) -> None:
    """Replace weight and bias by factors. The module stays the same object."""
    weight = layer.weight
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    is_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last and not weight.is_contiguous() else torch.contiguous_format

    def part(name: str) -> list[Tensor]:
        # LBFGS flattens gradients as views, and a gradient is laid out as its parameter.
        return [
            tensor.detach().to(weight.device, weight.dtype, copy=True, memory_format=torch.contiguous_format)
            for key, tensor in factors.items()
            if key.startswith(name)
        ]

    register_parametrization(layer, "weight", FactorProduct(part("weight"), kind, rate, groups, layout))
    if layer.bias is not None:
        register_parametrization(layer, "bias", FactorBias(part("bias"), groups, factor_lists(layer)["weight"]))


def expand(
    model: nn.Module,
    kind: Kinds = "CL",
    rate: int = 4,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    initial: Initial = "keep",
    expand_image: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Over-parameterise layers linearly (ExpandNets, Guo et al., NeurIPS 2020), in place.

    ======  ========================  ==================================================================================
    kind    with ``include=None``     what stands in for the weight, ``m`` to ``n`` channels
    ======  ========================  ==================================================================================
    ``CL``  kernels larger than 1x1   1x1 ``m -> r m``, k x k ``r m -> r n``, 1x1 ``r n -> n``
    ``CK``  odd square kernels from   ``(k-1)/2`` times 3x3: ``m -> r m -> r n -> ... -> n``; of a 5x5
            5x5 on                    ``m -> r n -> n``
    ``FC``  linear layers             three linear layers ``m -> r m -> r n -> n``
    ======  ========================  ==================================================================================

    There is no activation between the factors. Grouped layers have grouped factors. Call it before the optimizer is
    made.

    A convolution that reads at most 3 channels keeps their number in its first factor, as in the released CIFAR
    networks. ``CK`` factors of that size cannot compose to such a layer's kernel. The layer then starts from new
    weights, with a warning; a frozen layer is not expanded. ``expand_image=True`` expands it like the others, as the
    released MobileNets and ShuffleNet do.

    Args:
        model: the network (a ``LightningModule`` works too).
        kind: see the table; ``"CL+FC"``, ``"CK+FC"`` for both.
        rate: ``r``.
        include: patterns of layers; ``None``: see the table.
        exclude: patterns of layers to leave as they are.
        initial: ``"keep"``: the network computes the same as before; ``"fresh"``: new weights.
        expand_image: expand layers that read at most 3 channels to ``r m`` channels, too.
        seed: seed of the factors; they depend on it and on the layer's name alone.

    Returns:
        ``model``. Expanded layers are the same objects, with parametrized weight and bias
        (``torch.nn.utils.parametrize``).

    Warns:
        UserWarning: see :func:`choose_layers`; layers that read an image start from new weights or stay as they are.

    Raises:
        NoLayersError, ExpansionError: a selected layer cannot be expanded, or none is left. The network is then
            unchanged.
        TypeError, ValueError: a bad argument, by name.
    """
    check_choice("kind", kind, Kinds)
    check_integer("rate", rate, low=1)
    check_choice("initial", initial, Initial)
    check_flag("expand_image", expand_image)
    check_integer("seed", seed, low=0)
    chosen = choose_layers(model, kind, include, exclude)
    for name, factors in draw_all(chosen, rate, initial, seed, expand_image).items():
        layer, each = chosen[name]
        set_factors(layer, each, rate, factors)
    return model


def contract(model: nn.Module) -> nn.Module:
    """Turn every expanded layer into the compact one that computes the same, in place.

    Args:
        model: a network that :func:`expand` was called on.

    Returns:
        ``model``; its ``state_dict`` loads into the original class. Parameters are new objects: an optimizer made
        before does not know them.

    Raises:
        NoLayersError: no layer is expanded.
    """
    check_module("model", model)
    layers = [module for module in model.modules() if is_expanded(module)]
    if not layers:
        raise NoLayersError(f"{type(model).__name__} has no expanded layer to contract; call expand first")
    for layer in layers:
        for name, factors in factor_lists(layer).items():
            trains = any(p.requires_grad for p in factors.parameters())
            factors.requires_grad_()  # torch would make a buffer of factors that do not train
            with torch.enable_grad():
                remove_parametrizations(layer, name)
            layer.get_parameter(name).requires_grad_(trains)
    return model
