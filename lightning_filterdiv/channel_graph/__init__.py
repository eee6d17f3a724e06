"""Which tensors belong to channel j of a layer, and who consumes it: traced, exact, fail-closed."""

from .answers import ChannelGroup, ConsumerColumns, Operation, TensorRows
from .errors import ChannelGraphError, ExampleInputsError, NarrowingError, StaleGraphError, TraceError
from .graph import ChannelGraph
from .inputs import CapturedInputs, capture_inputs

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
