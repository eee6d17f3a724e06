"""What a checkpoint of a fit with C-SGD says: clusters, example inputs, and whose names they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_filterdiv.filters import canonical_name

__all__ = ["inputs_from_state", "relative_to", "saved_states"]


def saved_states(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a checkpoint keeps of every CentripetalSGD, subclasses included."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"checkpoint must be what torch.load(path, weights_only=True) returns, got {type(checkpoint).__name__}"
        )
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
    names = {canonical_name(name) for name, _ in model.named_modules(remove_duplicate=False)}

    def fits(prefix: str) -> bool:
        return all(name.removeprefix(prefix).split("[")[0] in names for name in clusters)

    if fits(""):
        return dict(clusters), network
    parts = next(iter(clusters)).split(".")
    for depth in range(1, len(parts)):
        prefix = ".".join(parts[:depth]) + "."
        if all(name.startswith(prefix) for name in clusters) and fits(prefix):
            inner = None if network is None or f"{network}." == prefix else network.removeprefix(prefix)
            return {name.removeprefix(prefix): index for name, index in clusters.items()}, inner
    return dict(clusters), network
