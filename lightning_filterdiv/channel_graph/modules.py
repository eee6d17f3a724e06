"""Modules and their tensors: names, wrappers, copies, and a state that a trace restores."""

from __future__ import annotations

import copy
import gc
import io
import logging
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..filters import all_modules, canonical_name, walk_modules, walk_tensors

__all__ = [
    "bare_module",
    "copy_network",
    "device_of",
    "find_tensors",
    "meta_stand_ins",
    "quiet",
    "replace_tensors",
    "set_norm_width",
    "structure",
    "tensor_names",
    "unchanged",
    "update_attributes",
    "without_collection",
    "without_compilation",
]


def bare_module(model: nn.Module) -> nn.Module:
    """``model`` without the wrappers of torch.compile and DDP."""
    while True:
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def tensor_names(model: nn.Module) -> dict[int, str]:
    """``id(tensor)`` -> canonical name of each parameter and buffer; a shared tensor goes by its first name."""
    names: dict[int, str] = {}
    for name, tensor in walk_tensors(model):
        names.setdefault(id(tensor), canonical_name(name))
    return names


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer, the CPU if there is none."""
    for _, tensor in walk_tensors(model):
        return tensor.device
    return torch.device("cpu")


def structure(model: nn.Module) -> dict[str, object]:
    """Module types, tensor shapes: what must not change between a trace and its use. Wrappers do not count."""
    described: dict[str, object] = {}
    for name, module in walk_modules(model):
        if bare_module(module) is module:
            described[canonical_name(name)] = type(module)
    for name, tensor in walk_tensors(model):
        described[f"{canonical_name(name)} "] = tensor.shape
    return described


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested containers, dataclasses and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from find_tensors(item)
    elif isinstance(value, (tuple, list, set)):
        for item in value:
            yield from find_tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        for item in vars(value).values():
            yield from find_tensors(item)


@contextmanager
def without_compilation(model: nn.Module) -> Iterator[None]:
    """Children wrapped by torch.compile replaced by the originals, and ``module.compile()`` undone, for a while."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    compiled: list[tuple[nn.Module, Any]] = []
    try:
        for parent in all_modules(model):
            for name, child in list(parent._modules.items()):
                if child is not None and bare_module(child) is not child:
                    swapped.append((parent, name, child))
                    parent._modules[name] = bare_module(child)
            if getattr(parent, "_compiled_call_impl", None) is not None:
                compiled.append((parent, parent._compiled_call_impl))
                parent._compiled_call_impl = None
        yield
    finally:
        for parent, name, child in reversed(swapped):
            parent._modules[name] = child
        for module, implementation in compiled:
            module._compiled_call_impl = implementation


