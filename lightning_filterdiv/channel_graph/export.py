"""Export a network to ATen operators without leaving a trace on it."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from ..filters import CONVOLUTIONS, canonical_name
from .capture import CapturedInputs
from .errors import ExampleInputsError, TraceError

__all__ = ["bare_module", "example_arguments", "export", "find_tensors", "quiet", "tensor_names", "without_compilation"]

_DATA_DEPENDENT = (
    "GuardOnDataDependentSymNode",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "PendingUnbackedSymbolNotFound",
    "UserError",
    "UncapturedHigherOrderOpError",
)


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
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), canonical_name(name))
    return names


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def example_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for ``model.forward``, on the model's device and in its floating dtype.

    A tensor is one argument, a tuple or list several, a dict keyword arguments (Lightning's convention for
    ``example_input_array``, which stands in when ``example_inputs`` is None).
    """
    if example_inputs is None:
        example_inputs = getattr(model, "example_input_array", None)
    if example_inputs is None:
        raise ExampleInputsError(
            f"no example inputs for {type(model).__name__}: pass example_inputs=..., or set example_input_array on the "
            "LightningModule, or record the first forward call with capture_inputs(module)"
        )
    if isinstance(example_inputs, CapturedInputs):
        if example_inputs.arguments is None:
            raise ExampleInputsError("no example inputs were captured: the module has not been called yet")
        example_inputs = _Call(*example_inputs.arguments)
    reference = next((t for t in model.parameters() if t.is_floating_point()), None)
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        if reference is not None and leaf.is_floating_point():
            leaf = leaf.to(reference.dtype)
        return leaf.to(next(iter(devices))) if len(devices) == 1 else leaf

    if isinstance(example_inputs, _Call):
        return tree_map(fit, tuple(example_inputs))  # type: ignore[no-any-return]
    example_inputs = tree_map(fit, example_inputs)
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


class _Flat(nn.Module):
    """The network with its outputs as a flat tuple of tensors, whatever container its forward returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(find_tensors(self.network(*args, **kwargs)))


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
        for parent in list(model.modules()):
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


@contextmanager
def _unchanged(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Set the mode; afterwards every attribute of every module, and the CPU generator, are as they were."""
    modules = list(model.modules())
    attributes = [(m, dict(m.__dict__)) for m in modules]
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (table, dict(table)) for m in modules for table in (m._parameters, m._buffers, m._modules)
    ]
    random_state = torch.random.get_rng_state()
    try:
        for module in modules:
            # Random masks say nothing about channels.
            module.training = training and not isinstance(module, nn.modules.dropout._DropoutNd)
        yield
    finally:
        torch.random.set_rng_state(random_state)
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for module, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines from torch about shapes that do not fit: they become our own error."""
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


@contextmanager
def _call_stack(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules whose forward is running; after an exception, those it came through."""
    stack: list[nn.Module] = []
    inside = {id(m) for m in model.modules()}

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in inside:
            stack.append(module)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if stack and stack[-1] is module:
            stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool = False
) -> ExportedProgram:
    """``model`` as an ATen graph, functional and decomposed no further than named operators.

    Runs on fake tensors: no weight is copied, nothing is computed.

    Raises:
        ExampleInputsError: forward fails on these inputs.
        TraceError: the network cannot be exported.
    """
    with without_compilation(model), _unchanged(model, training=training), _call_stack(model) as stack:
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(_Flat(model), args, kwargs, strict=False)
                return cast(ExportedProgram, program.run_decompositions({}))
        except Exception as error:
            raise _explain(model, stack, error) from error


def _explain(model: nn.Module, stack: list[nn.Module], error: Exception) -> Exception:
    names = {id(m): canonical_name(n) for n, m in reversed(list(model.named_modules()))}
    path = names.get(id(stack[-1]), "") if stack else ""
    part = f"submodule {path!r} ({type(stack[-1]).__name__})" if path else f"{type(model).__name__}.forward"
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    first_line = first_line.removesuffix(", but expected one of:")  # the lines after it
    kinds = {cls.__name__ for cls in type(error).__mro__}
    if kinds & set(_DATA_DEPENDENT):
        candidates = [
            name
            for name, child in model.named_children()
            if any(isinstance(m, CONVOLUTIONS) for m in child.modules()) and not path.startswith(name)
        ]
        example = candidates[0] if candidates else "backbone"
        return TraceError(
            f"{part} cannot be traced: its control flow or its shapes depend on the values of tensors ({first_line}). "
            f"Trace a submodule that does not, for instance network={example!r}"
        )
    if isinstance(error, (RuntimeError, TypeError, ValueError, IndexError, AssertionError, AttributeError)):
        return ExampleInputsError(f"{part} does not accept the example inputs: {first_line}")
    return TraceError(f"{part} cannot be traced: {first_line}. Trace a submodule that can: network='...'")
