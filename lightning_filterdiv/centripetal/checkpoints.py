"""What a checkpoint of a fit with C-SGD says: clusters, example inputs, and whose names they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_filterdiv.filters import find_prefix, named_modules
from lightning_filterdiv.tensors.arguments import check_checkpoint

__all__ = ["inputs_from_state", "relative_to", "saved_states"]


def saved_states(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a checkpoint keeps of every CentripetalSGD, subclasses included."""
    check_checkpoint(checkpoint)
    states = [state for state in (checkpoint.get("callbacks") or {}).values() if isinstance(state, dict)]
    return [s for s in states if isinstance(extra := s.get("extra"), dict) and {"clusters", "strength"} <= extra.keys()]


def inputs_from_state(state: dict[str, Any] | None, network: str | None) -> tuple[Any, str | None]:
    """Example inputs (zeros) and the submodule they belong to, from what a checkpoint keeps; ``None``: it has none."""
    if state is None:
        return None, network
    args = tuple(state["args"])
    return (dict(state["kwargs"]) if state["kwargs"] and not args else args), state["network"]


def relative_to(
    model: nn.Module, clusters: Mapping[str, Tensor], network: str | None
) -> tuple[dict[str, Tensor], str | None]:
    """``clusters`` and ``network`` as names of ``model``: they may be those of the LightningModule around it."""
    # The name of a group is that of its first layer, with its rows in brackets where it has not all of them.
    strip, add = find_prefix([name.split("[")[0] for name in clusters], named_modules(model)) or ("", "")
    renamed = {add + name.removeprefix(strip): index for name, index in clusters.items()}
    if network is None or f"{network}." == strip:
        return renamed, add.removesuffix(".") or None
    return renamed, add + network.removeprefix(strip)
