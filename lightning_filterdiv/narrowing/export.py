"""ONNX files with a dynamic batch, checked in onnxruntime, and latency in both runtimes."""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_filterdiv.channel_graph.inputs import example_arguments
from lightning_filterdiv.channel_graph.modules import bare_module, find_tensors
from lightning_filterdiv.channel_graph.verify import random_inputs
from lightning_filterdiv.files import write_files
from lightning_filterdiv.filters import find_submodule

__all__ = ["ExportError", "Latency", "export_onnx", "latency_table", "onnx_session"]

#: Largest difference of an output in onnxruntime, relative to the largest entry.
TOLERANCE = 1e-3
#: Images that the export sees. A forward that remembers the last shape must see another one: it would take the way for
#: equal shapes, and the file would be for one batch size.
_BATCH = 7


class ExportError(RuntimeError):
    """The network has no ONNX form that computes the same. The message says what failed."""


class Latency(NamedTuple):
    """Time of a forward pass, in milliseconds: medians of interleaved calls, and their ratio.

    Attributes:
        runtime: ``"torch"`` or ``"onnxruntime"``.
        batch: images per call.
        before: time of the original.
        after: time of the narrow network.
    """

    runtime: str
    batch: int
    before: float
    after: float

    def __str__(self) -> str:
        ratio = self.after / self.before
        return f"{self.runtime:<12} batch {self.batch:>3}  {self.before:9.2f} ms -> {self.after:9.2f} ms ({ratio:.2f})"


def export_onnx(model: nn.Module, path: str | Path, example_inputs: Any = None, *, network: str | None = None) -> float:
    """Write an ONNX file that takes any batch size, and compare it with the network in onnxruntime.

    Args:
        model: the network, on any device; it is left as it was.
        path: the file to write. It is written only if the comparison holds.
        example_inputs: tensors of one call; see :meth:`~lightning_filterdiv.channel_graph.ChannelGraph.trace`.
        network: export only this submodule.

    Returns:
        Largest difference of an output at batch sizes 1, 2 and 3, relative to the largest entry of that output.

    Raises:
        ExportError: onnx, onnxscript or onnxruntime is missing; the network cannot be exported; the file computes
            something else.
        ExampleInputsError: there are none.
    """
    traced, args = _callable(model, example_inputs, network)
    content = _exported(traced, args)
    session = onnx_session(content)
    worst = 0.0
    for batch in (1, 2, 3):
        call = _drawn(args, batch, seed=batch)
        with torch.no_grad():
            expected = list(find_tensors(traced(*call)))
        found = session(call)
        if [tuple(t.shape) for t in expected] != [t.shape for t in found]:
            raise ExportError(
                f"the ONNX file gives outputs of shape {[t.shape for t in found]} for a batch of {batch}, the network "
                f"{[tuple(t.shape) for t in expected]}: its forward fixes the batch size; nothing was written"
            )
        for a, b in zip(expected, found, strict=True):
            size = float(a.abs().max().clamp_min(1e-30))
            worst = max(worst, float((a.double() - torch.from_numpy(b).double()).abs().max()) / size)
    if not worst <= TOLERANCE:
        raise ExportError(
            f"the ONNX file differs from the network by {worst:.1e} (relative), more than {TOLERANCE:g}; nothing was "
            f"written"
        )
    write_files(Path(path).parent, {Path(path).name: content})
    return worst


