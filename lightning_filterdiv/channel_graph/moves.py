"""Rules for data movement, pooling and reductions: the operator itself is applied to the label tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .labels import Ints, LabelTensor, compress, core, distinct, mix, unique
from .propagate import Grouped, Move, Propagation, Rule, Value, fixed_labels, moved, nullified, pattern, unknown
from .record import Node, arguments, map_nodes, operator_name

__all__ = ["RULES", "refuse_product"]


def identity(state: Propagation, node: Node) -> Value:
    """Copies, casts and dropout, which keep every entry."""
    value = state.labels_of(node.args[0]) if isinstance(node.args[0], Node) else None
    if isinstance(node.value, (list, tuple)):
        return [value, None]
    return value


def _movement(state: Propagation, node: Node) -> Value:
    """Apply the operator to the labels."""
    call = arguments(node)
    known = [leaf for leaf in _leaves([call.get("index"), call.get("indices")]) if _is_index(leaf)]
    moving = [leaf for leaf in node.inputs if leaf not in known]
    operands = [leaf for leaf in moving if state.labels_of(leaf) is not None]
    if len(operands) != len(moving) or any(_value(state, n).uniform for n in operands):
        return _index_by_values(state, node)
    args, kwargs = map_nodes((node.args, node.kwargs), lambda n: n.constant if n in known else _labels(state, n))
    result = node.target(*args, **kwargs)
    parameters = all(_value(state, n).is_parameter for n in operands)
    if isinstance(result, Tensor):
        return LabelTensor(moved(state, node, result).labels, is_parameter=parameters)
    return [moved(state, node, part, i) for i, part in enumerate(result)]


def _leaves(value: Any) -> list[Node]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value] if isinstance(value, Node) else []


def _is_index(node: Node) -> bool:
    """True if a node is a tensor of integers that does not depend on inputs."""
    known = node.constant
    return isinstance(known, Tensor) and not known.is_floating_point() and known.ndim > 0


def _index_by_values(state: Propagation, node: Node) -> Value:
    """Indexing by a tensor that is a buffer of a channel map or computed in forward."""
    for leaf in node.inputs:
        state.pin(leaf, f"input of {state.where(node)}, which is indexed by a computed tensor")
    return state.fixed(node)


def _value(state: Propagation, node: Node) -> LabelTensor:
    value = state.labels_of(node)
    assert value is not None
    return value


def _labels(state: Propagation, node: Node) -> Tensor:
    return _value(state, node).labels


def _varying(labels: Tensor) -> set[int]:
    """Dimensions along which a labelled tensor is not constant."""
    small = core(labels)
    return {d for d in range(small.ndim) if small.shape[d] > 1}


def _note_move(state: Propagation, node: Node, labels: Tensor, natural: Callable[[Tensor], bool] | None = None) -> None:
    """Record a movement. ``natural`` tells if it has the same meaning at every width for given labels."""
    values, _ = distinct(core(labels).numpy())
    owners = unique(state.table.owner[values[values > 0]])
    if len(owners):
        fits = natural is not None and natural(labels)
        move = Move(operator_name(node), node.module, owners, labels, natural)
        (state.reshapes if fits else state.moves).append(move)


def _note_spread(state: Propagation, node: Node, before: Tensor, after: Tensor) -> None:
    """Record a movement that lays channels out along more dimensions than before."""
    if len(_varying(after)) > len(_varying(before)):
        values, _ = distinct(core(after).numpy())
        for owner in unique(state.table.owner[values[values > 0]]).tolist():
            state.spread[owner] = state.where(node)


def along_dim(state: Propagation, node: Node) -> Value:
    """Slices, splits and rolls. Along channels they depend on the number of channels."""
    call = arguments(node)
    labels = _labels(state, node.args[0]) if isinstance(node.args[0], Node) else None
    if labels is None:
        return _index_by_values(state, node)
    if _value(state, node.args[0]).weighed:  # blocks of unequally many channels, counted already
        return state.fixed(node)
    dims = call.get("dim", call.get("dims", 0))
    dims = [dims] if isinstance(dims, int) else (dims or range(labels.ndim))
    if operator_name(node, raw=True) == "slice" and tuple(node.value.shape) == tuple(labels.shape):
        return _value(state, node.args[0])
    along = {d % labels.ndim for d in dims}
    if along & _varying(labels):
        _note_move(state, node, labels, lambda moved: not along & _varying(moved))
        if operator_name(node, raw=True).endswith("_scatter") and (written := state.labels_of(node.args[1])):
            _note_move(state, node, written.labels, lambda moved: not along & _varying(moved))
    return _movement(state, node)


def keeps_order(state: Propagation, node: Node) -> Value:
    """Transpositions and similar calls, which move whole dimensions of any size."""
    return _movement(state, node)


def restride(state: Propagation, node: Node) -> Value:
    """as_strided with an unchanged shape, as after pooling a channels-last activation to one position."""
    value = state.labels_of(node.args[0])
    if value is None or value.shape != node.value.shape:
        return unknown(state, node)
    return value


def overwrite(state: Propagation, node: Node) -> Value:
    """copy: the written values, in the shape of the tensor that they overwrite."""
    source = _value(state, node.args[1])
    return moved(state, node, source.labels.expand(node.value.shape))


def index(state: Propagation, node: Node) -> Value:
    """Indexing by integer buffers. Other indices depend on values."""
    call = arguments(node)
    indexed = [d for d, i in enumerate(call["indices"]) if i is not None]
    if len(indexed) != 1 or not _is_index(call["indices"][indexed[0]]):
        return _index_by_values(state, node)
    labels = _labels(state, node.args[0])
    if indexed[0] in _varying(labels):
        _note_move(state, node, labels)
    return _movement(state, node)


def regroup(state: Propagation, node: Node) -> Value:
    """Shuffles with a fixed number of groups."""
    labels = _labels(state, node.args[0])
    if _varying(labels):
        _note_move(state, node, labels)
    result = _movement(state, node)
    if isinstance(result, LabelTensor):
        _note_spread(state, node, labels, result.labels)
    return result


def concatenate(state: Propagation, node: Node) -> Value:
    """cat and stack. The number of the operand joins the trail, so that repeated operands stay in order."""
    call = arguments(node)
    operands = [_value(state, n) for n in call["tensors"]]
    key = state.key(node)
    parts = [state.table.derive(v.labels, None if key is None else int(mix(key, i))) for i, v in enumerate(operands)]
    if operator_name(node, raw=True) == "stack":
        return LabelTensor(compress(torch.stack(parts, call["dim"])))
    parts = [p for p in parts if p.ndim > 1 or p.numel()]  # legacy: empty 1-D operands are ignored
    dim = call["dim"] % parts[0].ndim
    return LabelTensor(compress(_join_along(parts, dim)))


# No layer reads more features than this, because it would have millions of weights per output. Predictions of a dense
# detector are as many, and following each of their positions would take minutes.
_MOST_POSITIONS = 2**20


def reshape(state: Propagation, node: Node) -> Value:
    """view, reshape, flatten: row-major order is kept."""
    value = _value(state, node.args[0])
    labels, shape = value.labels, node.value.shape
    if not value.weighed:  # a norm that counts its channels splits them into blocks, however many there are
        _note_move(state, node, labels, lambda moved: _reshape_is_natural(moved, tuple(shape)))
    result = _reshaped(labels, tuple(shape))
    result = state.table.derive(result, state.key(node))
    _note_spread(state, node, labels, result)
    small = core(result)
    if small.numel() > core(labels).numel():
        if small.numel() > _MOST_POSITIONS:
            state.pin(value, f"input of {state.where(node)}, which makes {small.numel():,} features of them")
            return state.fixed(node)
        result = _number_slots(state, small).expand(shape)
    return LabelTensor(_positions_apart(state, result), is_parameter=value.is_parameter, weighed=value.weighed)


def _number_slots(state: Propagation, small: Tensor) -> Tensor:
    """Make the entries of one channel separate values after a flatten, numbered in order."""
    table, flat = state.table, small.reshape(-1).numpy()
    owned = np.flatnonzero(flat > 0)
    old = flat[owned]
    order = np.argsort(old, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(old[order])) + 1] if len(old) else np.zeros(0, np.int64)
    rank = np.empty(len(old), dtype=np.int64)
    rank[order] = np.arange(len(old)) - np.repeat(starts, np.diff(np.r_[starts, len(old)]))
    result = flat.copy()
    result[owned] = table.add(
        owner=table.owner[old],
        trail=table.trail[old],
        slot=mix(table.slot[old], rank) if table.slot[old].any() else rank,
        origin=table.origin[old],
        leak=table.leak[old],
    )
    return torch.from_numpy(result).reshape(small.shape)


def _positions_apart(state: Propagation, labels: Tensor) -> Tensor:
    """``labels`` without numbers of positions where these lie along dimensions of their own again.

    There every channel has the same position at the same place (windows and patches that were cut out of an image), so
    that equal channels are equal at each.
    """
    table, small = state.table, core(labels)
    values = small.numpy()
    owned = values > 0
    index = np.where(owned, values, 0)
    slots = np.where(owned, table.slot[index], 0)
    if not slots.any():
        return labels
    owners = torch.from_numpy(np.where(owned, table.owner[index], values))
    positions = [d for d in range(small.ndim) if compress(owners).stride(d) == 0 and small.shape[d] > 1]
    channels = [d for d in range(small.ndim) if d not in positions]
    first = tuple(slice(0, 1) if d in positions else slice(None) for d in range(small.ndim))
    at_first = tuple(slice(0, 1) if d in channels else slice(None) for d in range(small.ndim))
    alike = (column[index] for column in (table.trail, table.origin, table.leak, table.zero))
    if (slots != slots[at_first]).any() or any((column != column[first])[owned].any() for column in alike):
        return labels
    known, inverse = distinct(values[first])
    mine = known > 0
    known = known.copy()
    old = known[mine]
    known[mine] = table.add(
        owner=table.owner[old],
        trail=table.trail[old],
        origin=table.origin[old],
        leak=table.leak[old],
        zero=table.zero[old],
    )
    return torch.from_numpy(known[inverse].reshape(values[first].shape)).expand(labels.shape)


def _segments(source: Sequence[int], target: Sequence[int]) -> list[tuple[slice, slice]]:
    """Return the matching groups of dimensions of the two shapes of a reshape, in order."""
    parts: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        a, b = i, j
        left = source[i] if i < len(source) else 1
        right = target[j] if j < len(target) else 1
        i, j = min(i + 1, len(source)), min(j + 1, len(target))
        while left != right:
            if left < right:
                left, i = left * source[i], i + 1
            else:
                right, j = right * target[j], j + 1
        parts.append((slice(a, i), slice(b, j)))
    return parts


def _reshaped(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return ``labels.reshape(shape)``, with expanded dimensions kept."""
    if not labels.numel():
        return labels.reshape(shape)
    small = core(labels)
    kept_source: list[int] = []
    kept_target: list[int] = []
    for here, there in _segments(labels.shape, shape):
        constant = all(n == 1 for n in small.shape[here])
        kept_source += [1] * (here.stop - here.start) if constant else labels.shape[here]
        kept_target += [1] * (there.stop - there.start) if constant else shape[there]
    return compress(small.expand(kept_source).reshape(kept_target)).expand(shape)


