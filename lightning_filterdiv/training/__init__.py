"""What callbacks share that knows Lightning: guard rails, the step protocol, example inputs, learning rates."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
