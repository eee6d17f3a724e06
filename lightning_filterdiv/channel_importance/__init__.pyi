from .callback import ChannelImportance as ChannelImportance
from .gates import ChannelGate as ChannelGate
from .gates import GatedConv2d as GatedConv2d
from .gates import gated_layers as gated_layers
from .gates import insert_gates as insert_gates
from .gates import measure_importance as measure_importance
from .gates import remove_gates as remove_gates
from .selection import select_channels as select_channels
