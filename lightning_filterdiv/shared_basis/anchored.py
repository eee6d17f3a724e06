"""One kernel for all layers, or for all layers of a stage (DACNN). The convolution is shared, norms are not.

"Deep anchored convolutional neural networks", CVPR Workshops 2019 (arXiv 1904.09764).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from lightning_filterdiv.filters import canonical_name
from lightning_filterdiv.shared_basis.modules import shared_bases
from lightning_filterdiv.shared_basis.stages import Stage, find_stages
from lightning_filterdiv.shared_basis.surgery import (
    SharingError,
    SharingPlan,
    check_layers,
    choose_stages,
    replace_layer,
)
from lightning_filterdiv.tensors.arguments import check_choice, check_flag

__all__ = ["Anchoring", "share_anchored_filters"]

Anchoring = Literal["plain", "mix"]


def _sharing(stage: Stage) -> dict[str, nn.Module]:
    """Return the layers of a stage that keep width and resolution."""
    found: dict[str, nn.Module] = {}
    for name, block in stage.blocks.items():
        for key in ("conv1", "conv2"):
            conv = block.get_submodule(key)
            if not isinstance(conv, nn.Conv2d) or (max(conv.stride) == 1 and conv.in_channels == conv.out_channels):
                found[canonical_name(f"{name}.{key}")] = conv
    return found


def share_anchored_filters(
    model: nn.Module, *, mode: Anchoring = "mix", regulator: bool = False, stages: Sequence[str] | None = None
) -> nn.Module:
    """Let the 3x3 convolutions of a ResNet of basic blocks be one convolution, in place (DACNN).

    Call it on a fresh network, before an optimizer is made: the shared kernels are drawn anew, orthonormal.

    Args:
        model: the network (a ``LightningModule`` works too).
        mode: ``"mix"``: one kernel per stage; ``"plain"``: one for all stages, which must have one width. The first
            layer of a stage, if it changes width or resolution, keeps a kernel of its own.
        regulator: put an unshared 1x1 convolution behind the second norm of every block, before the addition. It
            starts as the identity.
        stages: only these; ``None``: all that can share.

    Returns:
        ``model``. It has ``(n - 1) k^2 C^2`` parameters fewer if ``n`` layers of ``C`` channels share, and ``C^2`` more
        per block with a regulator. :class:`~lightning_filterdiv.BasisOrthonormality` finds the kernels.

    Raises:
        SharingError: there is no such stage, ``"plain"`` over stages of several widths, or a layer that has a bias or
            is unlike the others. The network is then unchanged.
        TypeError, ValueError: a bad argument, by name.
    """
    check_choice("mode", mode, Anchoring)
    check_flag("regulator", regulator)
    found = {stage.name: stage for stage in find_stages(model) if stage.kind == "basic"}
    users = {name: layers for name, stage in found.items() if len(layers := _sharing(stage)) > 1}
    if not users:
        raise SharingError(
            f"{type(model).__name__} has no stage of basic blocks (conv1, conv2) in which two layers of equal "
            f"width could be one; share_filter_bases(layers=[...]) shares a basis between any layers"
        )
    wanted = choose_stages(list(users), stages)
    users = {name: layers for name, layers in users.items() if name in wanted}
    groups = (
        users if mode == "mix" else {"anchor": {n: layer for layers in users.values() for n, layer in layers.items()}}
    )
    plans = [_plan(name, layers) for name, layers in groups.items()]
    for name in {basis.gram for _, basis, _ in shared_bases(model)} & set(groups):
        raise SharingError(f"the network has shared filters called {name!r} already; share once, on a fresh network")
    blocks = {name: block for stage in users for name, block in found[stage].blocks.items()} if regulator else {}
    for name, block in blocks.items():
        if not isinstance(getattr(block, "bn2", None), nn.BatchNorm2d):
            raise SharingError(f"block {canonical_name(name)!r} has no batch norm bn2 to put a regulator behind")
    for plan in plans:
        plan.apply(model)
    for block in blocks.values():
        norm = block.get_submodule("bn2")
        assert isinstance(norm, nn.BatchNorm2d)
        width, like = norm.num_features, norm.running_mean if norm.weight is None else norm.weight
        assert like is not None
        mixing = nn.Conv2d(width, width, 1, bias=False, device=like.device, dtype=like.dtype)
        nn.init.dirac_(mixing.weight)
        replace_layer(model, norm, nn.Sequential(norm, mixing))
    return model


def _plan(name: str, layers: Mapping[str, nn.Module]) -> SharingPlan:
    convs = check_layers(layers)
    for layer, conv in convs.items():
        if conv.bias is not None:
            raise SharingError(
                f"{layer!r} has a bias, which a shared kernel has not; build the layer with bias=False "
                f"(the norm behind it has one)"
            )
    return SharingPlan(name, [convs], next(iter(convs.values())).out_channels, 0, whole=True)
