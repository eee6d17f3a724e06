"""From a channel graph and a choice to a smaller network: clustering, merging, pruning, files, cost."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
