"""Deeply shared filter bases (DSFB): layers of a stage build their filters from one basis; or one kernel (DACNN)."""

from lightning_filterdiv.shared_basis.anchored import share_anchored_filters
from lightning_filterdiv.shared_basis.modules import FilterBasis, SharedBasisConv2d, SharedConv2d, shared_bases
from lightning_filterdiv.shared_basis.surgery import SharingError, share_filter_bases

__all__ = [
    "FilterBasis",
    "SharedBasisConv2d",
    "SharedConv2d",
    "SharingError",
    "share_anchored_filters",
    "share_filter_bases",
    "shared_bases",
]
