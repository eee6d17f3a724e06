"""The penalty of all layers of one optimizer, batched by shape. No Lightning here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_filterdiv.orthonormality import functional, gradients
from lightning_filterdiv.orthonormality.batches import Bank, Batch
from lightning_filterdiv.orthonormality.targets import FilterBlock
from lightning_filterdiv.tensors.arguments import check_choice
from lightning_filterdiv.tensors.randomness import keyed_generator, stage
from lightning_filterdiv.tensors.stacking import group_by

__all__ = ["DEFAULT_WEIGHTS", "Form", "OrthonormalityPenalty", "check_form"]

Form = Literal["basis", "soft", "double_soft", "mutual_coherence", "srip", "convolutional"]
#: What ``weight=None`` means. Published: "basis" (DSFB) and "srip" (released code, for the squared value). The others
#: have no published weight for these definitions; theirs are small ones that we tried.
DEFAULT_WEIGHTS: Mapping[str, float] = {
    "basis": 10.0,
    "soft": 1e-2,
    "double_soft": 1e-2,
    "mutual_coherence": 1e-2,
    "srip": 1e-2,
    "convolutional": 1e-2,
}


def check_squared(form: str, squared: bool | None) -> None:
    """Raise ValueError if ``squared`` says something about a form for which it means nothing."""
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


class OrthonormalityPenalty:
    """Adds the gradient of a penalty to the gradients of one optimizer, in closed form::

        penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, form="soft")
        for step, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            penalty.before_step(weight=1e-2, step=step)
            optimizer.step()
            penalty.after_step()

    With ``decoupled=True`` gradients are left alone and the weights move by ``-lr * weight * gradient`` of the penalty
    *after* the step, as AdamW's decay does: momentum and second moments never see it.

    A parameter without gradient takes no part in the step and is never given one; frozen filters are compared with but
    not moved. Decoupled, weights that are not finite count as 0, so that a NaN of this step stays in its own filter.

    Args:
        blocks: from :func:`~lightning_filterdiv.orthonormality.targets.filter_blocks`; those without a trainable
            parameter of ``optimizer`` are ignored.
        optimizer: the optimizer that makes the steps.
        form: which penalty.
        squared: of ``"srip"`` and ``"convolutional"``: the value with or without its square; ``None``: as the form is
            defined here, without for ``"srip"``, with for ``"convolutional"``.
        decoupled: see above.
        seed: of the starting vectors of ``"srip"``, a function of (seed, stream, step).
        stream: tells objects with equal seeds apart.

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
            raise ValueError("none of the layers has a trainable weight in this optimizer")
        devices = {p.device for block in self.blocks for p in block.parameters}
        if len(devices) > 1:
            raise ValueError(f"the layers of one optimizer must be on one device, got {sorted(map(str, devices))}")
        self._device = devices.pop()

        def layout(block: FilterBlock) -> Hashable:
            kinds = tuple((len(s), s[0].shape, s[0].stride(), s[0].dtype, s[0].device) for s in block.segments)
            return kinds, block.groups, block.transposed, block.stride, block.mask is None, block.pool

        def side(blocks: list[FilterBlock]) -> int:
            n, d = blocks[0].shape
            return n if blocks[0].mask is not None or form == "mutual_coherence" else min(n, d)

        def wide(blocks: list[FilterBlock]) -> torch.dtype:
            return torch.promote_types(blocks[0].parameters[0].dtype, torch.float32)

        # SRIP starts from given vectors, for which the order inside a filter counts.
        self._banks = [
            Bank(alike, [side(blocks) for blocks in alike], form == "srip", wide(alike[0]))
            for alike in group_by(group_by(self.blocks, layout), wide)
        ]
        # "basis" is a mean over the entries of all blocks of a pool, whatever optimizer owns them.
        self._entries: dict[str, int] = {}
        for block in blocks:
            self._entries[block.pool] = self._entries.get(block.pool, 0) + block.entries
        self._kinds = [self._alike(bank) for bank in self._banks]
        self._pending: tuple[float, int] | None = None

    def _alike(self, bank: Bank) -> list[tuple[float, dict[str, Any], list[int]]]:
        """Places that one operation moves, with their share of the weight and their group of the optimizer.

        A parameter that belongs to several blocks is moved once by each.
        """
        kinds: dict[Hashable, tuple[float, dict[str, Any], list[int]]] = {}
        seen: Counter[int] = Counter()
        for batch in bank.batches:
            share = self._share(batch.blocks[0])
            for place in batch.members:
                parameter = bank.parameters[place]
                if (group := self._groups.get(id(parameter))) is not None:
                    key = (share, id(group) if self.decoupled else None, seen[id(parameter)])
                    kinds.setdefault(key, (share, group, []))[2].append(place)
                    seen[id(parameter)] += 1
        return list(kinds.values())

    def before_step(self, *, weight: float, step: int, gradient_scale: Tensor | None = None) -> None:
        """Add ``weight`` times the penalty's gradient to the gradients (decoupled: remember the weight).

        Args:
            weight: of the penalty; 0 switches it off for this step.
            step: the key of SRIP's starting vectors.
            gradient_scale: scalar on the device by which gradients are still multiplied (fused optimizers under AMP).
        """
        if self.decoupled:
            self._pending = (weight, step)
        elif weight:
            self._move(weight, step, gradient_scale)

    def after_step(self) -> None:
        """Move the weights, where the penalty is decoupled; a skipped fused step is none."""
        pending, self._pending = self._pending, None
        if pending is not None and pending[0]:
            skipped: Tensor | None = getattr(self.optimizer, "found_inf", None)
            self._move(pending[0], pending[1], None if skipped is None else 1 - skipped)

    @torch.no_grad()
    def _move(self, weight: float, step: int, factor: Tensor | None) -> None:
        with torch.autocast(self._device.type, enabled=False):
            starts = self._starts(step)
            for bank, kinds in zip(self._banks, self._kinds, strict=True):
                # A parameter without gradient takes no part in the step.
                moving = {i for _, _, places in kinds for i in places if bank.parameters[i].grad is not None}
                if not moving:
                    continue
                bank.load(finite=self.decoupled)  # what this step broke must not reach the others through the Gram
                for batch in bank.batches:
                    if not moving.isdisjoint(batch.members):
                        self._differentiate(batch, starts)
                for share, group, places in kinds:
                    amount = weight * share * (-group["lr"] if self.decoupled else 1.0)
                    pairs: list[tuple[Tensor, Tensor]] = []
                    for i in places:
                        parameter, gradient = bank.parameters[i], bank.parameters[i].grad
                        if gradient is not None:
                            pairs.append((parameter.detach() if self.decoupled else gradient, bank.gradients.views[i]))
                    for alike in group_by(pairs, lambda pair: pair[0].dtype):
                        self._add([target for target, _ in alike], [part for _, part in alike], amount, factor)

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
        """Block name -> why its penalty cannot be used now; empty where all are finite. Synchronises."""
        reasons: dict[str, str] = {}
        starts = self._starts(0)
        for bank in self._banks:
            bank.load()
            with torch.autocast(self._device.type, enabled=False):
                for batch in bank.batches:
                    self._differentiate(batch, starts)
            largest = torch.stack([view.abs().amax() for view in bank.values.views]).tolist()
            moved = torch.stack([view.isfinite().all() for view in bank.gradients.views]).tolist()
            for batch in bank.batches:
                places = {id(bank.parameters[i]): i for i in batch.members}
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

    def _differentiate(self, batch: Batch, starts: Mapping[int, Tensor]) -> None:
        """Put the gradient of what is loaded into the buffer."""
        stride = batch.blocks[0].stride
        overlap = self.form == "convolutional" and any(functional.self_padding(batch.kernels().shape[3:], stride))
        if overlap or (self.form == "convolutional" and not self.squared):
            kernels = batch.kernels()
            found = (
                gradients.convolutional_gradient(kernels, stride)
                if overlap
                else gradients.soft_gradient(batch.rows(), batch.identity).view_as(kernels)
            )
            if not self.squared:
                norms = _convolutional_norms(batch).clamp_min(functional.EPSILON)
                per_matrix = (2 * norms).repeat_interleave(batch.blocks[0].groups)
                found = found / per_matrix.view(-1, *[1] * (found.dim() - 1))
            batch.store(found)
            return
        rows, out = batch.rows(), batch.out
        if batch.twice is not None:
            found = gradients.masked_gradient(rows, batch.twice, batch.identity, out=out)
        elif self.form == "mutual_coherence":
            found = gradients.mutual_coherence_gradient(rows, batch.identity, out=out)
        elif self.form == "srip":
            found = gradients.spectral_gradient(rows, starts[id(batch)], squared=self.squared, out=out)
        else:  # the side of the Gram matrix changes no gradient, so the basis form shares it
            found = gradients.soft_gradient(rows, batch.identity, out=out)
        if out is None:
            batch.store(found)

    def _starts(self, step: int) -> dict[int, Tensor]:
        """SRIP's starting vectors of all batches, one copy to the device."""
        if self.form != "srip":
            return {}
        batches = [batch for bank in self._banks for batch in bank.batches]
        shapes = [(len(b.blocks) * b.blocks[0].groups, min(b.blocks[0].shape)) for b in batches]
        sizes = [count * n for count, n in shapes]
        drawn = torch.randn(sum(sizes), generator=keyed_generator(self.seed, self.stream, "srip", step))
        parts = stage(drawn, self._device).split(sizes)
        return {
            id(batch): part.view(shape).to(batch.identity.dtype)
            for batch, part, shape in zip(batches, parts, shapes, strict=True)
        }

    @torch.no_grad()
    def values(self, step: int = 0) -> dict[str, Tensor]:
        """Block name -> excess of the penalty over what is unreachable, scalars on the device; not weighted.

        ``"basis"``: the mean over the block's entries. Subtracted is the minimum for more filters than numbers in a
        filter: ``n - d`` ("basis", and "convolutional" in part), ``|n - d|`` ("double_soft").
        """
        starts = self._starts(step)
        penalties: dict[str, Tensor] = {}
        for bank in self._banks:
            bank.load()
            for batch in bank.batches:
                with torch.autocast(self._device.type, enabled=False):
                    if self.form == "convolutional" and not self.squared:
                        per_block = _convolutional_norms(batch) - math.sqrt(
                            batch.blocks[0].groups * _unreachable(batch)
                        )
                    else:
                        per_matrix = _values(batch, self.form, starts.get(id(batch)), self.squared)
                        per_block = per_matrix.view(-1, batch.blocks[0].groups).sum(1)
                sums = per_block.unbind()
                penalties |= {block.name: value for block, value in zip(batch.blocks, sums, strict=True)}
        if self.form == "basis":
            penalties = {block.name: penalties[block.name] / block.entries for block in self.blocks}
        return {block.name: penalties[block.name] for block in self.blocks}

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """The penalty of the blocks in ``values``, from :meth:`values`: pooled means for ``"basis"``, else the sum."""
        shares = {b.name: b.entries / self._entries[b.pool] if self.form == "basis" else 1.0 for b in self.blocks}
        return torch.stack([value.double() * shares[name] for name, value in values.items()]).sum()


def _unreachable(batch: Batch) -> int:
    """Squared distance from orthonormal rows that more filters than numbers in a filter cannot fall below."""
    n, d = batch.blocks[0].shape
    return max(0, n - d)


def _convolutional_norms(batch: Batch) -> Tensor:
    """The norm without square of each block, over its groups together, ``(len(blocks),)``."""
    squares = functional.convolutional_orthogonality(batch.kernels(), batch.blocks[0].stride)
    return squares.view(-1, batch.blocks[0].groups).sum(1).sqrt()


def _values(batch: Batch, form: Form, start: Tensor | None, squared: bool) -> Tensor:
    """What each matrix of a batch is above the reachable minimum, ``(B,)``; ``"basis"`` as a sum over entries."""
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