_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@contextmanager
def unchanged(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Set the mode, and restore every attribute and hook of every module and the random state afterwards.

    Dicts, lists and sets among the attributes get their entries back: hooks that forward installs at its first call
    (transformers), caches (LeViT).
    """
    modules = all_modules(model)
    attributes = [(m, dict(m.__dict__)) for m in modules]
    containers = {id(c): (c, c.copy()) for _, values in attributes for c in values.values() if type(c) in _CONTAINERS}
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            for module in modules:
                # Random masks say nothing about channels.
                module.training = training and not isinstance(module, nn.modules.dropout._DropoutNd)
            yield
        finally:
            for container, entries in containers.values():
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(entries)
            for module, before in attributes:
                module.__dict__.clear()
                module.__dict__.update(before)


def meta_stand_ins(model: nn.Module) -> dict[int, Tensor]:
    """``id`` of each parameter and floating buffer -> the same on meta: shape and no memory."""
    stand_ins: dict[int, Tensor] = {}
    for _, tensor in walk_tensors(model):
        new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        if isinstance(tensor, nn.Parameter):
            stand_ins.setdefault(id(tensor), nn.Parameter(new, tensor.requires_grad))
        elif tensor.is_floating_point():
            stand_ins.setdefault(id(tensor), new)
    return stand_ins


def replace_tensors(model: nn.Module, replaced: Mapping[int, Tensor]) -> list[nn.Module]:
    """Put new tensors in place of old ones (looked up by identity, so shared tensors stay shared).

    Returns:
        The modules that have new ones.
    """
    touched: list[nn.Module] = []
    parameters: dict[int, nn.Parameter] = {}
    modules = all_modules(model)
    for module in modules:
        for name, old in list(module._parameters.items()):
            if old is not None and id(old) in replaced:
                if id(old) not in parameters:
                    new = replaced[id(old)]
                    parameters[id(old)] = (
                        new if isinstance(new, nn.Parameter) else nn.Parameter(new, requires_grad=old.requires_grad)
                    )
                module._parameters[name] = parameters[id(old)]
                touched.append(module)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and id(buffer) in replaced:
                module._buffers[name] = replaced[id(buffer)]
                touched.append(module)
    for module in modules:
        if is_parametrized(module) and any(m in touched for m in cast(nn.Module, module.parametrizations).modules()):
            touched.append(module)
    return list(dict.fromkeys(touched))


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause cyclic garbage collection.

    A trace makes many small objects and no garbage. Full collections, which visit all of torch, would take a third of
    its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch's log lines about shapes that do not fit, which become our own error."""
    loggers = [logging.getLogger(f"torch._subclasses.{name}") for name in ("fake_tensor", "functional_tensor")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def copy_network(model: nn.Module, tensors: Mapping[int, object] | None = None) -> nn.Module:
    """Deep copy without compilation wrappers, gradients or the Trainer.

    Args:
        model: the network.
        tensors: ``id`` of a parameter or buffer -> what stands for it in the copy.
    """
    model = bare_module(model)
    memo: dict[int, Any] = dict(tensors or {})
    for module in all_modules(model):
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that a hook computes before each call
                memo[id(value)] = value.detach().clone()
            elif type(value) in (dict, OrderedDict) and not value:  # a dozen tables of hooks, which deepcopy rebuilds
                memo[id(value)] = type(value)()
    trainer = getattr(model, "_trainer", None)
    if trainer is not None:
        memo[id(trainer)] = trainer
    with without_compilation(model):
        try:
            copied = copy.deepcopy(model, dict(memo))
        except Exception:  # a lock, an open file, a logger: whatever a module keeps that cannot be copied is shared
            copied = copy.deepcopy(model, memo | _uncopyable(model, memo))
    if trainer is not None:
        copied.__dict__["_trainer"] = None
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _uncopyable(model: nn.Module, memo: Mapping[int, Any]) -> dict[int, Any]:
    """Plain attributes of the modules that refuse to be copied, standing for themselves."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and id(value) not in memo:
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    shared[id(value)] = value
    return shared


def _recompute(module: nn.Module) -> None:
    """Bring a weight that hooks compute before each call (weight_norm, prune) up to date."""
    if isinstance(vars(module).get("weight"), Tensor):
        for hook in module._forward_pre_hooks.values():
            if hasattr(hook, "compute_weight") or hasattr(hook, "apply_mask"):
                hook(module, ())


def update_attributes(module: nn.Module) -> None:
    """Make the integer attributes of ``module`` agree with its tensors."""
    _recompute(module)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        reads, writes = module.weight.shape[:2]
        if module.groups == module.in_channels > 1:  # depthwise: a block has one channel
            module.groups = reads
        module.in_channels, module.out_channels = reads, writes * module.groups
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        writes, reads = module.weight.shape[:2]
        if module.groups == module.in_channels > 1:  # depthwise: a block has one channel
            per_channel = module.out_channels // module.groups
            module.groups = writes // per_channel
        module.in_channels, module.out_channels = reads * module.groups, writes
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = [t for t in (module.weight, module.running_mean, module.bias) if t is not None]
        if known:  # without any, a norm takes every width
            module.num_features = known[0].shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(weight := module._parameters.get("weight"), Tensor) and weight.ndim == 1:
        set_norm_width(module, weight.numel())


def set_norm_width(module: nn.Module, width: int) -> None:
    """Make the attributes of a norm over channels agree with their number."""
    if isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = width
        module.num_channels = width
    elif isinstance(shape := getattr(module, "normalized_shape", None), (tuple, list)) and len(shape) == 1:
        vars(module)["normalized_shape"] = [width] if isinstance(shape, list) else (width,)
