"""Every callback of the package with what the cross-cutting suites need to know. A new one joins by one entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_filterdiv import (
    BasisOrthonormality,
    CentripetalSGD,
    ChannelImportance,
    EntropyDepthBound,
    ExpandNet,
    FilterCallback,
    FilterSimilarityMonitor,
    RePr,
    WeightAsynchronousUpdate,
)
from lightning_filterdiv.async_update import AsynchronousUpdate
from lightning_filterdiv.centripetal import CentripetalUpdate, ClusteredTensor
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.optimizer_state import HeldRows, RowHold
from lightning_filterdiv.orthonormality import OrthonormalityPenalty, filter_blocks

Wrong = tuple[dict[str, Any], type[Exception], str]
#: One step's hooks in framework-free form: (before the step, after the step).
PerStep = Callable[[nn.Module, Optimizer], tuple[Callable[[int], None], Callable[[], None]]]


@dataclass(frozen=True)
class Case:
    """A callback in one configuration.

    Attributes:
        name: test id.
        cls: its class.
        arguments: constructor arguments of this configuration.
        wrong: constructor arguments of its own that must be refused, the first one named in the message; the exception;
            words of the way out.
        trains_differently: whether weights differ from a run without the callback.
        per_step: its per-step path without Lightning, for the fake-GPU and launch-count suites; ``None``: it has none.
        gradients_only: it writes gradients back, one operation per tensor on a CPU (one kernel for all on a GPU).
        kernels: most kernels that one step of ``per_step`` may start on a GPU for a CIFAR ResNet.
        variant: another configuration of a callback that has a case already; the slowest suites run it under ``soak``.
        refuses_without_state: part of the message for a checkpoint saved without it; ``None``: it starts afresh.
        refuses_other_layers: part of the message for a checkpoint of other layers, where the weights' loading is the
            first to notice; ``None``: its own state is.
        lr_scale: by what the learning rates of the suites are multiplied: a product of three factors takes about three
            steps at once, and the suites' SGD is at the edge of divergence as it is, the more when filters move out of
            step; gates halve a signal that no norm restores.
        refused_precisions: values of Trainer's ``precision`` that it refuses.
    """

    name: str
    cls: type[FilterCallback]
    arguments: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[Wrong, ...] = ()
    trains_differently: bool = True
    per_step: PerStep | None = None
    gradients_only: bool = False
    kernels: int = 90
    variant: bool = False
    lr_scale: float = 1.0
    refuses_without_state: str | None = None
    refuses_other_layers: str | None = None
    refused_precisions: tuple[str, ...] = ()

    def make(self, **overrides: Any) -> FilterCallback:
        return self.cls(**(self.arguments | overrides))


def _wau_step(**arguments: Any) -> PerStep:
    def build(model: nn.Module, optimizer: Optimizer) -> tuple[Callable[[int], None], Callable[[], None]]:
        update = AsynchronousUpdate(select_filters(model), optimizer, **arguments)
        return update.before_step, update.after_step

    return build


def _hold_step(model: nn.Module, optimizer: Optimizer) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A sub-network phase of RePr: three filters of every layer with their norm, and the columns that read them."""
    rows = []
    for name, parameter in model.named_parameters():
        if "classifier" not in name:
            rows.append(HeldRows(parameter, torch.arange(3, device=parameter.device)))
            if parameter.dim() == 4 and parameter.shape[1] > 3:
                rows.append(HeldRows(parameter, torch.arange(3, device=parameter.device), dim=1))
    hold = RowHold(rows)
    return (lambda step: hold.before_step(optimizer)), (lambda: hold.after_step(optimizer))


