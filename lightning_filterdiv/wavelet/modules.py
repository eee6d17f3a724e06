"""The functions as layers without parameters, for the front of a network or a pipeline of transforms."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_filterdiv.tensors.arguments import check_choice, check_integer
from lightning_filterdiv.wavelet.functional import Band, dilated_details, filters_of, local_maxima, reconstruct

__all__ = ["WaveletModulusMaxima", "WaveletReconstruction"]

Output = Literal["replace", "add", "append"]


class _EdgeLayer(nn.Module):
    """Base that checks inputs and combines edges with the image."""

    def __init__(self, wavelet: str, level: int, output: Output) -> None:
        super().__init__()
        if not isinstance(wavelet, str):
            raise TypeError(f"wavelet must be a name such as 'haar', got {wavelet!r}")
        self.low, self.high = filters_of(wavelet)
        self.wavelet = wavelet
        self.level = check_integer("level", level, low=1)
        self.output = check_choice("output", output, Output)

    def edges(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to edges of the same shape, in float32 or wider."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)``, or one ``(C, H, W)``, to the same shape, with ``2 C`` channels for ``append``.

        Raises:
            TypeError: not a floating tensor.
            ValueError: wrong number of dimensions, or images smaller than the filters of the level.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{type(self).__name__} takes floating tensors, got {kind}; convert images first")
        if x.dim() not in (3, 4):
            raise ValueError(f"{type(self).__name__} takes (B, C, H, W) or (C, H, W), got {tuple(x.shape)}")
        reach = (len(self.low) - 1) * 2 ** (self.level - 1)
        if min(x.shape[-2:]) <= reach:
            raise ValueError(
                f"images of {x.shape[-2]}x{x.shape[-1]} are too small for {self.wavelet!r} at level={self.level}, "
                f"which reaches {reach} pixels; take a lower level or a shorter wavelet"
            )
        batch = x if x.dim() == 4 else x[None]
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            edges = self.edges(batch.to(wide)).to(x.dtype)
        if self.output == "add":
            edges = batch + edges
        elif self.output == "append":
            edges = torch.cat([batch, edges], dim=1)
        return edges if x.dim() == 4 else edges[0]

    def extra_repr(self) -> str:
        """The arguments."""
        return f"wavelet={self.wavelet!r}, level={self.level}, output={self.output!r}"


class WaveletReconstruction(_EdgeLayer):
    """Rebuild images from chosen sub-bands of their wavelet decomposition.

    Without the approximation, edges and texture remain. With all sub-bands the result is the image.

    Args:
        keep: some of ``approximation``, ``horizontal``, ``vertical``, ``diagonal``; ``None``: the three details.
        wavelet: name of a discrete wavelet of PyWavelets.
        level: level of the decomposition.
        output: ``replace`` the image, ``add`` to it, or ``append`` as further channels.

    Raises:
        ImportError: the extra ``wavelets`` is not installed.
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(
        self, *, keep: list[Band] | None = None, wavelet: str = "db2", level: int = 1, output: Output = "replace"
    ) -> None:
        super().__init__(wavelet, level, output)
        bands = get_args(Band)
        self.keep = list(bands[1:]) if keep is None else keep
        if isinstance(self.keep, str) or not isinstance(self.keep, list | tuple) or not self.keep:
            raise TypeError(f"keep must be a non-empty list of sub-bands ({', '.join(bands)}), got {keep!r}")
        if unknown := [band for band in self.keep if band not in bands]:
            raise ValueError(f"keep may hold {', '.join(map(repr, bands))}, got {unknown[0]!r}")

    def edges(self, x: Tensor) -> Tensor:
        """See :func:`~lightning_filterdiv.wavelet.reconstruct`."""
        return reconstruct(x, self.wavelet, self.level, self.keep)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"keep={self.keep!r}, {super().extra_repr()}"


class WaveletModulusMaxima(_EdgeLayer):
    """Extract thin edges: the modulus of the undecimated wavelet gradient where it is a local maximum across the edge.

    Args:
        wavelet: name of a discrete wavelet of PyWavelets.
        level: the scale is ``2^level`` pixels.
        output: ``replace`` the image, ``add`` to it, or ``append`` as further channels.

    Raises:
        ImportError: the extra ``wavelets`` is not installed.
        TypeError, ValueError: a bad argument, by name.
    """

    def __init__(self, *, wavelet: str = "haar", level: int = 1, output: Output = "replace") -> None:
        super().__init__(wavelet, level, output)

    def edges(self, x: Tensor) -> Tensor:
        """See :func:`~lightning_filterdiv.wavelet.local_maxima`."""
        return local_maxima(*dilated_details(x, self.low, self.high, self.level))
