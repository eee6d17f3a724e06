"""Orthonormal filters: six published penalties in closed form, and the ``BasisOrthonormality`` callback."""

from lightning_filterdiv.orthonormality.callback import BasisOrthonormality
from lightning_filterdiv.orthonormality.functional import (
    basis_penalty,
    convolutional_orthogonality,
    double_soft_orthogonality,
    mutual_coherence_penalty,
    soft_orthogonality,
    spectral_restricted_isometry,
)
from lightning_filterdiv.orthonormality.penalty import DEFAULT_WEIGHTS, OrthonormalityPenalty
from lightning_filterdiv.orthonormality.targets import FilterBlock, filter_blocks

__all__ = [
    "DEFAULT_WEIGHTS",
    "BasisOrthonormality",
    "FilterBlock",
    "OrthonormalityPenalty",
    "basis_penalty",
    "convolutional_orthogonality",
    "double_soft_orthogonality",
    "filter_blocks",
    "mutual_coherence_penalty",
    "soft_orthogonality",
    "spectral_restricted_isometry",
]
