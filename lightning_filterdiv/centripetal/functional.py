"""The C-SGD rule: average gradients inside clusters and pull the members of a cluster together.

Pure tensor functions, and :class:`CentripetalUpdate`, which applies them to all tensors of a network. Its number of
kernels depends only on the number of distinct shapes. No Lightning here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from lightning_filterdiv.narrowing.clusters import (
    ClusteredTensor,
    cluster_channels,
    cluster_filters,
    clustered_tensors,
)
from lightning_filterdiv.optimizer_state import row_state
from lightning_filterdiv.tensors.flat_buffer import Bank, FlatBuffer, Run
from lightning_filterdiv.tensors.stacking import group_by

__all__ = [
    "CentripetalUpdate",
    "ClusteredTensor",
    "centripetal_gradient",
    "cluster_channels",
    "cluster_distances",
    "cluster_filters",
    "cluster_means",
    "clustered_tensors",
    "equalise",
    "relative_deviations",
]


@torch.no_grad()
def cluster_means(rows: Tensor, clusters: Tensor) -> Tensor:
    """Return ``Gamma rows``: each row replaced by the mean of its cluster.

    Args:
        rows: ``(J, ...)``, one row per filter.
        clusters: ``(J,)`` cluster index.
    """
    index = torch.unique(clusters, return_inverse=True)[1].to(rows.device)
    one_hot = torch.nn.functional.one_hot(index).to(rows.dtype)
    averaging = (one_hot / one_hot.sum(0)).T
    with torch.autocast(rows.device.type, enabled=False):
        means = averaging @ rows.reshape(len(rows), -1)
    return means[index].view_as(rows)


def centripetal_gradient(gradient: Tensor, weight: Tensor, clusters: Tensor, strength: float) -> Tensor:
    """Return ``Gamma g + eps (w - Gamma w)``, the gradient that C-SGD passes to the optimizer.

    The rule of the official code, with weight decay left to the optimizer (see the card).

    Args:
        gradient: ``(J, ...)`` gradient, one row per filter.
        weight: ``(J, ...)`` filters.
        clusters: ``(J,)`` cluster index.
        strength: eps, the centripetal strength.

    Returns:
        ``(J, ...)``, a new tensor.
    """
    return cluster_means(gradient, clusters) + strength * (weight - cluster_means(weight, clusters))


class _Batch:
    """Tensors of one layout in a buffer, and the matrix that averages their clusters in one product."""

    def __init__(self, tensors: Sequence[ClusteredTensor], run: Run, buffer: FlatBuffer, group: dict[str, Any]) -> None:
        self.is_vector, self.group = tensors[0].is_vector, group
        clusters = [tensor.clusters for tensor in tensors]
        count = max(max(index) + 1 for index in clusters)
        # One matrix averages all tensors of a group, so it is stored once.
        distinct = list(dict.fromkeys(clusters))
        matrices = torch.tensor(np.stack([_averaging(index, count) for index in distinct]), dtype=buffer.flat.dtype)
        self._matrices = matrices.to(buffer.flat.device)
        if len(distinct) == 1:
            self._matrices = self._matrices.expand(len(clusters), -1, -1)
        elif len(distinct) < len(clusters):
            order = torch.tensor([distinct.index(index) for index in clusters]).to(buffer.flat.device)
            self._matrices = self._matrices.index_select(0, order)
        members = np.concatenate([np.array(index) + count * i for i, index in enumerate(clusters)])
        self._members = torch.tensor(members).to(buffer.flat.device)
        rows, first = len(clusters[0]), tensors[0]
        self._view = run.rows(buffer, rows, first.dim) if first.groups == 1 else None
        # Rows come after the dimension of tensors. (L, n, d) is a copy if a row is not one block of memory.
        self._stack = first.rows_first(run.stacked(buffer), 1)
        self._shape = (len(tensors), rows, self._stack.numel() // (len(tensors) * rows))

    def rows(self) -> Tensor:
        """Return the buffer's values as ``(L, n, d)``, a view or a copy."""
        return self._stack.reshape(self._shape).contiguous() if self._view is None else self._view

    def store(self, rows: Tensor) -> None:
        """Copy ``rows`` back, unless they are a view of the buffer."""
        if self._view is None:
            self._stack.copy_(rows.view(self._stack.shape))

    def means(self, rows: Tensor, out: Tensor) -> Tensor:
        """Return ``(L, n, d)`` cluster means in ``out``. They are bit-equal inside a cluster: each is computed once and
        copied."""
        means = torch.bmm(self._matrices, rows).flatten(0, 1)
        torch.index_select(means, 0, self._members, out=out.view(-1, self._shape[2]))
        return out


