"""Choose the number of channels that each layer keeps, by shares or by a target for the whole network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup
from lightning_filterdiv.narrowing.cost import Cost, network_cost
from lightning_filterdiv.selection import NoLayersError, match_pattern, quote_names, select_layers
from lightning_filterdiv.tensors.arguments import check_choice, check_integer, check_number

__all__ = [
    "KeepFraction", "Scope", "TargetError", "WidthPlan", "WidthRule", "check_keep_fraction", "choose_groups",
    "kept_count", "kept_fractions", "plan_widths", "removal_order",
]  # fmt: skip

KeepFraction = float | dict[str, float]
Scope = Literal["layer", "global"]
#: Tolerance of a target, as a share of it.
_TOLERANCE = 0.01
#: As messages write them.
_MEASURES = {"channels": "channels", "macs": "MACs", "parameters": "parameters"}
_TARGETS = ("keep_fraction", "target_macs", "target_parameters")


class TargetError(ValueError):
    """No choice of widths meets the target. The message gives the obstacle and the nearest value."""


def check_keep_fraction(keep_fraction: object) -> KeepFraction:
    """Return ``keep_fraction`` if it is a number in (0, 1] or a dict of name pattern -> such a number.

    Raises:
        TypeError, ValueError: anything else, by name.
    """
    if not isinstance(keep_fraction, Mapping):
        return check_number("keep_fraction", keep_fraction, above=0.0, high=1.0)
    if not keep_fraction:
        raise ValueError("keep_fraction={} squeezes no layer; give a number or at least one pattern")
    checked: dict[str, float] = {}
    for pattern, fraction in keep_fraction.items():
        if not isinstance(pattern, str):
            raise TypeError(f"keep_fraction must map name patterns to fractions, got the key {pattern!r}")
        checked[pattern] = check_number(f"keep_fraction[{pattern!r}]", fraction, above=0.0, high=1.0)
    return checked


def kept_count(size: int, fraction: float) -> int:
    """Return the number of channels left of ``size``: ``ceil(fraction * size - 1e-9)``, at least one."""
    return max(1, math.ceil(fraction * size - 1e-9))


def kept_fractions(groups: Iterable[ChannelGroup], keep_fraction: KeepFraction) -> dict[str, float]:
    """Return group name -> share of its channels to keep, without groups that no pattern of a dict matches.

    Raises:
        NoLayersError: a pattern matches no layer of the groups.
        ValueError: coupled layers are given different fractions.
    """
    groups = list(groups)
    if not isinstance(keep_fraction, Mapping):
        return {group.name: keep_fraction for group in groups}
    names = sorted({layer for group in groups for layer in group.layers})
    noun = "layer that can be squeezed"
    fraction_of = {
        layer: fraction
        for pattern, fraction in keep_fraction.items()
        for layer in match_pattern(pattern, names, argument="keep_fraction", noun=noun)
    }
    fractions: dict[str, float] = {}
    for group in groups:
        wanted = {layer: fraction_of[layer] for layer in group.layers if layer in fraction_of}
        if len(set(wanted.values())) > 1:
            listed = ", ".join(f"{layer}: {fraction:g}" for layer, fraction in wanted.items())
            raise ValueError(
                f"keep_fraction gives different fractions to layers that share channels ({listed}); give them one"
            )
        if wanted:
            fractions[group.name] = next(iter(wanted.values()))
    return fractions


@dataclass(frozen=True)
class WidthRule:
    """Checked request for widths: the common arguments of C-SGD and pruning.

    Args:
        keep_fraction: share of every group's channels to keep, or a dict of layer pattern -> share (groups that no
            pattern matches keep all).
        target_macs: share of the full network's multiply-accumulate operations to end at, in (0, 1].
        target_parameters: the same for parameters.
        scope: ``"layer"``: the same share in every group; ``"global"``: channels of all groups compete by their scores.
        max_layer_fraction: at most this share of a group's channels goes; ``None``: all but one may.
        channels_multiple: a group that loses channels keeps a multiple of this.

    Raises:
        TypeError, ValueError: a bad argument, by name; not exactly one of the first three.
    """

    keep_fraction: KeepFraction | None = None
    target_macs: float | None = None
    target_parameters: float | None = None
    scope: Scope = "layer"
    max_layer_fraction: float | None = None
    channels_multiple: int = 1

    def __post_init__(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            what = "none of them was given" if not given else f"got {' and '.join(given)}"
            raise ValueError(f"give one of keep_fraction, target_macs and target_parameters: {what}")
        if self.keep_fraction is not None:
            object.__setattr__(self, "keep_fraction", check_keep_fraction(self.keep_fraction))
        for name in ("target_macs", "target_parameters"):
            if (value := getattr(self, name)) is not None:
                if isinstance(value, int | float) and not isinstance(value, bool) and value > 1:
                    raise ValueError(
                        f"{name} is a share of the full network, 0 < {name} <= 1, got {value!r}; for half write 0.5"
                    )
                object.__setattr__(self, name, check_number(name, value, above=0.0, high=1.0))
        check_choice("scope", self.scope, Scope)
        if self.scope == "global" and isinstance(self.keep_fraction, Mapping):
            raise ValueError("scope='global' needs one number: keep_fraction by pattern fixes the share of each layer")
        if self.max_layer_fraction is not None:
            check_number("max_layer_fraction", self.max_layer_fraction, above=0.0, below=1.0)
        check_integer("channels_multiple", self.channels_multiple, low=1)

    @property
    def target(self) -> str:
        """Argument that is given."""
        return next(n for n in _TARGETS if getattr(self, n) is not None)

    @property
    def asked(self) -> str:
        """Request as the user wrote it."""
        parts = [f"{self.target}={getattr(self, self.target)!r}"]
        parts += ["scope='global'"] if self.scope == "global" else []
        parts += [f"max_layer_fraction={self.max_layer_fraction:g}"] if self.max_layer_fraction is not None else []
        parts += [f"channels_multiple={self.channels_multiple}"] if self.channels_multiple > 1 else []
        return ", ".join(parts)

    @property
    def measure(self) -> Literal["channels", "macs", "parameters"]:
        """Quantity that the target counts."""
        named: dict[str, Literal["channels", "macs", "parameters"]] = {
            "target_macs": "macs", "target_parameters": "parameters",
        }  # fmt: skip
        return named.get(self.target, "channels")


@dataclass(frozen=True)
class WidthPlan:
    """Channels that each group keeps, and the resulting cost. ``str(plan)`` is a table.

    Attributes:
        counts: group name -> channels to keep; groups that keep all are among them.
        sizes: group name -> channels now.
        layers: group name -> its layers.
        macs: multiply-accumulate operations on the example inputs of the trace, before and after.
        parameters: parameters of the network, before and after.
        asked: the argument behind the plan, in words.
        left_alone: layer -> reason why (some of) its channels are not in the plan.
        note: reason why the target is met only approximately; empty if it is met.
    """

    counts: dict[str, int]
    sizes: dict[str, int]
    layers: dict[str, tuple[str, ...]]
    macs: tuple[int, int]
    parameters: tuple[int, int]
    asked: str
    left_alone: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def removed(self) -> int:
        """Number of removed channels."""
        return sum(self.sizes.values()) - sum(self.counts.values())

    def __str__(self) -> str:
        shown = {name: self._label(name) for name in self.counts}
        width = min(60, max([len("channels of"), *map(len, shown.values())]))
        lines = [f"{'channels of':<{width}}  {'now':>6}  {'kept':>6}  share"]
        lines += [
            f"{shown[name]:<{width}}  {self.sizes[name]:>6}  {count:>6}  {count / self.sizes[name]:5.2f}"
            for name, count in self.counts.items()
        ]
        for what, (before, after) in (("MACs", self.macs), ("parameters", self.parameters)):
            lines.append(f"{what}: {before:,} -> {after:,} ({after / before if before else 1.0:.4f} of the network)")
        lines.append(f"asked for: {self.asked}" + (f"; {self.note}" if self.note else ""))
        lines += [f"left alone: {layer}: {reason}" for layer, reason in self.left_alone.items()]
        return "\n".join(lines)

    def _label(self, name: str) -> str:
        others = len(self.layers[name]) - 1
        return name + (f" and {others} coupled" if others else "")


def choose_groups(
    graph: ChannelGraph, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups all of whose layers are chosen.

    Args:
        graph: channel graph of the network.
        include: patterns of layers, convolutions and linear ones; ``None``: all.
        exclude: patterns of layers to leave out.

    Returns:
        The groups, and layer -> reason why (some of) its channels are left alone.

    Raises:
        TypeError, ValueError: bad patterns, by name.
        NoLayersError: a pattern of ``include`` matches no layer, or no group is left; the message says why.
    """
    chosen = select_layers(
        dict.fromkeys(graph.layers),
        include,
        exclude,
        noun="layer",
        is_default=lambda _: True,
        no_default="the traced network has none",
        find_obstacle=lambda _name, _layer: None,
    )
    left_alone = {layer: reason for layer, reason in graph.pinned.items() if layer in chosen}
    groups = []
    for group in graph.groups:
        outside = [layer for layer in group.layers if layer not in chosen]
        if not outside:
            groups.append(group)
        elif len(outside) < len(group.layers):
            reason = f"it shares channels and {outside[0]!r} is not chosen"
            left_alone |= {layer: reason for layer in group.layers if layer in chosen}
    if not groups:
        listed = "; ".join(f"{layer}: {reason}" for layer, reason in list(left_alone.items())[:3])
        raise NoLayersError(
            f"no layer is left to narrow: {listed or 'none is chosen'}; choose others with include and exclude, or "
            f"trace a part of the network with network='...'"
        )
    return groups, left_alone


