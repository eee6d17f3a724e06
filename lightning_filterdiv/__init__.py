"""PyTorch Lightning callbacks that control how diverse and how redundant the filters of a network become."""

from importlib.metadata import version

import lazy_loader

__version__ = version("lightning-filterdiv")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
