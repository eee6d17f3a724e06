"""Text table of a channel graph."""

from __future__ import annotations

from .answers import ChannelAnswers, layer_of

__all__ = ["describe"]


def describe(graph: ChannelAnswers) -> str:
    """Return one line per group (size, coupled layers, members, consumers), then one per pinned layer with its
    reason."""
    rows = [("group", "channels", "layers", "also narrowed", "read by")]
    for group in graph.groups:
        others = dict.fromkeys(
            layer_of(p.tensor) for p in group.parts if p.kind == "member" and layer_of(p.tensor) not in group.layers
        )
        readers = dict.fromkeys(layer_of(p.tensor) for p in group.parts if p.kind == "consumer")
        rows.append((group.name, str(group.size), _some(group.layers), _some(others), _some(readers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths))
    total = sum(group.size for group in graph.groups)
    pinned = "1 layer is" if len(graph.pinned) == 1 else f"{len(graph.pinned)} layers are"
    lines.append(f"{total} channels in {len(graph.groups)} groups may be clustered; {pinned} pinned:")
    lines.extend(f"  {layer}: {reason}" for layer, reason in graph.pinned.items())
    return "\n".join(lines)


def _some(names: object, limit: int = 4) -> str:
    listed = list(names)  # type: ignore[call-overload]
    return ", ".join(listed[:limit]) + (f", ... ({len(listed)} in all)" if len(listed) > limit else "")
