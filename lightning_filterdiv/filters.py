"""Filters as the rows of a ``(J, d)`` matrix, for every kind of convolution; layers and tensors by canonical name.

Shapes used throughout the package: a layer has ``J`` filters (output channels); each filter has ``d`` weights, its
fan-in (input channels seen by the filter times kernel positions).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lightning_filterdiv.selection import NoLayersError, Obstacle, check_patterns, select_layers
from lightning_filterdiv.tensors.arguments import check_module, check_tensor

__all__ = [
    "CONVOLUTIONS",
    "FAKE_QUANTISED",
    "FLOAT_FIRST",
    "PACKED",
    "Conv",
    "NoLayersError",
    "Obstacle",
    "all_modules",
    "canonical_name",
    "check_patterns",
    "check_rows",
    "filter_count",
    "filter_matrix",
    "find_prefix",
    "find_submodule",
    "find_weight_obstacle",
    "mask_layout",
    "named_convolutions",
    "named_modules",
    "named_tensors",
    "quantised_modules",
    "select_filters",
    "walk_modules",
    "walk_tensors",
    "write_filters",
]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_FORWARD = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: Every kind of convolution, for ``isinstance``.
CONVOLUTIONS = _FORWARD + _TRANSPOSED
# Wrappers that add one level to every name below them: torch.compile, DataParallel and DDP, FSDP.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module"})
# Modules whose kernels are packed integers instead of parameters. They are known by name: importing them takes long.
_QUANTISED_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
#: Fix for layers whose weights are integers.
FLOAT_FIRST = "train the float network, and quantise it afterwards"
#: Obstacle of the layers in :func:`quantised_modules`.
PACKED = Obstacle("is quantised (packed integers)", FLOAT_FIRST)
#: Reason to refuse a layer with a ``weight_fake_quant``: its equal or silent filters do not stay exactly so.
FAKE_QUANTISED = (
    "its weight is fake-quantised in forward, with a scale per filter that follows its history; train the float "
    "network, and prepare it for quantisation afterwards"
)


@lru_cache(maxsize=1 << 16)
def canonical_name(name: str) -> str:
    """Return ``name`` without the levels that wrappers add (``_orig_mod``, ``module``, ``_fsdp_wrapped_module``).

    A compiled, DDP-wrapped ``backbone.conv1`` is ``module.backbone._orig_mod.conv1`` to ``named_modules()`` and
    ``backbone.conv1`` to the user, in every error, in checkpoints and in YAML.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _is_wrapped(name: str) -> bool:
    """True if the last level of ``name`` is one that a wrapper adds."""
    return name.rpartition(".")[2] in _WRAPPERS


def walk_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """``model.named_modules(remove_duplicate=False)``, whose nested generators take several times as long."""
    found, waiting = [], [("", model)]
    while waiting:
        name, module = waiting.pop()
        found.append((name, module))
        if module._modules:
            prefix = f"{name}." if name else ""
            children = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
            waiting += reversed(children)
    return found


def all_modules(model: nn.Module) -> list[nn.Module]:
    """``model.modules()``: each module once."""
    return list(dict.fromkeys(module for _, module in walk_modules(model)))


def walk_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters, then all buffers, under every name they have."""
    modules = walk_modules(model)
    for name, module in modules:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{name}.{key}" if name else key), parameter
    for name, module in modules:
        for key, buffer in module._buffers.items():
            if buffer is not None:
                yield (f"{name}.{key}" if name else key), buffer


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return canonical name -> module, under each of its names. A wrapper is replaced by the module that it wraps.

    Names that would collide when shortened (``conv`` beside ``module.conv``) stay long, so that no module is lost.
    Likewise the name of a module that lies in ``module`` of one that is no wrapper (``Residual(module)``). If it is a
    layer, it has the short name, as its weights do, and the other one is ``name (Residual)``. The outermost module
    counts as a wrapper.
    """
    named = walk_modules(model)
    taken = Counter(canonical_name(name) for name, _ in named if not _is_wrapped(name))
    found, raw = {}, dict(named)
    for name, module in named:
        short = canonical_name(name)
        around = name.rpartition(".")[0]
        inside = bool(around and _is_wrapped(name) and module._modules) and not _is_wrapper(raw[around])
        inner = module._modules.get("module")
        if name and inner is not None and not inner._modules and not _is_wrapper(module):
            short = f"{short} ({type(module).__name__})"
        found[name if inside or taken[short] > 1 else short] = module
    return found


