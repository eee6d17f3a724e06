"""Record of the narrowings of a network, kept on the network so that a file can repeat them on a fresh one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .answers import ChannelAnswers
from .errors import NarrowingError

__all__ = ["chosen_channels", "example_inputs_of", "history_of", "narrowing_step", "remember", "set_history"]

_ATTRIBUTE = "_narrowing_steps"


def remember(model: nn.Module, step: dict[str, Any], *, of: nn.Module) -> nn.Module:
    """Record on ``model`` that it was made from ``of`` by ``step``, and return it."""
    set_history(model, [*history_of(of), step])
    return model


def set_history(model: nn.Module, steps: list[dict[str, Any]]) -> None:
    """Record the steps that made ``model``, oldest first."""
    model.__dict__[_ATTRIBUTE] = steps


def history_of(model: nn.Module) -> list[dict[str, Any]]:
    """The steps that made ``model``, oldest first."""
    return list(model.__dict__.get(_ATTRIBUTE, []))


def narrowing_step(
    graph: ChannelAnswers, keep: Mapping[str, Tensor], sums: Mapping[str, Tensor], form: str
) -> dict[str, Any]:
    """Return the kept filters, by the tensor that makes them, as plain values and tensors."""
    kept: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    groups = {group.name: group for group in graph.groups}
    for name, index in keep.items():
        group = groups[name]
        if len(index) < group.size:
            part = next(p for p in group.parts if p.kind == "filter")
            rows = part.rows[index.cpu().long().sort().values, 0]
            kept[part.tensor] = torch.cat([kept.get(part.tensor, rows.new_empty(0)), rows])
            if name in sums:
                into = sums[name].cpu().long()
                pairs = torch.stack([part.rows[:, 0], part.rows[into.clamp_min(0), 0]], dim=1)[into >= 0]
                added[part.tensor] = torch.cat([added.get(part.tensor, pairs.new_empty(0, 2)), pairs])
    inputs = _described(graph.arguments)
    return {"network": graph.network, "inputs": inputs, "form": form, "keep": kept, "sums": added}


def chosen_channels(
    graph: ChannelAnswers, kept: Mapping[str, Tensor], added: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return ``keep`` and ``sums`` for the groups of ``graph`` from the filters of a step.

    Raises:
        NarrowingError: a tensor has no such removable filters.
    """
    keep: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    left = {tensor: set(rows.tolist()) for tensor, rows in kept.items()}
    for group in graph.groups:
        part = next(p for p in group.parts if p.kind == "filter")
        if part.tensor in kept:
            here = torch.isin(part.rows[:, 0], kept[part.tensor])
            if here.any():
                keep[group.name] = here.nonzero().squeeze(1)
                left[part.tensor] -= set(part.rows[here, 0].tolist())
                if part.tensor in added:
                    place = {row: i for i, row in enumerate(part.rows[:, 0].tolist())}
                    into = torch.full((group.size,), -1)
                    for row, onto in added[part.tensor].tolist():
                        if row in place:
                            into[place[row]] = place.get(onto, -1)
                    sums[group.name] = into
    wrong = [tensor for tensor, rows in left.items() if rows]
    if wrong:
        raise NarrowingError(f"{wrong[0]} does not have the filters that were kept")
    return keep, sums


def _described(value: Any) -> Any:
    """Return example inputs without the values of floating tensors."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return value.detach().cpu().clone()
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_described(item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _described(item) for key, item in value.items()}}
    return value if value is None or isinstance(value, (bool, int, float, str)) else {"object": type(value).__name__}


def example_inputs_of(described: Any) -> Any:
    """Return inputs of that description, with random floating tensors.

    Raises:
        ValueError: it is no such description, or holds an object that a file cannot hold.
    """
    if isinstance(described, Tensor) or described is None or isinstance(described, (bool, int, float, str)):
        return described
    if isinstance(described, dict) and set(described) == {"shape", "dtype"}:
        dtype = getattr(torch, str(described["dtype"]), None)
        if isinstance(dtype, torch.dtype):
            generator = torch.Generator().manual_seed(0)
            return torch.rand([int(n) for n in described["shape"]], generator=generator).to(dtype)
    if isinstance(described, dict) and len(described) == 1:
        kind, value = next(iter(described.items()))
        if kind in ("list", "tuple") and isinstance(value, list):
            items = [example_inputs_of(item) for item in value]
            return items if kind == "list" else tuple(items)
        if kind == "dict" and isinstance(value, dict):
            return {key: example_inputs_of(item) for key, item in value.items()}
    raise ValueError("no example inputs")
