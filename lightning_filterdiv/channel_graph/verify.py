"""Numerical proof of a narrowing: the narrow network computes the same as the one it was made of, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..filters import find_submodule, named_modules, named_tensors
from ..tensors.arguments import check_module
from .answers import ChannelAnswers
from .decisions import Decision, FollowDecisions, RecordDecisions, relative_difference
from .errors import NarrowingError
from .inputs import example_arguments
from .modules import bare_module, copy_network, device_of, find_tensors
from .narrow import Narrowing, merging, tie
from .widths import nearest_counts

__all__ = [
    "TOLERANCE",
    "Proof",
    "as_type",
    "check_finite",
    "compare",
    "dtype_of",
    "prove",
    "random_clusters",
    "random_inputs",
    "randomise",
    "verify",
]

#: Largest relative difference that counts as rounding in float64.
TOLERANCE = 1e-9
_NO_VALUES = "a model on meta has no values to verify with: construct it on a real device, or load its weights"
Call = tuple[tuple[Any, ...], dict[str, Any]]
#: A network before a step, or the tensors that the step changed, as they were.
Earlier = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class Proof:
    """Result of a comparison.

    Attributes:
        difference: largest difference of an output, relative to the largest entry of that output.
        tolerance: largest difference that counts as rounding in ``dtype``.
        dtype: floating type of the comparison: float64, or the network's own where forward casts.
        cases: inputs that were compared: ``"example inputs"``, ``"drawn inputs"``.
        changes: relative change of the outputs from each earlier network to the next one, from the last to the
            reference.
        macs: multiply-accumulate operations of a forward pass of the earliest network and of the narrow one, on the
            example inputs where these were compared; None where a fused operator hides some.
    """

    difference: float
    tolerance: float
    dtype: torch.dtype
    cases: tuple[str, ...]
    changes: tuple[float, ...] = ()
    macs: tuple[int, int] | None = None

    @property
    def exact(self) -> bool:
        """True if the difference is rounding."""
        return self.difference <= self.tolerance

    @property
    def precision(self) -> str:
        """Name of :attr:`dtype`."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        why = "" if self.dtype == torch.float64 else ", the network's own type, because forward casts"
        return (
            f"outputs differ by {self.difference:.1e} (relative; tolerance {self.tolerance:.0e}) in "
            f"{self.precision}{why}, on {' and '.join(self.cases)}"
        )


def random_clusters(graph: ChannelAnswers, generator: torch.Generator, keep: float = 0.6) -> dict[str, Tensor]:
    """Random clusters of every group, about ``keep`` as many as channels, within what forward can express."""
    counts = nearest_counts(graph, {group.name: group.rounded(round(keep * group.size)) for group in graph.groups})
    clusters = {}
    for group in graph.groups:
        index = torch.empty(group.size, dtype=torch.int64)
        kept = counts[group.name] // group.block_count
        for block, members in enumerate(group.members()):
            more = torch.randint(kept, (len(members) - kept,), generator=generator)
            drawn = torch.cat([torch.arange(kept), more]) + block * kept
            index[members] = drawn[torch.randperm(len(members), generator=generator)]
        clusters[group.name] = index
    return clusters


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw random norm statistics, affines and biases, because fresh ones (0 and 1) would hide mistakes."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=1):
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            centred = name.endswith(("bias", "mean"))
            tensor.copy_(0.4 * (values - 0.5) if centred else 0.5 + values)


def random_inputs(inputs: Any, device: torch.device, generator: torch.Generator) -> Any:
    """Inputs like ``inputs``: floating tensors drawn at random in float64, everything else as given.

    Images and sequences (three dimensions and more) are drawn uniformly from the range of the given ones, from the
    normal distribution where those are constant or on meta. Smaller tensors (boxes, scales) are the given ones, scaled
    down, so that order, sign and validity stay.
    """
    floating = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.is_floating_point()]
    large = max((t.ndim for t in floating), default=0) > 2

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point() or (leaf.is_meta and not leaf.numel()):
            return leaf.to(device)
        if not leaf.is_meta and large and leaf.ndim <= 2:
            factor = 0.5 + 0.5 * float(torch.rand((), generator=generator))
            return (leaf.double() * factor).to(device)
        low, high = (0.0, 0.0) if leaf.is_meta or not leaf.numel() else (float(leaf.min()), float(leaf.max()))
        if low < high and high - low < float("inf"):
            values = torch.rand(leaf.shape, generator=generator, dtype=torch.float64)
            return (low + (high - low) * values).to(device)
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(device)

    return tree_map(draw, inputs)