def _is_wrapper(module: nn.Module) -> bool:
    """True for torch's and Lightning's own classes: all that they do is to call ``module``."""
    return type(module).__module__.partition(".")[0] in ("torch", "lightning", "pytorch_lightning")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return canonical name -> parameter or buffer, under each of its names."""
    return {canonical_name(name): tensor for name, tensor in walk_tensors(model)}


def find_submodule(model: nn.Module, name: str | None, error: type[ValueError] = NoLayersError) -> nn.Module:
    """Return the submodule of a canonical name, ``model`` itself for ``None`` and for an empty name.

    If the submodule is wrapped, the wrapper is returned, because hooks inside a compiled module may never fire.

    Args:
        model: the network.
        name: canonical name.
        error: class of the error.

    Raises:
        ``error``: there is no such submodule; the message lists the children.
    """
    module: nn.Module
    if not name:
        return model
    for full, module in walk_modules(model):
        if canonical_name(full) == (name or "") and (not full or not _is_wrapped(full)):
            return module
    children = ", ".join(repr(canonical_name(child)) for child, _ in model.named_children())
    raise error(f"{type(model).__name__} has no submodule network={name!r}; its children are {children}")


def find_prefix(names: Iterable[str], known: Iterable[str]) -> tuple[str, str] | None:
    """Find how names of a network become those of the network around it, or inside it.

    A LightningModule adds one level (``net.``) to the names of the network that it holds.

    Args:
        names: canonical names, at least one.
        known: canonical names that they are to become.

    Returns:
        The prefix to take off and the prefix to put on, with dots, one of them empty; ``None`` where no prefix makes
        all of ``names`` known.
    """
    names, known = list(names), dict.fromkeys(known)
    if all(name in known for name in names):
        return "", ""
    for prefix in _leading_parts(names[:1]):
        if all(name.startswith(prefix) and name.removeprefix(prefix) in known for name in names):
            return prefix, ""
    for prefix in _leading_parts(known):
        if all(prefix + name in known for name in names):
            return "", prefix
    return None


def _leading_parts(names: Iterable[str]) -> list[str]:
    """Return the prefixes of names, shortest first: ``a.`` and ``a.b.`` for ``a.b.c``."""
    parts = [name.split(".") for name in names]
    prefixes = {".".join(levels[:depth]) + "." for levels in parts for depth in range(1, len(levels))}
    return sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix))


def _is_transposed(conv: Conv) -> bool:
    return isinstance(conv, _TRANSPOSED)


def filter_count(layer: Conv | nn.Linear) -> int:
    """Return the number of filters ``J`` of ``layer``: its output channels or features."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _filter_view(conv: Conv) -> Tensor:
    """Return a view of the weight with filters in front: ``(J, in/groups, *k)``, transposed ``(G, J/G, in/G, *k)``.

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
    Treat it as read-only. :func:`write_filters` writes in all of these cases.

    Args:
        conv: ``Conv1d/2d/3d`` or ``ConvTranspose1d/2d/3d``, any ``groups``.

    Returns:
        Tensor of shape ``(J, d)``, the dtype and device of the weight.
    """
    view = _filter_view(conv)
    return (view.flatten(0, 1) if _is_transposed(conv) else view).flatten(1)


