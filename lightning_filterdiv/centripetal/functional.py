"""The C-SGD rule: average gradients inside clusters and pull the members of a cluster together.

Pure tensor functions and :class:`CentripetalUpdate`, which applies them to all tensors of a network with a number of
kernels that depends on the number of distinct shapes only. No Lightning here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from lightning_filterdiv.centripetal.clusters import ClusteredTensor
from lightning_filterdiv.optimizer_state import row_state
from lightning_filterdiv.stacking import gather, group_by, scatter

__all__ = [
    "CentripetalUpdate",
    "centripetal_gradient",
    "cluster_distances",
    "cluster_means",
    "equalise",
    "relative_deviations",
]


@torch.no_grad()
def cluster_means(rows: Tensor, clusters: Tensor) -> Tensor:
    """``Gamma rows``: each row replaced by the mean of its cluster.

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
    """``Gamma g + eps (w - Gamma w)``, the gradient that C-SGD hands to the optimizer.

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


@dataclass
class _Batch:
    """Tensors of one layout with what averages their clusters in one matrix product."""

    tensors: list[ClusteredTensor]
    strength: float
    group: dict[str, Any]  # the optimizer's parameter group; one per batch only where its learning rate is needed
    made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def averaging(self, members: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """(L, k, n) averaging matrices, padded to the largest number of clusters, and (L * n,) rows to expand by."""
        if members not in self.made:
            first = self.tensors[0].parameter
            clusters = [self.tensors[i].clusters for i in members]
            count = max(max(index) + 1 for index in clusters)
            dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
            # Tensors of one group are averaged by one matrix, which then is stored once.
            distinct = list(dict.fromkeys(clusters))
            matrices = torch.tensor(np.stack([_averaging(index, count) for index in distinct]), dtype=dtype)
            matrices = matrices.to(first.device)
            if len(distinct) == 1:
                matrices = matrices.expand(len(members), -1, -1)
            elif len(distinct) < len(clusters):
                order = torch.tensor([distinct.index(index) for index in clusters]).to(first.device)
                matrices = matrices.index_select(0, order)
            rows = np.concatenate([np.array(index) + count * i for i, index in enumerate(clusters)])
            self.made[members] = (matrices, torch.tensor(rows).to(first.device))
        return self.made[members]

    def rows(self, stacked: Tensor) -> Tensor:
        """``(L, *shape)`` to ``(L, n, d)`` in float32 or wider."""
        wide = stacked if stacked.dtype == torch.float64 else stacked.float()
        wide = wide.movedim(self.tensors[0].dim + 1, 1)
        return wide.reshape(*wide.shape[:2], -1)

    def means(self, rows: Tensor, members: tuple[int, ...]) -> Tensor:
        """``(L, n, d)`` cluster means, bit-equal inside a cluster: each is computed once and copied."""
        matrices, index = self.averaging(members)
        return torch.bmm(matrices, rows).flatten(0, 1).index_select(0, index).view_as(rows)

    def restore(self, rows: Tensor, like: Tensor) -> Tensor:
        """``(L, n, d)`` back to the shape and dtype of ``like``, ``(L, *shape)``."""
        dim = self.tensors[0].dim + 1
        return rows.view(like.movedim(dim, 1).shape).movedim(1, dim).to(like.dtype)


def _averaging(clusters: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """(count, n): row ``c`` averages the members of cluster ``c``."""
    index = np.array(clusters)
    matrix = np.zeros((count, len(index)))
    matrix[index, np.arange(len(index))] = 1 / np.bincount(index, minlength=count)[index]
    return matrix


class CentripetalUpdate:
    """C-SGD for the parameters of one optimizer, batched by shape; gradients are edited in place.

    For ``torch.optim.SGD`` (momentum, Nesterov, weight decay) the pull goes into the gradient and the rule is exact.
    For every other optimizer the gradient is averaged before the step and the pull follows it, ``w -= lr * eps * (w -
    Gamma w)``: a term in the gradient would be rescaled by the optimizer.

    Protocol, once per step: :meth:`before_step` when gradients are final, the optimizer's step, :meth:`after_step`. A
    parameter without gradient is skipped.

    Args:
        tensors: what is clustered, from :func:`~lightning_filterdiv.centripetal.clusters.clustered_tensors`; those that
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
        vector = strength if vector_strength is None else vector_strength

        def layout(tensor: ClusteredTensor) -> Hashable:
            p = tensor.parameter
            group = id(groups[id(p)]) if self.decoupled else None
            return p.shape, p.stride(), p.dtype, p.device, tensor.dim, group

        self._batches = [
            _Batch(members, vector if members[0].is_vector else strength, groups[id(members[0].parameter)])
            for members in group_by(self.tensors, layout)
        ]
        for batch in self._batches:  # what is sent to the device is sent here, not in a step
            batch.averaging(tuple(range(len(batch.tensors))))
        self._stepping: list[tuple[_Batch, tuple[int, ...]]] = []

    @torch.no_grad()
    def before_step(self, gradient_scale: Tensor | None = None) -> None:
        """Edit the gradients in place.

        Args:
            gradient_scale: scalar on the device by which gradients are still multiplied (fused optimizers under AMP).
        """
        self._stepping = []
        for batch in self._batches:
            members = tuple(i for i, t in enumerate(batch.tensors) if t.parameter.grad is not None)
            if not members:
                continue
            self._stepping.append((batch, members))
            gradients = [g for i in members if (g := batch.tensors[i].parameter.grad) is not None]
            stacked = gather(gradients)
            with torch.autocast(stacked.device.type, enabled=False):
                rows = batch.rows(stacked)
                if self.decoupled:
                    edited = batch.means(rows, members)
                else:
                    # Gamma (g - eps w) + eps w: members that are equal get bit-equal gradients.
                    weights = batch.rows(gather([batch.tensors[i].parameter for i in members]))
                    weights = weights * batch.strength
                    if gradient_scale is not None:
                        weights = weights * gradient_scale
                    edited = batch.means(rows - weights, members).add_(weights)
                scatter(gradients, batch.restore(edited, stacked))

    @torch.no_grad()
    def after_step(self) -> None:
        """Pull the members together, where the pull is not part of the gradient; a skipped fused step is none."""
        stepping, self._stepping = self._stepping, []
        if not self.decoupled:
            return
        skipped: Tensor | None = getattr(self.optimizer, "found_inf", None)
        for batch, members in stepping:
            parameters = [batch.tensors[i].parameter for i in members]
            stacked = gather(parameters)
            factor = batch.group["lr"] * batch.strength
            if skipped is not None:
                factor = factor * (1 - skipped)
            with torch.autocast(stacked.device.type, enabled=False):
                rows = batch.rows(stacked)
                pulled = rows + (batch.means(rows, members) - rows) * factor
                scatter(parameters, batch.restore(pulled, stacked))

    def first_gradient(self) -> Tensor | None:
        """One of the gradients of the step under way; ``None`` outside a step."""
        if not self._stepping:
            return None
        batch, members = self._stepping[0]
        return batch.tensors[members[0]].parameter.grad

    @torch.no_grad()
    def equalise_state(self) -> None:
        """Average the optimizer's state inside clusters, once at the start: the rule needs equal state there.

        Raises:
            ValueError: the optimizer keeps state that is not element-wise.
        """
        for tensor in self.tensors:
            for state in row_state(self.optimizer, tensor.parameter).values():
                equalise(state, tensor)


