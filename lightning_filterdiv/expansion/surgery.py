"""Put factors in the place of weights, and weights back in the place of factors."""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_filterdiv.expansion.functional import Kind, draw_factors
from lightning_filterdiv.expansion.layers import ExpandedConv2d, ExpandedLinear, ExpandedModule
from lightning_filterdiv.filters import (
    FLOAT_FIRST,
    NoLayersError,
    canonical_name,
    check_patterns,
    find_weight_obstacle,
    named_convolutions,
    quantised_modules,
)
from lightning_filterdiv.tensors.arguments import check_choice, check_integer, check_module
from lightning_filterdiv.tensors.randomness import keyed_generator

__all__ = ["ExpansionError", "Initial", "Kinds", "choose_layers", "contract", "expand", "expand_layer", "set_factors"]

Kinds = Literal["CL", "CK", "FC", "CL+FC", "CK+FC"]
Initial = Literal["keep", "fresh"]
Layer = nn.Conv2d | nn.Linear

_BUILD = "build the network in __init__, of nn.Conv2d and nn.Linear layers"


class ExpansionError(ValueError):
    """A layer cannot be expanded as asked. The message names the layer and the fix."""


def _obstacle(layer: nn.Module, kind: Kind, shared: Counter[int]) -> str | None:
    """Why ``layer`` cannot be expanded; ``None`` if it can."""
    if (own := _own_obstacle(layer, shared)) is not None:
        return own
    if kind == "CK" and isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size
        if height != width or height % 2 == 0 or height < 5:
            return f"has kernel {height}x{width}; kind='CK' needs an odd square kernel of 5 or more, take kind='CL'"
    return None


def _own_obstacle(layer: nn.Module, shared: Counter[int]) -> str | None:
    """Why no kind of expansion takes ``layer``."""
    if isinstance(layer, ExpandedModule):
        return "is expanded already; contract it first, or leave it out with exclude"
    if (found := find_weight_obstacle(layer)) is not None:
        return str(found)
    weight = layer._parameters["weight"]
    assert weight is not None
    if is_lazy(weight) or weight.is_meta:
        return (
            "has no weight yet (lazy or on meta); run one forward pass before expanding, or leave it out with exclude"
        )
    if type(layer) not in (nn.Conv2d, nn.Linear):
        cls = type(layer)
        kind = f"{cls.__module__}.{cls.__name__}" if cls.__module__.startswith("torch.") else cls.__name__
        return f"is a {kind}; only nn.Conv2d and nn.Linear themselves can be expanded, leave it out with exclude"
    if shared[id(weight)] > 1:
        return "shares its weight with another layer, which would keep the old one; leave both out with exclude"
    return None


def _worth_expanding(layer: nn.Module, kind: Kind) -> bool:
    """Whether ``include=None`` means this layer, by its kernel."""
    if not isinstance(layer, nn.Conv2d):
        return True
    height, width = layer.kernel_size
    return (height, width) != (1, 1) if kind == "CL" else height == width and height % 2 == 1 and height >= 5


def _left_alone(layer: nn.Module) -> bool:
    """Whether ``include=None`` leaves out a layer that cannot be expanded.

    A lazy one may be what was meant, and an expanded one is, so that expanding twice is an error and not half a
    surprise.
    """
    weight = layer._parameters.get("weight")
    return not isinstance(layer, ExpandedModule) and not (weight is not None and is_lazy(weight))


def _candidates(model: nn.Module, kinds: str) -> Iterator[tuple[str, Layer, Kind]]:
    for name, module in model.named_modules():
        for kind in cast(list[Kind], kinds.split("+")):
            if isinstance(module, nn.Linear if kind == "FC" else nn.Conv2d):
                yield canonical_name(name), module, kind


def cannot_keep(name: str, error: ValueError) -> ExpansionError:
    """What to raise where :func:`expand_layer` failed for layer ``name``."""
    return ExpansionError(
        f"layer {name!r} cannot keep its weight: {error}. Take a larger rate, kind='CL', or initial='fresh'"
    )


