"""The channel graph: the tensors of channel ``j`` of a layer, and the layers that read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .answers import ChannelAnswers
from .describe import describe
from .errors import TraceError
from .modules import without_collection
from .resize import pin_unresizable
from .shapes import one_trace
from .trace import trace
from .verify import verify
from .widths import nearest_counts

__all__ = ["ChannelGraph"]


class ChannelGraph(ChannelAnswers):
    """Exact answers about the channels of a network, or none. Made by :meth:`trace`.

    All names are canonical (without ``_orig_mod.``, ``module.``). The graph refers to the model without copying it.
    Every question raises :class:`StaleGraphError` once its structure has changed.
    """

    @classmethod
    def trace(cls, model: nn.Module, example_inputs: Any = None, *, network: str | None = None) -> ChannelGraph:
        """Trace ``model`` on example inputs.

        One forward pass in eval mode is recorded on shapes alone. If forward reads values of tensors, it runs on real
        tensors instead. Channels that it reads, or uses afterwards, are pinned.

        Args:
            model: nn.Module or LightningModule, on any device (``meta`` too), compiled or not. It is left as it was.
            example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of ``forward``. Default: the
                model's ``example_input_array``. Also what :func:`capture_inputs` recorded.
            network: trace only this submodule (``"backbone"``), which ``example_inputs`` then belong to. Names stay
                those of ``model``. The submodule's outputs count as network outputs.

        Raises:
            ExampleInputsError: no example inputs, or forward fails on them.
            TraceError: the network cannot be recorded (the message says which part).
            ChannelGraphError: the network has no convolution, or there is no such submodule.
        """
        try:
            with without_collection(), one_trace():
                graph = trace(model, example_inputs, network, cls)
                with graph.unquestioned():
                    pin_unresizable(graph)
        except StopIteration as error:  # a Trainer would take it for the end of the data
            raise TraceError(f"{type(model).__name__} cannot be traced: something in it ran out of items") from error
        return graph

    def expressible_counts(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """Return the number of channels to keep per group, as close to ``wanted`` as forward allows.

        If a forward body splits or pads channels, only some widths fit it. If channels are in blocks, the nearest
        multiple of the number of blocks is used. All other numbers are returned as wanted. Groups not mentioned keep
        all channels.
        """
        return nearest_counts(
            self, {group.name: group.rounded(wanted.get(group.name, group.size)) for group in self.groups}
        )

    def describe(self) -> str:
        """Return a text table of all groups and pinned layers."""
        return describe(self)

    def verify(self, example_inputs: Any = None, *, seed: int = 0) -> float:
        """Tie random channels of every group in a float64 copy, narrow it, and compare the outputs.

        Returns:
            Largest relative difference of an output (1e-15 to 1e-12 is rounding).

        Raises:
            NarrowingError: the narrowed network does not run or differs by more than rounding.
        """
        return verify(self, example_inputs, seed=seed).difference
