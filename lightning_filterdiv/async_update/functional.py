"""Weight asynchronous update: at every step only a random subset of each layer's filters moves. No Lightning here.

Zhang, He, Luo, Xu, He: "Weight asynchronous update: improving the diversity of filters in a deep convolutional
network", Computational Visual Media 6(4), 2020, and its official optimizer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_filterdiv.filters import Conv, mask_layout
from lightning_filterdiv.tensors.arguments import check_choice, check_number
from lightning_filterdiv.tensors.randomness import keyed_generator, stage
from lightning_filterdiv.tensors.stacking import ParameterStack, gather, group_by, scatter

__all__ = ["AsynchronousUpdate", "Axis", "Hold", "Sampling", "draw_subsets", "effective_fraction", "subset_size"]

Axis = Literal["out", "in"]
Sampling = Literal["without_replacement", "with_replacement"]
Hold = Literal["update", "gradient"]


def subset_size(slices: int, fraction: float, sampling: Sampling) -> int:
    """Number of draws for a layer of ``slices`` filters (or input channels), never below one.

    Without replacement ``max(1, round(fraction * J))`` distinct filters (Python's rounding: halves to even). With
    replacement ``max(1, floor(fraction * n))`` draws; the official code lacks the ``max`` and freezes a layer with
    ``floor(fraction * n) = 0`` for good.
    """
    if sampling == "without_replacement":
        return max(1, round(fraction * slices))
    return max(1, int(fraction * slices + 1e-9))


def effective_fraction(slices: int, fraction: float, sampling: Sampling) -> float:
    """Expected share of the slices that one step updates: ``k/J``, or ``1 - (1 - 1/n)^draws`` with replacement."""
    draws = subset_size(slices, fraction, sampling)
    if sampling == "without_replacement":
        return draws / slices
    return float(1.0 - (1.0 - 1.0 / slices) ** draws)


def draw_subsets(layers: int, slices: int, fraction: float, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw an independent subset for each of several layers with the same number of slices.

    Args:
        layers: ``L``.
        slices: ``J`` filters, or ``n`` input channels.
        fraction: in (0, 1].
        sampling: ``"without_replacement"``: exactly :func:`subset_size` slices, every subset equally likely;
            ``"with_replacement"``: that many uniform draws, repeated ones count once (official code).
        generator: a CPU generator.

    Returns:
        ``(L, slices)`` bool on the CPU, true where a slice is updated.
    """
    draws = subset_size(slices, fraction, sampling)
    if sampling == "without_replacement":
        # The k smallest of random keys are a uniform k-subset. Keys end in their own index: no two are equal. Selecting
        # takes less than half of sorting's time, and the host's time is what a GPU waits for.
        keys = torch.randint(2**40, (layers, slices), generator=generator).mul_(slices).add_(torch.arange(slices))
        return keys <= keys.kthvalue(draws, dim=1, keepdim=True).values
    picked = torch.randint(slices, (layers, draws), generator=generator)
    return torch.zeros(layers, slices, dtype=torch.bool).scatter_(1, picked, True)


class _Slot:
    """One tensor kind (weights, or biases) of the layers of one shape, as a batch."""

    def __init__(self, parameters: Sequence[Tensor], views: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        self.parameters = list(parameters)
        self.value_view, self.mask_view = views
        self.stack: ParameterStack | None = None
        self.snapshot: Tensor | None = None
        self._room: Tensor | None = None

    def share_storage(self) -> None:
        self.stack = ParameterStack(self.parameters)

    def _viewed(self, stacked: Tensor) -> Tensor:
        # Only transposed convolutions are viewed differently (groups split off dim 0); that never copies.
        return stacked.unflatten(1, self.value_view[:2]) if len(self.value_view) == stacked.dim() else stacked

    def remember(self) -> tuple[Tensor, Tensor] | None:
        """Where the old values are to go and the values, for the caller to copy; ``None``: copied already."""
        assert self.stack is not None
        storage = self.stack.storage()
        if storage is not None:
            if self._room is None:
                self._room = torch.empty_like(storage)
                self.snapshot = self.stack.shaped(self._room)
            return self._room, storage
        values = self.stack.read()
        if self.snapshot is None:
            self.snapshot = torch.empty_like(values)
        self.snapshot.copy_(values)
        return None

    def restore(self, held: Tensor, gain: float) -> None:
        """Undo the step where ``held`` (and scale it by ``gain`` elsewhere)."""
        assert self.stack is not None
        assert self.snapshot is not None
        values = self.stack.read()
        old, new = self._viewed(self.snapshot), self._viewed(values)
        moved = new if gain == 1.0 else torch.lerp(old, new, gain)
        torch.where(held.view(-1, *self.mask_view), old, moved, out=new)
        if not self.stack.holds(values):
            self.stack.write(values)

    def mask_gradients(self, held: Tensor, gain: float) -> None:
        present = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            return
        if len(present) < len(self.parameters):
            held = torch.stack([held[i] for i in present])
        stacked = gather(gradients)
        if gain != 1.0:
            stacked.mul_(gain)
        # Zero is assigned, not multiplied: after an fp16 overflow inf * 0 would be NaN.
        self._viewed(stacked).masked_fill_(held.view(-1, *self.mask_view), 0)
        scatter(gradients, stacked)


class AsynchronousUpdate:
    """Updates a random subset of each layer's filters at every step of one optimizer.

    Call :meth:`before_step` when the gradients are final and :meth:`after_step` after ``optimizer.step()``::

        update = AsynchronousUpdate(select_filters(model), optimizer, update_fraction=0.5, seed=0)
        for step, (x, y) in enumerate(batches):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            update.before_step(step)
            optimizer.step()
            update.after_step()
        update.release()

    One step of ``hold="update"`` is the official rule: the optimizer takes its dense step (momentum and weight decay
    see every slice), then slices outside the subset get their old values back, bit for bit.

    Args:
        layers: name -> convolution, as returned by ``select_filters``. Those whose weight ``optimizer`` does not own,
            or that are frozen, are left alone.
        optimizer: any torch optimizer. A subset is drawn per optimizer step, for all layers together.
        update_fraction: share of a layer's filters updated per step, in (0, 1].
        axis: ``"out"``: filters are output channels, their bias goes with them; ``"in"``: slices ``p[:, s]`` of input
            channels, the official code.
        sampling: see :func:`draw_subsets`.
        hold: ``"update"`` keeps filters outside the subset bit-identical through the step while the optimizer state
            advances densely; ``"gradient"`` zeroes their gradient only, so that momentum and weight decay still move
            them. Two different algorithms.
        rescale: multiply the update (``hold="gradient"``: the gradient) of the subset by 1 / effective fraction.
        seed: draws are a function of (seed, stream, step) alone.
        stream: tells objects with equal seeds apart.

    Raises:
        TypeError, ValueError: a bad argument, by name.
        ValueError: no layer is left, or the layers are on several devices.
    """

    def __init__(
        self,
        layers: Mapping[str, Conv],
        optimizer: Optimizer,
        *,
        update_fraction: float = 0.5,
        axis: Axis = "out",
        sampling: Sampling = "without_replacement",
        hold: Hold = "update",
        rescale: bool = False,
        seed: int = 0,
        stream: str = "",
    ) -> None:
        self.update_fraction = check_number("update_fraction", update_fraction, above=0.0, high=1.0)
        axis = check_choice("axis", axis, Axis)
        self.sampling = check_choice("sampling", sampling, Sampling)
        self.hold, self.rescale = check_choice("hold", hold, Hold), rescale
        self.seed, self.stream = seed, stream
        owned = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        mine = {name: conv for name, conv in layers.items() if id(conv.weight) in owned}
        if not mine:
            raise ValueError("none of the layers has a trainable weight in this optimizer")
        devices = {conv.weight.device for conv in mine.values()}
        if len(devices) > 1:
            raise ValueError(f"the layers of one optimizer must be on one device, got {sorted(map(str, devices))}")
        self._device = devices.pop()

        def slices(conv: Conv) -> int:
            return math.prod(mask_layout(conv, axis)[1])

        # A bias that several layers share belongs to no single filter.
        shared = Counter(id(conv.bias) for conv in mine.values() if conv.bias is not None)

        def bias(conv: Conv) -> list[Tensor]:
            alone = axis == "out" and conv.bias is not None and id(conv.bias) in owned and shared[id(conv.bias)] == 1
            return [conv.bias] if alone and conv.bias is not None else []

        def layout(item: tuple[str, Conv]) -> tuple[object, ...]:
            weight = item[1].weight
            biases = [b.dtype for b in bias(item[1])]
            return (mask_layout(item[1], axis), weight.shape, weight.stride(), weight.dtype, *biases)

        # Layers with equally many slices are drawn together; inside such a batch, equal shapes are neighbours, so that
        # the mask of a shape is one contiguous block.
        self._batches: list[tuple[int, list[str]]] = []
        self._blocks: list[tuple[int, list[_Slot], int]] = []  # layers, their tensors, slices
        for batch in group_by(mine.items(), lambda item: slices(item[1])):
            count = slices(batch[0][1])
            names: list[str] = []
            for members in group_by(batch, layout):
                names += [name for name, _ in members]
                convs = [conv for _, conv in members]
                slots = [_Slot([conv.weight for conv in convs], mask_layout(convs[0], axis))]
                self._blocks.append((len(members), slots, count))
                if biases := [b for conv in convs for b in bias(conv)]:
                    slots.append(_Slot(biases, ((count,), (count,))))
            self._batches.append((count, names))
        if hold == "update":
            for _, slots, _ in self._blocks:
                for slot in slots:
                    slot.share_storage()
        self._pending: list[Tensor] | None = None
        self._drawn: Tensor | None = None
        self._gains: list[float] = []

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers that this optimizer updates asynchronously."""
        return [name for _, names in self._batches for name in names]

    def holds_nothing(self) -> bool:
        """Whether ``update_fraction`` comes to all slices of every layer, as it does for layers of one filter."""
        counts = [count for count, _ in self._batches]
        return all(effective_fraction(count, self.update_fraction, self.sampling) == 1 for count in counts)

    @property
    def last_subsets(self) -> dict[str, Tensor]:
        """The last draw: layer name -> ``(J,)`` bool on the CPU, true where a filter was updated."""
        if self._drawn is None:
            return {}
        sizes = [count for count, names in self._batches for _ in names]
        return dict(zip(self.layer_names, self._drawn.split(sizes), strict=True))

    def _draw(self, step: int, fraction: float) -> list[Tensor]:
        generator = keyed_generator(self.seed, self.stream, step)
        drawn = [draw_subsets(len(n), count, fraction, self.sampling, generator) for count, n in self._batches]
        self._drawn = torch.cat([masks.flatten() for masks in drawn])
        held = stage(~self._drawn, self._device)
        return list(held.split([layers * slices for layers, _, slices in self._blocks]))

    @torch.no_grad()
    def before_step(self, step: int, fraction: float | None = None) -> None:
        """Draw the subsets of this step; for ``hold="update"`` remember the weights, else mask the gradients.

        Args:
            step: number of the optimizer step, the key of the draw.
            fraction: overrides ``update_fraction`` for this step.

        Raises:
            ValueError: ``fraction`` is not in (0, 1].
        """
        if fraction is None:  # the attribute may have been changed too
            fraction = self.update_fraction
        fraction = check_number("fraction", fraction, above=0.0, high=1.0)
        with torch.autocast(self._device.type, enabled=False):
            held_masks = self._draw(step, fraction)
            self._gains = [
                1.0 / effective_fraction(slices, fraction, self.sampling) if self.rescale else 1.0
                for _, _, slices in self._blocks
            ]
            if self.hold == "update":
                pairs = [
                    pair for _, slots, _ in self._blocks for slot in slots if (pair := slot.remember()) is not None
                ]
                if pairs:
                    torch._foreach_copy_([room for room, _ in pairs], [values for _, values in pairs])
            else:
                for (layers, slots, _), held, gain in zip(self._blocks, held_masks, self._gains, strict=True):
                    for slot in slots:
                        slot.mask_gradients(held.view(layers, -1), gain)
        self._pending = held_masks

    @torch.no_grad()
    def after_step(self) -> None:
        """Give the filters outside the subset their old values back (``hold="update"``).

        Raises:
            RuntimeError: no :meth:`before_step` announced this step.
        """
        if self._pending is None:
            raise RuntimeError("optimizer.step() ran without AsynchronousUpdate.before_step(...) before it")
        if self.hold == "update":
            with torch.autocast(self._device.type, enabled=False):
                for (_, slots, _), held, gain in zip(self._blocks, self._pending, self._gains, strict=True):
                    for slot in slots:
                        slot.restore(held, gain)
        self._pending = None

    def release(self) -> None:
        """Give every weight a storage of its own again; the object is not usable afterwards."""
        for _, slots, _ in self._blocks:
            for slot in slots:
                if slot.stack is not None:
                    slot.stack.release()
        self._pending = None