def _others(model: nn.Module) -> str:
    """The first convolution that is none of ``nn.Conv2d``, for a message."""
    found = ((name, conv) for name, conv in named_convolutions(model) if not isinstance(conv, nn.Conv2d))
    return next((f" ({name!r} is a {type(conv).__name__})" for name, conv in found), "")


def choose_layers(
    model: nn.Module,
    kinds: Kinds,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, tuple[Layer, Kind]]:
    """The layers that an expansion of ``kinds`` means: canonical name -> (layer, kind).

    Args:
        model: the network.
        kinds: see :func:`expand`.
        include, exclude: patterns of canonical names.

    Raises:
        NoLayersError: a pattern of ``include`` matches nothing, or no layer is left.
        ExpansionError: a layer that is meant cannot be expanded.
    """
    check_module("model", model)
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    found = list(_candidates(model, kinds))
    packed = [name for name in quantised_modules(model) if include is None]
    shared = Counter(
        id(p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if name == "weight" and p is not None
    )
    names = [name for name, _, _ in found]
    noun = {"C": "convolution", "F": "linear layer"}[kinds[0]] + (" or linear layer" if "+" in kinds else "")
    if not names:
        raise NoLayersError(
            f"{type(model).__name__} has no {noun} for kind={kinds!r} to expand{_others(model)}; "
            + (f"{packed[0]!r} is quantised: {FLOAT_FIRST}" if packed else _BUILD)
        )
    for pattern in include or ():
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            raise NoLayersError(
                f"include pattern {pattern!r} matches no {noun}"
                f"{f'; the closest name is {near[0]!r}' if near else ''}. Available: {', '.join(map(repr, names[:12]))}"
            )
    chosen: dict[str, tuple[Layer, Kind]] = {}
    left = dict.fromkeys(packed, f"cannot be expanded: it is quantised; {FLOAT_FIRST}")
    for name, layer, kind in found:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude or ()):
            continue
        if include is None:
            if not _worth_expanding(layer, kind):
                continue
        elif not any(fnmatch.fnmatchcase(name, pattern) for pattern in include):
            continue
        obstacle = _obstacle(layer, kind, shared)
        if obstacle is not None and include is None and _left_alone(layer):
            left[name] = obstacle
            continue
        if obstacle is not None:
            raise ExpansionError(f"layer {name!r} {obstacle}")
        chosen[name] = (layer, kind)
    if not chosen:
        raise NoLayersError(
            f"no layer of {type(model).__name__} is left for kind={kinds!r} to expand"
            f"{''.join(f': {name!r} {why}' for name, why in list(left.items())[:1])}. Choose another kind, include or "
            f"exclude; available: {', '.join(map(repr, names[:12]))}"
        )
    for name, why in left.items():
        warnings.warn(f"layer {name!r} stays as it is: it {why}", stacklevel=2)
    return chosen


def expand_layer(layer: Layer, kind: Kind, rate: int, initial: Initial, generator: torch.Generator) -> None:
    """Put factors in the place of the weight (and bias) of one layer; the module stays the same object.

    Raises:
        ValueError: the weight is not finite, or ``CK`` factors cannot reproduce it.
    """
    weight, bias = layer.weight.detach(), layer.bias
    linear = weight.dim() == 2
    kernel = (weight[:, :, None, None] if linear else weight).double().cpu()
    outputs, inputs, height, width = kernel.shape
    target = kernel if initial == "keep" else None
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    weights = draw_factors(kind, (outputs, inputs, height, width), groups, rate, generator, target)
    biases: list[Tensor] | None = None
    if bias is not None:
        last = bias.detach().double().cpu()
        if initial == "fresh":
            bound = (inputs * height * width) ** -0.5
            last = (2 * torch.rand(outputs, generator=generator, dtype=torch.float64) - 1) * bound
        biases = [*(torch.zeros(len(w), dtype=torch.float64) for w in weights[:-1]), last]
    set_factors(layer, kind, rate, [w.flatten(1) if linear else w for w in weights], biases)


