"""Errors of the channel graph. Each message names the layer or submodule and the fix."""

from __future__ import annotations

__all__ = [
    "ChannelGraphError",
    "ExampleInputsError",
    "GraphFormError",
    "NarrowingError",
    "StaleGraphError",
    "TraceError",
]


class ChannelGraphError(ValueError):
    """Base class: a question about channels has no exact answer."""


class ExampleInputsError(ChannelGraphError):
    """No example inputs are known, or the network does not accept the given ones."""


class TraceError(ChannelGraphError):
    """The network cannot be recorded, for instance because forward reads values where there are none."""


class StaleGraphError(ChannelGraphError):
    """The model changed its structure after it was traced."""


class NarrowingError(ChannelGraphError):
    """The requested clusters cannot be turned into a narrower network."""


class GraphFormError(NarrowingError):
    """A forward cannot be written down as a graph. The message is the reason, without the name of the module."""
