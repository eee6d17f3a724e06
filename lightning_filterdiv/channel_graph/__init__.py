"""Which tensors belong to channel j of a layer, and who consumes it: traced, exact, fail-closed."""

from .capture import CapturedInputs, capture_inputs
from .classes import ChannelGroup, TensorRows
from .errors import ChannelGraphError, ExampleInputsError, NarrowingError, StaleGraphError, TraceError
from .graph import ChannelGraph, ConsumerColumns, Operation

__all__ = [
    "CapturedInputs",
    "ChannelGraph",
    "ChannelGraphError",
    "ChannelGroup",
    "ConsumerColumns",
    "ExampleInputsError",
    "NarrowingError",
    "Operation",
    "StaleGraphError",
    "TensorRows",
    "TraceError",
    "capture_inputs",
]
