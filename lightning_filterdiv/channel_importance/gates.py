"""Squeeze-and-excite gates beside a convolution and its norm. Their mean measures the importance of a channel.

Chang, Lu, Xue, Wei, Wei: "UCP: Uniform channel pruning for deep convolutional neural networks compression and
acceleration", arXiv 2010.01251. The gate is that of Hu, Shen, Sun (CVPR 2018).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lightning_filterdiv.filters import NoLayersError, canonical_name, select_filters
from lightning_filterdiv.narrowing.importance import gate_means, gated_layers
from lightning_filterdiv.tensors.arguments import check_choice, check_integer
from lightning_filterdiv.tensors.randomness import keyed_generator

__all__ = [
    "REDUCTION", "ChannelGate", "GateHost", "GatedBatchNorm2d", "GatedConv2d", "InputGatedConv2d", "Placement",
    "gated_layers", "insert_gates", "mean_gates", "measure_importance", "remove_gates",
]  # fmt: skip

#: Channels per hidden unit of a gate.
REDUCTION = 16
Placement = Literal["convolution", "cifar", "imagenet"]


class ChannelGate(nn.Module):
    """Compute ``y = x * sigmoid(excite(ReLU(squeeze(mean of x over space))))``, one factor in (0, 1) per image and
    channel.

    Args:
        channels: ``C``; the hidden layer has ``C / reduction`` units, at least one.
        generator: generator for the weights, on the CPU; ``None``: torch's global one.
        reduction: channels per hidden unit. If no hidden unit is ever positive, the gates stay at 0.5. Smaller numbers
            avoid that in narrow layers.
        biases: give both layers biases. The released code does so for ``C <= 16``.

    Attributes:
        total: ``(C + 1,)`` or ``None``: sums of the factors over the images seen in training mode, and the number of
            images. Images whose factors are not finite (an fp16 overflow) do not count.
    """

    def __init__(
        self,
        channels: int,
        generator: torch.Generator | None = None,
        *,
        reduction: int = REDUCTION,
        biases: bool = False,
    ) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden, bias=biases, device="meta")
        self.excite = nn.Linear(hidden, channels, bias=biases, device="meta")
        for linear in (self.squeeze, self.excite):
            for name, parameter in list(linear.named_parameters()):
                drawn = torch.rand(parameter.shape, generator=generator)
                setattr(linear, name, nn.Parameter((2 * drawn - 1) * linear.in_features**-0.5))
        # A plain attribute, because DDP would overwrite a buffer with that of rank 0 before every forward.
        self.total: Tensor | None = None

    def factors(self, x: Tensor) -> Tensor:
        """Return the factors ``(B, C)`` for ``x``, ``(B, C, H, W)``."""
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


class GateHost(nn.Module):
    """A layer that holds a :class:`ChannelGate`; its subclasses are made by :func:`insert_gates` only.

    Attributes:
        gate: the gate.
        gated_layer: name of the sibling whose channels the gate measures; empty for the layer itself.
    """

    #: Reason why narrowing refuses the network, read by :mod:`lightning_filterdiv.narrowing`.
    narrowing_obstacle = (
        "still has its gate: prune_channels(..., importance='gates') folds gates into the filters; else narrow a fresh "
        "network, or call remove_gates first"
    )
    #: Class of the layer without its gate.
    plain_class: ClassVar[type[nn.Module]]
    #: Dimension of the layer's weight that the gate scales.
    gate_dim: ClassVar[int] = 0

    gate: ChannelGate
    gated_layer: str

    @torch.no_grad()
    def fold_gate(self, mean: Tensor) -> None:
        """Multiply a constant gate ``(C,)`` into the layer, and turn it into an ordinary one."""
        weight, bias = cast(Tensor, self.weight), cast("Tensor | None", getattr(self, "bias", None))
        shape = [1] * weight.ndim
        shape[self.gate_dim] = -1
        weight.mul_(mean.to(weight.device, weight.dtype).reshape(shape))
        if bias is not None and self.gate_dim == 0:
            bias.mul_(mean.to(bias.device, bias.dtype))
        self.remove_gate()

    def remove_gate(self) -> None:
        """Turn the layer into an ordinary one, without its gate."""
        plain_class = self.plain_class
        del self.gate, self.gated_layer
        self.__class__ = plain_class  # type: ignore[assignment]

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
                f"include, exclude or placement. Use the same, or load its weights before gates are inserted and start "
                f"a new fit"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class GatedConv2d(GateHost, nn.Conv2d):
    """A convolution whose outputs pass a gate."""

    plain_class = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W)`` to ``(B, out, H', W')``."""
        y: Tensor = self.gate(super().forward(x))
        return y


