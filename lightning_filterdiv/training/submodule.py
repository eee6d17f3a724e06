"""The ``network`` argument of callbacks that trace: the submodule, and the chosen layers inside it."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_filterdiv.filters import Conv, NoLayersError

__all__ = ["check_network", "layers_inside"]


def check_network(network: object) -> str | None:
    """Return ``network`` if it is a name or ``None``.

    Raises:
        TypeError: anything else.
    """
    if network is not None and not isinstance(network, str):
        given = repr(network) if isinstance(network, int | float) else f"a {type(network).__name__}"
        raise TypeError(f"network must be the name of a submodule, such as 'backbone', or None, got {given}")
    return network


def layers_inside(network: str | None, layers: Mapping[str, Conv]) -> dict[str, Conv]:
    """Return those of ``layers`` that belong to the submodule ``network``; all of them for ``None``.

    Args:
        network: canonical name of a submodule.
        layers: canonical name -> convolution, as ``include`` and ``exclude`` select them.

    Raises:
        NoLayersError: no layer belongs to it.
    """
    if network is None:
        return dict(layers)
    inside = {name: conv for name, conv in layers.items() if name.startswith(f"{network}.")}
    if not inside:
        raise NoLayersError(
            f"network={network!r} is no submodule with convolutions that include and exclude leave; "
            f"the selected layers are {', '.join(list(layers)[:6])}"
        )
    return inside