def _reshape_is_natural(labels: Tensor, shape: Sequence[int]) -> bool:
    """True if the reshape has the same meaning for any number of channels.

    It has if channels lie along at most one dimension before and after. A stack of branches may be between, if each
    channel is the same along the dimension of branches.
    """
    if not labels.numel():
        return True
    before, after = _varying(labels), None
    for here, there in _segments(labels.shape, shape):
        channels = sum(d in before for d in range(here.start, here.stop))
        if channels > 1:
            return False
        if channels and sum(n != 1 for n in shape[there]) > 1:
            after = _varying(_reshaped(labels, tuple(shape))) if after is None else after
            if sum(d in after for d in range(there.start, there.stop)) > 1:
                return False
    return True


def pad(state: Propagation, node: Node) -> Value:
    """Padding. Along space every channel is padded alike. Along channels the padding gets places of its own."""
    call = arguments(node)
    value = _value(state, node.args[0])
    result, shape = value.labels, node.value.shape
    widths: list[int] = list(call.get("pad") or call.get("padding") or [])
    constant = operator_name(node, raw=True) == "constant_pad_nd" or call.get("mode") == "constant"
    fill = call.get("value") or 0
    varying, filled = _varying(result), False
    for k in range(0, len(widths), 2):
        before, after = widths[k : k + 2]
        dim = result.ndim - 1 - k // 2
        if dim not in varying:
            filled |= constant and fill != 0 and max(before, after) > 0
            sizes = [-1] * result.ndim
            sizes[dim] = shape[dim]
            result = result.narrow(dim, 0, 1).expand(sizes)
        elif before or after:
            if not constant:
                state.pin(value, f"input of {state.where(node)}, which repeats channels")
                return state.fixed(node)
            kept = result.narrow(dim, max(0, -before), result.shape[dim] + min(0, before) + min(0, after))
            blocks = [_padding(state, node, kept.shape, dim, width, fill) for width in (before, after)]
            result = _join_along([blocks[0], kept, blocks[1]], dim)
            _note_move(state, node, result)
    if filled:  # a silent channel would not be silent at the border
        result = state.table.derive(result, state.key(node), shift=state.where(node))
    return moved(state, node, result)


