"""Inputs of a submodule, recorded from its first real call."""

from __future__ import annotations

from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..filters import canonical_name
from .errors import ChannelGraphError

__all__ = ["CapturedInputs", "capture_inputs", "find_submodule"]


class CapturedInputs:
    """Arguments of the first forward call of a module; a valid ``example_inputs``. Also a context manager.

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
        sizes = [leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 1]
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

        self.arguments = tree_map(few, (args, kwargs))

    def remove(self) -> None:
        """Stop waiting for a call. Done by itself at the first one."""
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
        module: the network that will be traced; it may be called by anything, for instance a ``training_step``.
        limit: items of the batch to keep.
    """
    return CapturedInputs(module, limit)


def find_submodule(model: nn.Module, network: str | None) -> nn.Module:
    """The submodule called ``network`` (canonical name), ``model`` itself for None.

    Raises:
        ChannelGraphError: there is no such submodule; the message lists the children.
    """
    if not network:
        return model
    for name, module in model.named_modules(remove_duplicate=False):
        if canonical_name(name) == network and canonical_name(name) != canonical_name(name.rpartition(".")[0]):
            return cast(nn.Module, module)
    children = ", ".join(repr(canonical_name(name)) for name, _ in model.named_children())
    raise ChannelGraphError(f"{type(model).__name__} has no submodule network={network!r}; its children are {children}")
