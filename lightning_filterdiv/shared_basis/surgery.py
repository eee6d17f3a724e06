"""Put shared filter bases into a network: which layers of which stage share, and how many filters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_filterdiv.filters import find_weight_obstacle, named_modules
from lightning_filterdiv.selection import Obstacle, check_patterns, match_pattern
from lightning_filterdiv.shared_basis.modules import (
    BasisUser,
    FilterBasis,
    SharedBasisConv2d,
    SharedConv2d,
    SharedGroupedConv2d,
    shared_bases,
)
from lightning_filterdiv.shared_basis.stages import ROLES, Stage, find_stages, stage_width
from lightning_filterdiv.tensors.arguments import check_flag, check_integer

__all__ = ["SharingError", "SharingPlan", "check_layers", "choose_stages", "replace_layer", "share_filter_bases"]


class SharingError(ValueError):
    """A basis cannot be shared as asked. The message names the layer, or the argument, and the fix."""


def _find_obstacle(layer: nn.Module, grouped: bool = False) -> Obstacle | None:
    if isinstance(layer, BasisUser):
        return Obstacle("shares its filters already", "call share_filter_bases once, on a fresh network")
    if not isinstance(layer, nn.Conv2d):
        return Obstacle(f"is a {type(layer).__name__}", "only nn.Conv2d can share filters, leave this layer out")
    if (obstacle := find_weight_obstacle(layer)) is not None:
        return obstacle
    if is_lazy(layer.weight):
        return Obstacle("is lazy and has no weight yet", "run one forward pass before sharing")
    if layer.groups != 1 and not grouped:
        return Obstacle(
            f"is a grouped convolution (groups={layer.groups}), whose filters see different channels and cannot share "
            f"a basis",
            "leave it out",
        )
    if max(layer.stride) != 1:
        return Obstacle(
            f"has stride {tuple(layer.stride)}, and layers that share a basis need stride 1",
            "leave it out: the first block of a stage keeps its own convolutions",
        )
    return None


def check_layers(layers: Mapping[str, nn.Module], *, grouped: bool = False) -> dict[str, nn.Conv2d]:
    """Return the layers as convolutions that can share filters.

    Args:
        layers: by name.
        grouped: allow grouped convolutions too.

    Raises:
        SharingError: one cannot, by name.
    """
    checked: dict[str, nn.Conv2d] = {}
    for name, layer in layers.items():
        if (obstacle := _find_obstacle(layer, grouped)) is not None:
            raise SharingError(f"{name!r} {obstacle}")
        assert isinstance(layer, nn.Conv2d)
        checked[name] = layer
    first_name, first = next(iter(checked.items()))
    for name, conv in checked.items():
        for what in ("in_channels", "out_channels", "kernel_size", "padding", "dilation", "padding_mode", "groups"):
            mine, expected = getattr(conv, what), getattr(first, what)
            if mine != expected:
                raise SharingError(
                    f"{name!r} has {what}={mine}, {first_name!r} {expected}: layers that share a basis must be alike "
                    f"(channels, kernel, padding, dilation). Leave one of them out, or give them to different groups"
                )
    return checked


def _basis(like: nn.Conv2d, filters: int, gram: str, pool: str = "", groups: int = 1) -> FilterBasis:
    return FilterBasis(
        like.in_channels,
        filters,
        (like.kernel_size[0], like.kernel_size[1]),
        padding=like.padding if isinstance(like.padding, str) else (like.padding[0], like.padding[1]),
        dilation=(like.dilation[0], like.dilation[1]),
        padding_mode=like.padding_mode,
        gram=gram,
        pool=pool,
        groups=groups,
        device=like.weight.device,
        dtype=like.weight.dtype,
    )


def replace_layer(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old``, in its mode, wherever ``model`` holds it."""
    new.train(old.training)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                # setattr keeps the position among its siblings, also in a Sequential, whose keys are numbers.
                setattr(parent, key, new)


def _orthonormal(bases: Sequence[FilterBasis]) -> None:
    """Draw the bases as one orthonormal set, to be split between them."""
    rows = sum(basis.out_channels for basis in bases)
    drawn = bases[0].weight.new_empty((rows, *bases[0].weight.shape[1:]), dtype=torch.float32)
    nn.init.orthogonal_(drawn)
    with torch.no_grad():
        for basis, part in zip(bases, drawn.split([basis.out_channels for basis in bases]), strict=True):
            basis.weight.copy_(part)