def _padding(state: Propagation, node: Node, shape: torch.Size, dim: int, width: int, fill: float) -> Tensor:
    """Return labels of ``width`` padded channels: zeros, or another constant that no channel owns."""
    count = max(0, width)
    if fill == 0:
        trail = np.full(count, state.key(node) or 0, dtype=np.int64)
        values = torch.from_numpy(state.table.add(owner=state.table.new_owners(count), trail=trail, zero=1))
    else:
        values = torch.full((count,), state.table.add_fixed(f"padding with {fill} by {state.where(node)}"))
    view = [count if d == dim else 1 for d in range(len(shape))]
    return values.reshape(view).expand([count if d == dim else n for d, n in enumerate(shape)])


def _join_along(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate labels. Dimensions along which all parts are constant stay expanded."""
    sizes = [-1 if d == dim else n for d, n in enumerate(parts[0].shape)]
    for d in range(len(sizes)):
        if d != dim and all(p.stride(d) == 0 or p.shape[d] == 1 for p in parts):
            parts = [p.narrow(d, 0, 1) for p in parts]
    return torch.cat(list(parts), dim).expand(sizes)


def _zero_preserving(name: str) -> bool:
    return not re.search(r"softmax|logsumexp|prod|any|all|cumprod|argm", name)


def over_space(state: Propagation, node: Node) -> Value:
    """Pooling and resizing of the last k dimensions, alike for every channel."""
    labels = _value(state, node.args[0]).labels
    rank = int(re.findall(r"(\d)d", operator_name(node, raw=True))[0])
    small = state.collapse(labels, range(labels.ndim - rank, labels.ndim), node, silent=False)
    small = state.table.derive(small, state.key(node))
    value = node.value
    if isinstance(value, Tensor):
        return LabelTensor(small.expand(value.shape))
    return [LabelTensor(small.expand(part.shape)) for part in value]


def windows(state: Propagation, node: Node) -> Value:
    """Tensor.unfold: windows along a dimension of space, each of which holds every channel alike."""
    call = arguments(node)
    value = _value(state, node.args[0])
    if call["dimension"] % value.labels.ndim in _varying(value.labels):
        return unknown(state, node)
    return _movement(state, node)


def patches(state: Propagation, node: Node) -> Value:
    """F.unfold: the positions of each window become features of its channel, in the same order for every channel."""
    labels, shape = _value(state, node.args[0]).labels, node.value.shape
    small = state.collapse(labels, (-2, -1), node, silent=False).squeeze(-1)
    each = shape[-2] // small.shape[-2]
    small = compress(small.expand([*small.shape[:-1], each]).reshape([*small.shape[:-2], shape[-2], 1]))
    result = _number_slots(state, core(small)) if each > 1 else small
    return moved(state, node, result.expand(shape))


def sum_of_patches(state: Propagation, node: Node) -> Value:
    """F.fold: adds up what the windows hold for each position of a channel."""
    labels, shape = _value(state, node.args[0]).labels, node.value.shape
    small = labels.narrow(-1, 0, 1).squeeze(-1)
    if labels.stride(-1) != 0 and labels.shape[-1] > 1:
        small = state.collapse(labels, [-1], node).squeeze(-1)
    small = compress(small.unflatten(-1, (shape[-3], -1)))
    small = state.collapse(small, [-1], node).unsqueeze(-1)
    return LabelTensor(state.table.derive(small.expand(shape), state.key(node)))


def sampled(state: Propagation, node: Node) -> Value:
    """Values at positions that another operand gives, alike for every channel."""
    positions = state.labels_of(node.args[1])
    if positions is not None and bool((core(positions.labels) > 0).any()):
        state.pin(positions, f"acts on all channels at once in {state.where(node)}")
    return over_space(state, node)


def _axis(dims: Sequence[int], labels: Tensor) -> str:
    """Return a description of the dimensions that an operator mixes: channels if they lie along one, else its
    number."""
    if _varying(labels) == set(dims):
        return "channels"
    return f"dimension {dims[0]}" if len(dims) == 1 else f"dimensions {', '.join(map(str, dims))}"


def reduction(state: Propagation, node: Node) -> Value:
    """Means, sums, maxima and softmax over dimensions along which the channel does not change."""
    call = arguments(node)
    labels, is_parameter = _value(state, node.args[0]).labels, _value(state, node.args[0]).is_parameter
    dims: Any = call.get("dim")
    chosen = [dims] if isinstance(dims, int) else (list(dims) if dims else list(range(labels.ndim)))
    chosen = [d % labels.ndim for d in chosen]
    name = operator_name(node, raw=True)
    mixed = sorted(set(chosen) & _varying(labels))
    if mixed:
        if _value(state, node.args[0]).weighed and name == "sum":
            return _counted(state, node, labels, mixed)
        if _within_heads(node, labels, mixed) or not state.stay_apart(_lines(labels, mixed)):
            if name in _AVERAGES and len(mixed) == 1 and state.count(node, state.channels(labels, mixed[0], node)):
                return state.fixed(node)
            kind = None if _value(state, node.args[0]).is_parameter else _countable(node)
            if kind is not None and len(mixed) == 1:
                state.reduce(node, kind, mixed[0], state.channels(labels, mixed[0], node))
                return state.fixed(node)
            state.pin(node.args[0], f"input of {state.where(node)} over {_axis(mixed, labels)}, which mixes channels")
            return state.fixed(node)
        labels = _joined(state, node, labels, mixed)
    small = labels
    for d in chosen:
        if not mixed or labels.stride(d) == 0:
            small = small.narrow(d, 0, 1)
    small = state.table.derive(small, state.key(node), shift=None if _zero_preserving(name) else state.where(node))

    def shaped(part: Tensor) -> LabelTensor:
        if part.ndim == labels.ndim:
            return LabelTensor(small.expand(part.shape), is_parameter=is_parameter)
        kept = [d for d in range(labels.ndim) if d not in chosen]
        left = small.permute(*kept, *chosen).reshape([labels.shape[d] for d in kept]) if kept else small.reshape(())
        return LabelTensor(left, is_parameter=is_parameter)

    value = node.value
    return shaped(value) if isinstance(value, Tensor) else [shaped(part) for part in value]


def _within_heads(node: Node, labels: Tensor, mixed: Sequence[int]) -> bool:
    """True for the length or the mean that a norm takes of each head of attention.

    A head lies along an earlier dimension than its channels. A sum of branches looks alike, but nothing is divided by
    it: a norm keeps the dimension, or takes a Euclidean length.
    """
    varying, name = _varying(labels), operator_name(node, raw=True)
    if len(varying) < 2 or list(mixed) != [max(varying)]:
        return False
    return _countable(node) == "norm" or (name in ("sum", *_AVERAGES) and arguments(node).get("keepdim") is True)


def _countable(node: Node) -> str | None:
    """Return the kind of a reduction that counts per channel make exact after merging; None for others."""
    call, name = arguments(node), operator_name(node, raw=True)
    if call.get("dtype") is not None:
        return None
    if name in ("max", "min"):  # over a dimension: values, and indices, which must not be used
        unused = not any(user.args[1] == 1 and user.users for user in node.users)
        return f"a{name}" if "dim" in call and unused else None
    if name in ("linalg_vector_norm", "norm"):
        return "norm" if call.get("ord", call.get("p")) in (None, 2) else None
    return name if name in ("mean", "sum", "amax", "amin") else None


def _counted(state: Propagation, node: Node, labels: Tensor, dims: Sequence[int]) -> Value:
    """Sum of channels that were multiplied by the counts of a norm."""
    along = _varying(state.rooted(labels))  # one channel may lie there in several states
    vector = state.collapse(labels, [d for d in range(labels.ndim) if d not in along], node).reshape(-1).numpy()
    state.count(node, vector)
    if (groups := int(np.prod([labels.shape[d] for d in along - set(dims)], initial=1))) > 1:
        state.grouped[f"{node.module}.counts"] = Grouped(groups, (len(vector) // groups,))
    return state.fixed(node)


def _lines(labels: Tensor, dims: Sequence[int]) -> Ints:
    """Return ``(n, m)`` labels along ``dims``, one row for each place along the other dimensions."""
    small = core(labels)
    kept = [d for d in range(small.ndim) if d not in dims]
    return small.permute(*kept, *dims).reshape(int(np.prod([small.shape[d] for d in kept], initial=1)), -1).numpy()


def _joined(
    state: Propagation, node: Node, labels: Tensor, dims: Sequence[int], keeps_shape: bool | None = None
) -> Tensor:
    """Labels of branches that meet along ``dims``: what lies there becomes one channel.

    Operators that keep the shape (softmax; ``None``: see whether they do) make as many values of it as there were,
    others one.
    """
    table, shape = state.table, labels.shape
    small, matrix = core(labels), _lines(labels, dims)
    kept = [d for d in range(small.ndim) if d not in dims]
    size = [small.shape[d] for d in kept]
    values, owned = np.empty(len(matrix), dtype=np.int64), (matrix > 0).all(axis=1)
    if not owned.all():
        fixed = table.fixed_reasons[-1 - int(matrix.min())]
        rest = matrix[~owned]
        table.pin(rest[rest > 0], f"meets values that no channel owns ({fixed}) in {state.where(node)}", expose=False)
        table.expose_leaks(rest)
        values[~owned] = table.add_fixed(f"computed by {state.where(node)}")
    rows = matrix[owned]
    if len(rows):
        slots = table.slot[rows]
        if (apart := (slots != slots[:, :1]).any(axis=1)).any():
            table.pin(rows[apart], f"meets another order of positions in {state.where(node)}")
        owners, origins = table.owner[rows], table.origin[rows]
        table.unite(np.repeat(owners[:, 0], rows.shape[1]), owners.reshape(-1))
        alone = (origins == origins[:, :1]).all(axis=1)
        if operator_name(node, raw=True) not in _LINEAR:
            for origin in unique(origins[~alone]).tolist():
                table.exposed.setdefault(origin, f"joined by {state.where(node)}")
        table.expose_leaks(rows[~alone])
        values[owned] = table.add(
            owner=owners[:, 0],
            trail=pattern(table, rows),
            slot=slots[:, 0],
            origin=np.where(alone, origins[:, 0], -1),
            leak=np.where(alone, table.leak[rows].max(axis=1), 0),
            zero=table.zero[rows].min(axis=1),
        )
    joint = torch.from_numpy(values).reshape([*size, *[1] * len(dims)])
    joint = joint.permute(*np.argsort([*kept, *dims]).tolist())
    if keeps_shape is None:
        first = node.value if isinstance(node.value, Tensor) else node.value[0]
        keeps_shape = tuple(first.shape) == tuple(shape)
    if not keeps_shape:
        return joint.expand(shape)
    return _pairwise(state, small, joint.expand(small.shape)).expand(shape)


def _pairwise(state: Propagation, own: Tensor, joint: Tensor) -> Tensor:
    """Return values that depend on themselves and on all values that they meet."""
    table = state.table
    owns, joints = own.reshape(-1).numpy(), joint.reshape(-1).numpy()
    low, span = joints.min(), joints.max() - joints.min() + 1
    pairs, inverse = distinct(owns * span + (joints - low))  # one number for a pair
    first, second = pairs // span, pairs % span + low
    result = second.copy()
    owned = (first > 0) & (second > 0)
    mine, met = first[owned], second[owned]
    result[owned] = table.add(
        owner=table.owner[mine],
        trail=mix(table.trail[mine], table.trail[met]),
        slot=table.slot[mine],
        origin=table.origin[met],
        leak=table.leak[met],
        zero=table.zero[met],
    )
    return torch.from_numpy(result[inverse]).reshape(own.shape)


_LINEAR = ("sum", "mean", "bmm")
_AVERAGES = ("mean", "var", "var_mean", "std")


def batched_product(state: Propagation, node: Node) -> Value:
    """A batch of products of matrices, as in attention.

    It sums over positions, with weights that are alike for all channels: like a mean over them. Or it sums over
    channels of both factors, which belong together pair by pair: their products can be counted. Matrices of a batch
    (heads) hold one channel each at the same place.
    """
    if any(state.labels_of(n) is None for n in node.args[:2]):
        return unknown(state, node)
    values = [_value(state, n) for n in node.args[:2]]
    if not any(value.is_parameter for value in values):
        for dim, (own, weights) in ((1, values), (2, values[::-1])):
            if _varying(weights.labels):
                continue
            labels = own.labels
            if 3 - dim in _varying(labels) and state.stay_apart(_lines(labels, [3 - dim])):  # branches, weighed
                labels = _joined(state, node, labels, [3 - dim], keeps_shape=False)
            if dim in _varying(labels) <= {0, dim} and _heads(state, node, [(labels, dim)]) is not None:
                state.pin(weights, f"acts on all channels at once in {state.where(node)}")
                small = labels.narrow(3 - dim, 0, 1)
                return LabelTensor(state.table.derive(small, state.key(node)).expand(node.value.shape))
        if all(dim in _varying(value.labels) <= {0, dim} for dim, value in zip((2, 1), values, strict=True)):
            rows = _heads(state, node, [(values[0].labels, 2), (values[1].labels, 1)])
            if rows is not None and values[0].weighed:
                state.count(node, rows.numpy())
            elif rows is not None:
                state.reduce(node, "product", 2, rows.numpy())
            if rows is not None:
                return state.fixed(node)
    return refuse_product(state, node, node.args[0], node.args[1])


def _heads(state: Propagation, node: Node, operands: Sequence[tuple[Tensor, int]]) -> Tensor | None:
    """(channels,) labels along the given dimension of each operand, all that lies at one place made one channel.

    None if no or several channels would be left to choose from, or something else lies among them.
    """
    parts = [core(labels).narrow(3 - dim, 0, 1).movedim(dim, 2).flatten(0, 1) for labels, dim in operands]
    together = torch.cat([part.expand(-1, operands[0][0].shape[operands[0][1]]) for part in parts])
    lines = together.T.numpy()
    if len(together) > 1 and ((lines <= 0).any() or state.table.zero[lines].any() or not state.stay_apart(lines)):
        return None
    return state.collapse(together, [0], node).squeeze(0)


def refuse_product(state: Propagation, node: Node, first: Node, second: Node) -> Value:
    """A product of matrices that no rule follows: what it reads is pinned, with what it does to channels."""
    where, summed = state.where(node), {first: len(first.shape) - 1, second: len(second.shape) - 2}
    varying = {n: _varying(v.labels) for n in summed if (v := state.labels_of(n)) is not None and state.is_owned(n)}
    for n, dims in varying.items():
        labels, reason = _labels(state, n), f"input of {where}, which mixes channels"
        other = second if n is first else first
        if (known := state.labels_of(other)) is not None and known.is_parameter:
            weight = ", ".join(state.tensors_behind(other))
            reason = f"input of {where} by {weight}, which is the weight of no convolution or linear layer"
        elif summed[n] in dims:
            axis = "channels" if dims <= {0, summed[n]} else _axis([summed[n]], labels)  # dim 0: heads of attention
            reason = f"input of {where} over {axis}, which mixes channels"
        elif len(varying) > 1 and all(other - {0, summed[o]} for o, other in varying.items()):
            reason = f"input of {where}, which multiplies every channel by every other"
        elif 0 in dims and labels.ndim > 2:
            reason = f"input of {where}, which multiplies the channels at each place of dimension 0 by another matrix"
        state.pin(n, reason)
    return unknown(state, node)


def creation(state: Propagation, node: Node) -> Value:
    """Tensors made in forward. Zeros count as padding, other constants are the same for every channel."""
    name, value = operator_name(node, raw=True), node.value
    call = arguments(node)
    fill = 0 if "zeros" in name else 1 if "ones" in name else call.get("fill_value")
    like = state.labels_of(node.args[0]) if name.endswith("_like") and isinstance(node.args[0], Node) else None
    if like is not None and (fill == 0 or _varying(like.labels)) and not like.is_parameter:
        return LabelTensor(nullified(state, node, like.labels) if fill == 0 else _filled(state, node, like.labels))
    if fill == 0 and value.ndim > 1 and value.shape[1] > 1:
        labels = _padding(state, node, value.shape, 1, value.shape[1], 0)
        _note_move(state, node, labels)
        return LabelTensor(labels)
    label = state.table.add_fixed(f"computed by {state.where(node)}")
    return LabelTensor(fixed_labels(value.shape, label), uniform=isinstance(fill, (int, float, bool)))


def _filled(state: Propagation, node: Node, labels: Tensor) -> Tensor:
    """Labels of one number in the places of ``labels`` (``ones_like(x)``), which come and go with its channels."""
    result = state.table.derive(labels, state.key(node), shift=state.where(node))
    values = unique(core(result).numpy())
    values = values[values > 0]
    state.table.origin[values], state.table.leak[values] = -1, 0
    return result


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("clone", "contiguous", "alias", "detach", "lift_fresh", "lift_fresh_copy", "_to_copy", "to", "native_dropout"),
        identity,
    ),
    **dict.fromkeys(
        ("slice", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "roll", "narrow"), along_dim
    ),
    **dict.fromkeys(("index_select", "slice_scatter", "select_scatter"), along_dim),
    **dict.fromkeys(
        ("transpose", "permute", "t", "movedim", "flip", "squeeze", "unsqueeze", "expand", "repeat"), keeps_order
    ),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle"), regroup),
    "index": index,
    "copy": overwrite,
    "as_strided": restride,
    **dict.fromkeys(("cat", "stack"), concatenate),
    "bmm": batched_product,
    "unfold": windows,
    "im2col": patches,
    "col2im": sum_of_patches,
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "reshape", "flatten", "unflatten"), reshape),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys((f"{mode}_pad{rank}d" for mode in ("reflection", "replication") for rank in (1, 2, 3)), pad),
    **dict.fromkeys(
        (f"{kind}_pool{rank}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)),
        over_space,
    ),
    **dict.fromkeys((f"_adaptive_avg_pool{rank}d" for rank in (2, 3)), over_space),
    **dict.fromkeys((f"max_pool{rank}d_with_indices" for rank in (2, 3)), over_space),
    **dict.fromkeys(
        (f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "bicubic2d")), over_space
    ),
    **dict.fromkeys(
        (
            *(f"_upsample_nearest_exact{rank}d" for rank in (1, 2, 3)),
            *(f"_upsample_{kind}2d_aa" for kind in ("bilinear", "bicubic")),
            "upsample_linear1d",
            "upsample_trilinear3d",
        ),
        over_space,
    ),
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), sampled),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "softmax", "_softmax"), reduction
    ),
    **dict.fromkeys(("log_softmax", "_log_softmax", "logsumexp", "cumsum", "linalg_vector_norm", "norm"), reduction),
    **dict.fromkeys(
        (
            "zeros",
            "ones",
            "full",
            "zeros_like",
            "ones_like",
            "full_like",
            "new_zeros",
            "new_ones",
            "new_full",
            "scalar_tensor",
        ),
        creation,
    ),
}
