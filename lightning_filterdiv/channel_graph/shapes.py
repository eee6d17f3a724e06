"""Results of calls on meta tensors: shape, strides and dtype, without the kernel where they are known.

Kernels on meta are written in Python for many operators and take up to 1.5 ms, as long as all the rest of a record does
for fifty calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .record import meta_like

__all__ = ["MetaResults", "is_dense", "meta_results", "one_trace"]

_META = torch.device("meta")
_UNTAGGED = frozenset({torch.ops.aten.hardswish.default})  # element-wise, without ATen's tag
_elementwise: dict[Any, bool] = {}
# Element-wise operator, dtypes and kinds of its arguments -> dtype of the result, None if it has several results.
_dtypes: dict[Any, torch.dtype | None] = {}


def is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill memory in one of the usual orders, which element-wise operators keep."""
    if tensor.is_contiguous():
        return True
    if tensor.ndim not in (4, 5):
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


class MetaResults:
    """Results of the calls of one trace. A call that was made with the same shapes before is not made again."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)`` for tensors on meta. The result shares no memory with the arguments."""
        if func.is_view:
            return func(*args, **kwargs)
        if _is_elementwise(func) and (result := _elementwise_result(func, args, kwargs)) is not None:
            return result
        key = (func, _described(args), _described(tuple(kwargs.items())))
        try:
            known = self._known.get(key)
        except TypeError:  # an argument that cannot be looked up
            return func(*args, **kwargs)
        if known is None:
            result = func(*args, **kwargs)
            self._known[key] = _specification(result)
            return result
        return _made(known)


_current: ContextVar[MetaResults | None] = ContextVar("results", default=None)


@contextmanager
def one_trace() -> Iterator[None]:
    """Share results among all records made inside, most of whose calls are the same."""
    token = _current.set(_current.get() or MetaResults())
    try:
        yield
    finally:
        _current.reset(token)


def meta_results() -> MetaResults:
    """Those of the trace that is running, or new ones."""
    return _current.get() or MetaResults()


def _is_elementwise(func: Any) -> bool:
    known = _elementwise.get(func)
    if known is None:
        known = _elementwise[func] = torch.Tag.pointwise in func.tags or func in _UNTAGGED
    return known


def _elementwise_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of an element-wise call; None where its strides do not simply follow from those of its operands."""
    if "memory_format" in kwargs:
        return None
    operands: list[Tensor] = []
    key: list[Any] = [func, torch.get_default_dtype(), *kwargs.items()]
    for item in args:
        if isinstance(item, Tensor):
            key.append((item.dtype, item.ndim == 0))
            operands.append(item)
        elif isinstance(item, (list, tuple)):
            return None
        else:
            key.append(type(item) if isinstance(item, (bool, int, float)) else item)
    wide = [operand for operand in operands if operand.ndim] or operands
    if not wide:
        return None
    first = wide[0]
    shape, strides = first.shape, first.stride()
    if all(other.shape == shape and other.stride() == strides for other in wide[1:]):
        if not is_dense(first):
            return None
    elif all(other.is_contiguous() for other in wide):
        shape, strides = torch.broadcast_shapes(*[other.shape for other in wide]), ()
    else:
        return None
    where = tuple(key)
    dtype = _dtypes.get(where, ...)
    if dtype is ...:
        result = func(*args, **kwargs)
        _dtypes[where] = result.dtype if isinstance(result, Tensor) else None
        return result  # type: ignore[no-any-return]
    if dtype is None:
        return None
    if strides:
        return torch.empty_strided(shape, strides, dtype=dtype, device=_META)
    return torch.empty(shape, dtype=dtype, device=_META)


def _described(value: Any) -> Any:
    """What a result on meta depends on, to look it up by; plain numbers with their type, since 1 == 1.0 == True."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple([_described(item) for item in value])
    return (type(value), value)


def _specification(result: Any) -> Any:
    """A copy of a result to make others of; None for what is not of tensors alone."""
    if isinstance(result, Tensor):
        return meta_like(result)
    if isinstance(result, (list, tuple)) and all(isinstance(part, Tensor) for part in result):
        return tuple([meta_like(part) for part in result])
    return None


def _made(known: Any) -> Any:
    return meta_like(known) if isinstance(known, Tensor) else tuple([meta_like(part) for part in known])
