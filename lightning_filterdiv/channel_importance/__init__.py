"""Channel importance from squeeze-and-excite gates (UCP), and pruning of the channels that do not matter."""

from lightning_filterdiv.channel_importance.callback import ChannelImportance
from lightning_filterdiv.channel_importance.gates import (
    ChannelGate,
    GatedConv2d,
    gated_layers,
    insert_gates,
    measure_importance,
    remove_gates,
)
from lightning_filterdiv.channel_importance.selection import prune_channels, select_channels

__all__ = [
    "ChannelGate",
    "ChannelImportance",
    "GatedConv2d",
    "gated_layers",
    "insert_gates",
    "measure_importance",
    "prune_channels",
    "remove_gates",
    "select_channels",
]
