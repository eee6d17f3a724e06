"""What a filter is: row ``j`` of a ``(J, d)`` matrix, for every kind of convolution, and how layers are chosen by name.

Shapes used throughout the package: a layer has ``J`` filters (output channels); each filter has ``d`` weights, its
fan-in (input channels seen by the filter times kernel positions).
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_filterdiv.tensors.arguments import check_module, check_tensor

__all__ = [
    "CONVOLUTIONS",
    "FAKE_QUANTISED",
    "FLOAT_FIRST",
    "Conv",
    "NoLayersError",
    "canonical_name",
    "check_patterns",
    "filter_count",
    "filter_matrix",
    "mask_layout",
    "named_convolutions",
    "quantised_modules",
    "select_filters",
    "weight_obstacle",
    "write_filters",
]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_FORWARD = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Every kind of convolution, for ``isinstance``.
CONVOLUTIONS = _FORWARD + _TRANSPOSED
# Wrappers that add one level to every name below them: torch.compile, DataParallel and DDP, FSDP.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module"})
# Their kernels are packed integers and no parameters; by name, because importing them all takes long.
_QUANTISED_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
#: The way out where weights are integers.
FLOAT_FIRST = "train the float network, and quantise it afterwards"
#: Of a layer whose module has a ``weight_fake_quant``, where equal or silent filters must stay so exactly.
FAKE_QUANTISED = (
    "its weight is fake-quantised in forward, with a scale per filter that follows its history; train the float "
    "network, and prepare it for quantisation afterwards"
)


class NoLayersError(ValueError):
    """No layer is left to act on. The message lists the available names and the closest match to each pattern."""


def canonical_name(name: str) -> str:
    """Return ``name`` without the levels that wrappers add (``_orig_mod``, ``module``, ``_fsdp_wrapped_module``).

    A compiled, DDP-wrapped ``backbone.conv1`` is ``module.backbone._orig_mod.conv1`` to ``named_modules()`` and
    ``backbone.conv1`` to the user, in every error, in checkpoints and in YAML.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_transposed(conv: Conv) -> bool:
    return isinstance(conv, _TRANSPOSED)


def filter_count(conv: Conv) -> int:
    """Number of filters ``J`` of ``conv``: its output channels."""
    return conv.out_channels


def _filter_view(conv: Conv) -> Tensor:
    """View of the weight with filters in front: ``(J, in/groups, *k)``, transposed ``(G, J/G, in/G, *k)``.

    A transposed convolution stores filter ``j`` of group ``g`` as the slice ``weight[g*in/G:(g+1)*in/G, j % (J/G)]``.
    """
    weight = conv.weight.detach()
    if not _is_transposed(conv):
        return weight
    groups = conv.groups
    return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)


def filter_matrix(conv: Conv) -> Tensor:
    """Return the filters of ``conv`` as the rows of a ``(J, d)`` matrix, detached.

    Columns are ordered (input channel, kernel position), whatever the memory format. For a contiguous ordinary
    convolution this is a view of the weight; for ``channels_last`` weights and transposed convolutions it is a copy.
    Treat it as read-only and write with :func:`write_filters`, which is right for all of them.

    Args:
        conv: ``Conv1d/2d/3d`` or ``ConvTranspose1d/2d/3d``, any ``groups``.

    Returns:
        Tensor of shape ``(J, d)``, the dtype and device of the weight.
    """
    view = _filter_view(conv)
    return (view.flatten(0, 1) if _is_transposed(conv) else view).flatten(1)


