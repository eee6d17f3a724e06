"""A small network and real data sets that need no download: for ``filterdiv demo``, first steps and tests."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