class GatedBatchNorm2d(GateHost, nn.BatchNorm2d):
    """A norm whose outputs pass a gate."""

    plain_class = nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        y: Tensor = self.gate(super().forward(x))
        return y


class InputGatedConv2d(GateHost, nn.Conv2d):
    """A convolution whose inputs pass a gate."""

    plain_class = nn.Conv2d
    gate_dim = 1

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in, H, W)`` to ``(B, out, H', W')``."""
        return super().forward(self.gate(x))


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield prefix, module, and a flag for bottlenecks, of every residual block. Blocks are known by the names of
    convolutions."""
    for name, module in model.named_modules():
        convs = [isinstance(getattr(module, f"conv{index}", None), nn.Conv2d) for index in (1, 2, 3)]
        if convs[:2] == [True, True]:
            yield f"{name}." if name else "", module, convs[2]


def _released_places(model: nn.Module, placement: Placement) -> dict[str, tuple[nn.Module, type[GateHost]]]:
    """Return canonical name of each measured convolution -> layer and class that hold its gate in the released
    networks.

    Raises:
        ValueError: there is no block, or one that the released networks of ``placement`` do not have.
    """
    places: dict[str, tuple[nn.Module, type[GateHost]]] = {}
    for prefix, block, is_bottleneck in _blocks(model):
        if placement == "cifar":
            if is_bottleneck:
                raise ValueError(
                    f"placement='cifar' is for basic blocks, and {prefix[:-1]!r} is a bottleneck; use 'imagenet'"
                )
            places[canonical_name(f"{prefix}conv1")] = (block.get_submodule("conv1"), GatedConv2d)
        elif is_bottleneck:
            places[canonical_name(f"{prefix}conv2")] = (block.get_submodule("conv3"), InputGatedConv2d)
        else:
            children = list(block.children())
            behind = children[children.index(block.get_submodule("conv1")) + 1]
            if not isinstance(behind, nn.BatchNorm2d):
                raise ValueError(
                    f"placement='imagenet' puts a gate behind the nn.BatchNorm2d of {prefix}conv1, and a "
                    f"{type(behind).__name__} is there; use 'cifar', which puts it in front"
                )
            places[canonical_name(f"{prefix}conv1")] = (behind, GatedBatchNorm2d)
    if not places and placement == "imagenet":
        raise ValueError(
            f"placement='imagenet' is for residual blocks with conv1 and conv2, and {type(model).__name__} has none; "
            f"use 'cifar' (a stack: behind every convolution, as in the released VGG) or 'convolution'"
        )
    return places


