from .anchored import share_anchored_filters as share_anchored_filters
from .modules import FilterBasis as FilterBasis
from .modules import SharedBasisConv2d as SharedBasisConv2d
from .modules import SharedConv2d as SharedConv2d
from .modules import SharedGroupedConv2d as SharedGroupedConv2d
from .modules import shared_bases as shared_bases
from .surgery import SharingError as SharingError
from .surgery import share_filter_bases as share_filter_bases