class _Clusters(Bank):
    """Tensors of one dtype on one device, in one buffer for gradients and one for weights."""

    def __init__(self, batches: Sequence[Sequence[ClusteredTensor]], groups: Mapping[int, dict[str, Any]]) -> None:
        # Kernels before vectors, which may have another strength.
        batches = sorted(batches, key=lambda tensors: tensors[0].is_vector)
        dtype = torch.float64 if batches[0][0].parameter.dtype == torch.float64 else torch.float32
        super().__init__([[tensor.parameter for tensor in tensors] for tensors in batches], dtype)
        self.values = self.buffer()
        self.batches = [
            _Batch(tensors, run, self.values, groups[id(tensors[0].parameter)])
            for tensors, run in zip(batches, self.runs, strict=True)
        ]
        kernels = sum(len(tensors) for tensors in batches if not tensors[0].is_vector)
        self._first_vector = self.values.start(kernels)
        self._other: FlatBuffer | None = None

    @property
    def other(self) -> FlatBuffer:
        """Return a second buffer with the layout of :attr:`values`."""
        if self._other is None:
            self._other = self.buffer()
        return self._other

    def keep_finite(self, originals: list[Tensor], members: Sequence[int] | None) -> None:
        """Restore ``originals`` where the edited values are not finite. :attr:`other` is overwritten.

        The product that averages clusters multiplies by zeros, and ``0 * inf`` is NaN. Without this, one infinite
        number would reach the same entry of every filter of its layer.

        Args:
            originals: the tensors that were read.
            members: their places; ``None``: all.
        """
        values = self.values.flat
        if self.values.on_cpu and math.isfinite(values.sum()):  # elsewhere the host would wait for the sum
            return
        finite = torch.sub(values, values, out=self.other.flat) == 0
        self.other.read(originals, members)
        torch.where(finite, values, self.other.flat, out=values)

    def pull(self, members: Sequence[int] | None, strength: float, vector_strength: float) -> Tensor:
        """Return ``eps w`` of ``members`` in the layout of :attr:`values`; ``None``: of all."""
        self.other.read(self.tensors if members is None else [self.tensors[i] for i in members], members)
        pull = self.other.flat
        if strength == vector_strength:
            return pull.mul_(strength)
        pull[: self._first_vector].mul_(strength)
        pull[self._first_vector :].mul_(vector_strength)
        return pull


