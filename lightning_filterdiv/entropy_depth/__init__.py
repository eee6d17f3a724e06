"""How deep can the convolutional part usefully be? A bound from the entropy of the training images."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
