"""Read a checkpoint of a fit with ChannelImportance: gated layers and their mean gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_filterdiv.channel_importance.gates import insert_gates, mean_gates
from lightning_filterdiv.filters import find_prefix, named_modules

__all__ = ["restore_gates"]

#: Entries that identify the state of a ChannelImportance.
_OWN = {"widths", "sums", "finished", "epoch"}


def restore_gates(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Insert the gates of a checkpoint's network, in place, so that its weights load.

    Args:
        model: the LightningModule of the fit, or the network in it, newly built.
        checkpoint: result of ``torch.load(path, weights_only=True)``.

    Returns:
        Layer of ``model`` -> ``(C,)`` mean gate of the fit, float64; ``{}`` if the checkpoint was saved without
        :class:`~lightning_filterdiv.ChannelImportance`, or before its first step.

    Raises:
        ValueError: the callback's state is damaged, or ``model`` lacks a layer that had a gate.
    """
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and isinstance(extra := state.get("extra"), dict) and extra.keys() >= _OWN:
            return _restore(model, state)
    return {}


def _restore(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    extra = state["extra"]
    try:
        placement, reduction = (state["arguments"][name] for name in ("placement", "reduction"))
        widths = {str(name): int(count) for name, count in extra["widths"]}
        for key in ("sums", "finished"):
            if extra[key] is not None and extra[key].shape != (sum(widths.values()) + len(widths),):
                raise ValueError(f"{key} has shape {tuple(extra[key].shape)}")
        sums = extra["sums"] if extra["finished"] is None else extra["finished"]
        means = {} if sums is None else mean_gates(widths, sums)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the state of ChannelImportance is damaged ({error}); take another checkpoint of the fit"
        ) from error
    if not widths:
        return {}
    prefixes = find_prefix(widths, named_modules(model))
    if prefixes is None:
        raise ValueError(
            f"{next(iter(widths))!r} had a gate in the fit, and {type(model).__name__} has no such layer; name the "
            f"network that was trained"
        )
    strip, add = prefixes
    insert_gates(
        model,
        [add + name.removeprefix(strip) for name in widths],
        placement=placement,
        reduction=reduction,
    )
    return {add + name.removeprefix(strip): mean for name, mean in means.items()}
