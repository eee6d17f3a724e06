"""Layers whose weight is a product of factors while they train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_filterdiv.expansion.functional import Kind, compose_chain
from lightning_filterdiv.selection import Obstacle

__all__ = ["ExpandedConv2d", "ExpandedLinear", "ExpandedModule"]


class ExpandedModule(nn.Module):
    """What an expanded layer adds to its compact class; made by :func:`~lightning_filterdiv.expansion.expand` only.

    The factors are the parameters ``weight_1``, ``weight_2``, ... (and ``bias_1``, ...) in order of application. They
    are composed at every call and the layer runs as one convolution: the outputs and gradients are those of the chain,
    at a cost that does not depend on the size of the images.

    Attributes:
        kind: which expansion.
        rate: ``r``.
        compact_state: whether ``state_dict`` shows the compact layer's ``weight`` and ``bias`` instead of the factors.
        pending: compact tensors were loaded into a layer in that mode; its factors have not followed yet.
    """

    kind: Kind
    rate: int
    factor_count: int
    has_bias: bool
    channels_last: bool
    compact_state: bool
    pending: bool
    #: Read by :func:`~lightning_filterdiv.filters.find_weight_obstacle`.
    obstacle: ClassVar[Obstacle] = Obstacle(
        "is expanded by ExpandNet", "give ExpandNet other layers with its include or exclude"
    )

    def factors(self) -> tuple[list[nn.Parameter], list[nn.Parameter] | None]:
        """Weights and biases in order of application, biases ``None`` where the compact layer has none."""
        names = range(1, self.factor_count + 1)
        weights = [self._parameters[f"weight_{i}"] for i in names]
        biases = [self._parameters[f"bias_{i}"] for i in names] if self.has_bias else None
        return weights, biases  # type: ignore[return-value]  # none of them is None

    def composed(self) -> tuple[Tensor, Tensor | None]:
        """The compact layer's weight and bias, computed in float32 or wider, in the dtype of the factors."""
        weights, biases = self.factors()
        dtype = weights[0].dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(weights[0].device.type, enabled=False):
            weight, bias = compose_chain(
                [_as_kernel(w).to(wide) for w in weights],
                None if biases is None else [b.to(wide) for b in biases],
                getattr(self, "groups", 1),
            )
        weight = weight.to(dtype)
        if weights[0].dim() == 2:
            weight = weight.flatten(1)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        weight = weight.contiguous(memory_format=layout)
        return weight, None if bias is None else bias.to(dtype)

    @property
    def weight(self) -> Tensor:
        """The compact weight, composed anew at every access."""
        return self.composed()[0]

    @property
    def bias(self) -> Tensor | None:
        """The compact bias."""
        return self.composed()[1]

    def extra_repr(self) -> str:
        """The compact layer's, and the expansion."""
        return f"{super().extra_repr()}, expansion={self.kind!r}, rate={self.rate}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.compact_state:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        with torch.set_grad_enabled(keep_vars and torch.is_grad_enabled()):
            weight, bias = self.composed()
        destination[f"{prefix}weight"] = weight
        if bias is not None:
            destination[f"{prefix}bias"] = bias

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        if not self.compact_state or f"{prefix}weight_1" in state_dict:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            self.pending = False
            return
        present = {f"{prefix}weight": self.weight, **({f"{prefix}bias": self.bias} if self.has_bias else {})}
        for name, own in present.items():
            if name not in state_dict:
                missing_keys.append(name)
            elif state_dict[name].shape != own.shape:  # type: ignore[union-attr]
                error_msgs.append(
                    f"size mismatch for {name}: {tuple(state_dict[name].shape)} in the file, {tuple(own.shape)} here"  # type: ignore[union-attr]
                )
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in present]
        self.pending = True


def _as_kernel(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 4 else weight[:, :, None, None]


class ExpandedConv2d(ExpandedModule, nn.Conv2d):  # type: ignore[override]  # weight and bias are properties
    """A convolution in the middle of an expansion."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W)`` to ``(B, out, H', W')``."""
        weight, bias = self.composed()
        y: Tensor = self._conv_forward(x, weight, bias)
        return y

    def unrolled(self) -> nn.Sequential:
        """The chain as the paper draws it: one convolution per factor, all padding on the first one's input.

        Its parameters are those of this layer. The stride is on the k x k convolution (``CK``: the last).

        Raises:
            ValueError: ``padding="same"`` of a kernel that needs unequal padding.
        """
        weights, biases = self.factors()
        padding = self.padding
        if isinstance(padding, str):
            total = [
                d * (k - 1) if padding == "same" else 0 for d, k in zip(self.dilation, self.kernel_size, strict=True)
            ]
            if any(t % 2 for t in total):
                raise ValueError("padding='same' pads this kernel unequally, which one convolution cannot express")
            padding = (total[0] // 2, total[1] // 2)
        strided = 1 if self.kind == "CL" else len(weights) - 1
        chain = nn.Sequential()
        for index, weight in enumerate(weights):
            conv = nn.Conv2d(
                weight.shape[1] * self.groups,
                weight.shape[0],
                (weight.shape[2], weight.shape[3]),
                self.stride if index == strided else 1,  # type: ignore[arg-type]
                padding if index == 0 else 0,  # type: ignore[arg-type]
                self.dilation,  # type: ignore[arg-type]
                self.groups,
                biases is not None,
                self.padding_mode if index == 0 else "zeros",
                device="meta",
            )
            conv.weight = weight
            if biases is not None:
                conv.bias = biases[index]
            chain.append(conv)
        return chain


class ExpandedLinear(ExpandedModule, nn.Linear):  # type: ignore[override, misc]  # weight and bias are properties
    """A linear layer in the middle of an expansion."""

    @property
    def out_channels(self) -> int:
        """``out_features``, under the name that convolutions use."""
        return self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        weight, bias = self.composed()
        return F.linear(x, weight, bias)

    def unrolled(self) -> nn.Sequential:
        """The three linear layers as the paper draws them; their parameters are those of this layer."""
        weights, biases = self.factors()
        chain = nn.Sequential()
        for index, weight in enumerate(weights):
            linear = nn.Linear(weight.shape[1], weight.shape[0], biases is not None, device="meta")
            linear.weight = weight
            if biases is not None:
                linear.bias = biases[index]
            chain.append(linear)
        return chain
