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
from lightning_filterdiv.tensors.flat_buffer import FlatBuffer, ParameterBuffer, owns_storage
from lightning_filterdiv.tensors.randomness import keyed_generator, stage
from lightning_filterdiv.tensors.stacking import gather, group_by, scatter

__all__ = ["AsynchronousUpdate", "Axis", "Hold", "Sampling", "draw_subsets", "effective_fraction", "subset_size"]

Axis = Literal["out", "in"]
Sampling = Literal["without_replacement", "with_replacement"]
Hold = Literal["update", "gradient"]
# Of a ResNet-50 this is half a megabyte of masks.
_STEPS_AT_ONCE = 16


def subset_size(slices: int, fraction: float, sampling: Sampling) -> int:
    """Number of draws for a layer of ``slices`` filters (or input channels), never below one.

    Without replacement these are ``max(1, round(fraction * J))`` distinct filters (halves are rounded to even). With
    replacement these are ``max(1, floor(fraction * n))`` draws. The official code lacks the ``max``, which freezes a
    layer with ``floor(fraction * n) = 0`` for good.
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


def draw_subsets(
    layers: int,
    slices: int,
    fraction: float,
    sampling: Sampling,
    generator: torch.Generator | Sequence[torch.Generator],
) -> Tensor:
    """Draw an independent subset for each of several layers with the same number of slices.

    Args:
        layers: ``L``.
        slices: ``J`` filters, or ``n`` input channels.
        fraction: in (0, 1].
        sampling: ``"without_replacement"``: exactly :func:`subset_size` slices, every subset equally likely;
            ``"with_replacement"``: that many uniform draws, repeated ones count once (official code).
        generator: a CPU generator; or several, one for each of ``S`` draws.

    Returns:
        ``(L, slices)`` bool on the CPU, true where a slice is updated; ``(S, L, slices)`` for several generators.
    """
    one_draw = isinstance(generator, torch.Generator)
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    draws = subset_size(slices, fraction, sampling)
    without = sampling == "without_replacement"
    high, shape = (2**40, (layers, slices)) if without else (slices, (layers, draws))
    numbers = torch.empty(len(generators), *shape, dtype=torch.int64, device="cpu")
    for row, one in zip(numbers, generators, strict=True):
        torch.randint(high, shape, generator=one, out=row)
    if without:
        # The k smallest of random keys are a uniform k-subset. Keys end in their own index, so no two are equal.
        # Selecting takes less than half of the time of sorting, and a GPU waits for the host.
        keys = numbers.mul_(slices).add_(torch.arange(slices, device="cpu"))
        chosen = keys <= keys.kthvalue(draws, dim=2, keepdim=True).values
    else:
        chosen = torch.zeros(len(generators), layers, slices, dtype=torch.bool, device="cpu").scatter_(2, numbers, True)
    return chosen[0] if one_draw else chosen


class _Values(ParameterBuffer):
    """Held tensors of one dtype, and their values before the step."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters)
        self._before = FlatBuffer(parameters, adoptable=True)

    def remember(self) -> None:
        self.read()
        self._before.flat.copy_(self.buffer.flat)

    def stacks(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return the values before the step and now, ``(L, *shape)`` each."""
        return self._before.stack(first, count), self.buffer.stack(first, count)


class _Slot:
    """Weights, or biases, of the layers of one shape, as a batch.

    Args:
        parameters: parameters of one layout.
        views: shapes of a value and of its mask, see :func:`~lightning_filterdiv.filters.mask_layout`.
        held: ``(L * slices,)`` bool, their part of the mask.
    """

    def __init__(
        self, parameters: Sequence[Tensor], views: tuple[tuple[int, ...], tuple[int, ...]], held: Tensor, block: int
    ) -> None:
        self.parameters = list(parameters)
        self.block = block
        self._value_view, mask_view = views
        self._held = held.view(-1, *mask_view)
        self._before: Tensor | None = None
        self._now: Tensor | None = None

    def hold_in(self, values: _Values, first: int) -> None:
        """Look up the parameters in the buffer, from place ``first`` on."""
        self._before, self._now = map(self._viewed, values.stacks(first, len(self.parameters)))

    def _viewed(self, stacked: Tensor) -> Tensor:
        # Only transposed convolutions are viewed differently (groups split off dim 0); that never copies.
        return stacked.unflatten(1, self._value_view[:2]) if len(self._value_view) == stacked.dim() else stacked

    def restore(self, gain: float) -> None:
        """Undo the step where the mask holds (and scale it by ``gain`` elsewhere)."""
        assert self._before is not None
        assert self._now is not None
        moved = self._now if gain == 1.0 else torch.lerp(self._before, self._now, gain)
        torch.where(self._held, self._before, moved, out=self._now)

    def mask_gradients(self, gain: float) -> None:
        present = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            return
        held = self._held
        if len(present) < len(self.parameters):
            held = torch.stack([held[i] for i in present])
        stacked = gather(gradients)
        if gain != 1.0:
            stacked.mul_(gain)
        # Zero is assigned, not multiplied: after an fp16 overflow inf * 0 would be NaN.
        self._viewed(stacked).masked_fill_(held, 0)
        scatter(gradients, stacked)


class _Draws:
    """Subsets of coming steps, drawn for many steps at once. The subsets of a step are a function of its key.

    Args:
        batches: (slices, layers) for each set of layers that is drawn together.
        sampling: see :func:`draw_subsets`.
        key: key of the draws, to which the step is added.
    """

    def __init__(self, batches: Sequence[tuple[int, int]], sampling: Sampling, key: tuple[int, str]) -> None:
        self._batches, self._sampling, self._key = batches, sampling, key
        self._for: tuple[int, float] | None = None  # first step and fraction of what is drawn
        self._masks = torch.empty(0, 0, dtype=torch.bool, device="cpu")
        self._held = self._masks

    def at(self, step: int, fraction: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return two ``(slices of all layers,)`` masks: updated slices on the CPU, and held slices on the device."""
        if self._for is None or self._for[1] != fraction or not 0 <= step - self._for[0] < len(self._masks):
            # A fraction that changes from step to step is unknown for coming steps.
            steady = self._for is not None and self._for[1] == fraction
            steps = range(step, step + (_STEPS_AT_ONCE if steady else 1))
            self._masks = self._draw(steps, fraction)
            self._held = stage(~self._masks, device)
            self._for = step, fraction
        row = step - self._for[0]
        return self._masks[row], self._held[row]

    def _draw(self, steps: Sequence[int], fraction: float) -> Tensor:
        generators = [keyed_generator(*self._key, step) for step in steps]
        drawn = [
            draw_subsets(count, slices, fraction, self._sampling, generators).flatten(1)
            for slices, count in self._batches
        ]
        return torch.cat(drawn, dim=1)


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
        rescale: divide the update (``hold="gradient"``: the gradient) of the subset by :func:`effective_fraction`.
        seed: draws are a function of (seed, stream, step) alone.
        stream: number that separates the draws of objects with equal seeds.

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
            raise ValueError(
                "none of the layers has a trainable weight in this optimizer; hand it their weights, or give other "
                "layers"
            )
        devices = {conv.weight.device for conv in mine.values()}
        if len(devices) > 1:
            raise ValueError(
                f"the layers of one optimizer must be on one device, got {sorted(map(str, devices))}; give the layers "
                f"of each device an optimizer of their own, or leave some out"
            )
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
        blocks: list[tuple[int, list[Conv]]] = []  # slices, layers of one layout
        for batch in group_by(mine.items(), lambda item: slices(item[1])):
            members = group_by(batch, layout)
            count = slices(batch[0][1])
            self._batches.append((count, [name for block in members for name, _ in block]))
            blocks += [(count, [conv for _, conv in block]) for block in members]
        self._slices = [count for count, _ in blocks]
        sizes = [count * len(convs) for count, convs in blocks]
        self._held = torch.zeros(sum(sizes), dtype=torch.bool, device=self._device)
        self._slots: list[_Slot] = []
        for block, ((count, convs), held) in enumerate(zip(blocks, self._held.split(sizes), strict=True)):
            self._slots.append(_Slot([conv.weight for conv in convs], mask_layout(convs[0], axis), held, block))
            if biases := [b for conv in convs for b in bias(conv)]:
                self._slots.append(_Slot(biases, ((count,), (count,)), held, block))
        self._values = self._hold() if hold == "update" else []
        self._draws = _Draws([(count, len(names)) for count, names in self._batches], self.sampling, (seed, stream))
        self._pending = False
        self._drawn: Tensor | None = None
        self._gains: list[float] = []

    def _hold(self) -> list[_Values]:
        def kind(slot: _Slot) -> tuple[torch.dtype, bool]:
            return slot.parameters[0].dtype, all(map(owns_storage, slot.parameters))

        held: list[_Values] = []
        for slots in group_by(self._slots, kind):
            held.append(_Values([p for slot in slots for p in slot.parameters]))
            first = 0
            for slot in slots:
                slot.hold_in(held[-1], first)
                first += len(slot.parameters)
        return held

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers that this optimizer updates asynchronously."""
        return [name for _, names in self._batches for name in names]

    def holds_nothing(self) -> bool:
        """True if every step updates all slices of every layer, as it is with layers of one filter."""
        counts = [count for count, _ in self._batches]
        return all(effective_fraction(count, self.update_fraction, self.sampling) == 1 for count in counts)

    @property
    def last_subsets(self) -> dict[str, Tensor]:
        """The last draw: layer name -> ``(J,)`` bool on the CPU, true where a filter was updated."""
        if self._drawn is None:
            return {}
        sizes = [count for count, names in self._batches for _ in names]
        return dict(zip(self.layer_names, self._drawn.split(sizes), strict=True))

    @torch.no_grad()
    def before_step(self, step: int, fraction: float | None = None) -> None:
        """Draw the subsets of this step. Remember the weights for ``hold="update"``, else mask the gradients.

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
            self._drawn, held = self._draws.at(step, fraction, self._device)
            self._held.copy_(held)
            self._gains = [
                1.0 / effective_fraction(slices, fraction, self.sampling) if self.rescale else 1.0
                for slices in self._slices
            ]
            for values in self._values:
                values.remember()
            if self.hold == "gradient":
                for slot in self._slots:
                    slot.mask_gradients(self._gains[slot.block])
        self._pending = True

    @torch.no_grad()
    def after_step(self) -> None:
        """Give the filters outside the subset their old values back (``hold="update"``).

        Raises:
            RuntimeError: no :meth:`before_step` announced this step.
        """
        if not self._pending:
            raise RuntimeError(
                "optimizer.step() ran without AsynchronousUpdate.before_step(step) before it; call it before every step"
            )
        if self.hold == "update":
            with torch.autocast(self._device.type, enabled=False):
                for values in self._values:
                    values.read()
                for slot in self._slots:
                    slot.restore(self._gains[slot.block])
                for values in self._values:
                    values.write()
        self._pending = False

    def release(self) -> None:
        """Give every weight a storage of its own again. The object cannot be used afterwards."""
        for values in self._values:
            values.release()
        self._pending = False
