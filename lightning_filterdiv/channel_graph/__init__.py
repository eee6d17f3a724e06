"""Find the tensors that belong to channel j of a layer and the layers that read it, by tracing, exactly or not at
all."""

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