def check_rows(conv: Conv, rows: Tensor | Sequence[int]) -> Tensor:
    """Return filter indices as ``(n,)`` int64 on the CPU.

    Raises:
        TypeError: ``rows`` are not integers; a bool mask is not a list of indices.
        IndexError: a row is outside ``0 <= row < J`` or given twice.
    """
    index = torch.as_tensor(rows).reshape(-1).cpu()
    if index.numel() and (index.dtype == torch.bool or index.is_floating_point() or index.is_complex()):
        raise TypeError(f"rows must be integers (filter indices), got {index.dtype}: {index.tolist()}")
    index = index.long()
    count = filter_count(conv)
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        raise IndexError(f"rows must be in 0..{count - 1} for a layer of {count} filters, got {index.tolist()}")
    if index.unique().numel() != index.numel():
        raise IndexError(f"rows must name each filter once, got {index.tolist()}")
    return index


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
    index = check_rows(conv, rows)
    fan_in = conv.weight.numel() // filter_count(conv)
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
    """Return the shapes in which a vector with one entry per slice of ``conv.weight`` broadcasts over the weight.

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


def find_weight_obstacle(layer: nn.Module) -> Obstacle | None:
    """Return why the filters of ``layer`` cannot be read from and written to its weight.

    ``None`` if they can, and for a lazy layer, which has no weight yet. A parametrization may give its own reason, by
    an attribute ``obstacle``.
    """
    weight = _weight_parameter(layer)
    if weight is None:
        if is_parametrized(layer, "weight"):
            for step in cast(nn.ModuleDict, layer.parametrizations)["weight"].children():
                if isinstance(own := getattr(step, "obstacle", None), Obstacle):
                    return own
        return Obstacle(
            "has a weight computed by a parametrization (weight_norm, prune, ...)",
            "remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations, prune.remove)",
        )
    if is_lazy(weight):
        return None
    if is_traceable_wrapper_subclass(weight):
        return Obstacle(
            f"has a {type(weight).__name__} for its weight, a shard or a packed form",
            "use strategy='ddp' or a single device, with whole, plain weights",
        )
    if weight.layout != torch.strided:
        return Obstacle(f"has a sparse weight ({weight.layout})", "store it dense, with weight.to_dense()")
    if weight.numel() == 0:
        return Obstacle("has a weight without numbers", "give it at least one channel, or remove it")
    if weight.element_size() == 1 or not (weight.is_floating_point() or weight.is_complex()):
        return Obstacle(f"is quantised ({weight.dtype})", FLOAT_FIRST)
    return None


def quantised_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return canonical name -> layer of torch's quantised classes. These are not among :data:`CONVOLUTIONS`."""
    return {n: m for n, m in named_modules(model).items() if type(m).__module__.startswith(_QUANTISED_MODULES)}


def named_convolutions(model: nn.Module) -> Iterator[tuple[str, Conv]]:
    """Yield ``(canonical name, convolution)`` of every convolution of ``model``; a shared weight once."""
    seen: set[int] = set()
    for name, module in named_modules(model).items():
        if isinstance(module, CONVOLUTIONS):
            weight = _weight_parameter(module)
            identity = id(module if weight is None else weight)
            if identity not in seen:
                seen.add(identity)
                yield name, module


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
    convolutions = dict(named_convolutions(model))
    packed = {name: module for name, module in quantised_modules(model).items() if hasattr(module, "kernel_size")}
    if not convolutions and not packed:
        raise NoLayersError(f"{type(model).__name__} has no convolution to act on; use a network with some")

    def find_obstacle(name: str, layer: nn.Module) -> Obstacle | None:
        if name in packed:
            return PACKED
        obstacle = find_weight_obstacle(layer)
        if obstacle is None and is_lazy(convolutions[name].weight):
            raise ValueError(
                f"layer {name!r} is lazy and has no weight yet: run one forward pass before training, "
                f"or exclude it with exclude=[{name!r}]"
            )
        return obstacle

    selected = select_layers(
        {**convolutions, **packed},
        include,
        exclude,
        noun="convolution",
        is_default=lambda layer: not isinstance(layer, _TRANSPOSED),
        no_default="the model has only transposed convolutions, which must be named in include",
        find_obstacle=find_obstacle,
    )
    return {name: convolutions[name] for name in selected}
