"""Centripetal SGD (C-SGD): train channels to become equal; :mod:`lightning_filterdiv.narrowing` merges them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
