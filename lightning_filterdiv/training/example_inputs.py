"""Example inputs of the channel graph: the module's own, else those of the first real forward call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_filterdiv.channel_graph import (
    CapturedInputs,
    ChannelGraph,
    ChannelGraphError,
    ExampleInputsError,
    capture_inputs,
)
from lightning_filterdiv.channel_graph.inputs import without_targets
from lightning_filterdiv.channel_graph.modules import bare_module
from lightning_filterdiv.filters import NoLayersError, find_submodule, named_convolutions

__all__ = ["ExampleInputs", "check_inputs_state"]


_PLAIN = (Tensor, int, float, bool, str, type(None))


def check_inputs_state(state: object) -> dict[str, Any] | None:
    """Return what :meth:`ExampleInputs.state` wrote.

    Raises:
        KeyError, TypeError: it is damaged.
    """
    if state is None:
        return None
    if not isinstance(state, dict):
        raise TypeError("inputs must be a dict")
    args, kwargs, network = (state[entry] for entry in ("args", "kwargs", "network"))
    if not isinstance(args, list) or not isinstance(kwargs, dict) or not isinstance(network, str | None):
        raise TypeError("inputs must hold a list of args, a dict of kwargs and the name of a network")
    if not all(isinstance(leaf, _PLAIN) for leaf in tree_leaves((args, kwargs))):
        raise TypeError("inputs must hold tensors and plain values")
    return state


class ExampleInputs:
    """Capture the inputs of the network in training, and trace it on request.

    Sources in this order: the submodule ``network`` and its first call; the module and its ``example_input_array``; the
    module and its first call; the only child with convolutions and its first call. The last one serves modules whose
    ``training_step`` never calls ``forward``.

    Args:
        pl_module: the module that is trained.
        network: canonical name of the submodule to trace.
        state: result of :meth:`state` before a resume. The first event of a resume may come before any forward call.

    Raises:
        NoLayersError: there is no such submodule.
    """

    def __init__(self, pl_module: pl.LightningModule, network: str | None, state: dict[str, Any] | None = None) -> None:
        self._module = pl_module
        self._captured: dict[str | None, CapturedInputs] = {}
        self._graph: ChannelGraph | None = None
        self._of_checkpoint = False
        if network is None and pl_module.example_input_array is not None:
            return
        if state is not None:
            try:
                find_submodule(pl_module, state["network"])
            except NoLayersError as error:
                raise NoLayersError(
                    f"{error}. The name is that of the fit that saved the checkpoint: resume with the same network"
                ) from error
            known = capture_inputs(nn.Identity())
            known.arguments = (tuple(state["args"]), dict(state["kwargs"]))
            self._captured[state["network"]] = known
            self._of_checkpoint = True
            return
        for name in [network] if network is not None else [None, *self._only_child_with_convolutions()]:
            module = find_submodule(pl_module, name)
            self._captured[name] = capture_inputs(module) if name is not None else _ForwardInputs(module, 2)

    def _only_child_with_convolutions(self) -> list[str]:
        names = {name.split(".")[0] for name, _ in named_convolutions(self._module)}
        return list(names) if len(names) == 1 else []

    def _called(self) -> tuple[str | None, CapturedInputs] | None:
        return next(((n, captured) for n, captured in self._captured.items() if captured.arguments is not None), None)

    @property
    def known(self) -> bool:
        """True if :meth:`trace` has inputs."""
        return self._graph is not None or not self._captured or self._called() is not None

    def awaited(self, layers: Iterable[nn.Module]) -> bool:
        """True if the first forward call is still to come. A ``training_step`` may skip batches.

        Args:
            layers: layers of the network. If one of them has a gradient, a forward call has happened.
        """
        return not self.known and all(p.grad is None for layer in layers for p in layer.parameters())

    def trace(self) -> ChannelGraph:
        """Return the channel graph. It is traced once, and again if the structure of the model has changed.

        Raises:
            ExampleInputsError: no example inputs are known; the message says how to give them.
        """
        if self._graph is None or not self._graph.current:
            if not self._captured:
                self._graph = ChannelGraph.trace(self._module)
            elif (called := self._called()) is not None:
                try:
                    self._graph = ChannelGraph.trace(self._module, called[1], network=called[0])
                except ChannelGraphError as error:
                    if not self._of_checkpoint:
                        raise
                    raise type(error)(
                        f"{error}. The inputs are those of the fit that saved the checkpoint: set example_input_array "
                        f"in the LightningModule to give others"
                    ) from error
            else:
                waiting = next(iter(self._captured)) or type(self._module).__name__
                raise ExampleInputsError(
                    f"no forward call of {waiting} was seen in training, so the channel graph has no example inputs: "
                    f"set example_input_array in the LightningModule, or name the submodule that training_step calls "
                    f"with network='...'"
                )
            self.close()
        return self._graph

    def state(self) -> dict[str, Any] | None:
        """Return the shapes of the captured call for a checkpoint, as zeros without memory; ``None`` if there are
        none."""
        called = self._called()
        if called is None or called[1].arguments is None:
            return None
        if not all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(called[1].arguments)):
            return None

        def shape(leaf: Any) -> Any:
            return torch.zeros((), dtype=leaf.dtype).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf

        # Detectors refuse boxes of zeros. A trace leaves out their targets anyway.
        traced = bare_module(find_submodule(self._module, called[0]))
        args, kwargs = tree_map(shape, without_targets(traced, *called[1].arguments))
        return {"network": called[0], "args": list(args), "kwargs": dict(kwargs)}

    def close(self) -> None:
        """Stop waiting."""
        for captured in self._captured.values():
            captured.remove()


class _ForwardInputs(CapturedInputs):
    """Capture the inputs of ``forward`` only. Under DDP Lightning calls the module to run ``training_step``, with
    ``forward`` replaced for the moment. That call has the step's arguments, not the network's."""

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "forward" not in vars(module):
            super()._record(module, args, kwargs)
