"""The penalty of all layers of one optimizer, batched by shape. No Lightning here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_filterdiv.orthonormality import functional, gradients
from lightning_filterdiv.orthonormality.batches import Batch, Penalties
from lightning_filterdiv.orthonormality.targets import FilterBlock
from lightning_filterdiv.tensors.arguments import check_choice
from lightning_filterdiv.tensors.randomness import keyed_generator, stage
from lightning_filterdiv.tensors.stacking import group_by

__all__ = ["DEFAULT_WEIGHTS", "Form", "OrthonormalityPenalty", "check_form"]

Form = Literal["basis", "soft", "double_soft", "mutual_coherence", "srip", "convolutional"]
#: Weights for ``weight=None``. Published are those of "basis" (DSFB) and "srip" (released code, for the squared value).
#: For the other definitions there is no published weight. We chose small weights by trial.
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "basis": 10.0,
    "soft": 1e-2,
    "double_soft": 1e-2,
    "mutual_coherence": 1e-2,
    "srip": 1e-2,
    "convolutional": 1e-2,
}


def check_squared(form: str, squared: bool | None) -> None:
    """Raise ValueError if ``squared`` is given for a form that has no such variant."""
    if squared is not None and form not in ("srip", "convolutional"):
        raise ValueError(
            f"squared={squared} belongs to form='srip' or 'convolutional', got form={form!r}; leave squared out, or "
            f"change form"
        )


def check_form(form: Form, blocks: Sequence[FilterBlock]) -> None:
    """Raise if ``form`` is not defined for one of the blocks.

    Raises:
        ValueError: an unknown form, pairs with unique filters outside ``"basis"``, or a transposed convolution under
            ``"convolutional"``.
    """
    check_choice("form", form, Form)
    for block in blocks:
        if block.mask is not None and form != "basis":
            raise ValueError(f"{block.name}: unique=True is defined for form='basis' only, got form={form!r}")
        if block.transposed and form == "convolutional":
            raise ValueError(
                f"{block.name} is a transposed convolution, for which form='convolutional' is not defined; leave it "
                f"out with exclude=[{block.name!r}] or use form='soft'"
            )


class _Move(NamedTuple):
    """Parameters of a bank that one operation moves together."""

    share: float  # of the weight
    group: dict[str, Any]  # of the optimizer, which knows the learning rate
    places: list[int]
    parts: list[Tensor]  # views of the penalty's gradient

    def add(self, place: int, part: Tensor) -> None:
        self.places.append(place)
        self.parts.append(part)

    def where(self, gradients: Sequence[Tensor | None]) -> _Move:
        """Return the places that have a gradient."""
        pairs = [(i, p) for i, p in zip(self.places, self.parts, strict=True) if gradients[i] is not None]
        return _Move(self.share, self.group, [i for i, _ in pairs], [part for _, part in pairs])


class OrthonormalityPenalty:
    """Add the gradient of a penalty to the gradients of one optimizer, in closed form::

        penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, form="soft")
        for step, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            penalty.before_step(weight=1e-2, step=step)
            optimizer.step()
            penalty.after_step()

    With ``decoupled=True`` gradients are left alone and the weights move by ``-lr * weight * gradient`` of the penalty
    *after* the step, as AdamW's decay does: momentum and second moments do not contain it.

    A parameter without gradient is skipped and gets none. Frozen filters are compared with the others but do not move.
    If decoupled, weights that are not finite count as 0, so that a NaN of this step stays in its own filter.

    Args:
        blocks: result of :func:`~lightning_filterdiv.orthonormality.targets.filter_blocks`. Blocks without a trainable
            parameter of ``optimizer`` are ignored.
        optimizer: the optimizer that makes the steps.
        form: name of the penalty.
        squared: for ``"srip"`` and ``"convolutional"``: the value with or without its square; ``None``: as the
            form is defined here, without for ``"srip"``, with for ``"convolutional"``.
        decoupled: see above.
        seed: seed of the starting vectors of ``"srip"``, a function of (seed, stream, step).
        stream: number that separates the draws of objects with equal seeds.

    Raises:
        ValueError: the form is unknown or not defined for a block, no block has a trainable parameter in the optimizer,
            the blocks are on several devices, the optimizer makes a line search (its loss lacks the penalty), or LBFGS
            with ``decoupled``.
    """

    def __init__(
        self,
        blocks: Sequence[FilterBlock],
        optimizer: Optimizer,
        *,
        form: Form = "basis",
        squared: bool | None = None,
        decoupled: bool = False,
        seed: int = 0,
        stream: str = "",
    ) -> None:
        check_form(form, blocks)
        check_squared(form, squared)
        if isinstance(optimizer, LBFGS):
            if decoupled:
                raise ValueError(
                    "decoupled=True needs steps of one evaluation, which LBFGS does not make; use SGD or Adam"
                )
            if any(group.get("line_search_fn") for group in optimizer.param_groups):
                raise ValueError(
                    "LBFGS with a line search compares losses that lack the penalty; use line_search_fn=None or add "
                    "the penalty to your loss"
                )
        self.form, self.decoupled = form, decoupled
        self.squared = form == "convolutional" if squared is None else squared
        self.seed, self.stream, self.optimizer = seed, stream, optimizer
        # Parameter that may be moved -> its group, which knows the learning rate.
        self._groups = {id(p): group for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        self.blocks = [block for block in blocks if any(id(p) in self._groups for p in block.parameters)]
        if not self.blocks:
            raise ValueError(
                "none of the layers has a trainable weight in this optimizer; hand it their weights, or give other "
                "layers"
            )
        devices = {p.device for block in self.blocks for p in block.parameters}
        if len(devices) > 1:
            raise ValueError(
                f"the layers of one optimizer must be on one device, got {sorted(map(str, devices))}; give the layers "
                f"of each device an optimizer of their own, or leave some out"
            )
        self._device = devices.pop()

        def layout(block: FilterBlock) -> Hashable:
            kinds = tuple((len(s), s[0].shape, s[0].stride(), s[0].dtype, s[0].device) for s in block.segments)
            return kinds, block.groups, block.transposed, block.stride, block.mask is None, block.pool

        def wide(blocks: list[FilterBlock]) -> torch.dtype:
            return torch.promote_types(blocks[0].parameters[0].dtype, torch.float32)

        self._banks = [
            Penalties(alike, form, wide(alike[0])) for alike in group_by(group_by(self.blocks, layout), wide)
        ]
        # "basis" is a mean over the entries of all blocks of a pool, also of blocks of other optimizers.
        self._entries: dict[str, int] = {}
        for block in blocks:
            self._entries[block.pool] = self._entries.get(block.pool, 0) + block.entries
        self._moves = [self._alike(bank) for bank in self._banks]
        self._drawn = [bank.vector_entries for bank in self._banks]
        self._pending: tuple[float, int] | None = None

    def _alike(self, bank: Penalties) -> list[_Move]:
        """Return the parameters that one operation can move together.

        A parameter of several blocks is moved once by each.
        """
        moves: dict[Hashable, _Move] = {}
        seen: Counter[int] = Counter()
        for batch in bank.batches:
            share = self._share(batch.blocks[0])
            for place in batch.members:
                parameter = bank.tensors[place]
                if (group := self._groups.get(id(parameter))) is not None:
                    key = (share, parameter.dtype, id(group) if self.decoupled else None, seen[id(parameter)])
                    moves.setdefault(key, _Move(share, group, [], [])).add(place, bank.results.views[place])
                    seen[id(parameter)] += 1
        return list(moves.values())

    def before_step(self, *, weight: float, step: int, gradient_scale: Tensor | None = None) -> None:
        """Add ``weight`` times the penalty's gradient to the gradients (decoupled: remember the weight).

        Args:
            weight: weight of the penalty; 0 switches it off for this step.
            step: the key of SRIP's starting vectors.
            gradient_scale: scalar on the device by which gradients are still multiplied (fused optimizers under AMP).
        """
        if self.decoupled:
            self._pending = (weight, step)
        elif weight:
            self._move(weight, step, gradient_scale)

    def after_step(self) -> None:
        """Move the weights if the penalty is decoupled. A skipped fused step is ignored."""
        pending, self._pending = self._pending, None
        if pending is not None and pending[0]:
            skipped: Tensor | None = getattr(self.optimizer, "found_inf", None)
            self._move(pending[0], pending[1], None if skipped is None else 1 - skipped)

    @torch.no_grad()
    def _move(self, weight: float, step: int, factor: Tensor | None) -> None:
        with torch.autocast(self._device.type, enabled=False):
            starts = self._starts(step)
            for at, (bank, moves) in enumerate(zip(self._banks, self._moves, strict=True)):
                # A parameter without gradient takes no part in the step.
                gradients = [parameter.grad for parameter in bank.tensors]
                if any(gradient is None for gradient in gradients):
                    moves = [move.where(gradients) for move in moves]
                moves = [move for move in moves if move.places]
                if not moves:
                    continue
                bank.load(finite=self.decoupled)  # a NaN of this step must stay in its filter
                self._differentiate(bank, starts[at] if starts else None)
                targets: Sequence[Any] = bank.tensors if self.decoupled else gradients
                for move in moves:
                    amount = weight * move.share * (-move.group["lr"] if self.decoupled else 1.0)
                    self._add([targets[i] for i in move.places], move.parts, amount, factor)

    @staticmethod
    def _add(targets: list[Tensor], parts: list[Tensor], amount: Any, factor: Tensor | None) -> None:
        """Add ``amount * factor * parts`` to ``targets`` in place; a learning rate on the device stays there."""
        if factor is not None:
            amount = amount * factor
        if isinstance(amount, Tensor):
            parts = list(torch._foreach_mul(parts, amount.to(parts[0].dtype)))
            amount = 1.0
        if parts[0].dtype != targets[0].dtype:
            parts = [part.to(targets[0].dtype) for part in parts]
        torch._foreach_add_(targets, parts, alpha=amount)

    def _share(self, block: FilterBlock) -> float:
        if self.form == "basis":
            return 1.0 / self._entries[block.pool]
        return 2.0 if self.form == "double_soft" else 1.0

    @torch.no_grad()
    def broken(self) -> dict[str, str]:
        """Return block name -> reason why its penalty cannot be used now; empty if all are finite. Synchronises."""
        reasons: dict[str, str] = {}
        starts = self._starts(0)
        for at, bank in enumerate(self._banks):
            bank.load()
            with torch.autocast(self._device.type, enabled=False):
                self._differentiate(bank, starts[at] if starts else None)
            largest = torch.stack([view.abs().amax() for view in bank.values.views]).tolist()
            moved = torch.stack([view.isfinite().all() for view in bank.results.views]).tolist()
            for batch in bank.batches:
                places = {id(bank.tensors[i]): i for i in batch.members}
                for block in batch.blocks:
                    mine = [places[id(p)] for p in block.parameters]
                    sizes = [largest[i] for i in mine]
                    if not all(map(math.isfinite, sizes)):
                        reasons[block.name] = "its weights contain NaN or inf"
                    elif not all(moved[i] for i in mine):
                        reasons[block.name] = (
                            f"its weights are so large (up to {max(sizes):.1e}) that the gradient overflows"
                        )
        return reasons

    def _differentiate(self, bank: Penalties, starts: Tensor | None) -> None:
        """Compute the gradient for the loaded values into the buffer."""
        if bank.iteration is not None and starts is not None:
            rows, outs = [batch.rows() for batch in bank.batches], [batch.out for batch in bank.batches]
            computed = bank.iteration.gradients(rows, starts, squared=self.squared, outs=outs)
        else:
            bank.compare()
            computed = [self._gradient(batch) for batch in bank.batches]
        for batch, gradient in zip(bank.batches, computed, strict=True):
            if batch.out is None:
                batch.store(gradient)

    def _gradient(self, batch: Batch) -> Tensor:
        """Return the gradient for the loaded values, in ``batch.out`` if that exists."""
        rows, out = batch.rows(), batch.out
        if batch.twice is not None:
            return gradients.masked_gradient(rows, batch.twice, batch.off, out=out)
        if self.form == "mutual_coherence":
            return gradients.mutual_coherence_gradient(rows, batch.off, out=out)
        if self.form == "convolutional" and batch.spectrum is not None:
            gradient = gradients.convolutional_gradient(
                batch.kernels(), batch.blocks[0].stride, batch.spectrum, out=out
            )
        else:  # the side of the Gram matrix does not change the gradient, so the basis form uses this too
            gradient = gradients.soft_gradient(rows, batch.off, out=out)
        if self.form == "convolutional" and not self.squared:
            per_matrix = (2 * _convolutional_norms(batch).clamp_min(functional.EPSILON)).repeat_interleave(
                batch.blocks[0].groups
            )
            gradient.div_(per_matrix.view(-1, *[1] * (gradient.dim() - 1)))
        return gradient

    def _starts(self, step: int) -> list[Tensor]:
        """Return SRIP's starting vectors, ``(sum of B, m)`` per bank, in one copy to the device; empty for other
        forms."""
        if self.form != "srip":
            return []
        drawn = torch.randn(sum(self._drawn), generator=keyed_generator(self.seed, self.stream, "srip", step))
        padded = [b.padded(part) for b, part in zip(self._banks, drawn.split(self._drawn), strict=True)]
        staged = stage(torch.cat([part.flatten() for part in padded]), self._device)
        parts = staged.split([part.numel() for part in padded])
        return [
            part.view(like.shape).to(bank.dtype) for bank, part, like in zip(self._banks, parts, padded, strict=True)
        ]

    @torch.no_grad()
    def values(self, step: int = 0) -> dict[str, Tensor]:
        """Return block name -> unweighted penalty minus its smallest possible value, as scalars on the device.

        ``"basis"``: the mean over the block's entries. With more filters than weights per filter the smallest value is
        ``n - d`` ("basis", and the unshifted part of "convolutional") or ``|n - d|`` ("double_soft").
        """
        starts = self._starts(step)
        penalties: dict[str, Tensor] = {}
        for at, bank in enumerate(self._banks):
            bank.load()
            vectors = bank.of_batches(starts[at]) if starts else [None] * len(bank.batches)
            for batch, start in zip(bank.batches, vectors, strict=True):
                with torch.autocast(self._device.type, enabled=False):
                    if self.form == "convolutional" and not self.squared:
                        per_block = _convolutional_norms(batch) - math.sqrt(
                            batch.blocks[0].groups * _unreachable(batch)
                        )
                    else:
                        per_matrix = _values(batch, self.form, start, self.squared)
                        per_block = per_matrix.view(-1, batch.blocks[0].groups).sum(1)
                sums = per_block.unbind()
                penalties |= {block.name: value for block, value in zip(batch.blocks, sums, strict=True)}
        if self.form == "basis":
            penalties = {block.name: penalties[block.name] / block.entries for block in self.blocks}
        return {block.name: penalties[block.name] for block in self.blocks}

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the penalty of all blocks in ``values``, from :meth:`values`: pooled means for ``"basis"``, else the
        sum."""
        shares = {b.name: b.entries / self._entries[b.pool] if self.form == "basis" else 1.0 for b in self.blocks}
        return torch.stack([value.double() * shares[name] for name, value in values.items()]).sum()


