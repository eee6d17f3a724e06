"""What a checkpoint of a fit with ChannelImportance says: which layers have gates, and what they let through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_filterdiv.channel_importance.callback import ChannelImportance
from lightning_filterdiv.channel_importance.gates import insert_gates
from lightning_filterdiv.filters import find_prefix, named_modules

__all__ = ["restore_gates"]


def restore_gates(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Put gates where a checkpoint's network had them, in place, so that its weights load.

    Args:
        model: the LightningModule of the fit, or the network in it, newly built.
        checkpoint: what ``torch.load(path, weights_only=True)`` returns.

    Returns:
        Layer of ``model`` -> ``(C,)`` mean gate of the fit, float64; ``{}`` if the checkpoint was saved without
        :class:`~lightning_filterdiv.ChannelImportance`, or before its first step.

    Raises:
        ValueError: the callback's state is damaged, or ``model`` lacks a layer that had a gate.
    """
    own = ChannelImportance().extra_state().keys()
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, dict) and isinstance(extra := state.get("extra"), dict) and own <= extra.keys():
            return _restore(model, state)
    return {}


def _restore(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        callback = ChannelImportance(**{name: state["arguments"][name] for name in ("placement", "reduction")})
        callback.load_extra_state(state["extra"])
        layers = [name for name, _ in state["extra"]["widths"]]
        means = callback.importance
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the state of ChannelImportance is damaged ({error}); take another checkpoint of the fit"
        ) from error
    if not layers:
        return {}
    prefixes = find_prefix(layers, named_modules(model))
    if prefixes is None:
        raise ValueError(
            f"{layers[0]!r} had a gate in the fit, and {type(model).__name__} has no such layer; name the network that "
            f"was trained"
        )
    strip, add = prefixes
    insert_gates(
        model,
        [add + name.removeprefix(strip) for name in layers],
        placement=callback.placement,
        reduction=callback.reduction,
    )
    return {add + name.removeprefix(strip): mean for name, mean in means.items()}