@torch.no_grad()
def compare(first: nn.Module, second: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Largest difference of two networks' outputs, relative to the largest entry of each output.

    NaN and infinities in the same places of both are equal.

    Raises:
        NarrowingError: the second network does not run, or its outputs have other shapes.
    """
    return _difference(list(find_tensors(first(*args, **kwargs))), _outputs(second, (args, dict(kwargs)), [])[0])


def _outputs(network: nn.Module, call: Call, decisions: list[Decision]) -> tuple[list[Tensor], FollowDecisions]:
    """Outputs under the decisions of another network, and how it followed them."""
    with FollowDecisions(decisions) as follow:
        try:
            return list(find_tensors(network(*call[0], **call[1]))), follow
        except Exception as error:  # whatever forward checks about its widths
            message = (str(error).splitlines() or [type(error).__name__])[0]
            raise NarrowingError(f"the narrowed network does not run: {message}") from error


def _difference(expected: list[Tensor], obtained: list[Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in obtained]:
        raise NarrowingError(
            f"the narrowed network gives outputs of shape {[tuple(t.shape) for t in obtained]}, the whole one "
            f"{[tuple(t.shape) for t in expected]}"
        )
    return max(map(relative_difference, expected, obtained), default=0.0)


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """Relative change of outputs; infinite where their shapes are others, as the number of a detector's boxes."""
    return _difference(before, after) if [t.shape for t in before] == [t.shape for t in after] else math.inf


def check_finite(model: nn.Module) -> None:
    """Refuse a network that computes NaN: any two of those are equal.

    Raises:
        TypeError: no network.
        NarrowingError: a parameter or running statistic is not finite, by name.
    """
    check_module("model", model)
    for name, tensor in named_tensors(model).items():
        layer, _, own = name.rpartition(".")
        if not isinstance(tensor, nn.Parameter) and not own.startswith("running_"):
            continue  # a mask may hold infinities
        if tensor.is_meta or nn.parameter.is_lazy(tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        # The sum takes a tenth of the time, and is infinite at worst where all numbers are finite.
        if not bool(tensor.detach().sum().isfinite()) and not bool(tensor.detach().isfinite().all()):
            raise NarrowingError(
                f"{own} of {layer!r} holds NaN or inf; has the training diverged? Start from a checkpoint before that"
            )


def as_type(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy in eval mode with floating tensors of ``dtype`` (None: their own), on a device that has float64."""
    replaced: dict[int, object] = {}
    device = torch.device("cpu") if device_of(model).type == "mps" else None
    for tensor in [*model.parameters(), *model.buffers()]:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        new = tensor.detach().to(device=device or tensor.device, dtype=kind, copy=True)
        replaced[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return copy_network(model, replaced).eval()


def dtype_of(model: nn.Module) -> torch.dtype:
    """Type of the first floating parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _cast(call: Call, dtype: torch.dtype, device: torch.device) -> Call:
    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)

    return tree_map(one, call)  # type: ignore[no-any-return]


def _cases(call: Call, seed: int) -> Iterator[tuple[str, Call]]:
    """(name, arguments), drawn ones first. Arguments without values are drawn only."""
    yield "drawn inputs", random_inputs(call, torch.device("cpu"), torch.Generator().manual_seed(seed))
    if not any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves(call)):
        yield "example inputs", call


@torch.no_grad()
def prove(
    reference: nn.Module,
    narrowing: Callable[[nn.Module], nn.Module],
    graph: ChannelAnswers,
    arguments: Call | None = None,
    *,
    earlier: Sequence[Earlier] = (),
    seed: int = 0,
) -> Proof:
    """Compare a network with what ``narrowing`` makes of it, in eval mode.

    The comparison runs in float64, on the example inputs and on inputs drawn like them. Where forward decides on values
    (non-maximum suppression, ``argmax``), the narrow network takes over the decisions of the reference, and the numbers
    that they rest on are compared too. Where forward casts, it runs in
    the network's own type, with the square root of that type's rounding unit as tolerance.

    Args:
        reference: the network before narrowing, with tied or silent channels. It is left as it was.
        narrowing: a copy of ``reference`` -> the narrow network.
        graph: channel graph of the network.
        arguments: (args, kwargs) of the traced network, by default those of the trace.
        earlier: what the network was before, step by step: a network, or canonical name -> tensor where it had others
            than one step later. The proof says how much each step changed the outputs.
        seed: seed of the drawn inputs.

    Raises:
        NarrowingError: the model has no values, no output of it is finite, or the narrow network does not run. A
            difference is no error here, see :attr:`Proof.exact`.
    """
    if device_of(reference).type == "meta":
        raise NarrowingError(_NO_VALUES)
    call = graph.arguments if arguments is None else arguments
    wide = _run(reference, narrowing, earlier, graph, call, torch.float64, seed)
    return wide or _own_type(reference, narrowing, earlier, graph, call, seed)


def _own_type(
    reference: nn.Module,
    narrowing: Callable[[nn.Module], nn.Module],
    earlier: Sequence[Earlier],
    graph: ChannelAnswers,
    call: Call,
    seed: int,
) -> Proof:
    own = dtype_of(reference)
    proof = _run(reference, narrowing, earlier, graph, call, own, seed, casts=True)
    if proof is None:
        raise NarrowingError(
            f"{type(bare_module(reference)).__name__} runs neither in float64 nor in {own} on its example inputs: "
            "nothing can be compared. Pass example inputs that forward accepts in eval mode"
        )
    return proof


def _run(
    reference: nn.Module,
    narrowing: Callable[[nn.Module], nn.Module],
    earlier: Sequence[Earlier],
    graph: ChannelAnswers,
    call: Call,
    dtype: torch.dtype,
    seed: int,
    *,
    casts: bool = False,
) -> Proof | None:
    """The comparison in ``dtype``; None if forward does not run, or casts (unless ``casts``)."""
    expected: dict[str, tuple[Call, list[Tensor], list[Decision]]] = {}
    whole = as_type(reference, dtype)
    device, narrowest = device_of(whole), dtype
    macs: list[int | None] = [None, None]
    for name, given in _cases(call, seed):
        arguments = _cast(given, dtype, device)
        with RecordDecisions() as record:
            try:
                outputs = list(find_tensors(find_submodule(whole, graph.network)(*arguments[0], **arguments[1])))
                expected[name] = arguments, outputs, record.decisions
                macs[0] = record.macs
                narrowest = max(narrowest, record.narrowest, key=lambda kind: torch.finfo(kind).eps)
            except (RuntimeError, ValueError, IndexError):
                pass  # not an input of this network: another case may be
        if narrowest != dtype and not casts:
            return None
    if not expected:
        return None
    _check_outputs(find_submodule(whole, graph.network), expected)
    narrowed = find_submodule(narrowing(whole), graph.network)
    difference = 0.0
    for arguments, outputs, decisions in expected.values():
        obtained, follow = _outputs(narrowed, arguments, decisions)
        difference, macs[1] = max(difference, follow.difference, _difference(outputs, obtained)), follow.macs
    changes: list[float] = []
    for step in reversed(earlier):
        whole, change = _before(step, whole, dtype), 0.0
        before = find_submodule(whole, graph.network)
        for name, (arguments, outputs, decisions) in expected.items():
            ahead, follow = _outputs(before, arguments, decisions)
            change = max(change, follow.difference, _change(ahead, outputs))
            expected[name], macs[0] = (arguments, ahead, follow.taken), follow.macs
        changes.insert(0, change)
    tolerance = TOLERANCE if narrowest == torch.float64 else torch.finfo(narrowest).eps ** 0.5
    before_after = None if macs[0] is None or macs[1] is None else (macs[0], macs[1])
    cases = tuple(sorted(expected, reverse=True))
    return Proof(difference, tolerance, dtype, cases, tuple(changes), before_after)


def _before(step: Earlier, whole: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network before a step; ``whole``, which is the one after it, may be changed."""
    if isinstance(step, nn.Module):
        return as_type(step, dtype)
    tensors = named_tensors(whole)
    for name, values in step.items():
        tensors[name].copy_(values)
    return whole


def _check_outputs(network: nn.Module, expected: Mapping[str, tuple[Call, list[Tensor], list[Decision]]]) -> None:
    """Raise NarrowingError where no output holds a finite number: there is nothing to compare."""
    outputs = [tensor for _, tensors, _ in expected.values() for tensor in tensors if tensor.numel()]
    if not outputs or any(bool(tensor.isfinite().any()) for tensor in outputs):
        return
    first: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not any(bool(t.isfinite().any()) for t in find_tensors(output) if t.numel()):
                first.append(name)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in named_modules(network).items() if not list(m.children())]
    try:
        arguments = next(iter(expected.values()))[0]
        network(*arguments[0], **arguments[1])
    finally:
        for handle in handles:
            handle.remove()
    where = f", from {first[0]!r} on" if first else ""
    raise NarrowingError(
        f"every output of {type(bare_module(network)).__name__} is NaN or infinite{where}, on its example inputs and "
        f"on drawn ones: nothing can be compared. Start from weights that compute numbers, or pass other example inputs"
    )


def verify(graph: ChannelAnswers, example_inputs: Any = None, *, seed: int = 0) -> Proof:
    """See :meth:`ChannelGraph.verify`.

    Raises:
        NarrowingError: the narrowed network does not run or differs by more than rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    arguments = None
    if example_inputs is not None:
        arguments = example_arguments(bare_module(find_submodule(graph.model, graph.network)), example_inputs)
    if device_of(graph.model).type == "meta":
        raise NarrowingError(_NO_VALUES)
    check_finite(graph.model)
    clusters = random_clusters(graph, generator)
    keep, sums = merging(graph, clusters)
    model = copy_network(graph.model)
    randomise(model, generator)
    tie(model, graph, clusters)
    proof = prove(model, Narrowing(graph, keep, sums), graph, arguments, seed=seed)
    if not proof.exact:
        raise NarrowingError(
            f"the narrowed network differs by {proof.difference:.1e} (relative), more than {proof.tolerance:.0e}"
        )
    return proof
