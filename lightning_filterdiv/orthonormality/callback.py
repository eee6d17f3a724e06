"""The ``BasisOrthonormality`` callback."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_filterdiv.filters import (
    Conv,
    canonical_name,
    find_weight_obstacle,
    named_convolutions,
    named_modules,
    select_filters,
)
from lightning_filterdiv.orthonormality.penalty import DEFAULT_WEIGHTS, Form, OrthonormalityPenalty, check_squared
from lightning_filterdiv.orthonormality.targets import FilterBlock, filter_blocks
from lightning_filterdiv.shared_basis.modules import shared_bases
from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer, check_number
from lightning_filterdiv.training.callback import FilterCallback
from lightning_filterdiv.training.steps import gradient_scale

__all__ = ["BasisOrthonormality"]

FormOrAuto = Literal["auto", Form]


class BasisOrthonormality(FilterCallback):
    """Push filters towards orthonormality by a penalty whose gradient is added in closed form.

    In a network with shared filter bases (:func:`~lightning_filterdiv.shared_basis.share_filter_bases`) it acts on the
    bases, as in DSFB (Kang, Kim, NeurIPS 2021). In other networks it acts on every convolution that ``include`` and
    ``exclude`` leave (Bansal, Chen, Wang, NeurIPS 2018; Wang et al., CVPR 2020).

    Args:
        weight: factor of the penalty, > 0; ``None``: the default of the form, see
            :data:`~lightning_filterdiv.orthonormality.DEFAULT_WEIGHTS`.
        every_n_steps: n: act at every n-th step of an optimizer, the first one included, with n times the weight. The
            cost falls by that factor; the weight per step stays the same on average.
        milestones: epoch (from 0) -> factor on the weight from that epoch on. The published decay of
            SRIP is ``{20: 1e-3, 50: 1e-4, 70: 1e-6, 120: 0}``.
        form: ``"basis"`` (a mean over entries), ``"soft"``, ``"double_soft"``, ``"mutual_coherence"``, ``"srip"`` or
            ``"convolutional"``. ``"auto"``: ``"basis"`` where shared bases are among the layers, else ``"soft"``.
        decoupled: move the weights after the step, by learning rate times weight times gradient, instead of adding to
            the gradient. ``"auto"``: with optimizers of the Adam family (a class or base whose name holds "Adam").
        squared: ``True``: the square of the norm, ``False``: the norm itself, for ``"srip"`` and ``"convolutional"``.
            ``None``: the norm for ``"srip"``, the square for ``"convolutional"``. The released codes do the opposite.
        unique: compare shared filters also with the unique filters of the layers that use them (CIFAR-10 experiments of
            DSFB); ``"basis"`` only.
        linear: penalise linear layers too, those that ``include`` names or all. The released SRIP script for WRN-28-10
            penalises the classifier. A linear layer's filters are the rows of its weight.
        include: patterns of layers; ``None``: the shared bases, or every ``Conv1d/2d/3d`` where there are none. The
            released OCNN recipes leave the stem out: ``exclude=["conv1"]``.
        exclude: patterns of layers to leave out.
        seed: seed of the starting vectors of ``"srip"``, a function of the seed and the step.
        check_ranks_every_n_steps: see :class:`~lightning_filterdiv.training.callback.FilterCallback`.

    Raises:
        TypeError, ValueError: a bad argument, by name.
        MisconfigurationException: the penalty of a layer is not finite at the start or after an epoch: its weights are
            not finite, or so large that its gradient overflows.
    """

    gradient_stage = 10
    waits_for_layers = True
    log_prefix = "orthonormality"

    def __init__(
        self,
        *,
        weight: float | None = None,
        every_n_steps: int = 1,
        milestones: dict[int, float] | None = None,
        form: FormOrAuto = "auto",
        decoupled: bool | Literal["auto"] = "auto",
        squared: bool | None = None,
        unique: bool = False,
        linear: bool = False,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        check_ranks_every_n_steps: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude, check_ranks_every_n_steps=check_ranks_every_n_steps)
        self.form = check_choice("form", form, FormOrAuto)
        self.weight = None if weight is None else check_number("weight", weight, above=0.0)
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, low=1)
        self.milestones = _check_milestones(milestones)
        if not isinstance(decoupled, bool) and decoupled != "auto":
            raise TypeError(f"decoupled must be True, False or 'auto', got {decoupled!r}")
        self.decoupled = decoupled
        self.squared = None if squared is None else check_flag("squared", squared)
        self.unique = check_flag("unique", unique)
        check_squared(self.form, self.squared)
        if self.unique and self.form not in ("basis", "auto"):
            raise ValueError(
                f"unique=True belongs to form='basis', got form={form!r}; leave unique out, or change form"
            )
        self.linear = check_flag("linear", linear)
        if self.linear and self.form == "convolutional":
            raise ValueError("linear=True, but form='convolutional' is about kernels; leave linear out, or change form")
        self.seed = check_integer("seed", seed, low=0)
        self._penalties: dict[int, OrthonormalityPenalty] = {}
        self._looked = -1
        self._taken: dict[int, int] = {}  # completed steps of each optimizer
        self._on_bases = self.unique

    @property
    def resolved_form(self) -> Form:
        """Return ``form``; for ``"auto"`` the choice of the present or last fit, ``"soft"`` before the first fit."""
        if self.form != "auto":
            return self.form
        return "basis" if self._on_bases else "soft"

    @property
    def base_weight(self) -> float:
        """Return ``weight``, or the default of the form."""
        return DEFAULT_WEIGHTS[self.resolved_form] if self.weight is None else self.weight

    def weight_at(self, epoch: int, step: int) -> float:
        """Return the weight of the penalty at a step, before the factor ``every_n_steps``. Override it for a schedule.

        Args:
            epoch: the current epoch, from 0.
            step: optimizer steps of the fit so far.

        Returns:
            A number >= 0; 0 switches the penalty off.
        """
        reached = [at for at in self.milestones or {} if at <= epoch]
        return self.base_weight * ((self.milestones or {})[max(reached)] if reached else 1.0)

    def values(self) -> dict[str, float]:
        """Return layer or Gram name -> unweighted penalty minus its smallest possible value; ``"total"`` for all."""
        penalties: dict[str, float] = {}
        total = 0.0
        for penalty in self._penalties.values():
            # A Gram whose filters are in two optimizers counts once.
            values = {name: value for name, value in penalty.values(self._looked).items() if name not in penalties}
            if not values:
                continue
            numbers = torch.stack([v.double() for v in [*values.values(), penalty.total(values)]]).tolist()
            penalties |= dict(zip(values, numbers, strict=False))
            total += numbers[-1]
        return penalties | {"total": total} if penalties else {}

    # ------------------------------------------------------------------ start

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Return the shared bases, if there are any and ``include`` names nothing else."""
        bases = [canonical_name(name) for name, _, _ in shared_bases(pl_module)]
        include = bases if bases and self.include is None else self.include
        if not self.linear:
            return select_filters(pl_module, include, self.exclude)
        layers = {name: module for name, module in named_modules(pl_module).items() if type(module) is nn.Linear}
        only_linear = [p for p in [*(include or ()), *(self.exclude or ())] if _only_matches(p, layers, pl_module)]
        names = None if include is None else [p for p in include if p not in only_linear]
        out = [p for p in self.exclude or () if p not in only_linear]
        chosen: dict[str, Any] = {} if names == [] else dict(select_filters(pl_module, names, out))
        for name, layer in layers.items():
            taken = self.include is None or any(fnmatch.fnmatchcase(name, p) for p in self.include)
            if taken and not any(fnmatch.fnmatchcase(name, p) for p in self.exclude or ()):
                if (obstacle := find_weight_obstacle(layer)) is not None:
                    raise MisconfigurationException(f"BasisOrthonormality: linear layer {name!r} {obstacle}")
                chosen[name] = layer
        return chosen

    def _check_restored_layers(self, saved: Mapping[str, int], present: Mapping[str, Conv]) -> None:
        super()._check_restored_layers(saved, {**present, **self.layers})  # linear layers too

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build one :class:`OrthonormalityPenalty` per optimizer that owns chosen layers."""
        self._on_bases = self.unique or any(
            canonical_name(name) in self.layers for name, _, _ in shared_bases(pl_module)
        )
        try:
            blocks = filter_blocks(pl_module, self.layers, unique=self.unique)
            for index, optimizer in enumerate(trainer.optimizers):
                owned = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
                if any(id(p) in owned for block in blocks for p in block.parameters):
                    self._penalties[index] = self._penalty(blocks, optimizer, index)
                self.follow_steps(index)
        except ValueError as error:
            raise MisconfigurationException(f"BasisOrthonormality: {error}") from error
        self._check_finite("at the start")
        self._announce()

    def _announce(self) -> None:
        """Log form, weight and coupling, with reasons."""
        why = " (auto: shared bases)" if self._on_bases else " (auto: no shared bases)"
        form = f"form {self.resolved_form!r}{why if self.form == 'auto' else ''}"
        source = "the form's own" if self.weight is None else "given"
        parts = [form, f"weight {self.base_weight:g} ({source})"]
        if self.every_n_steps > 1:
            parts.append(f"one step in {self.every_n_steps}, with {self.every_n_steps} times the weight")
        kinds = {type(penalty.optimizer).__name__: penalty.decoupled for penalty in self._penalties.values()}
        for name, decoupled in kinds.items():
            words = "decoupled from the gradient" if decoupled else "added to the gradient"
            parts.append(f"{words} (auto: {name})" if self.decoupled == "auto" else words)
        rank_zero_info(f"BasisOrthonormality: {', '.join(dict.fromkeys(parts))}")

    def _check_finite(self, when: str) -> None:
        broken = {name: reason for penalty in self._penalties.values() for name, reason in penalty.broken().items()}
        for name, reason in broken.items():
            raise MisconfigurationException(
                f"BasisOrthonormality: the penalty of {name!r} is not finite {when}: {reason}. Its gradient grows with "
                f"the third power of the weights: use a smaller weight (now {self.base_weight:g}) or learning rate, "
                f"rescale the layer, or leave it out with exclude=[{name!r}]"
            )

    def _penalty(self, blocks: list[FilterBlock], optimizer: Optimizer, index: int) -> OrthonormalityPenalty:
        return OrthonormalityPenalty(
            blocks,
            optimizer,
            form=self.resolved_form,
            squared=self.squared,
            decoupled=_is_adam(optimizer) if self.decoupled == "auto" else self.decoupled,
            seed=self.seed,
            stream=f"{self.state_key}/{index}",
        )

    # ------------------------------------------------------------------ steps

    def before_step(self, index: int) -> None:
        """Add the penalty's gradient, once per optimizer step, after DDP has averaged the gradient of the loss."""
        if (penalty := self._penalties.get(index)) is None:
            return
        trainer = self.trainer
        step = trainer.global_step
        weight = check_number("weight_at(epoch, step)", self.weight_at(trainer.current_epoch, step), low=0.0)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector; 0: never
        if every and step % every == 0 and step != self._looked:
            self._log(weight)
        due = self._taken.get(index, 0) % self.every_n_steps == 0  # repeated if a scaler skipped the step
        weight = weight * self.every_n_steps if due else 0.0
        scale = None if penalty.decoupled else gradient_scale(trainer, penalty.optimizer)
        penalty.before_step(weight=weight, step=step, gradient_scale=scale)

    def after_step(self, index: int) -> None:
        """Move the weights if the penalty is decoupled from the gradient."""
        if (penalty := self._penalties.get(index)) is not None:
            penalty.after_step()
            self._taken[index] = self._taken.get(index, 0) + 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the values after the epoch. Stop a fit that diverged because of the penalty."""
        if not self._penalties:
            return
        self._check_finite("after this epoch")
        self._log(self.weight_at(trainer.current_epoch, trainer.global_step))

    def _log(self, weight: float) -> None:
        self._looked = self.trainer.global_step
        if self.trainer.is_global_zero and self.trainer.loggers:
            self.log_metrics({**self.values(), "weight": weight})

    def release(self) -> None:
        """Forget the penalties. The model was not changed."""
        self._penalties = {}

    def reset(self) -> None:
        """Reset counts and logs for a new fit."""
        self._looked, self._taken = -1, {}

    def extra_state(self) -> dict[str, Any]:
        """Return the step of the last log and the steps of each optimizer. All else follows from weights, epoch and
        step."""
        return {"logged": [self._looked], "taken": [[index, count] for index, count in self._taken.items()]}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`."""
        logged = state["logged"]
        if not isinstance(logged, list) or len(logged) != 1 or not isinstance(logged[0], int):
            raise TypeError(f"logged must be a list of one step, got {logged!r}")
        taken = state.get("taken", [])  # states of 0.1 lack it
        if not isinstance(taken, list) or not all(
            isinstance(one, list) and len(one) == 2 and all(isinstance(n, int) and n >= 0 for n in one) for one in taken
        ):
            raise TypeError(f"taken must be a list of optimizer and steps, got {taken!r}")
        self._looked, self._taken = logged[0], dict(taken)


def _only_matches(pattern: str, layers: Mapping[str, nn.Module], model: nn.Module) -> bool:
    """Return whether ``pattern`` matches one of ``layers`` and no convolution."""
    convolutions = [name for name, _ in named_convolutions(model)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in layers) and not any(
        fnmatch.fnmatchcase(name, pattern) for name in convolutions
    )


def _is_adam(optimizer: Optimizer) -> bool:
    """True if the name of the optimizer's class, or of a base, says that it divides by second moments as Adam does."""
    return any("adam" in cls.__name__.lower() for cls in type(optimizer).__mro__)


def _check_milestones(milestones: object) -> dict[int, float] | None:
    if milestones is None:
        return None
    if not isinstance(milestones, Mapping):
        raise TypeError(f"milestones must be a dict of epoch -> factor such as {{20: 1e-3}}, got {milestones!r}")
    if not milestones:
        raise ValueError("milestones={} changes nothing; use milestones=None for a constant weight")
    return {
        check_integer("an epoch of milestones", epoch, low=0): check_number(f"milestones[{epoch!r}]", factor, low=0.0)
        for epoch, factor in milestones.items()
    }