def _averaging(clusters: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """Return a (count, n) matrix whose row ``c`` averages the members of cluster ``c``."""
    index = np.array(clusters)
    matrix = np.zeros((count, len(index)))
    matrix[index, np.arange(len(index))] = 1 / np.bincount(index, minlength=count)[index]
    return matrix


class CentripetalUpdate:
    """C-SGD for the parameters of one optimizer, batched by shape; gradients are edited in place.

    For ``torch.optim.SGD`` (momentum, Nesterov, weight decay) the pull is part of the gradient and the rule is exact.
    For every other optimizer the gradient is averaged before the step and the pull follows it, ``w -= lr * eps * (w -
    Gamma w)``, because such an optimizer would rescale a term in the gradient.

    Protocol, once per step: :meth:`before_step` when gradients are final, the optimizer's step, :meth:`after_step`. A
    parameter without gradient is skipped. If an entry of a gradient or weight is not finite, this entry is not averaged
    over the filters of its layer in this step. A NaN therefore stays in its own filter.

    Args:
        tensors: clustered tensors, from :func:`~lightning_filterdiv.narrowing.clusters.clustered_tensors`. Those that
            the optimizer does not own are ignored.
        optimizer: the optimizer that makes the steps.
        strength: eps for kernels.
        vector_strength: eps for tensors with one number per channel; ``None``: the same.

    Raises:
        ValueError: LBFGS, or SGD with ``maximize=True``, which would push members apart.
    """

    def __init__(
        self,
        tensors: Sequence[ClusteredTensor],
        optimizer: Optimizer,
        *,
        strength: float,
        vector_strength: float | None = None,
    ) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError("C-SGD edits the gradient of single filters and LBFGS mixes them; use SGD or Adam")
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError("C-SGD needs an optimizer with maximize=False: maximizing would push clusters apart")
        self.optimizer = optimizer
        self.decoupled = not isinstance(optimizer, SGD)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self.tensors = [tensor for tensor in tensors if id(tensor.parameter) in groups]
        self._strengths = strength, strength if vector_strength is None else vector_strength

        def layout(tensor: ClusteredTensor) -> Hashable:
            p = tensor.parameter
            group = id(groups[id(p)]) if self.decoupled else None
            return p.shape, p.stride(), tensor.dim, tensor.groups, group

        # All copies to the device happen here, none in a step.
        self._banks = [
            _Clusters(group_by(alike, layout), groups)
            for alike in group_by(self.tensors, lambda t: (t.parameter.dtype, t.parameter.device))
        ]
        self._stepping: list[tuple[_Clusters, Sequence[int] | None]] = []

    @torch.no_grad()
    def before_step(self, gradient_scale: Tensor | None = None) -> None:
        """Edit the gradients in place.

        Args:
            gradient_scale: scalar on the device by which gradients are still multiplied (fused optimizers under AMP).
        """
        self._stepping = []
        for bank in self._banks:
            gradients, members = bank.gradients()
            if not gradients:
                continue
            self._stepping.append((bank, members))
            bank.values.read(gradients, members)
            values = bank.values.flat
            # Gamma (g - eps w) + eps w: members that are equal get bit-equal gradients.
            pull: Tensor | None = None
            if not self.decoupled:
                pull = bank.pull(members, *self._strengths)
                if gradient_scale is not None:
                    pull.mul_(gradient_scale)
                values.sub_(pull)
            with torch.autocast(values.device.type, enabled=False):
                for batch in bank.batches:
                    rows = batch.rows()
                    batch.store(batch.means(rows, out=rows))
            if pull is not None:
                values.add_(pull)
            bank.keep_finite(gradients, members)
            bank.values.write(gradients, members)

    @torch.no_grad()
    def after_step(self) -> None:
        """Pull the members together if the pull is not part of the gradient. A skipped fused step is ignored."""
        stepping, self._stepping = self._stepping, []
        if not self.decoupled:
            return
        skipped: Tensor | None = getattr(self.optimizer, "found_inf", None)
        for bank, members in stepping:
            parameters = bank.tensors if members is None else [bank.tensors[i] for i in members]
            bank.values.read(parameters, members)
            with torch.autocast(bank.values.flat.device.type, enabled=False):
                for batch in bank.batches:
                    factor = batch.group["lr"] * self._strengths[batch.is_vector]
                    if skipped is not None:
                        factor = factor * (1 - skipped)
                    rows = batch.rows()
                    means = batch.means(rows, out=torch.empty_like(rows))
                    batch.store(rows.add_(means.sub_(rows).mul_(factor)))
            bank.keep_finite(parameters, members)
            bank.values.write(parameters, members)

    def first_gradient(self) -> Tensor | None:
        """Return one gradient of the step in progress; ``None`` outside a step."""
        if not self._stepping:
            return None
        bank, members = self._stepping[0]
        return bank.tensors[members[0] if members else 0].grad

    @torch.no_grad()
    def equalise_state(self) -> None:
        """Average the optimizer's state inside clusters, once at the start. The rule needs equal state in a cluster.

        Raises:
            ValueError: the optimizer keeps state that is not element-wise.
        """
        for tensor in self.tensors:
            for state in row_state(self.optimizer, tensor.parameter).values():
                equalise(state, tensor)


@torch.no_grad()
def equalise(values: Tensor, tensor: ClusteredTensor) -> None:
    """Set ``values``, shaped like ``tensor.parameter``, to its cluster means, in place."""
    rows = tensor.rows_first(values)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    rows.copy_(cluster_means(wide.reshape(len(tensor.clusters), -1), torch.tensor(tensor.clusters)).view(rows.shape))


@torch.no_grad()
def cluster_distances(tensors: Sequence[ClusteredTensor]) -> dict[str, tuple[float, float]]:
    """Return tensor name -> (``|w - Gamma w|``, ``|w|``), Frobenius norms in float32 or wider. Synchronises once.

    They are NaN for a tensor that is not finite. They are exact even if squares of the weights under- or overflow.
    """
    measured: list[Tensor] = []
    for tensor in tensors:
        rows = tensor.rows_first(tensor.parameter.detach()).reshape(len(tensor.clusters), -1)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        peak = wide.abs().amax()
        wide = wide / torch.where(peak > 0, peak, torch.ones_like(peak))
        off = wide - cluster_means(wide, torch.tensor(tensor.clusters))
        measured.append(torch.stack([torch.linalg.vector_norm(off), torch.linalg.vector_norm(wide), peak]).double())
    if not measured:
        return {}
    measures = torch.stack(measured).tolist()  # multiplied on the host: a norm of large numbers may overflow float32
    return {t.name: (off * peak, norm * peak) for t, (off, norm, peak) in zip(tensors, measures, strict=True)}


def relative(off: float, norm: float) -> float:
    """Return ``off / norm``: 0 if both are 0, NaN if either is NaN."""
    return off / norm if norm else off


def relative_deviations(tensors: Sequence[ClusteredTensor]) -> dict[str, float]:
    """Return tensor name -> ``|w - Gamma w| / |w|``: 0 if all members are equal, NaN if an entry is not finite.

    Synchronises once.
    """
    return {name: relative(off, norm) for name, (off, norm) in cluster_distances(tensors).items()}
