"""Labels of channels, on which a record is run instead of data.

Every activation becomes an integer tensor of the same shape. Each entry names a *value*, a row of :class:`ValueTable`:

``> 0``
    a value that belongs to one channel. The table keeps its *owner* (the filter or the entry of a per-channel parameter
    it comes from), its *trail* (a hash of its operators, which distinguishes channels of one layer that were treated
    differently) and, until its first join, the filter that alone feeds it. A *zero* (padding) has an owner too: it is
    neutral in a sum, but takes up a place that goes with the channel it meets;
``< 0``
    a value that no channel owns: network inputs, results of operators that mix channels.

Owners are merged by union-find: a class of owners is one channel. Label tensors are constant along space almost
everywhere, so those dimensions are kept expanded (stride 0): the cost of a trace does not depend on the image size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Ints", "LabelTensor", "ValueTable", "compress", "core", "distinct", "is_increasing", "mix", "stable_hash"]

Ints = npt.NDArray[np.int64]
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def stable_hash(text: str) -> int:
    """Return a 64-bit hash of ``text`` that is equal in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def mix(*parts: Ints | int) -> Ints:
    """Return a hash of a sequence of (arrays of) 64-bit integers, element by element. It depends on the order."""
    with np.errstate(over="ignore"):
        state: npt.NDArray[np.uint64] = np.zeros((), dtype=np.uint64)
        for part in parts:
            state = (state ^ np.asarray(part, dtype=np.int64).view(np.uint64)) * _MULTIPLIER
            state = state ^ (state >> np.uint64(29))
    return np.asarray(state).view(np.int64)


def is_increasing(values: Ints) -> bool:
    """Whether a vector ascends strictly: it has no entry twice. Filters in a row do, most of what is looked at."""
    return values.ndim == 1 and bool((values[1:] > values[:-1]).all())


def unique(values: Ints) -> Ints:
    """Return sorted distinct entries, by sorting. NumPy from 2.3 on hashes integers, which takes several times as long
    here."""
    if is_increasing(values):
        return values
    found = np.sort(values, axis=None)
    return found[np.r_[True, found[1:] != found[:-1]]] if len(found) else found


def distinct(labels: Ints) -> tuple[Ints, Ints]:
    """Return sorted distinct entries of ``labels``, and the position of each entry among them, without sorting if
    possible."""
    flat = labels.reshape(-1)
    if is_increasing(flat):
        return flat, np.arange(len(flat))
    low, high = int(flat.min()), int(flat.max())
    if len(flat) < 256 or high - low > 4 * len(flat):
        values, inverse = np.unique(flat, return_inverse=True)
        return values, inverse.reshape(-1)
    met = np.zeros(high - low + 1, dtype=bool)
    met[flat - low] = True
    position = np.cumsum(met) - 1
    return np.flatnonzero(met) + low, position[flat - low]


def core(labels: Tensor) -> Tensor:
    """Return a view of ``labels`` with every expanded (stride 0) dimension shrunk to size 1, an empty one too."""
    if 0 in labels.shape and not any(s for n, s in zip(labels.shape, labels.stride(), strict=True) if not n):
        # An empty batch, as where no box is found.
        labels = labels.as_strided([max(1, n) for n in labels.shape], labels.stride())
    for dim in range(labels.ndim):
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def compress(labels: Tensor) -> Tensor:
    """Return ``labels`` with every dimension along which they are constant expanded (stride 0)."""
    shape, small = labels.shape, core(labels)
    for dim in range(small.ndim):
        if small.shape[dim] > 1:
            first = small.narrow(dim, 0, 1)
            # Cheap test first: most dimensions that vary differ between their first two entries.
            if bool((small.narrow(dim, 1, 1) == first).all()) and bool((small == first).all()):
                small = first
    return small.expand(shape)


@dataclass(frozen=True)
class LabelTensor:
    """Labels of one node of the graph."""

    labels: Tensor
    is_parameter: bool = False  # computed from parameters and buffers only, not yet joined with an activation
    uniform: bool = False  # one and the same constant everywhere (torch.ones, torch.full)
    weighed: bool = False  # multiplied by the counts of a norm, to be summed over channels

    @property
    def shape(self) -> torch.Size:
        """Shape of the activation."""
        return self.labels.shape


