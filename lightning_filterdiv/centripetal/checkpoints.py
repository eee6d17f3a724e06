"""Read a checkpoint of a fit with C-SGD: clusters, example inputs, and the network that names refer to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_filterdiv.filters import find_prefix, named_modules
from lightning_filterdiv.tensors.arguments import check_checkpoint

__all__ = ["inputs_from_state", "relative_to", "saved_states"]


def saved_states(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the saved state of every CentripetalSGD in a checkpoint, subclasses included."""
    check_checkpoint(checkpoint)
    states = [state for state in (checkpoint.get("callbacks") or {}).values() if isinstance(state, dict)]
    return [s for s in states if isinstance(extra := s.get("extra"), dict) and {"clusters", "strength"} <= extra.keys()]


def inputs_from_state(state: dict[str, Any] | None, network: str | None) -> tuple[Any, str | None]:
    """Return example inputs (zeros) and their submodule from a checkpoint; ``None`` if it has none."""
    if state is None:
        return None, network
    args = tuple(state["args"])
    return (dict(state["kwargs"]) if state["kwargs"] and not args else args), state["network"]


def relative_to(
    model: nn.Module, clusters: Mapping[str, Tensor], network: str | None
) -> tuple[dict[str, Tensor], str | None]:
    """Return ``clusters`` and ``network`` with the names of ``model``, which may be inside the LightningModule of the
    fit."""
    # A group is named after its first layer. If it lacks some of its rows, the rows follow in brackets.
    strip, add = find_prefix([name.split("[")[0] for name in clusters], named_modules(model)) or ("", "")
    renamed = {add + name.removeprefix(strip): index for name, index in clusters.items()}
    if network is None or f"{network}." == strip:
        return renamed, add.removesuffix(".") or None
    return renamed, add + network.removeprefix(strip)