def write_filters(conv: Conv, rows: Tensor | Sequence[int], values: Tensor) -> None:
    """Overwrite the filters ``rows`` of ``conv`` in place with the rows of ``values``.

    Args:
        conv: the convolution to edit.
        rows: ``(n,)`` integer filter indices in ``0 <= row < J``, without repetition.
        values: ``(n, d)``, ordered like :func:`filter_matrix`; cast to the weight's dtype and device.

    Raises:
        TypeError: ``rows`` are not integers; a bool mask is not a list of indices.
        IndexError: a row is outside ``0 <= row < J`` or given twice.
        ValueError: ``values`` does not have shape ``(n, d)``.
    """
    check_tensor("values", values)
    index = torch.as_tensor(rows).reshape(-1).cpu()
    if index.numel() and (index.dtype == torch.bool or index.is_floating_point() or index.is_complex()):
        raise TypeError(f"rows must be integers (filter indices), got {index.dtype}: {index.tolist()}")
    index = index.long()
    count = filter_count(conv)
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        raise IndexError(f"rows must be in 0..{count - 1} for a layer of {count} filters, got {index.tolist()}")
    if index.unique().numel() != index.numel():
        raise IndexError(f"rows must name each filter once, got {index.tolist()}")
    fan_in = conv.weight.numel() // count
    if values.shape != (index.numel(), fan_in):
        raise ValueError(
            f"values must have shape ({index.numel()}, {fan_in}): one row of fan-in {fan_in} per filter, "
            f"got {tuple(values.shape)}"
        )
    view = _filter_view(conv)
    values = values.detach().to(device=view.device, dtype=view.dtype)
    index = index.to(view.device)
    with torch.no_grad():
        if _is_transposed(conv):
            per_group = view.shape[1]
            view[index // per_group, index % per_group] = values.view(-1, *view.shape[2:])
        else:
            view[index] = values.view(-1, *view.shape[1:])


def mask_layout(conv: Conv, axis: str = "out") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How a vector with one entry per slice of ``conv.weight`` broadcasts over the weight.

    Args:
        conv: the convolution.
        axis: ``"out"``: slices are filters, ``J`` entries; ``"in"``: slices are input channels as the weight stores
            them (``in/groups`` entries for an ordinary convolution, ``in`` for a transposed one).

    Returns:
        ``(weight_view, mask_view)``: reshape the weight to the first and the vector to the second, and they broadcast.

    Raises:
        ValueError: ``axis`` is neither.
    """
    if axis not in ("out", "in"):
        raise ValueError(f"axis must be 'out' or 'in', got {axis!r}")
    shape = tuple(conv.weight.shape)
    kernel_ones = (1,) * (len(shape) - 2)
    transposed = _is_transposed(conv)
    if axis == "in":
        return shape, ((shape[0], 1, *kernel_ones) if transposed else (1, shape[1], *kernel_ones))
    if transposed:
        groups = conv.groups
        return (groups, shape[0] // groups, *shape[1:]), (groups, 1, shape[1], *kernel_ones)
    return shape, (shape[0], 1, *kernel_ones)


def _weight_parameter(conv: nn.Module) -> nn.Parameter | None:
    return conv._parameters.get("weight")


def weight_obstacle(layer: nn.Module) -> tuple[str, str] | None:
    """Why the filters of ``layer`` are not the rows of a weight that can be read and updated as it is.

    Returns:
        ``None`` if they are (also for a lazy layer, which has no weight yet), else two clauses, each with the way out
        behind a semicolon: what follows "its weight", and what follows "every selected layer".
    """
    weight = _weight_parameter(layer)
    if weight is None:
        if (own := getattr(layer, "weight_obstacle", None)) is not None:
            return cast("tuple[str, str]", own)
        advice = "remove the parametrization first"
        return (
            f"is computed by a parametrization (weight_norm, prune, ...); {advice}",
            "is parametrized; remove that first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove)",
        )
    if is_lazy(weight):
        return None
    if is_traceable_wrapper_subclass(weight):
        kind = type(weight).__name__
        return (
            f"is a {kind}, a shard or a packed form; use strategy='ddp' or a single device, with whole, plain weights",
            f"has a {kind} for its weight, a shard or a packed form; use strategy='ddp' or a single device, with "
            f"whole, plain weights",
        )
    if weight.element_size() == 1 or not (weight.is_floating_point() or weight.is_complex()):
        return f"is quantised ({weight.dtype}); {FLOAT_FIRST}", f"is quantised; {FLOAT_FIRST}"
    return None


def quantised_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Canonical name -> layer of torch's quantised kinds; the convolutions among them are no :data:`CONVOLUTIONS`."""
    named = model.named_modules()
    return {canonical_name(n): m for n, m in named if type(m).__module__.startswith(_QUANTISED_MODULES)}


def named_convolutions(model: nn.Module) -> Iterator[tuple[str, Conv]]:
    """Yield ``(canonical name, convolution)`` of every convolution of ``model``; a shared weight once."""
    # Names that collide when they are shortened (`conv` beside `module.conv`) stay long, or one layer would be lost.
    found: list[tuple[str, Conv]] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, CONVOLUTIONS):
            continue
        weight = _weight_parameter(module)
        if weight is not None:
            if id(weight) in seen:
                continue
            seen.add(id(weight))
        found.append((name, module))
    taken = Counter(canonical_name(name) for name, _ in found)
    for name, conv in found:
        short = canonical_name(name)
        yield (short if taken[short] == 1 else name), conv


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _available(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _closest(pattern: str, names: Sequence[str]) -> str:
    """The nearest thing that would have matched: a subtree pattern, a longer prefix or the most similar name."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; '{pattern}' is a parent module, did you mean '{pattern}.*'?"
    if suffixed := [name for name in names if fnmatch.fnmatchcase(name, f"*.{pattern}")]:
        return f"; did you mean '*.{pattern}' (it matches {suffixed[0]!r})?"
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
    return f"; the closest name is {near[0]!r}" if near else ""


def check_patterns(argument: str, patterns: object) -> list[str] | None:
    """Return ``patterns`` as a list of strings, or raise an error that names ``argument``.

    Raises:
        TypeError: not ``None`` and not a list of strings (a bare string would be read letter by letter).
        ValueError: an empty list, which selects nothing.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise TypeError(
            f"{argument} must be a list of name patterns such as ['layer1.*'], got {patterns!r}; "
            f"write {argument}=[{patterns!r}] for a single pattern"
        )
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{argument} must be a list of strings, got {list(patterns)!r}")
    if not patterns and argument == "include":
        raise ValueError("include=[] selects no layer; use include=None for every convolution")
    return list(patterns)


def select_filters(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, Conv]:
    """Choose convolutions of ``model`` by shell-style patterns on their canonical names.

    Args:
        model: the network (a ``LightningModule`` works too).
        include: patterns such as ``["backbone.layer*.conv2"]`` (``*`` also crosses dots). ``None``: every
            ``Conv1d/2d/3d``. Transposed convolutions are taken only when a pattern names them.
        exclude: patterns of layers to leave out.

    Returns:
        Ordered mapping canonical name -> convolution. A weight shared by several modules appears once.

    Warns:
        UserWarning: layers whose weight is parametrized (``weight_norm``, ``torch.nn.utils.prune``), quantised or
            sharded are left out, by name; an ``exclude`` pattern that matches nothing.

    Raises:
        NoLayersError: a pattern of ``include`` matches nothing, or no layer is left.
        ValueError: a selected layer is lazy and not initialised yet.
    """
    check_module("model", model)
    include = check_patterns("include", include)
    exclude = check_patterns("exclude", exclude)
    found = dict(named_convolutions(model))
    quantised = [name for name, module in quantised_modules(model).items() if hasattr(module, "kernel_size")]
    if not found:
        packed = f". Its quantised layers ({_available(quantised)}) do not count: {FLOAT_FIRST}" if quantised else ""
        raise NoLayersError(
            f"{type(model).__name__} has no convolution: nothing for filter callbacks to act on{packed}"
        )
    names = [*found, *quantised]
    for pattern in include or ():
        if not any(_matches(name, [pattern]) for name in names):
            raise NoLayersError(
                f"include pattern {pattern!r} matches no convolution{_closest(pattern, names)}. "
                f"Available: {_available(names)}"
            )
    for pattern in exclude or ():
        if not any(_matches(name, [pattern]) for name in names):
            warnings.warn(f"exclude pattern {pattern!r} matches no convolution{_closest(pattern, names)}", stacklevel=2)
    chosen = {
        name: conv
        for name, conv in found.items()
        if (_matches(name, include) if include is not None else isinstance(conv, _FORWARD))
        and not _matches(name, exclude or ())
    }
    selected: dict[str, Conv] = {}
    left_out: dict[tuple[str, str], list[str]] = {}
    for name in quantised:
        if (include is None or _matches(name, include)) and not _matches(name, exclude or ()):
            packed_kind = f"is quantised (packed integers); {FLOAT_FIRST}", f"is quantised; {FLOAT_FIRST}"
            left_out.setdefault(packed_kind, []).append(name)
    for name, conv in chosen.items():
        if (obstacle := weight_obstacle(conv)) is not None:
            left_out.setdefault(obstacle, []).append(name)
        elif is_lazy(conv.weight):
            raise ValueError(
                f"layer {name!r} is lazy and has no weight yet: run one forward pass before training, "
                f"or exclude it with exclude=[{name!r}]"
            )
        else:
            selected[name] = conv
    for (why, _), layers in left_out.items():
        what, _, advice = why.partition("; ")
        warnings.warn(f"left out, because their weight {what}: {_available(layers)}; {advice}", stacklevel=2)
    if not selected:
        reason = "exclude leaves no convolution"
        if left_out:
            reason = "every selected layer " + ", or ".join(dict.fromkeys(everyone for _, everyone in left_out))
        elif include is None and not any(isinstance(conv, _FORWARD) for conv in found.values()):
            reason = "the model has only transposed convolutions, which must be named in include"
        raise NoLayersError(f"no layer is left: {reason}. Available: {_available(names)}")
    return selected