class ValueTable:
    """Table of values, union-find over their owners, and the reasons why owners are pinned."""

    def __init__(self) -> None:
        self._size = 1  # there is no value 0
        self._columns = {
            name: np.zeros(1024, dtype=np.int64) for name in ("owner", "trail", "slot", "origin", "leak", "zero")
        }
        self._columns["owner"][0] = self._columns["origin"][0] = -1
        self._parent = np.zeros(0, dtype=np.int64)
        self.pins: dict[int, str] = {}  # owner -> reason, the first one found
        self.fixed_reasons: list[str] = []  # reason of value -1-k
        self.leak_reasons: list[str] = [""]  # leak 0: the value is zero once its filter is silenced
        self.exposed: dict[int, str] = {}  # origin -> why silencing it is not enough

    # -- columns -----------------------------------------------------------------------------------------------------

    def _column(self, name: str) -> Ints:
        return self._columns[name][: self._size]

    @property
    def owner(self) -> Ints:
        """Owner of each value (before union)."""
        return self._column("owner")

    @property
    def trail(self) -> Ints:
        """Hash of the operators each value went through."""
        return self._column("trail")

    @property
    def slot(self) -> Ints:
        """Position of each value within its channel after a flatten, otherwise 0."""
        return self._column("slot")

    @property
    def origin(self) -> Ints:
        """The filter that alone feeds each value, -1 behind the first join."""
        return self._column("origin")

    @property
    def leak(self) -> Ints:
        """Index into ``leak_reasons``: why the value is not zero when its filter is silenced (0: it is zero)."""
        return self._column("leak")

    @property
    def zero(self) -> Ints:
        """1 for values that are constant zero."""
        return self._column("zero")

    def add(
        self,
        *,
        owner: Ints,
        trail: Ints,
        slot: Ints | int = 0,
        origin: Ints | int = -1,
        leak: Ints | int = 0,
        zero: Ints | int = 0,
    ) -> Ints:
        """Append values; returns their numbers."""
        start, stop = self._size, self._size + len(owner)
        capacity = len(self._columns["owner"])
        if stop > capacity:
            for name, old in self._columns.items():
                self._columns[name] = np.empty(max(stop, 2 * capacity), dtype=np.int64)
                self._columns[name][:start] = old[:start]
        self._size = stop
        columns = {"owner": owner, "trail": trail, "slot": slot, "origin": origin, "leak": leak, "zero": zero}
        for name, values in columns.items():
            self._columns[name][start:stop] = values
        return np.arange(start, stop, dtype=np.int64)

    def add_fixed(self, reason: str) -> int:
        """Add a value that no channel owns and return it."""
        self.fixed_reasons.append(reason)
        return -len(self.fixed_reasons)

    def add_leak(self, reason: str) -> int:
        """Add a reason why silencing does not reach some values, and return its number."""
        if reason not in self.leak_reasons:
            self.leak_reasons.append(reason)
        return self.leak_reasons.index(reason)

    # -- owners ------------------------------------------------------------------------------------------------------

    def new_owners(self, count: int) -> Ints:
        """``count`` new owners, each a class of its own."""
        start = len(self._parent)
        new = np.arange(start, start + count, dtype=np.int64)
        self._parent = np.concatenate([self._parent, new])
        return new

    @property
    def owner_count(self) -> int:
        """Number of owners."""
        return len(self._parent)

    def root(self, owner: int) -> int:
        """Representative of the class of ``owner``."""
        return int(self.roots(np.asarray([owner]))[0])

    def roots(self, owners: Ints) -> Ints:
        """Representatives of the classes of ``owners``."""
        found = self._parent[owners]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self._parent[owners] = found
        return found

    def unite(self, first: Ints | int, second: Ints | int) -> None:
        """Make the classes of owners one channel, pair by pair."""
        firsts, seconds = np.atleast_1d(first), np.atleast_1d(second)
        while True:
            a, b = self.roots(firsts), self.roots(seconds)
            apart = a != b
            if not apart.any():
                return
            np.minimum.at(self._parent, np.maximum(a, b)[apart], np.minimum(a, b)[apart])

    def pin(self, labels: Tensor | Ints, reason: str, *, expose: bool = True) -> None:
        """Pin the owners of the positive ``labels``. With ``expose`` they cannot be silenced either, for the same
        reason."""
        values = unique(core(labels).numpy() if isinstance(labels, Tensor) else labels)
        values = values[values > 0]
        for owner in unique(self.owner[values]).tolist():
            self.pins.setdefault(owner, reason)
        if expose:
            for origin in unique(self.origin[values]).tolist():
                self.exposed.setdefault(origin, reason)

    def expose_leaks(self, values: Ints) -> None:
        """Mark values that reach a join or a consumer. A leak there cannot be silenced."""
        self.expose_leaks_in_order(unique(values[values > 0]))

    def expose_leaks_in_order(self, values: Ints) -> None:
        """Run :meth:`expose_leaks` on positive ``values``. The first reason for a filter is kept."""
        for value in values[self.leak[values] > 0].tolist():
            self.exposed.setdefault(int(self.origin[value]), self.leak_reasons[int(self.leak[value])])

    # -- values ------------------------------------------------------------------------------------------------------

    def derive(self, labels: Tensor, key: int | None, *, shift: str | None = None) -> Tensor:
        """Return ``labels`` after one more operator that treats every channel alike: same owners, longer trail.

        Args:
            labels: label tensor of any shape.
            key: stable hash of the operator; None leaves the values as they are.
            shift: words for the operator if it does not map zero to zero.
        """
        if key is None:
            return labels
        small = core(labels)
        values, inverse = distinct(small.numpy())
        renamed = values.copy()
        renamed[values > 0] = self.advance(values[values > 0], key, shift=shift)
        renamed = np.asarray(renamed[inverse]).reshape(tuple(small.shape))
        return torch.from_numpy(renamed).expand(labels.shape)

    def advance(self, old: Ints, key: Ints | int, *, shift: str | None = None, rank: Ints | int = 0) -> Ints:
        """Return new values with the owners of ``old``, see :meth:`derive`."""
        leak = self.leak[old]
        if shift is not None:
            leak = np.where(leak > 0, leak, self.add_leak(f"{shift} does not map zero to zero"))
        new = self.add(
            owner=self.owner[old],
            trail=mix(self.trail[old], key, rank),
            slot=self.slot[old],
            origin=self.origin[old],
            leak=leak,
            zero=self.zero[old],
        )
        return new if shift is None else self.shift_zeros(new, shift)

    def shift_zeros(self, values: Ints, where: str) -> Ints:
        """Replace zeros after an operator with an offset by a constant that no channel owns."""
        owned = values > 0
        zeros = owned & (self.zero[np.where(owned, values, 0)] > 0)
        if zeros.any():
            reason = f"zero padding is shifted by {where}"
            self.pin(values[zeros], reason)
            values = np.where(zeros, self.add_fixed(reason), values)
        return values
