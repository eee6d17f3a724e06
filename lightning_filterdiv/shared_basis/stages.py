"""Find the stages of a network and their blocks by the kinds of their layers, not by names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_filterdiv.filters import canonical_name
from lightning_filterdiv.shared_basis.modules import BasisUser, SharedBasisConv2d, SharedGroupedConv2d

__all__ = ["ROLES", "Stage", "find_stages", "stage_width"]

Kind = Literal["basic", "bottleneck", "grouped", "dense", "inverted"]


@dataclass(frozen=True)
class Stage:
    """Blocks of one resolution. The first keeps its layers and the others share. In a dense block all share.

    Attributes:
        name: name of the container, or ``stage3`` where the network has none.
        kind: kind of its blocks.
        blocks: name -> block, in order.
    """

    name: str
    kind: Kind
    blocks: Mapping[str, nn.Module]

    @property
    def can_share(self) -> bool:
        """True if at least two layers would use a basis."""
        return len(self.blocks) > (1 if self.kind in ("basic", "dense") else 2)

    def sharing(self) -> list[dict[str, nn.Module]]:
        """The layers that may share, one dict per position in the block (conv1, conv2)."""
        positions: list[dict[str, nn.Module]] = []
        for name, block in list(self.blocks.items())[self.kind != "dense" :]:
            for position, layer in enumerate(_positions(self.kind, block)):
                if position == len(positions):
                    positions.append({})
                positions[position][canonical_name(f"{name}.{layer}")] = block.get_submodule(layer)
        return positions


def _positions(kind: Kind, block: nn.Module) -> list[str]:
    if kind == "basic":
        return ["conv1", "conv2"]
    if kind == "bottleneck":
        return ["conv2", "conv3"]
    if kind in ("grouped", "dense"):
        return ["conv2"]
    return ["conv.0.0", "conv.2"]


# Names of the positions at which the basis is a whole convolution.
ROLES: dict[Kind, list[str]] = {"bottleneck": ["conv2", "conv3"], "inverted": ["expansion", "projection"]}


def _kind(block: nn.Module) -> Kind | None:
    """Return the kind of a block by its layers; ``None`` for anything else."""
    layers = [getattr(block, name, None) for name in ("conv1", "conv2", "conv3")]
    convs = [isinstance(layer, nn.Conv2d | BasisUser) for layer in layers]
    first, second = layers[:2]
    if convs == [True, True, False]:
        narrows = isinstance(first, nn.Conv2d) and first.kernel_size == (1, 1)
        widens = isinstance(second, BasisUser) or (isinstance(second, nn.Conv2d) and second.kernel_size != (1, 1))
        return "dense" if narrows and widens else "basic"
    if convs == [True, True, True]:
        is_grouped = isinstance(second, SharedGroupedConv2d) or (isinstance(second, nn.Conv2d) and second.groups > 1)
        return "grouped" if is_grouped else "bottleneck"
    body = getattr(block, "conv", None)
    if not isinstance(body, nn.Sequential) or len(body) != 4 or not isinstance(body[0], nn.Sequential):
        return None
    return "inverted" if isinstance(body[2], nn.Conv2d | BasisUser) else None


def find_stages(model: nn.Module) -> list[Stage]:
    """Stages in order: containers of basic, bottleneck or dense blocks; runs of inverted residuals of one width."""
    found: list[Stage] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{prefix}.") for prefix in inside):
            continue
        children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
        kinds = {_kind(child) for child in children.values()}
        if (
            isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
            and len(kinds) == 1
            and (kind := kinds.pop()) is not None
        ):
            inside.append(name)
            if kind != "inverted":
                found.append(Stage(canonical_name(name) or "stage", kind, children))
                continue
        # Named after what the container stands in: a network may have two such backbones.
        prefix = canonical_name(name.rpartition(".")[0])
        runs: list[dict[str, nn.Module]] = []
        width = None
        for key, child in children.items():
            if _kind(child) == "inverted":
                inside.append(key)
                if not runs or _outputs(child) != width:
                    runs.append({})
                width = _outputs(child)
                runs[-1][key] = child
        for number, run in enumerate(_with_first(runs, children), start=1):
            found.append(Stage(f"{prefix}.stage{number}" if prefix else f"stage{number}", "inverted", run))
    return found


def _with_first(runs: list[dict[str, nn.Module]], children: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    # MobileNetV2 counts a first block without expansion as stage 1; it has nothing to share.
    if not runs:
        return runs
    names = list(children)
    before = names.index(next(iter(runs[0]))) - 1
    first = children[names[before]] if before >= 0 else None
    body = getattr(first, "conv", None)
    return [{names[before]: first}, *runs] if isinstance(body, nn.Sequential) and first is not None else runs


def _outputs(block: nn.Module) -> int:
    projection = block.get_submodule("conv.2")
    return projection.basis.out_channels if isinstance(projection, BasisUser) else int(projection.out_channels)  # type: ignore[arg-type]


def stage_width(stage: Stage) -> int:
    """Output channels of a stage of basic blocks."""
    layer = list(stage.blocks.values())[-1].get_submodule("conv2")
    channels = layer.coefficients.out_channels if isinstance(layer, SharedBasisConv2d) else layer.out_channels
    assert isinstance(channels, int)
    return channels
