"""Run a submodule that moves channels at another width, by index arithmetic around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ChannelMap"]


class ChannelMap(nn.Module):
    """Run ``inner`` between two channel selections: widen the input to its original width, run, and select the kept
    channels.

    It replaces a parameter-free submodule whose forward fixes numbers of channels (a zero-pad shortcut, a channel
    shuffle). Widening repeats each merged channel, so that ``inner`` gets exactly the channels of the tied original.

    Args:
        inner: the original submodule.
        expand: (original input width,) index into the narrow input, or None if the input was not narrowed.
        keep: (narrow output width,) index into the output of ``inner``, or None if the output was not narrowed.

    Shape: ``(N, C, *)`` -> ``(N, C', *)``.
    """

    expand: Tensor | None
    keep: Tensor | None

    def __init__(self, inner: nn.Module, expand: Tensor | None, keep: Tensor | None) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("expand", expand)
        self.register_buffer("keep", keep)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run ``inner`` at its original width."""
        if self.expand is not None:
            input = input.index_select(1, self.expand)
        output: Tensor = self.inner(input, *args, **kwargs)
        return output if self.keep is None else output.index_select(1, self.keep)

    def narrowed(self, expand: Tensor | None, keep: Tensor | None) -> ChannelMap:
        """Return this map after a further narrowing of its input and output, with composed selections."""
        return ChannelMap(self.inner, _compose(self.expand, expand, first=False), _compose(self.keep, keep, first=True))

    def extra_repr(self) -> str:
        """Sizes of the two selections."""
        parts = [f"{name}={t.numel()}" for name, t in (("expand", self.expand), ("keep", self.keep)) if t is not None]
        return ", ".join(parts)


def _compose(old: Tensor | None, new: Tensor | None, *, first: bool) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    outer, inner = (old, new) if first else (new, old)
    return torch.index_select(outer, 0, inner.to(outer.device))
