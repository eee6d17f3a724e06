"""One batch that the network sees at every snapshot, so that the outputs of its filters can be compared over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_filterdiv.channel_graph.inputs import example_arguments
from lightning_filterdiv.filters import Conv, find_submodule, named_convolutions
from lightning_filterdiv.monitor.activations import measure_channels
from lightning_filterdiv.monitor.functional import Dropped

__all__ = ["FixedBatch"]


class FixedBatch:
    """Capture the arguments of a forward call of a network, and repeat that call.

    The network is ``module`` if it is called itself, else its only child with convolutions.

    Args:
        module: module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._call: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._handles: list[Any] = []

    @property
    def known(self) -> bool:
        """True if a call was captured."""
        return self._call is not None

    def watch(self) -> None:
        """Keep a copy of the arguments of the next call, unless one is known."""
        if self.known or self._handles:
            return
        names = {name.partition(".")[0] for name, _ in named_convolutions(self._module)}
        children = [find_submodule(self._module, name) for name in names] if len(names) == 1 else []
        candidates = [module for module in (self._module, *children) if module is not None]
        self._handles = [m.register_forward_pre_hook(self._keep, with_kwargs=True) for m in candidates]

    def stop(self) -> bool:
        """Stop watching. Return true if no call was seen meanwhile."""
        watched = bool(self._handles)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return watched and not self.known

    def take_example(self, module: nn.Module) -> None:
        """Use Lightning's ``example_input_array`` of ``module``.

        Raises:
            ExampleInputsError: there is none.
        """
        self._call = module, *example_arguments(module, None)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Under DDP a step runs by calling the module, with forward replaced. Those arguments belong to the step.
        if self.known or "forward" in vars(module):
            return

        def copied(leaf: Any) -> Any:
            return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

        self._call = module, tree_map(copied, args), tree_map(copied, kwargs)

    @torch.no_grad()
    def correlations(self, layers: Mapping[str, Conv], dropped: Mapping[str, Dropped]) -> dict[str, Tensor]:
        """Return correlations between the channels of ``layers``, see :func:`~.activations.measure_channels`.

        Raises:
            RuntimeError: none of the layers ran.
        """
        assert self._call is not None
        module, args, kwargs = self._call
        found = measure_channels(self._module, layers, lambda: module(*args, **kwargs), dropped)
        if not found:
            raise RuntimeError(f"a forward call of {type(module).__name__} runs none of the layers")
        return found
