"""Count the kernels and bytes of a per-step path on a device that need not exist, and find calls that would wait for
it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They move no data and launch nothing.
VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand",
    "narrow", "new_empty", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "_reshape_alias", "lift_fresh", "set_", "_to_copy_views",
}  # fmt: skip
# They do not read what they change.
_OVERWRITING = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_"}
# They wait for the device although fake tensors let them pass.
FACTORIZATIONS = ("linalg_", "_linalg", "svd", "qr", "eigh", "cholesky", "lu_")


class DeviceTrafficError(AssertionError):
    """A per-step path copies between host and device, indexes across them, or factorises a matrix."""


def _one_kernel(lists: Sequence[Sequence[Tensor]]) -> bool:
    """True if a ``_foreach`` op takes its multi-tensor path: lists that agree in shape, stride and dtype."""
    return all(
        len({(t.shape, t.stride(), t.dtype, t.device) for t in together}) == 1 for together in zip(*lists, strict=True)
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the distinct elements of tensors. An expanded tensor has fewer than its shape says."""
    total = 0
    for tensor in tensors:
        sides = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        total += prod(sides) * tensor.element_size()
    return total


def _traffic(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that an operation reads and writes. Tensors changed in place count twice, unless they are
    overwritten."""
    read: list[Any] = []
    written: list[Any] = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written.append(value)
        if not changed or func._schema.name.split("::")[1] not in _OVERWRITING:
            read.append(value)
    results = result if len(func._schema.returns) > 1 else (result,)
    written += [value for value, of in zip(results, func._schema.returns, strict=False) if of.alias_info is None]
    return _bytes([leaf for leaf in tree_leaves((read, written)) if isinstance(leaf, Tensor)])


class KernelCounter(TorchDispatchMode):
    """Counts kernels on a device; raises on traffic between host and device.

    Args:
        device: type of the counted device. With ``"cpu"``, real tensors show what a GPU would start.

    Attributes:
        kernels: by operation.
        bytes: read and written by them.
        flops: rate of matrix products.
    """

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.kernels: Counter[str] = Counter()
        self.bytes = 0
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "prim":  # queries such as a tensor's device
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        tensors += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        devices = {t.device.type for t in tensors}
        if len(devices) > 1:
            raise DeviceTrafficError(f"{func} mixes {sorted(devices)}")
        if self.device not in devices or name in VIEWS:
            return result
        if name.startswith(FACTORIZATIONS) and name != "linalg_vector_norm":  # a reduction like any other
            raise DeviceTrafficError(f"{func} factorises on the device")
        if name.startswith("_foreach_"):
            lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
            self.kernels[name] += 1 if _one_kernel(lists) else len(lists[0])
        else:
            self.kernels[name] += 1
        self.bytes += _traffic(func, args, kwargs, result)
        if name.rstrip("_") in ("mm", "bmm", "addmm", "baddbmm"):  # in place too
            self.flops += 2 * result.numel() * args[1 if "add" in name else 0].shape[-1]
        return result


#: Modules whose per-step paths copy something that was drawn on the host to the device, by ``stage``.
STAGING = ("lightning_filterdiv.async_update.functional", "lightning_filterdiv.orthonormality.penalty")


@contextmanager
def _staged(crossing: Callable[[Tensor, torch.device], Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in STAGING:
            stack.enter_context(mock.patch(f"{module}.stage", crossing))
        yield


@contextmanager
def host_draws_apart(counter: KernelCounter) -> Iterator[None]:
    """Exclude random draws on the host from ``counter``, which counts on the CPU.

    A per-step path draws first, copies once and never returns to the host. Counts up to its copy therefore belong to
    the host.
    """

    def crossing(cpu_tensor: Tensor, device: torch.device) -> Tensor:
        counter.kernels.clear()
        counter.flops = 0
        counter.kernels["stage"] = 1
        counter.bytes = 2 * cpu_tensor.nbytes
        return cpu_tensor

    with _staged(crossing):
        yield


@contextmanager
def fake_stage() -> Iterator[list[int]]:
    """Replace ``stage`` by a function that makes a fake device tensor and counts its calls, the only allowed copies to
    the device."""
    calls: list[int] = []

    def crossing(cpu_tensor: Tensor, device: torch.device) -> Tensor:
        calls.append(cpu_tensor.numel())
        return torch.empty(cpu_tensor.shape, dtype=cpu_tensor.dtype, device=device)

    with _staged(crossing):
        yield calls


def profiled_operations(action: Callable[[], object]) -> Counter[str]:
    """Operations inside ``action`` by name, the inner ones too, views left out (torch.profiler on the CPU)."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        action()
    return Counter(
        {
            event.key: event.count
            for event in recorded.key_averages()
            if event.key.startswith("aten::") and event.key.split("::")[-1] not in VIEWS
        }
    )