@dataclass(frozen=True)
class SharingPlan:
    """Bases that share a Gram matrix, and the layers that use each of them."""

    name: str
    users: list[dict[str, nn.Conv2d]]  # one dict per basis
    filters: int
    unique: int
    pool: str = ""
    whole: bool = False  # the basis is the layer

    def check_rank(self) -> None:
        """Raise SharingError where there are more filters than numbers in a filter."""
        conv = next(iter(self.users[0].values()))
        d = conv.weight[0].numel()
        rows = self.filters * len(self.users)
        if not self.whole and max(rows, self.filters + self.unique) > d:
            what = f"two bases of {self.filters}" if len(self.users) == 2 else f"shared={self.filters}"
            raise SharingError(
                f"{self.name}: {what} and unique={self.unique} filters per layer are more than the {d} numbers of one "
                f"filter ({conv.in_channels} channels, kernel {tuple(conv.kernel_size)}), so they cannot be "
                f"independent; shared and unique count for the first stage and grow with the width"
            )

    def apply(self, model: nn.Module) -> None:
        """Put the bases and their users into ``model``."""
        bases = []
        for users in self.users:
            basis = _basis(next(iter(users.values())), self.filters, self.name, self.pool)
            bases.append(basis)
            for conv in users.values():
                if self.whole:
                    replace_layer(model, conv, SharedConv2d(basis))
                else:
                    bias = conv.bias is not None
                    layer = SharedBasisConv2d(basis, conv.out_channels, unique=self.unique, bias=bias)
                    replace_layer(model, conv, layer)
        _orthonormal(bases)


@dataclass(frozen=True)
class GroupedSharingPlan(SharingPlan):
    """The same for the grouped convolutions of a ResNeXt stage. Norms and 1x1 convolutions behind them change in width.

    Attributes:
        blocks: name of the convolution -> its block.
        groups: number of groups of the basis.
        unique_groups: number of groups of a layer's own filters.
    """

    blocks: Mapping[str, nn.Module] = field(default_factory=dict)
    groups: int = 1
    unique_groups: int = 1

    def check_rank(self) -> None:
        """Raise SharingError where filters and groups do not fit, or a block has no norm behind the convolution."""
        for name, conv in self.users[0].items():
            for what, filters, groups in (
                ("shared", self.filters, self.groups),
                ("unique", self.unique, self.unique_groups),
            ):
                if not groups or filters % groups or conv.in_channels % groups:
                    raise SharingError(
                        f"{name!r}: {what}={filters} filters do not fall into groups over {conv.in_channels} channels; "
                        f"of a ResNeXt, shared and unique must be multiples of the filters per group of its first "
                        f"stage, and their quotients must divide the channels"
                    )
            self._norm(name)

    def _norm(self, name: str) -> nn.BatchNorm2d:
        """The norm behind the grouped convolution of a block."""
        children = list(self.blocks[name].children())
        behind = children[children.index(self.users[0][name]) + 1 :]
        norm = next((child for child in behind if isinstance(child, nn.BatchNorm2d)), None)
        if norm is None or norm.num_features != self.users[0][name].out_channels:
            raise SharingError(f"{name!r} has no BatchNorm2d behind it whose width could follow; leave its stage out")
        return norm

    def apply(self, model: nn.Module) -> None:
        """Put the basis, its users, and norms and 1x1 convolutions of the new width into ``model``."""
        basis = _basis(next(iter(self.users[0].values())), self.filters, self.name, groups=self.groups)
        for name, conv in self.users[0].items():
            norm, last = self._norm(name), self.blocks[name].get_submodule("conv3")
            assert isinstance(last, nn.Conv2d)
            layer = SharedGroupedConv2d(basis, self.unique, self.unique_groups)
            at: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
            new_norm = nn.BatchNorm2d(layer.rank, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, **at)
            mixing = nn.Conv2d(layer.rank, last.out_channels, 1, bias=last.bias is not None, **at)
            nn.init.kaiming_normal_(mixing.weight, mode="fan_out", nonlinearity="relu")
            for old, new in ((conv, layer), (norm, new_norm), (last, mixing)):
                replace_layer(model, old, new)
        _orthonormal([basis])