def set_factors(layer: Layer, kind: Kind, rate: int, weights: list[Tensor], biases: list[Tensor] | None) -> None:
    """Make ``layer`` an expanded one with these factors, cast to the dtype and device of its weight."""
    like = layer.weight
    channels_last = (
        like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    )
    layer._parameters.pop("weight")
    if biases is not None:
        layer._parameters.pop("bias")
    layer.__class__ = ExpandedLinear if isinstance(layer, nn.Linear) else ExpandedConv2d
    expanded = cast(ExpandedModule, layer)
    expanded.kind, expanded.rate, expanded.factor_count = kind, rate, len(weights)
    expanded.has_bias, expanded.channels_last = biases is not None, channels_last
    expanded.compact_state = expanded.pending = False
    for prefix, tensors in (("weight", weights), ("bias", biases or [])):
        for index, tensor in enumerate(tensors, start=1):
            # LBFGS flattens gradients as views, and a gradient is laid out as its parameter.
            value = tensor.detach().to(like.device, like.dtype, copy=True, memory_format=torch.contiguous_format)
            expanded.register_parameter(f"{prefix}_{index}", nn.Parameter(value, requires_grad=like.requires_grad))


def expand(
    model: nn.Module,
    kind: Kinds = "CL",
    rate: int = 4,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    initial: Initial = "keep",
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

    Nothing is between the factors. A layer that reads at most 3 channels keeps their number in its first factor;
    grouped layers have grouped factors. Call it before the optimizer is made.

    Args:
        model: the network (a ``LightningModule`` works too).
        kind: see the table; ``"CL+FC"``, ``"CK+FC"`` for both.
        rate: ``r``.
        include: patterns of layers; ``None``: see the table.
        exclude: patterns of layers to leave as they are.
        initial: ``"keep"``: the network computes the same as before; ``"fresh"``: new weights.
        seed: of the factors; they depend on it and on the layer's name alone.

    Returns:
        ``model``. Expanded layers are the same objects, of a subclass of their class.

    Raises:
        NoLayersError, ExpansionError: a layer that is meant cannot be expanded, or none is left. The network is then
            unchanged.
        TypeError, ValueError: a bad argument, by name.
    """
    check_choice("kind", kind, Kinds)
    check_integer("rate", rate, low=1)
    check_choice("initial", initial, Initial)
    check_integer("seed", seed, low=0)
    done: list[nn.Module] = []
    before = {
        name: (layer, each, dict(layer._parameters))
        for name, (layer, each) in choose_layers(model, kind, include, exclude).items()
    }
    for name, (layer, each, _) in before.items():
        try:
            expand_layer(layer, each, rate, initial, keyed_generator("expand", seed, name))
        except ValueError as error:
            for undone, _, parameters in list(before.values())[: len(done)]:
                _restore(undone, parameters)
            raise cannot_keep(name, error) from error
        done.append(layer)
    return model


def _restore(layer: nn.Module, parameters: dict[str, nn.Parameter | None]) -> None:
    """Make an expanded layer a compact one again, with these parameters."""
    for name in ("kind", "rate", "factor_count", "has_bias", "channels_last", "compact_state", "pending"):
        layer.__dict__.pop(name)
    layer.__class__ = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    layer._parameters.clear()
    layer._parameters.update(parameters)


@torch.no_grad()
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
    layers = [module for module in model.modules() if isinstance(module, ExpandedModule)]
    if not layers:
        raise NoLayersError(f"{type(model).__name__} has no expanded layer to contract; call expand first")
    for layer in layers:
        weight, bias = layer.composed()
        trains = any(p.requires_grad for p in layer.parameters())
        compact: dict[str, nn.Parameter | None] = {
            "weight": nn.Parameter(weight.detach().clone(), trains),
            "bias": None,
        }
        if bias is not None:
            compact["bias"] = nn.Parameter(bias.detach().clone(), trains)
        _restore(layer, compact)
    return model
