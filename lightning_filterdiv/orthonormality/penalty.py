"""The penalty of all layers of one optimizer, batched by shape. No Lightning here."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_filterdiv.arguments import check_choice
from lightning_filterdiv.orthonormality import functional, gradients
from lightning_filterdiv.orthonormality.targets import FilterBlock
from lightning_filterdiv.randomness import keyed_generator, stage
from lightning_filterdiv.stacking import gather, group_by, storage_order

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


@dataclass
class _Batch:
    """Blocks of one layout, and how their parameters become one ``(B, n, d)`` batch and back."""

    blocks: list[FilterBlock]
    form: Form
    identity: Tensor = field(init=False)  # of the side whose Gram matrix the form takes
    mask: Tensor | None = None  # (B, n, n) of ones and zeros
    twice: Tensor | None = None  # with its transpose added, for the gradient
    _segments: list[list[nn.Parameter]] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.blocks[0].segments)
        self._segments = [[p for block in self.blocks for p in block.segments[at]] for at in range(count)]
        first = self.parameters[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        n, d = self.blocks[0].shape
        mask = self.blocks[0].mask
        side = n if mask is not None or self.form == "mutual_coherence" else min(n, d)
        self.identity = torch.eye(side, dtype=dtype, device=first.device)
        if mask is not None:
            both = np.stack([block.mask for block in self.blocks if block.mask is not None]).astype(np.float32)
            self.mask = torch.tensor(both, device="cpu").to(first.device, dtype)
            self.twice = self.mask + self.mask.mT

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all segments, in the order in which :meth:`split` returns their parts."""
        return [parameter for segment in self._segments for parameter in segment]

    def read(self) -> Tensor:
        """Kernels in float32 or wider, ``(B, n, C, *k)``; ``B`` counts blocks times groups."""
        first = self.blocks[0]
        parts = [gather(segment) for segment in self._segments]
        wide = [part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts]
        if first.transposed:  # (L, in, J/G, *k)
            return torch.flatten(wide[0].unflatten(1, (first.groups, -1)).transpose(2, 3), 0, 1)
        if first.groups > 1:
            return torch.flatten(wide[0].unflatten(1, (first.groups, -1)), 0, 1)
        rows = [part.reshape(len(self.blocks), -1, *part.shape[2:]) for part in wide]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def split(self, kernels: Tensor) -> list[Tensor]:
        """The inverse of :meth:`read` for values shaped like it: one tensor per parameter."""
        first = self.blocks[0]
        if first.transposed:
            stacked = [kernels.unflatten(0, (-1, first.groups)).transpose(2, 3).flatten(1, 2)]
        elif first.groups > 1:
            stacked = [kernels.unflatten(0, (-1, first.groups)).flatten(1, 2)]
        else:
            sizes = [sum(len(p) for p in segment) // len(self.blocks) for segment in self._segments]
            stacked = [part.reshape(-1, *segment[0].shape)
                       for part, segment in zip(kernels.split(sizes, dim=1), self._segments, strict=True)]  # fmt: skip
        found: list[Tensor] = []
        for part, segment in zip(stacked, self._segments, strict=True):
            # Equal strides let a GPU add all of them in one kernel; no copy for contiguous weights.
            order = [0, *(1 + dim for dim in storage_order(segment[0]))]
            part = part.permute(order).contiguous().permute(sorted(range(part.dim()), key=order.__getitem__))
            found += part.unbind()
        return found


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
        squared: of ``"srip"``.
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
        squared: bool = False,
        decoupled: bool = False,
        seed: int = 0,
        stream: str = "",
    ) -> None:
        check_form(form, blocks)
        if squared and form != "srip":
            raise ValueError(f"squared=True belongs to form='srip', got form={form!r}")
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
        self.form, self.squared, self.decoupled = form, squared, decoupled
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

        self._batches = [_Batch(members, form) for members in group_by(self.blocks, layout)]
        # "basis" is a mean over the entries of all blocks of a pool, whatever optimizer owns them.
        self._entries: dict[str, int] = {}
        for block in blocks:
            self._entries[block.pool] = self._entries.get(block.pool, 0) + block.entries
        self._pending: tuple[float, int] | None = None

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
            for batch in self._batches:
                moved = [p for p in batch.parameters if p.grad is not None and id(p) in self._groups]
                if not moved:
                    continue
                parts = dict(zip(map(id, batch.parameters), batch.split(self._gradient(batch, starts)), strict=True))
                amount = weight * self._share(batch.blocks[0])
                if not self.decoupled:
                    self._add(
                        [p.grad for p in moved if p.grad is not None], [parts[id(p)] for p in moved], amount, factor
                    )
                    continue
                for alike in group_by(moved, lambda p: id(self._groups[id(p)])):
                    rate = -amount * self._groups[id(alike[0])]["lr"]
                    self._add([p.detach() for p in alike], [parts[id(p)] for p in alike], rate, factor)

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
        found: dict[str, str] = {}
        starts = self._starts(0)
        for batch in self._batches:
            kernels = batch.read().unflatten(0, (len(batch.blocks), -1)).flatten(1)
            with torch.autocast(self._device.type, enabled=False):
                gradient = self._gradient(batch, starts).unflatten(0, (len(batch.blocks), -1)).flatten(1)
            largest, moved = kernels.abs().amax(1).tolist(), gradient.isfinite().all(1).tolist()
            for block, size, fine in zip(batch.blocks, largest, moved, strict=True):
                if not math.isfinite(size):
                    found[block.name] = "its weights contain NaN or inf"
                elif not fine:
                    found[block.name] = f"its weights are so large (up to {size:.1e}) that the gradient overflows"
        return found

    def _gradient(self, batch: _Batch, starts: Mapping[int, Tensor]) -> Tensor:
        kernels = batch.read()
        if self.decoupled:  # a filter that this step broke must not reach the others through the Gram matrix
            kernels = torch.nan_to_num(kernels, nan=0.0, posinf=0.0, neginf=0.0)
        if self.form == "convolutional" and any(functional.self_padding(kernels.shape[3:], batch.blocks[0].stride)):
            return gradients.convolutional_gradient(kernels, batch.blocks[0].stride)
        rows = kernels.flatten(2)
        if batch.twice is not None:
            found = gradients.masked_gradient(rows, batch.twice, batch.identity)
        elif self.form == "mutual_coherence":
            found = gradients.mutual_coherence_gradient(rows, batch.identity)
        elif self.form == "srip":
            found = gradients.spectral_gradient(rows, starts[id(batch)], squared=self.squared)
        else:  # the side of the Gram matrix changes no gradient, so the basis form shares it
            found = gradients.soft_gradient(rows, batch.identity)
        return found.view(kernels.shape)

    def _starts(self, step: int) -> dict[int, Tensor]:
        """SRIP's starting vectors of all batches, one copy to the device."""
        if self.form != "srip":
            return {}
        shapes = [(len(b.blocks) * b.blocks[0].groups, min(b.blocks[0].shape)) for b in self._batches]
        sizes = [count * n for count, n in shapes]
        drawn = torch.randn(sum(sizes), generator=keyed_generator(self.seed, self.stream, "srip", step))
        parts = stage(drawn, self._device).split(sizes)
        wide = [
            part.view(shape).to(torch.promote_types(batch.parameters[0].dtype, torch.float32))
            for batch, part, shape in zip(self._batches, parts, shapes, strict=True)
        ]
        return {id(batch): part for batch, part in zip(self._batches, wide, strict=True)}

    @torch.no_grad()
    def values(self, step: int = 0) -> dict[str, Tensor]:
        """Block name -> excess of the penalty over what is unreachable, scalars on the device; not weighted.

        ``"basis"``: the mean over the block's entries. Subtracted is the minimum for more filters than numbers in a
        filter: ``n - d`` ("basis", and "convolutional" in part), ``|n - d|`` ("double_soft").
        """
        starts = self._starts(step)
        found: dict[str, Tensor] = {}
        for batch in self._batches:
            with torch.autocast(self._device.type, enabled=False):
                per_matrix = _values(batch, self.form, starts.get(id(batch)), self.squared)
            groups = batch.blocks[0].groups
            found |= {b.name: v for b, v in zip(batch.blocks, per_matrix.view(-1, groups).sum(1).unbind(), strict=True)}
        if self.form == "basis":
            found = {block.name: found[block.name] / block.entries for block in self.blocks}
        return {block.name: found[block.name] for block in self.blocks}

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """The penalty of the blocks in ``values``, from :meth:`values`: pooled means for ``"basis"``, else the sum."""
        shares = {b.name: b.entries / self._entries[b.pool] if self.form == "basis" else 1.0 for b in self.blocks}
        return torch.stack([value.double() * shares[name] for name, value in values.items()]).sum()


def _values(batch: _Batch, form: Form, start: Tensor | None, squared: bool) -> Tensor:
    """What each matrix of a batch is above the reachable minimum, ``(B,)``; ``"basis"`` as a sum over entries."""
    kernels = batch.read()
    rows = kernels.flatten(2)
    if form == "convolutional":
        unreachable = max(0, rows.shape[1] - rows.shape[2])
        return functional.convolutional_orthogonality(kernels, batch.blocks[0].stride) - unreachable
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