def _centripetal_step(model: nn.Module, optimizer: Optimizer) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Every kernel and norm in even clusters, 5/8 as many as filters."""
    tensors = []
    for name, parameter in model.named_parameters():
        if "classifier" not in name:
            clusters = tuple(i * 5 // 8 for i in range(len(parameter)))
            tensors.append(ClusteredTensor(name, parameter, 0, clusters))
    update = CentripetalUpdate(tensors, optimizer, strength=0.05)
    return (lambda step: update.before_step()), update.after_step


_WAU_WRONG: tuple[Wrong, ...] = (
    ({"update_fraction": 0}, ValueError, "0 < update_fraction <= 1"),
    ({"update_fraction": 1.5}, ValueError, "0 < update_fraction <= 1"),
    ({"update_fraction": float("nan")}, ValueError, "a finite number"),
    ({"update_fraction": "a lot"}, TypeError, "must be a number"),
    ({"update_fraction": True}, TypeError, "must be a number"),
    ({"axis": "sideways"}, ValueError, "'out', 'in'"),
    ({"sampling": "some"}, ValueError, "'without_replacement', 'with_replacement'"),
    ({"hold": "tight"}, ValueError, "'update', 'gradient'"),
    ({"rescale": "yes"}, TypeError, "True or False"),
    ({"seed": -1}, ValueError, ">= 0"),
    ({"seed": 0.5}, TypeError, ">= 0"),
)


def _wau(name: str, gradients_only: bool = False, lr_scale: float = 1.0, **arguments: Any) -> Case:
    return Case(
        name=name,
        lr_scale=lr_scale,
        cls=WeightAsynchronousUpdate,
        arguments=arguments,
        wrong=_WAU_WRONG,
        per_step=_wau_step(**arguments),
        gradients_only=gradients_only,
        variant=name != "wau",
    )


def _penalty_step(**arguments: Any) -> PerStep:
    def build(model: nn.Module, optimizer: Optimizer) -> tuple[Callable[[int], None], Callable[[], None]]:
        penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, **arguments)
        return (lambda step: penalty.before_step(weight=1e-2, step=step)), penalty.after_step

    return build


_ORTHONORMALITY_WRONG: tuple[Wrong, ...] = (
    ({"weight": 0}, ValueError, "0 < weight"),
    ({"weight": -10.0}, ValueError, "0 < weight"),
    ({"weight": float("nan")}, ValueError, "a finite number"),
    ({"weight": "auto"}, TypeError, "must be a number"),
    ({"form": "hard"}, ValueError, "'basis', 'soft', 'double_soft', 'mutual_coherence'"),
    ({"every_n_steps": 0}, ValueError, ">= 1"),
    ({"milestones": {}}, ValueError, "use milestones=None"),
    ({"milestones": [20, 50]}, TypeError, "a dict of epoch -> factor"),
    ({"milestones": {-1: 0.1}}, ValueError, ">= 0"),
    ({"milestones": {"late": 0.1}}, TypeError, ">= 0"),
    ({"milestones": {20: -0.1}}, ValueError, "0 <= milestones[20]"),
    ({"decoupled": 1}, TypeError, "True, False or 'auto'"),
    ({"squared": True}, ValueError, "leave squared out, or change form"),
    ({"unique": True, "form": "soft"}, ValueError, "leave unique out, or change form"),
    ({"seed": -1}, ValueError, ">= 0"),
)


def _orthonormality(name: str, kernels: int = 90, **arguments: Any) -> Case:
    step = {key: value for key, value in arguments.items() if key in ("form", "squared", "decoupled")}
    return Case(
        name=name,
        cls=BasisOrthonormality,
        arguments=arguments,
        wrong=_ORTHONORMALITY_WRONG,
        per_step=_penalty_step(**step),
        gradients_only=True,
        kernels=kernels,
        variant=name != "basis",
    )


CASES: tuple[Case, ...] = (
    # At the full rate every fifth seed of the subsets diverges in the suites' short fit with SGD; none does at 2/3.
    _wau("wau", lr_scale=2 / 3),
    _wau("wau_official", axis="in", sampling="with_replacement"),
    _wau("wau_gradient", gradients_only=True, hold="gradient", update_fraction=0.3),
    _wau("wau_rescaled", rescale=True, update_fraction=0.8),
    Case(
        name="repr",
        cls=RePr,
        arguments={"full_epochs": 1, "sub_epochs": 1, "cycles": 1, "include": ["net.*"]},
        wrong=(
            ({"full_epochs": 0}, ValueError, ">= 1"),
            ({"sub_epochs": 1.5}, ValueError, "a fraction of max_epochs"),
            ({"cycles": 1.5}, TypeError, ">= 1"),
            ({"prune_fraction": 0}, ValueError, "0 < prune_fraction < 1"),
            ({"prune_fraction": 1}, ValueError, "0 < prune_fraction < 1"),
            ({"prune_fraction": 1.5}, ValueError, "0 < prune_fraction < 1"),
            ({"criterion": "taste"}, ValueError, "'orthogonality', 'norm', 'random'"),
            ({"scope": "galaxy"}, ValueError, "'global', 'layer'"),
            ({"dim_correct": 1}, TypeError, "True or False"),
            ({"max_layer_fraction": 0.0}, ValueError, "0 < max_layer_fraction <= 1"),
            ({"gain": -1.0}, ValueError, "0 < gain"),
            ({"next_layer": "burn"}, ValueError, "'keep', 'zero', 'small_random'"),
            ({"hold_consumers": None}, TypeError, "True or False"),
            ({"network": 3}, TypeError, "the name of a submodule"),
            ({"seed": -1}, ValueError, ">= 0"),
        ),
        per_step=_hold_step,
        gradients_only=True,
    ),
    Case(
        name="csgd",
        cls=CentripetalSGD,
        arguments={"strength": 0.05},
        wrong=(
            ({"keep_fraction": 0}, ValueError, "0 < keep_fraction <= 1"),
            ({"keep_fraction": 1.2}, ValueError, "0 < keep_fraction <= 1"),
            ({"keep_fraction": "most"}, TypeError, "must be a number"),
            ({"keep_fraction": {}}, ValueError, "give a number or at least one pattern"),
            ({"keep_fraction": {"net.3": 1.2}}, ValueError, "0 < keep_fraction['net.3'] <= 1"),
            ({"keep_fraction": {3: 0.5}}, TypeError, "map name patterns to fractions"),
            ({"strength": 0}, ValueError, "0 < strength"),
            ({"strength": "strong"}, ValueError, "a number > 0 or 'auto'"),
            ({"strength": float("nan")}, ValueError, "a finite number"),
            ({"vector_strength": -1.0}, ValueError, "0 < vector_strength"),
            ({"clustering": "fuzzy"}, ValueError, "'kmeans', 'even', 'imbalanced'"),
            ({"network": 3}, TypeError, "the name of a submodule"),
            ({"seed": -1}, ValueError, ">= 0"),
        ),
        per_step=_centripetal_step,
        gradients_only=True,
        refused_precisions=("bf16-true",),
    ),
    _orthonormality("basis", form="basis", decoupled=False),
    _orthonormality("soft_decoupled", form="soft", decoupled=True, weight=0.05, milestones={1: 0.5}, every_n_steps=2),
    _orthonormality("double_soft", form="double_soft"),
    _orthonormality("mutual_coherence", form="mutual_coherence", weight=0.1),
    # Six shapes of twenty-two operations on vectors each.
    _orthonormality("srip", kernels=132, form="srip", squared=True),
    _orthonormality("convolutional", form="convolutional"),
    Case(
        name="monitor",
        cls=FilterSimilarityMonitor,
        arguments={"figures": False},  # a figure takes longer than the fits of the suites
        wrong=(
            ({"every_n_epochs": 0}, ValueError, ">= 1"),
            ({"scalars": 1}, TypeError, "True or False"),
            ({"figures": "all"}, TypeError, "True or False"),
            ({"figures_every_n_looks": 0}, ValueError, ">= 1"),
            ({"activations": "yes"}, TypeError, "True or False"),
            ({"max_figures": 0}, ValueError, ">= 1"),
            ({"figure_layers": "conv1"}, TypeError, "a list of name patterns"),
            ({"figure_layers": []}, ValueError, "use figures=False"),
        ),
        trains_differently=False,
    ),
    Case(
        name="entropy",
        cls=EntropyDepthBound,
        arguments={"rounding": "floor", "max_images": 64},
        wrong=(
            ({"unit": "bytes"}, ValueError, "'nats', 'bits'"),
            ({"rounding": "up"}, ValueError, "'ceil', 'floor', 'round'"),
            ({"max_images": 0}, ValueError, ">= 1"),
            ({"max_images": "all"}, TypeError, ">= 1"),
            ({"action": "shout"}, ValueError, "'warn', 'error', 'log'"),
            ({"network": 3}, TypeError, "the name of a submodule"),
        ),
        trains_differently=False,
    ),
    Case(
        name="expand",
        cls=ExpandNet,
        arguments={"rate": 2},
        wrong=(
            ({"kind": "CX"}, ValueError, "'CL', 'CK', 'FC', 'CL+FC', 'CK+FC'"),
            ({"rate": 0}, ValueError, ">= 1"),
            ({"rate": 1.5}, TypeError, ">= 1"),
            ({"initial": "zero"}, ValueError, "'keep', 'fresh'"),
            ({"seed": -1}, ValueError, ">= 0"),
        ),
        lr_scale=1 / 3,
        refuses_without_state="holds compact weights of 'net.0' but no factors: it was saved without ExpandNet",
    ),
    Case(
        name="importance",
        cls=ChannelImportance,
        wrong=(({"seed": -1}, ValueError, ">= 0"),),
        lr_scale=1.5,
        refuses_without_state="there is no gate of 'net.0' in what is loaded: it was saved without gates",
        refuses_other_layers="there is no gate of 'net.5' in what is loaded",
    ),
    Case(
        name="monitor_figures",
        cls=FilterSimilarityMonitor,
        arguments={"max_figures": 1},
        trains_differently=False,
        variant=True,
    ),
    Case(name="expand_fresh", cls=ExpandNet, arguments={"initial": "fresh"}, lr_scale=1 / 3, variant=True),
)
#: Cases of the slowest suites: variants of a callback run under ``soak``.
SLOW_CASES = tuple(pytest.param(case, marks=pytest.mark.soak) if case.variant else case for case in CASES)
#: One configuration per callback, for suites where more would only cost time.
ONE_EACH: tuple[Case, ...] = tuple({case.cls: case for case in reversed(CASES)}.values())
PER_STEP: tuple[Case, ...] = tuple(case for case in CASES if case.per_step is not None)
#: One configuration per callback that acts on optimizer steps.
EDITING: tuple[Case, ...] = tuple(case for case in ONE_EACH if case.per_step is not None)