def removal_order(scores: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Return the ``(size,)`` channels in order of removal, the least important first. With blocks, one of each block in
    turn.

    Args:
        scores: (size,) importance.
        blocks: (size,) block of each channel, equally many in every block; ``None``: one block.
    """
    order = scores.argsort(stable=True)
    if blocks is None:
        return order
    rank = torch.empty_like(order)
    of_block = blocks[order]
    for block in of_block.unique():
        members = order[of_block == block]
        rank[members] = torch.arange(len(members))
    return (rank * (int(blocks.max()) + 1) + blocks).argsort(stable=True)


class _Ladder:
    """Numbers of channels that a group may keep, largest first: its size, then multiples of the step."""

    def __init__(self, group: ChannelGroup, rule: WidthRule) -> None:
        step = math.lcm(rule.channels_multiple, group.block_count)
        share = 0.0 if rule.max_layer_fraction is None else 1 - rule.max_layer_fraction
        lowest = step * max(1, math.ceil(kept_count(group.size, share) / step)) if group.size >= step else group.size
        below = range((group.size - 1) // step * step, lowest - 1, -step)
        self.counts = [group.size, *below]
        self.step = step

    def at_least(self, count: int) -> int:
        """Return the position of the smallest allowed number that is at least ``count``, else of the lowest one."""
        return max(i for i, allowed in enumerate(self.counts) if allowed >= count or i == 0)


def plan_widths(
    graph: ChannelGraph,
    rule: WidthRule,
    *,
    groups: Sequence[ChannelGroup] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    fixed: Mapping[str, int] | None = None,
    left_alone: Mapping[str, str] | None = None,
) -> WidthPlan:
    """Solve for the channels that each group keeps, without changing a network or making a trial one.

    A target is met within 1 %. If single channels cost more than that, it is met within half of the smallest possible
    step. If forward itself ties widths together, the nearest width that it can express is taken, and the other groups
    compensate.

    Args:
        graph: channel graph of the network.
        rule: the request.
        groups: those that may lose channels; ``None``: all.
        scores: group name -> (size,) importance of its channels, for ``scope="global"``.
        fixed: group name -> channels, for groups with a fixed width.
        left_alone: layers that are not in the plan, for the table.

    Raises:
        TargetError: the target is out of reach.
        NoLayersError: a pattern of ``keep_fraction`` matches nothing.
        ValueError: coupled layers are given different fractions, or ``keep_fraction`` removes more than
            ``max_layer_fraction`` allows.
    """
    solver = _Solver(graph, rule, graph.groups if groups is None else groups, scores, dict(fixed or {}), left_alone)
    return solver.plan()


class _Solver:
    def __init__(
        self,
        graph: ChannelGraph,
        rule: WidthRule,
        groups: Sequence[ChannelGroup],
        scores: Mapping[str, Tensor] | None,
        fixed: dict[str, int],
        left_alone: Mapping[str, str] | None,
    ) -> None:
        self.graph, self.rule, self.left_alone = graph, rule, dict(left_alone or {})
        self.all, self.groups = graph.groups, [group for group in groups if group.name not in fixed]
        self.fixed = fixed
        self.place = {group.name: i for i, group in enumerate(self.all)}
        self.ladders = {group.name: _Ladder(group, rule) for group in self.groups}
        self.tied = {
            g.name for g in self.groups if any(int(g.channels[0]) in channels for channels in graph.constrained)
        }
        if rule.scope == "global":
            if scores is None:
                raise ValueError("scope='global' compares channels of different layers: give their scores")
            self.queue = self._queue(scores)

    def _queue(self, scores: Mapping[str, Tensor]) -> npt.NDArray[np.int64]:
        """Return the groups in the order of steps down their ladders, least important step first. Ties alternate."""
        keys = [self._keys(group, scores[group.name]) for group in self.groups]
        places = [np.arange(len(part)) / max(1, len(part)) for part in keys]
        owners = [np.full(len(part), i) for i, part in enumerate(keys)]
        together = (np.concatenate([*parts, [0.0][:0]]) for parts in (places, keys))
        return np.concatenate([*owners, [0][:0]]).astype(np.int64)[np.lexsort(tuple(together))]

    def _keys(self, group: ChannelGroup, scores: Tensor) -> list[float]:
        """Return the importance of the channels that each step removes, relative to the group's mean, as a
        non-decreasing sequence."""
        order = removal_order(scores, group.blocks)
        values = scores.double()[order] / scores.double().abs().mean().clamp_min(1e-300)
        counts = self.ladders[group.name].counts
        steps = [
            float(values[group.size - above : group.size - below].mean()) for above, below in itertools.pairwise(counts)
        ]
        return list(np.maximum.accumulate(steps)) if steps else []

    # -- asking for shares ---------------------------------------------------------------------------------------------

    def _at(self, share: float) -> dict[str, int]:
        """Return the numbers for a share of every group, or for channels whose importance is below a quantile."""
        if self.rule.scope == "layer":
            return {
                g.name: (ladder := self.ladders[g.name]).counts[ladder.at_least(kept_count(g.size, share))]
                for g in self.groups
            }
        steps = np.bincount(self.queue[: round((1 - share) * len(self.queue))], minlength=len(self.groups))
        return {g.name: self.ladders[g.name].counts[int(n)] for g, n in zip(self.groups, steps, strict=True)}

    def _shares(self) -> dict[str, int]:
        """Return the numbers for ``keep_fraction`` in every layer."""
        assert self.rule.keep_fraction is not None
        fractions = kept_fractions(self.graph.groups, self.rule.keep_fraction)
        counts = {group.name: group.size for group in self.groups}
        for group in self.groups:
            if group.name in fractions:
                ladder = self.ladders[group.name]
                wanted = kept_count(group.size, fractions[group.name])
                counts[group.name] = ladder.counts[ladder.at_least(wanted)]
                most = self.rule.max_layer_fraction
                if most is not None and group.size - wanted > most * group.size + 1e-9:
                    raise ValueError(
                        f"keep_fraction={fractions[group.name]:g} removes {1 - fractions[group.name]:.3g} of "
                        f"{group.name!r}, more than max_layer_fraction={most:g}; change one of them"
                    )
        return counts

    # -- meeting a target ----------------------------------------------------------------------------------------------

    def _vector(self, counts: Mapping[str, int]) -> list[int]:
        known = self.fixed | dict(counts)
        return [known.get(group.name, group.size) for group in self.all]

    def _meet(self, cost: Cost, goal: float, held: Mapping[str, int]) -> dict[str, int]:
        """Return the numbers whose cost is nearest to ``goal``, with some groups fixed."""

        def at(share: float) -> dict[str, int]:
            return self._at(share) | dict(held)

        low, high = 0.0, 1.0  # shares whose cost is at most and at least the goal
        best = min((at(low), at(high)), key=lambda counts: abs(cost.of(self._vector(counts)) - goal))
        for _ in range(40):
            middle = (low + high) / 2
            counts = at(middle)
            value = cost.of(self._vector(counts))
            best = min((best, counts), key=lambda c: abs(cost.of(self._vector(c)) - goal))
            low, high = (middle, high) if value <= goal else (low, middle)
        return self._refine(cost, goal, best, set(held))

    def _refine(self, cost: Cost, goal: float, counts: dict[str, int], held: set[str]) -> dict[str, int]:
        """Take single steps of groups while one brings the cost nearer. If that does not suffice, take two at once."""
        movable = [g.name for g in self.groups if g.name not in held and g.name not in self.tied]
        counts = dict(counts)
        while True:
            apart = abs(cost.of(self._vector(counts)) - goal)
            left, change = self._nearest_step(cost, goal, counts, movable)
            if left >= apart * (1 - 1e-9) and apart > 0.5 * _TOLERANCE * goal:
                first = [step for way in (-1, 1) for step in self._steps(counts, movable, way).items()]
                pairs = ((dict([one]), self._nearest_step(cost, goal, counts | dict([one]), movable)) for one in first)
                left, change = min(
                    ((after, one | two) for one, (after, two) in pairs), key=lambda pair: pair[0], default=(apart, {})
                )
            if left >= apart * (1 - 1e-9):
                return counts
            counts |= change

    def _steps(self, counts: Mapping[str, int], movable: Sequence[str], direction: int) -> dict[str, int]:
        """Return group -> its number one step down (-1) or up its ladder."""
        found = {}
        for name in movable:
            ladder = self.ladders[name].counts
            position = ladder.index(counts[name]) - direction
            if 0 <= position < len(ladder):
                found[name] = ladder[position]
        return found

    def _nearest_step(
        self, cost: Cost, goal: float, counts: Mapping[str, int], movable: Sequence[str]
    ) -> tuple[float, dict[str, int]]:
        """Return the distance from the goal after the best single step, and that step."""
        vector = self._vector(counts)
        best: tuple[float, dict[str, int]] = (math.inf, {})
        for direction in (-1, 1):
            steps = self._steps(counts, movable, direction)
            changes = [0] * len(self.all)
            for name, count in steps.items():
                changes[self.place[name]] = count - counts[name]
            left = np.abs(cost.with_changes(vector, changes) - goal)
            for name, count in steps.items():
                if left[self.place[name]] < best[0]:
                    best = float(left[self.place[name]]), {name: count}
        return best

    def _target(self, cost: Cost, goal: float) -> dict[str, int]:
        counts = self._meet(cost, goal, {})
        if not self.tied:
            return counts
        # Forward ties widths together. Take the nearest widths that it allows, and let other groups compensate.
        best, aim = counts, goal
        nearest = math.inf
        for _ in range(6):
            offered = self.graph.expressible_counts(self._named(counts))
            counts = self._meet(cost, goal, {name: offered[name] for name in self.tied})
            left = cost.of(self._vector(counts)) - goal
            if abs(left) < nearest:
                best, nearest = counts, abs(left)
            if nearest <= 0.1 * _TOLERANCE * goal:
                break
            aim = max(aim - left, 0.0)
            counts = self._meet(cost, aim, {})
        return best

    def _named(self, counts: Mapping[str, int]) -> dict[str, int]:
        return dict(zip(self.place, self._vector(counts), strict=True))

    # -- the plan ------------------------------------------------------------------------------------------------------

    def plan(self) -> WidthPlan:
        """See :func:`plan_widths`."""
        rule, note = self.rule, ""
        cost = network_cost(self.graph, rule.measure)
        value = getattr(rule, rule.target)
        if rule.measure == "channels" and rule.scope == "layer":
            wanted = self._shares()
            offered = self.graph.expressible_counts(self._named(wanted)) if self.tied else wanted
            counts = wanted | {name: offered[name] for name in self.tied}
        else:
            spent = sum(group.size for group in self.groups)
            goal = value * cost.full if rule.measure != "channels" else cost.full - spent + kept_count(spent, value)
            self._check_reach(cost, goal)
            counts = self._target(cost, goal)
            note = self._shortfall(cost, goal, counts)
        vector = self._vector(counts)
        macs, parameters = network_cost(self.graph, "macs"), network_cost(self.graph, "parameters")
        chosen = [group for group in self.all if group.name in counts or group.name in self.fixed]
        return WidthPlan(
            counts={group.name: vector[self.place[group.name]] for group in chosen},
            sizes={group.name: group.size for group in chosen},
            layers={group.name: group.layers for group in chosen},
            macs=(round(macs.full), round(macs.of(vector))),
            parameters=(round(parameters.full), round(parameters.of(vector))),
            asked=self.rule.asked,
            left_alone=self.left_alone,
            note=note,
        )

    def _check_reach(self, cost: Cost, goal: float) -> None:
        lowest = {group.name: self.ladders[group.name].counts[-1] for group in self.groups}
        least = cost.of(self._vector(lowest))
        if least <= goal * (1 + _TOLERANCE):
            return
        share = least / cost.full
        rule = self.rule
        limits = [] if rule.max_layer_fraction is None else [f"max_layer_fraction={rule.max_layer_fraction:g}"]
        limits += [f"channels_multiple={rule.channels_multiple}"] if rule.channels_multiple > 1 else []
        kept = f"what {' and '.join(limits)} leave{'s' if len(limits) == 1 else ''} of" if limits else "one channel in"
        alone = f"; left alone: {quote_names(list(self.left_alone), 4)}" if self.left_alone else ""
        raise TargetError(
            f"{rule.target}={getattr(rule, rule.target):g} is out of reach: with {kept} each of {len(self.groups)} "
            f"groups, {share:.3g} of the {_MEASURES[rule.measure]} remain{alone}. Ask for at least "
            f"{math.ceil(1000 * share) / 1000:g}, or let more go (include, exclude, max_layer_fraction, "
            f"channels_multiple)"
        )

    def _shortfall(self, cost: Cost, goal: float, counts: Mapping[str, int]) -> str:
        reached = cost.of(self._vector(counts))
        if abs(reached - goal) <= _TOLERANCE * goal:
            return ""
        steps = [g.name for g in self.groups if g.name not in self.tied and len(self.ladders[g.name].counts) > 1]
        step = self.rule.channels_multiple
        step_words = "one channel more or less" if step == 1 else f"a step of {step} channels"
        why = f"{step_words} changes it by more" if steps else ""
        if self.tied:
            why = f"forward ties the widths of {quote_names(sorted(self.tied), 3)}" + (f", and {why}" if why else "")
        return f"the nearest is {reached / cost.full:.4f}: {why or 'no group can change'}"
