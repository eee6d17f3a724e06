"""Fixed wavelet layers that enhance edges: reconstruction from chosen sub-bands, and local modulus maxima."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
