"""Weight asynchronous update (WAU): only a random subset of filters moves at every step."""

from lightning_filterdiv.async_update.callback import WeightAsynchronousUpdate
from lightning_filterdiv.async_update.functional import AsynchronousUpdate

__all__ = ["AsynchronousUpdate", "WeightAsynchronousUpdate"]