def share_filter_bases(
    model: nn.Module,
    *,
    shared: int | None = None,
    unique: int | None = None,
    double: bool = False,
    stages: Sequence[str] | None = None,
    layers: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Let the convolutions of a stage share one basis of filters (DSFB), in place.

    Kang, Kim, NeurIPS 2021. Call it on a fresh network, before an optimizer is made: weights are drawn anew
    (Kaiming-normal, fan-out; the bases orthonormal), from torch's global generator.

    =========================  ======================================================================================
    blocks                     what blocks 2, 3, ... of a stage share (the first keeps its convolutions)
    =========================  ======================================================================================
    basic (ResNet-18/34,       ``conv1`` and ``conv2`` become :class:`SharedBasisConv2d` over ``shared`` filters per
    CIFAR ResNets)             stage; ``double``: two bases per stage, one for each, drawn as one orthonormal set
    bottleneck (ResNet-50)     the 3x3 convolution; ``double``: also the last 1x1 ("Shared++")
    grouped bottleneck         the grouped 3x3 becomes ``unique`` own and ``shared`` shared filters; norm and last 1x1
    (ResNeXt-50)               follow in width
    dense (DenseNet-121)       the 3x3 of *every* layer of a dense block becomes a :class:`SharedBasisConv2d`;
                               ``shared`` and ``unique`` do not grow
    inverted residual          the expansion 1x1; ``double``: also the projection ("Shared++")
    (MobileNetV2)
    =========================  ======================================================================================

    Stages are found by their blocks, not by their names: containers of blocks with ``conv1`` and ``conv2`` (and
    ``conv3``), or runs of torchvision's inverted residuals of one width, called ``stage1``, ``stage2``, ... as in the
    paper. A stage with too few blocks for two layers to share is left as it is. In the released DenseNet-121 the fourth
    dense block uses the basis of the third, and its own basis is unused. Here it uses its own. The number of parameters
    is the same.

    Args:
        model: the network (a ``LightningModule`` works too).
        shared: ``S``, filters in the basis of the first stage. It grows in later stages in proportion to their width.
            ``None``: 16, for a ResNeXt half of the first stage's width.
        unique: ``U``, own filters of each layer; it grows likewise. ``None``: 1, for a ResNeXt the same as ``shared``.
        double: see the table.
        stages: only these; ``None``: all.
        layers: share between exactly these convolutions instead: a list of names or patterns, or a dict name of the
            basis -> list for several bases (the basis of a bare list is called after its first layer). ``shared`` and
            ``unique`` are then taken as they are.

    Returns:
        ``model``.

    Raises:
        SharingError: no stage is found, a name does not exist, a layer is strided, grouped (outside a ResNeXt),
            parametrized or unlike the others, or there are more filters than weights per filter. The network is then
            unchanged.
        TypeError, ValueError: a bad argument, by name.
    """
    filters = 16 if shared is None else check_integer("shared", shared, low=1)
    own = 1 if unique is None else check_integer("unique", unique, low=0)
    double = check_flag("double", double)
    if layers is not None:
        if stages is not None or double:
            raise ValueError("layers says which layers share; give neither stages nor double beside it")
        plans = [SharingPlan(name, [check_layers(group)], filters, own) for name, group in _groups(model, layers)]
    else:
        plans = list(_stage_plans(model, shared, unique, double, stages))
    taken: dict[nn.Module, str] = {}
    present = {basis.gram for _, basis, _ in shared_bases(model)}
    for plan in plans:
        plan.check_rank()
        if plan.name in present:
            raise SharingError(
                f"the network has a shared basis called {plan.name!r} already, and bases of one name are orthonormal "
                f"together; call this group something else in layers={{...}}"
            )
        for name, conv in ((name, conv) for users in plan.users for name, conv in users.items()):
            if conv in taken:
                raise SharingError(f"{name!r} is in two groups, {taken[conv]!r} and {plan.name!r}")
            taken[conv] = plan.name
    for plan in plans:
        plan.apply(model)
    return model


def _groups(model: nn.Module, layers: object) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Yield the name of each basis and its layers, in the user's order."""
    modules = named_modules(model)
    first_names = set({module: name for name, module in reversed(modules.items())}.values())
    convolutions = [n for n, m in modules.items() if isinstance(m, nn.Conv2d | BasisUser) and n in first_names]
    for basis, given in (layers if isinstance(layers, Mapping) else {None: layers}).items():
        patterns = check_patterns("layers" if basis is None else f"layers[{basis!r}]", given) or []
        # A full name selects any layer; check_layers says why it cannot share.
        names = [*convolutions, *(name for name in patterns if name in modules and name not in convolutions)]
        chosen = [
            name
            for pattern in patterns
            for name in match_pattern(pattern, names, argument="layers", noun="convolution", error=SharingError)
        ]
        seen: set[nn.Module] = set()
        for name in chosen:
            if modules[name] in seen:
                raise SharingError(f"layers: {name!r} is named twice")
            seen.add(modules[name])
        if len(chosen) < 2:
            raise SharingError(f"layers={given!r}: a basis is shared by at least two layers")
        yield chosen[0] if basis is None else str(basis), {name: modules[name] for name in chosen}


def choose_stages(names: Sequence[str], patterns: object) -> list[str]:
    """Return the stages that ``patterns`` select by name, all for ``None``.

    Raises:
        TypeError, ValueError: ``patterns`` is no list of strings.
        SharingError: a pattern matches none.
    """
    wanted = check_patterns("stages", patterns)
    if wanted is None:
        return list(names)
    if not wanted:
        raise ValueError("stages=[] shares nothing; use stages=None for every stage")
    noun = "stage with enough blocks to share"
    return [n for p in wanted for n in match_pattern(p, names, argument="stages", noun=noun, error=SharingError)]


#: Kinds of blocks in which ``shared`` and ``unique`` count filters, and kinds that may have two bases.
_COUNTED = {"basic", "grouped", "dense"}
_DOUBLE = {"basic", "bottleneck", "inverted"}


def _stage_plans(
    model: nn.Module, shared: int | None, unique: int | None, double: bool, chosen: Sequence[str] | None
) -> Iterator[SharingPlan]:
    found = find_stages(model)
    usable = [stage for stage in found if stage.can_share]
    if not usable:
        raise SharingError(
            f"{type(model).__name__} has no stage in which blocks with conv1 and conv2 (ResNet, DenseNet) or inverted "
            f"residuals (MobileNetV2) could share a basis; name the convolutions that are to share in layers=[...]"
        )
    wanted = choose_stages([stage.name for stage in usable], chosen)
    usable = [stage for stage in usable if stage.name in wanted]
    kinds: set[str] = {stage.kind for stage in usable}
    if (shared is not None or unique is not None) and not kinds <= _COUNTED:
        raise ValueError(
            "shared and unique count filters of basic, grouped and dense blocks; bottleneck and inverted residual "
            "blocks share their whole convolutions, so leave both at None"
        )
    if double and not kinds <= _DOUBLE:
        raise ValueError("grouped and dense blocks have one layer that shares and no second basis; leave double out")
    narrow = next((stage_width(stage) for stage in found if stage.kind == "basic"), 1)
    grouped = next((stage for stage in found if stage.kind == "grouped"), None)
    filters, own = 16 if shared is None else shared, 1 if unique is None else unique
    for stage in usable:
        positions = stage.sharing()
        if stage.kind == "grouped":
            assert grouped is not None
            yield _grouped_plan(stage, positions[0], grouped, shared, unique)
        elif stage.kind == "dense":
            yield SharingPlan(stage.name, [check_layers(positions[0])], filters, own)
        elif stage.kind == "basic":
            ratio = stage_width(stage) / narrow
            together = check_layers({**positions[0], **positions[1]})
            users = [check_layers(position) for position in positions] if double else [together]
            yield SharingPlan(stage.name, users, round(filters * ratio), round(own * ratio))
        else:
            for role, layer in list(zip(ROLES[stage.kind], positions, strict=True))[: 2 if double else 1]:
                convs = check_layers(layer)
                width = next(iter(convs.values())).out_channels
                yield SharingPlan(f"{stage.name}.{role}", [convs], width, 0, pool=role, whole=True)


def _grouped_plan(
    stage: Stage, layers: Mapping[str, nn.Module], first: Stage, shared: int | None, unique: int | None
) -> GroupedSharingPlan:
    """One basis for the grouped convolutions of ``stage``; ``first`` is the first such stage of the network."""
    start = next(iter(first.blocks.values())).get_submodule("conv2")
    assert isinstance(start, nn.Conv2d)
    per_group = start.out_channels // start.groups
    filters = start.out_channels // 2 if shared is None else shared
    own = filters if unique is None else unique
    convs = check_layers(layers, grouped=True)
    ratio = next(iter(convs.values())).out_channels // start.out_channels
    blocks = dict(zip(convs, list(stage.blocks.values())[1:], strict=True))
    return GroupedSharingPlan(
        stage.name, [convs], filters * ratio, own * ratio, blocks=blocks,
        groups=filters // per_group, unique_groups=own * ratio // per_group,
    )  # fmt: skip
