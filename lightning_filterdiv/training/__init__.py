"""Shared code of callbacks that needs Lightning: guard rails, step protocol, example inputs, learning rates."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
