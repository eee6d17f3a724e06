"""ExpandNets: train a compact network over-parameterised, contract it exactly."""

from lightning_filterdiv.expansion.callback import ExpandNet
from lightning_filterdiv.expansion.functional import compose, compose_bias, compose_chain
from lightning_filterdiv.expansion.layers import ExpandedConv2d, ExpandedLinear
from lightning_filterdiv.expansion.surgery import ExpansionError, contract, expand

__all__ = [
    "ExpandNet",
    "ExpandedConv2d",
    "ExpandedLinear",
    "ExpansionError",
    "compose",
    "compose_bias",
    "compose_chain",
    "contract",
    "expand",
]
