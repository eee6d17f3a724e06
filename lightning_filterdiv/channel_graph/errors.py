"""Errors of the channel graph. Each message names the layer or submodule at fault and what to do about it."""

from __future__ import annotations

__all__ = ["ChannelGraphError", "ExampleInputsError", "NarrowingError", "StaleGraphError", "TraceError"]


class ChannelGraphError(ValueError):
    """Base class: a question about channels that cannot be answered exactly."""


class ExampleInputsError(ChannelGraphError):
    """No example inputs are known, or the network does not accept the given ones."""


class TraceError(ChannelGraphError):
    """The network cannot be recorded, for instance because forward reads values where there are none."""


class StaleGraphError(ChannelGraphError):
    """The model changed its structure after it was traced."""


class NarrowingError(ChannelGraphError):
    """The requested clusters cannot be turned into a narrower network."""
