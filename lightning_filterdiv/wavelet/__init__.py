"""Fixed wavelet layers that enhance edges: reconstruction from chosen sub-bands, and local modulus maxima."""

from lightning_filterdiv.wavelet.functional import dilated_details, local_maxima, reconstruct
from lightning_filterdiv.wavelet.modules import WaveletModulusMaxima, WaveletReconstruction

__all__ = ["WaveletModulusMaxima", "WaveletReconstruction", "dilated_details", "local_maxima", "reconstruct"]
