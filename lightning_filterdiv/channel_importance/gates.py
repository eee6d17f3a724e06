"""Squeeze-and-excite gates between a convolution and its norm: what they let through is how much a channel matters.

Chang, Lu, Xue, Wei, Wei: "UCP: Uniform channel pruning for deep convolutional neural networks compression and
acceleration", arXiv 2010.01251. The gate is that of Hu, Shen, Sun (CVPR 2018) without biases.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_filterdiv.filters import NoLayersError, canonical_name, select_filters
from lightning_filterdiv.narrowing.importance import gate_means
from lightning_filterdiv.tensors.randomness import keyed_generator

__all__ = [
    "REDUCTION", "ChannelGate", "GatedConv2d", "gated_layers", "insert_gates", "measure_importance", "remove_gates",
]  # fmt: skip

#: Channels per hidden unit of a gate.
REDUCTION = 16


class ChannelGate(nn.Module):
    """``y = x * sigmoid(excite(ReLU(squeeze(mean of x over space))))``, one factor in (0, 1) per image and channel.

    Args:
        channels: ``C``; the hidden layer has ``C / 16`` units, at least one. No biases.
        generator: for the weights, on the CPU; ``None``: torch's global one.

    Attributes:
        total: ``(C + 1,)`` or ``None``: sums of the factors over the images seen in training mode, and their number;
            images whose factors are not finite (an fp16 overflow) do not count.
    """

    def __init__(self, channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        hidden = max(1, channels // REDUCTION)
        self.squeeze = nn.Linear(channels, hidden, bias=False, device="meta")
        self.excite = nn.Linear(hidden, channels, bias=False, device="meta")
        for linear in (self.squeeze, self.excite):
            drawn = torch.rand(linear.weight.shape, generator=generator)
            linear.weight = nn.Parameter((2 * drawn - 1) * linear.in_features**-0.5)
        # A plain attribute: DDP would overwrite a buffer with rank 0's before every forward.
        self.total: Tensor | None = None

    def factors(self, x: Tensor) -> Tensor:
        """``(B, C)`` of ``x``, ``(B, C, H, W)``."""
        gates: Tensor = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return gates

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        gates = self.factors(x)
        if self.training and self.total is not None:
            with torch.no_grad():
                known = gates.isfinite().all(dim=1, keepdim=True)
                self.total[:-1] += torch.where(known, gates, 0).sum(0)
                self.total[-1] += known.sum()
        return x * gates[:, :, None, None]


class GatedConv2d(nn.Conv2d):
    """A convolution whose outputs pass a :class:`ChannelGate`; made by :func:`insert_gates` only."""

    #: Why narrowing refuses the network, read by :mod:`lightning_filterdiv.narrowing`.
    narrowing_obstacle = "still has its gate: prune a fresh network, or call remove_gates first"

    gate: ChannelGate

    def remove_gate(self) -> None:
        """Become an ordinary convolution."""
        del self.gate
        self.__class__ = nn.Conv2d  # type: ignore[assignment]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if strict and f"{prefix}weight" in state_dict and f"{prefix}gate.squeeze.weight" not in state_dict:
            error_msgs.append(
                f"there is no gate of {prefix[:-1]!r} in what is loaded: it was saved without gates, or with other "
                f"include and exclude. Use the same, or load its weights before gates are inserted and start a new fit"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W)`` to ``(B, out, H', W')``."""
        y: Tensor = self.gate(super().forward(x))
        return y


def gated_layers(model: nn.Module) -> dict[str, GatedConv2d]:
    """Canonical name -> convolution with a gate."""
    return {canonical_name(n): m for n, m in model.named_modules() if isinstance(m, GatedConv2d)}


def insert_gates(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None, *, seed: int = 0
) -> nn.Module:
    """Put a gate behind convolutions, in place; the modules stay the same objects.

    Args:
        model: the network (a ``LightningModule`` works too), before its optimizer is made.
        include: patterns of layers; ``None``: every ``nn.Conv2d`` that is not grouped.
        exclude: patterns of layers to leave out.
        seed: of the gates' weights, which depend on it and on the layer's name alone.

    Returns:
        ``model``. Layers that have a gate keep it.

    Raises:
        NoLayersError: no layer is left.
        ValueError: a layer that ``include`` names is no ungrouped ``nn.Conv2d``.
    """
    chosen: dict[str, nn.Conv2d] = {}
    others: dict[str, str] = {}
    derived: list[str] = []  # subclasses, whose own forward a gate would replace
    for name, conv in select_filters(model, include, exclude).items():
        if type(conv) in (nn.Conv2d, GatedConv2d) and conv.groups == 1:
            chosen[name] = cast(nn.Conv2d, conv)
            continue
        kind = f"{type(conv).__module__}.{type(conv).__name__}".replace("torch.nn.modules.conv.", "nn.")
        others[name] = (
            f"{name!r} is {'an' if kind[:2] == 'nn' else 'a'} {kind} with {conv.groups} group{'s' * (conv.groups > 1)}"
        )
        if include is not None:
            raise ValueError(
                f"layer {others[name]}; gates go behind ungrouped layers of class nn.Conv2d itself, leave it out with "
                f"exclude"
            )
        if isinstance(conv, nn.Conv2d) and conv.groups == 1:
            derived.append(name)
    if not chosen:
        raise NoLayersError(
            f"{type(model).__name__} has no ungrouped layer of class nn.Conv2d itself to put a gate behind: "
            f"{', '.join(list(others.values())[:2])}; gates are for networks on images, built from such layers"
        )
    if derived:
        warnings.warn(
            f"no gate goes behind {', '.join(map(repr, derived[:12]))}: gates need layers of class nn.Conv2d itself, "
            f"and {others[derived[0]]}",
            stacklevel=2,
        )
    for name, conv in chosen.items():
        if not isinstance(conv, GatedConv2d):
            conv.__class__ = GatedConv2d
            gate = ChannelGate(conv.out_channels, keyed_generator("gate", seed, name))
            conv.add_module("gate", gate.to(conv.weight.device, conv.weight.dtype).train(conv.training))
    return model


def remove_gates(model: nn.Module) -> nn.Module:
    """Take all gates out again, in place. What was trained with them computes something else without.

    Raises:
        NoLayersError: there is none.
    """
    layers = gated_layers(model)
    if not layers:
        raise NoLayersError(
            f"{type(model).__name__} has no gate to remove; insert_gates or ChannelImportance adds them"
        )
    for conv in layers.values():
        conv.remove_gate()
    return model


def measure_importance(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Mean gate of every channel over images, in eval mode.

    Args:
        model: with gates, trained.
        batches: of inputs ``(B, C, H, W)``, or of tuples that begin with them.

    Returns:
        Canonical layer name -> ``(C,)`` in (0, 1), float64 on the CPU.

    Raises:
        NoLayersError: the model has no gates.
        TypeError: a batch that holds no tensor of images.
        ValueError: no images.
    """
    if not gated_layers(model):
        raise NoLayersError(f"{type(model).__name__} has no gates; insert_gates or ChannelImportance adds them")
    return gate_means(model, batches)