@torch.no_grad()
def equalise(values: Tensor, tensor: ClusteredTensor) -> None:
    """Set ``values``, shaped like ``tensor.parameter``, to its cluster means, in place."""
    rows = values.movedim(tensor.dim, 0)
    wide = rows if rows.dtype == torch.float64 else rows.float()
    rows.copy_(cluster_means(wide, torch.tensor(tensor.clusters)))


@torch.no_grad()
def cluster_distances(tensors: Sequence[ClusteredTensor]) -> dict[str, tuple[float, float]]:
    """Tensor name -> (``|w - Gamma w|``, ``|w|``), Frobenius norms in float32 or wider. Synchronises once."""
    measured: list[Tensor] = []
    for tensor in tensors:
        rows = tensor.parameter.detach().movedim(tensor.dim, 0)
        wide = rows if rows.dtype == torch.float64 else rows.float()
        off = wide - cluster_means(wide, torch.tensor(tensor.clusters))
        measured.append(torch.stack([torch.linalg.vector_norm(off), torch.linalg.vector_norm(wide)]).double())
    if not measured:
        return {}
    pairs = torch.stack(measured).tolist()
    return {tensor.name: (off, norm) for tensor, (off, norm) in zip(tensors, pairs, strict=True)}


def relative_deviations(tensors: Sequence[ClusteredTensor]) -> dict[str, float]:
    """Tensor name -> ``|w - Gamma w| / |w|``, 0 where all members are equal. Synchronises once."""
    return {name: off / norm if norm > 0 else 0.0 for name, (off, norm) in cluster_distances(tensors).items()}
