"""Numerical proof of a narrowing: the narrow network computes the same as the one it was made of, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..filters import find_submodule
from .answers import ChannelAnswers
from .errors import NarrowingError
from .inputs import example_arguments
from .modules import bare_module, copy_network, device_of, find_tensors
from .narrow import merging, narrow, tie
from .record import is_shape_only
from .widths import nearest_counts

__all__ = [
    "TOLERANCE",
    "Proof",
    "as_type",
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
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Proof:
    """Result of a comparison.

    Attributes:
        difference: largest difference of an output, relative to the largest entry of that output.
        tolerance: largest difference that counts as rounding in ``dtype``.
        dtype: floating type of the comparison: float64, or the network's own where forward casts.
        cases: inputs that were compared: ``"example inputs"``, ``"drawn inputs"``.
        change: relative change of the outputs from ``original`` to the reference, 0 without an original.
    """

    difference: float
    tolerance: float
    dtype: torch.dtype
    cases: tuple[str, ...]
    change: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the difference is no more than rounding."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        why = "" if self.dtype == torch.float64 else ", the network's own type, because forward casts"
        return (
            f"outputs differ by {self.difference:.1e} (relative; tolerance {self.tolerance:.0e}) in {kind}{why}, on "
            f"{' and '.join(self.cases)}"
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
    """Random norm statistics, affines and biases: fresh ones (0 and 1) would hide mistakes."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and tensor.numel() == max(tensor.shape, default=1):
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            centred = name.endswith(("bias", "mean"))
            tensor.copy_(0.4 * (values - 0.5) if centred else 0.5 + values)


def random_inputs(inputs: Any, device: torch.device, generator: torch.Generator) -> Any:
    """Inputs like ``inputs``: floating tensors drawn at random in float64, everything else as given.

    Images and sequences (three dimensions and more) are drawn uniformly from the range of the given ones, from the
    normal distribution where those are constant or on meta. Smaller tensors beside them (boxes, scales) are given ones
    made smaller: order, sign and validity stay.
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
    return _difference(list(find_tensors(first(*args, **kwargs))), _outputs(second, (args, dict(kwargs))))


def _outputs(network: nn.Module, call: Call) -> list[Tensor]:
    try:
        return list(find_tensors(network(*call[0], **call[1])))
    except (RuntimeError, ValueError, IndexError) as error:
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise NarrowingError(f"the narrowed network does not run: {message}") from error


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    """Relative change of outputs; infinite where their shapes are others, as the number of a detector's boxes."""
    return _difference(before, after) if [t.shape for t in before] == [t.shape for t in after] else math.inf