def _unreachable(batch: Batch) -> int:
    """Return the smallest squared distance from orthonormal rows, which is above 0 for more filters than numbers in a
    filter."""
    n, d = batch.blocks[0].shape
    return max(0, n - d)


def _convolutional_norms(batch: Batch) -> Tensor:
    """Return the norm (not squared) of each block, over its groups together, ``(len(blocks),)``."""
    squares = functional.convolutional_orthogonality(batch.kernels(), batch.blocks[0].stride)
    return squares.view(-1, batch.blocks[0].groups).sum(1).sqrt()


def _values(batch: Batch, form: Form, start: Tensor | None, squared: bool) -> Tensor:
    """Return by how much each matrix of a batch exceeds the reachable minimum, ``(B,)``; for ``"basis"`` as a sum over
    entries."""
    rows = batch.rows()
    if form == "convolutional":
        return functional.convolutional_orthogonality(batch.kernels(), batch.blocks[0].stride) - _unreachable(batch)
    if form == "mutual_coherence":
        return functional.mutual_coherence_penalty(rows)
    if form == "srip":
        assert start is not None
        return functional.spectral_restricted_isometry(rows, start, squared=squared)
    if batch.mask is not None:
        return (functional.off_identity(rows).square() * batch.mask).sum(dim=(1, 2))
    # By the identity of the two sides this is |W W^T - I|^2 - max(0, n - d), without cancellation.
    value = functional.soft_orthogonality(rows)
    return 2 * value if form == "double_soft" else value
