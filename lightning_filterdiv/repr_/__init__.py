"""RePr: drop the most redundant filters for a while, bring them back orthogonal to everything else."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