def insert_gates(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    placement: Placement = "convolution",
    reduction: int = REDUCTION,
    seed: int = 0,
) -> nn.Module:
    """Insert gates into a network, in place. The modules stay the same objects.

    ===============  ================================================================================================
    ``placement``    where
    ===============  ================================================================================================
    ``convolution``  ours: behind every convolution, in front of its norm; no biases
    ``cifar``        the released CIFAR networks: one gate per basic block, between ``conv1`` and its norm; in stacks
                     (VGG) behind every convolution. Gates of at most ``reduction`` channels have biases
    ``imagenet``     the released ImageNet networks: one gate per block, between the first norm and the ReLU of a basic
                     block, behind the second ReLU of a bottleneck, whose ``conv2`` it measures. Biases likewise
    ===============  ================================================================================================

    Args:
        model: the network (a ``LightningModule`` works too), before its optimizer is made.
        include: patterns of layers whose channels are measured; ``None``: every such ``nn.Conv2d`` that is not grouped.
        exclude: patterns of layers to leave out.
        placement: see the table.
        reduction: channels per hidden unit of a gate; smaller numbers keep the gates of narrow layers alive.
        seed: seed of the gates' weights, which depend on it and on the layer's name alone.

    Returns:
        ``model``. Layers that have a gate keep it.

    Raises:
        NoLayersError: no layer is left.
        ValueError: a layer that ``include`` names is no ungrouped ``nn.Conv2d``, or not one that ``placement``
            measures; the network has other blocks than ``placement`` is for.
    """
    check_choice("placement", placement, Placement)
    check_integer("reduction", reduction, low=1)
    places = _released_places(model, placement) if placement != "convolution" else {}
    chosen: dict[str, tuple[nn.Module, type[GateHost]]] = {}
    others: dict[str, str] = {}
    derived: list[str] = []  # a gate would replace the forward of a subclass
    for name, conv in select_filters(model, include, exclude).items():
        plain = type(conv) in (nn.Conv2d, GatedConv2d, InputGatedConv2d)
        if places and name not in places:
            if include is not None:
                raise ValueError(
                    f"layer {name!r} has no gate with placement={placement!r}, which measures "
                    f"{', '.join(list(places)[:4])}{', ...' * (len(places) > 4)}; leave it out with exclude"
                )
            continue
        if plain and (conv.groups == 1 or places):
            chosen[name] = places.get(name, (conv, GatedConv2d))
            continue
        kind = f"{type(conv).__module__}.{type(conv).__name__}".replace("torch.nn.modules.conv.", "nn.")
        others[name] = (
            f"{name!r} is {'an' if kind[:2] == 'nn' else 'a'} {kind} with {conv.groups} group{'s' * (conv.groups > 1)}"
        )
        if include is not None:
            raise ValueError(
                f"layer {others[name]}; gates need an ungrouped layer whose class is exactly nn.Conv2d, leave it "
                f"out with exclude"
            )
        if isinstance(conv, nn.Conv2d) and conv.groups == 1:
            derived.append(name)
    if not chosen:
        raise NoLayersError(
            f"{type(model).__name__} has no ungrouped layer to put a gate behind whose class is exactly nn.Conv2d: "
            f"{', '.join(list(others.values())[:2])}; gates are for networks on images, built from such layers"
        )
    if derived:
        warnings.warn(
            f"no gate goes behind {', '.join(map(repr, derived[:12]))}: gates need layers whose class is exactly "
            f"nn.Conv2d, and {others[derived[0]]}",
            stacklevel=2,
        )
    convolutions = select_filters(model, list(chosen))
    for name, (host, kind_of_host) in chosen.items():
        if not isinstance(host, GateHost):
            _insert(name, convolutions[name].out_channels, host, kind_of_host, placement, reduction, seed)
    return model


def _insert(
    name: str,
    channels: int,
    host: nn.Module,
    kind: type[GateHost],
    placement: Placement,
    reduction: int,
    seed: int,
) -> None:
    biases = placement != "convolution" and channels <= reduction
    gate = ChannelGate(channels, keyed_generator("gate", seed, name), reduction=reduction, biases=biases)
    weight = cast(Tensor, host.weight)
    host.__class__ = kind
    host.add_module("gate", gate.to(weight.device, weight.dtype).train(host.training))
    host.gated_layer = "" if kind is GatedConv2d else name.rpartition(".")[2]  # type: ignore[assignment]


def remove_gates(model: nn.Module) -> nn.Module:
    """Remove all gates, in place. This changes the outputs of the network.

    Raises:
        NoLayersError: there is none.
    """
    hosts = gated_layers(model)
    if not hosts:
        raise NoLayersError(
            f"{type(model).__name__} has no gate to remove; insert_gates or ChannelImportance adds them"
        )
    for host in hosts.values():
        cast(GateHost, host).remove_gate()
    return model


def mean_gates(widths: Mapping[str, int], sums: Tensor) -> dict[str, Tensor]:
    """Return mean gates from the sums of a fit.

    Args:
        widths: layer -> channels ``C``.
        sums: ``C`` sums of factors and the number of images, as :attr:`ChannelGate.total`, layer after layer.

    Returns:
        Layer -> ``(C,)`` float64 on the CPU; without layers that saw no image.
    """
    parts = sums.double().cpu().split([count + 1 for count in widths.values()])
    seen = {name: part for name, part in zip(widths, parts, strict=True) if part[-1] > 0}
    return {name: part[:-1] / part[-1] for name, part in seen.items()}


def measure_importance(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the mean gate of every channel over images, in eval mode.

    Args:
        model: trained network with gates.
        batches: batches of inputs ``(B, C, H, W)``, or of tuples that begin with them.

    Returns:
        Canonical layer name -> ``(C,)`` in (0, 1), float64 on the CPU.

    Raises:
        NoLayersError: the model has no gates.
        TypeError: a batch holds no tensor of images.
        ValueError: no images.
    """
    if not gated_layers(model):
        raise NoLayersError(f"{type(model).__name__} has no gates; insert_gates or ChannelImportance adds them")
    return gate_means(model, batches)