def _callable(model: nn.Module, example_inputs: Any, network: str | None) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of the traced part on the CPU in eval mode, and its arguments with the batch of the export."""
    traced = bare_module(find_submodule(bare_module(model), network))
    args, kwargs = example_arguments(traced, example_inputs)
    if kwargs or not all(isinstance(leaf, Tensor) for leaf in tree_leaves(args)):
        raise ExportError("only positional tensors can be inputs of an ONNX file; pass example inputs like that")
    trainer = getattr(traced, "_trainer", None)
    copied = copy.deepcopy(traced, {id(trainer): None} if trainer is not None else None)
    return copied.cpu().eval(), _drawn(args, _BATCH, seed=0)


def _drawn(args: tuple[Any, ...], batch: int, seed: int) -> tuple[Any, ...]:
    """Arguments like ``args``, with another batch size."""

    def sized(leaf: Tensor) -> Tensor:
        leaf = leaf.cpu()
        return leaf.repeat(-(-batch // len(leaf)), *[1] * (leaf.ndim - 1))[:batch] if leaf.ndim > 1 else leaf

    resized = tree_map(sized, args)
    drawn = random_inputs(resized, torch.device("cpu"), torch.Generator().manual_seed(seed))
    fitted: tuple[Any, ...] = tree_map(lambda new, old: new.to(old.dtype), drawn, resized)
    return fitted


def _exported(traced: nn.Module, args: tuple[Any, ...]) -> bytes:
    import io
    from contextlib import redirect_stderr, redirect_stdout

    batch = torch.export.Dim.DYNAMIC
    shapes = tree_map(lambda leaf: {0: batch} if leaf.ndim > 1 else {}, args)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            # A copy: what forward remembers of symbolic shapes must not stay in the network.
            program = torch.onnx.export(copy.deepcopy(traced), args, dynamo=True, dynamic_shapes=shapes, verbose=False)
    except ImportError as error:
        raise ExportError(
            f"ONNX needs the packages onnx and onnxscript ({error}): pip install onnx onnxscript"
        ) from error
    except Exception as error:  # torch has many types for what it cannot export
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer ones say what to do with a report
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ExportError(f"{type(traced).__name__} cannot be exported to ONNX: {reason}") from error
    assert program is not None
    return program.model_proto.SerializeToString()  # type: ignore[no-any-return]


def onnx_session(content: bytes) -> Callable[[tuple[Any, ...]], list[Any]]:
    """Load an ONNX file in onnxruntime, on as many threads as torch uses.

    Returns:
        Function of a tuple of tensors, to the outputs as arrays.

    Raises:
        ExportError: onnxruntime is missing, or cannot load it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("checking an ONNX file needs onnxruntime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load the file: {error}") from error
    names = [entry.name for entry in session.get_inputs()]

    def call(args: tuple[Any, ...]) -> list[Any]:
        tensors = [leaf.detach().numpy() for leaf in tree_leaves(args)]
        return session.run(None, dict(zip(names, tensors, strict=True)))  # type: ignore[no-any-return]

    return call


def latency_table(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any = None,
    *,
    network: str | None = None,
    batches: tuple[int, ...] = (1, 32),
    pairs: int = 20,
    onnx: bool = True,
) -> list[Latency]:
    """Time both networks in torch and in onnxruntime, on the CPU, in turn and in random order.

    Args:
        before: the original.
        after: the narrow network.
        example_inputs: as for :func:`export_onnx`.
        network: time only this submodule.
        batches: images per call.
        pairs: timed calls of each; three more come before them.
        onnx: time onnxruntime too.
    """
    (first, args), (second, _) = (_callable(model, example_inputs, network) for model in (before, after))
    calls: Mapping[str, tuple[Callable[[tuple[Any, ...]], Any], ...]] = {
        "torch": (lambda call: first(*call), lambda call: second(*call))
    }
    if onnx:
        calls = {**calls, "onnxruntime": tuple(onnx_session(_exported(model, args)) for model in (first, second))}
    order = random.Random(0)
    rows = []
    for runtime, pair in calls.items():
        for batch in batches:
            given = _drawn(args, batch, seed=0)
            times: tuple[list[float], list[float]] = ([], [])
            with torch.no_grad():
                for number in range(pairs + 3):
                    for which in order.sample([0, 1], 2):
                        start = time.perf_counter()
                        pair[which](given)
                        if number >= 3:
                            times[which].append(1000 * (time.perf_counter() - start))
            rows.append(Latency(runtime, batch, median(times[0]), median(times[1])))
    return rows
