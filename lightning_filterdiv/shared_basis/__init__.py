"""Deeply shared filter bases (DSFB): layers of a stage build their filters from one basis; or one kernel (DACNN)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