def _difference(expected: list[Tensor], obtained: list[Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in obtained]:
        raise NarrowingError("the narrowed network has outputs of another shape")
    worst = 0.0
    for a, b in zip(expected, obtained, strict=True):
        a, b = a.double(), b.double()
        alike = (a == b) | (a.isnan() & b.isnan())
        if bool(alike.all()):
            continue
        finite = a[a.isfinite()]
        scale = finite.abs().max() if finite.numel() else a.new_ones(())
        apart = (a - b).abs().masked_fill(alike, 0.0) / scale.clamp_min(torch.finfo(torch.float64).tiny)
        worst = max(worst, float(apart.nan_to_num(nan=float("inf")).max()))
    return worst


class _Casts(TorchDispatchMode):
    """Notes the narrowest floating type that forward casts a wider one to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.narrowest = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and not is_shape_only(func):
            precision = torch.finfo(result.dtype).eps
            read = (t for t in args if isinstance(t, Tensor) and t.is_floating_point())
            if precision > torch.finfo(self.narrowest).eps and any(torch.finfo(t.dtype).eps < precision for t in read):
                self.narrowest = result.dtype
        return result


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
    original: nn.Module | None = None,
    seed: int = 0,
) -> Proof:
    """Compare a network with what ``narrowing`` makes of it, in eval mode.

    The comparison runs in float64, on the example inputs and on inputs drawn like them. Where forward casts, it runs in
    the network's own type, with the square root of that type's rounding unit as tolerance.

    Args:
        reference: the network before narrowing, with tied or silent channels. It is left as it was.
        narrowing: a copy of ``reference`` -> the narrow network.
        graph: channel graph of the network.
        arguments: (args, kwargs) of the traced network, by default those of the trace.
        original: the network before tying; the proof says how far its outputs are from the reference's.
        seed: of the drawn inputs.

    Raises:
        NarrowingError: the model has no values, or the narrow network does not run. What differs is no error here: see
            :attr:`Proof.exact`.
    """
    if device_of(reference).type == "meta":
        raise NarrowingError("a model on meta has no values to verify with")
    call = graph.arguments if arguments is None else arguments
    wide = _run(reference, narrowing, original, graph, call, torch.float64, seed)
    return wide or _own_type(reference, narrowing, original, graph, call, seed)


def _own_type(
    reference: nn.Module,
    narrowing: Callable[[nn.Module], nn.Module],
    original: nn.Module | None,
    graph: ChannelAnswers,
    call: Call,
    seed: int,
) -> Proof:
    own = dtype_of(reference)
    proof = _run(reference, narrowing, original, graph, call, own, seed, casts=True)
    if proof is None:
        raise NarrowingError(
            f"{type(bare_module(reference)).__name__} runs neither in float64 nor in {own} on its example inputs: "
            "nothing can be compared. Pass example inputs that forward accepts in eval mode"
        )
    return proof


def _run(
    reference: nn.Module,
    narrowing: Callable[[nn.Module], nn.Module],
    original: nn.Module | None,
    graph: ChannelAnswers,
    call: Call,
    dtype: torch.dtype,
    seed: int,
    *,
    casts: bool = False,
) -> Proof | None:
    """The comparison in ``dtype``; None if forward does not run, or casts (unless ``casts``)."""
    expected: dict[str, tuple[Call, list[Tensor]]] = {}
    whole = as_type(reference, dtype)
    device, narrowest = device_of(whole), dtype
    for name, given in _cases(call, seed):
        arguments = _cast(given, dtype, device)
        outputs, used, error = _observed(find_submodule(whole, graph.network), arguments)
        if error is None:
            expected[name] = arguments, outputs
            narrowest = max(narrowest, used, key=lambda kind: torch.finfo(kind).eps)
        if narrowest != dtype and not casts:
            return None
    if not expected:
        return None
    narrowed = find_submodule(narrowing(whole), graph.network)
    difference = max(_difference(outputs, _outputs(narrowed, given)) for given, outputs in expected.values())
    change = 0.0
    if original is not None:
        before = find_submodule(as_type(original, dtype), graph.network)
        change = max(_change(_outputs(before, given), outputs) for given, outputs in expected.values())
    tolerance = TOLERANCE if narrowest == torch.float64 else torch.finfo(narrowest).eps ** 0.5
    return Proof(difference, tolerance, dtype, tuple(sorted(expected, reverse=True)), change)


def _observed(network: nn.Module, call: Call) -> tuple[list[Tensor], torch.dtype, Exception | None]:
    """(outputs, narrowest floating type that forward casts to, why it does not run)."""
    with _Casts() as casts:
        try:
            return list(find_tensors(network(*call[0], **call[1]))), casts.narrowest, None
        except (RuntimeError, ValueError, IndexError) as error:
            return [], casts.narrowest, error


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
        raise NarrowingError("a model on meta has no values to verify with")
    clusters = random_clusters(graph, generator)
    keep, sums = merging(graph, clusters)
    model = copy_network(graph.model)
    randomise(model, generator)
    tie(model, graph, clusters)
    proof = prove(model, lambda m: narrow(m, graph, keep, sums), graph, arguments, seed=seed)
    if not proof.exact:
        raise NarrowingError(
            f"the narrowed network differs by {proof.difference:.1e} (relative), more than {proof.tolerance:.0e}"
        )
    return proof
