"""Channel importance from squeeze-and-excite gates (UCP), and the choice of channels by importance."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
