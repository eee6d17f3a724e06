"""Example inputs of forward: given, captured from a real call, or drawn at random."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import ExampleInputsError

__all__ = ["CapturedInputs", "capture_inputs", "example_arguments", "without_targets"]

# Optional arguments of detectors and language models that only add losses, and whose values forward checks first.
_TARGETS = ("targets", "target", "labels")


class CapturedInputs:
    """Arguments of the first forward call of a module, valid as ``example_inputs``. Also a context manager.

    Attributes:
        arguments: (args, kwargs) of the call, detached, at most ``limit`` items of the batch (zeros for an empty
            batch); None before the call.
    """

    def __init__(self, module: nn.Module, limit: int) -> None:
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._limit = limit
        self._handle = module.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.remove()
        # A list of images or targets is a batch of its own: as many items, each of them whole.
        args = tuple(value[: self._limit] if isinstance(value, list) else value for value in args)
        kwargs = {k: value[: self._limit] if isinstance(value, list) else value for k, value in kwargs.items()}
        plain = [value for value in (*args, *kwargs.values()) if not isinstance(value, list)]
        sizes = [leaf.shape[0] for leaf in tree_leaves(plain) if isinstance(leaf, Tensor) and leaf.ndim > 1]
        batch = sizes[0] if sizes else 0

        def few(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = leaf.detach()
            if leaf.ndim > 1 and not leaf.shape[0]:
                # A rank may start with an empty batch; shapes are all that counts.
                return leaf.new_zeros((self._limit, *leaf.shape[1:]))
            # A copy, so that the rest of the batch is not kept alive.
            return (leaf[: self._limit] if leaf.ndim and leaf.shape[0] == batch else leaf).clone()

        def whole(leaf: Any) -> Any:
            return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

        def cut(value: Any) -> Any:
            return tree_map(whole if isinstance(value, list) else few, value)

        self.arguments = tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}

    def remove(self) -> None:
        """Stop waiting for a call. The first call does this too."""
        self._handle.remove()

    def __enter__(self) -> CapturedInputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def capture_inputs(module: nn.Module, limit: int = 2) -> CapturedInputs:
    """Record the arguments of the next forward call of ``module``, for :meth:`ChannelGraph.trace`.

    A hook on a module *inside* a compiled one may never fire (the compiled code no longer calls it): capture on the
    compiled module itself, or before compiling.

    Args:
        module: network to trace. Any code may call it, for instance a ``training_step``.
        limit: items of the batch to keep.
    """
    return CapturedInputs(module, limit)


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def example_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for ``model.forward``, on the model's device and in its floating dtype.

    A tensor is one argument, a tuple or list several, a dict keyword arguments (Lightning's convention for
    ``example_input_array``, which stands in when ``example_inputs`` is None). Captured targets of a detector are left
    out: in eval mode forward does without them.

    Raises:
        ExampleInputsError: there are none.
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
            raise ExampleInputsError(
                "no example inputs were captured: the module has not been called yet. Call it once, or pass inputs "
                "instead"
            )
        example_inputs = without_targets(model, *example_inputs.arguments)
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


def without_targets(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """Return the arguments of a call without a detector's targets, which forward does not need in eval mode."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return _Call(args, kwargs)
    optional = [p.name in _TARGETS and p.default is None for p in parameters]
    left_out = {p.name for o, p in zip(optional, parameters, strict=True) if o}
    kwargs = {k: v for k, v in kwargs.items() if k not in left_out}
    kept = [None if i < len(optional) and optional[i] else value for i, value in enumerate(args)]
    return _Call(tuple(kept), kwargs)
