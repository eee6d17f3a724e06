"""Constructor arguments of callbacks that are refused."""

from __future__ import annotations

from lightning_filterdiv import (
    BasisOrthonormality,
    CentripetalSGD,
    EntropyDepthBound,
    ExpandNet,
    FilterSimilarityMonitor,
    RePr,
    WeightAsynchronousUpdate,
)
from tests.suites.wrong_uses.row import Row
from tests.suites.wrong_uses.support import (
    net,
)

CONSTRUCTOR_ARGUMENTS: list[Row] = [
    Row(
        "fraction above one",
        lambda: WeightAsynchronousUpdate(update_fraction=1.5),
        ValueError,
        "update_fraction must be a finite number with 0 < update_fraction <= 1, got 1.5",
    ),
    Row(
        "fraction as text",
        lambda: WeightAsynchronousUpdate(update_fraction="half"),
        TypeError,
        "update_fraction must be a number (0 < update_fraction <= 1), got 'half'",
    ),
    Row(
        "unknown axis",
        lambda: WeightAsynchronousUpdate(axis="both"),
        ValueError,
        "axis must be one of 'out', 'in', got 'both'",
    ),
    Row(
        "seed below zero", lambda: WeightAsynchronousUpdate(seed=-1), ValueError, "seed must be an integer >= 0, got -1"
    ),
    Row(
        "one pattern without a list",
        lambda: WeightAsynchronousUpdate(include="layer1.*"),
        TypeError,
        "include must be a list of name patterns such as ['layer1.*'], got 'layer1.*'; write include=['layer1.*'] "
        "for a single pattern",
    ),
    Row(
        "no pattern",
        lambda: WeightAsynchronousUpdate(include=[]),
        ValueError,
        "include=[] selects no layer; use include=None for the default layers",
    ),
    Row("no cycle", lambda: RePr(cycles=0), ValueError, "cycles must be an integer >= 1, got 0"),
    Row(
        "drop everything",
        lambda: RePr(prune_fraction=1),
        ValueError,
        "prune_fraction must be a finite number with 0 < prune_fraction < 1, got 1",
    ),
    Row(
        "strength as a word",
        lambda: CentripetalSGD(strength="strong"),
        ValueError,
        "strength must be a number > 0 or 'auto', got 'strong'",
    ),
    Row(
        "keep nothing",
        lambda: CentripetalSGD(keep_fraction=0),
        ValueError,
        "keep_fraction must be a finite number with 0 < keep_fraction <= 1, got 0",
    ),
    Row(
        "keep by number",
        lambda: CentripetalSGD(keep_fraction={3: 0.5}),
        TypeError,
        "keep_fraction must map name patterns to fractions, got the key 3",
    ),
    Row(
        "negative weight",
        lambda: BasisOrthonormality(weight=-1.0),
        ValueError,
        "weight must be a finite number with 0 < weight, got -1.0",
    ),
    Row(
        "milestones as a list",
        lambda: BasisOrthonormality(milestones=[20, 50]),
        TypeError,
        "milestones must be a dict of epoch -> factor such as {20: 1e-3}, got [20, 50]",
    ),
    Row(
        "squared of another form",
        lambda: BasisOrthonormality(squared=True),
        ValueError,
        "squared=True belongs to form='srip', got form='basis'; leave squared out, or change form",
    ),
    Row(
        "unique of another form",
        lambda: BasisOrthonormality(unique=True, form="soft"),
        ValueError,
        "unique=True belongs to form='basis', got form='soft'; leave unique out, or change form",
    ),
    Row("no image", lambda: EntropyDepthBound(max_images=0), ValueError, "max_images must be an integer >= 1, got 0"),
    Row(
        "unknown action",
        lambda: EntropyDepthBound(action="shout"),
        ValueError,
        "action must be one of 'warn', 'error', 'log', got 'shout'",
    ),
    Row(
        "never look",
        lambda: FilterSimilarityMonitor(every_n_epochs=0),
        ValueError,
        "every_n_epochs must be an integer >= 1, got 0",
    ),
    Row(
        "draw no layer",
        lambda: FilterSimilarityMonitor(figure_layers=[]),
        ValueError,
        "figure_layers=[] selects no layer; use figures=False to draw nothing",
    ),
    Row(
        "unknown kind",
        lambda: ExpandNet(kind="CX"),
        ValueError,
        "kind must be one of 'CL', 'CK', 'FC', 'CL+FC', 'CK+FC', got 'CX'",
    ),
    Row("fractional rate", lambda: ExpandNet(rate=1.5), TypeError, "rate must be an integer >= 1, got 1.5"),
    Row(
        "network as a module",
        lambda: RePr(network=net()),
        TypeError,
        "network must be the name of a submodule, such as 'backbone', or None, got a Sequential",
    ),
]
