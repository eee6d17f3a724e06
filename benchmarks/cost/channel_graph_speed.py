"""Seconds of a trace on the committed list of networks, beside torch-pruning and an earlier version of this package.

    python -m benchmarks.cost.channel_graph_speed --earlier PATH

Each network runs in a process of its own, forked from one that has imported everything, one thread. *Trace* is
``ChannelGraph.trace``; *torch-pruning* is ``build_dependency`` with ``get_all_groups``; *forward* is a plain forward
pass. Each is called twice, and the faster call counts: the first one compiles. Seconds are those of the process (CPU),
which other work on the machine hardly changes. The earlier version runs once and is stopped at 60 s of CPU time, which
then count as 60.

Networks that read values in forward are traced on real tensors; torch-pruning has no answer there, and the bound is two
forward passes and half a second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Not imported from benchmarks.common: this file also runs beside an earlier version of the package.
ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ROOT / "benchmarks" / "models" / "zoo.txt"
RESULT = ROOT / "benchmarks" / "results" / "channel_graph_speed.json"
LIMIT = 60
_PACKAGES = {"smp": "segmentation_models_pytorch"}
_DETECTORS = ("fasterrcnn", "retinanet", "ssdlite", "fcos", "maskrcnn")


def networks() -> list[tuple[str, str, int]]:
    """(library, name, image size) of the committed list, as far as the libraries are installed."""
    lines = [line.split() for line in NETWORKS.read_text().splitlines() if line and not line.startswith("#")]
    installed = {library: find_spec(_PACKAGES.get(library, library)) is not None for library, _, _ in lines}
    return [(library, name, int(size)) for library, name, size in lines if installed[library]]


def _optional(library: str, name: str, size: int) -> tuple[nn.Module, Any]:
    """A network of the optional group ``zoo``, and its arguments."""
    image = torch.rand(1, 3, size, size)
    if library == "smp":
        import segmentation_models_pytorch as smp

        architecture, encoder = name.split("-")
        return getattr(smp, architecture)(encoder, encoder_weights=None), image
    if library == "ultralytics":
        from ultralytics.nn.tasks import ClassificationModel, DetectionModel

        kind = ClassificationModel if name.endswith("-cls") else DetectionModel
        return kind(f"{name}.yaml", verbose=False), image
    if library == "monai":
        import monai.networks.nets as nets

        options: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
        if name == "UNet":
            options |= {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 2}
        return getattr(nets, name)(**options), torch.rand(1, 1, size, size, size)
    if library == "diffusers":
        import diffusers

        blocks: dict[str, Any] = {
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        return getattr(diffusers, name)(sample_size=size, **blocks), (image, torch.tensor(10))
    import transformers

    configuration = getattr(transformers, f"{name}Config")()
    return getattr(transformers, f"{name}ForImageClassification")(configuration), image


def build(library: str, name: str, size: int) -> tuple[nn.Module, Any]:
    """The network in eval mode, and arguments of a forward pass."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, size, size)
    if library == "timm":
        import timm

        return timm.create_model(name).eval(), image
    if library != "torchvision":
        model, inputs = _optional(library, name, size)
        return model.eval(), inputs
    import torchvision

    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith((*_DETECTORS, "deeplab", "fcn", "lraspp")):
        options["weights_backbone"] = None
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    if name.startswith("raft"):
        return model, (2 * image - 1, 1 - 2 * image)
    if name.startswith("r3d"):
        return model, torch.rand(1, 3, 8, size, size)
    return model, ([image[0]],) if name.startswith(_DETECTORS) else image


def _fastest(call: Callable[[], object], times: int = 2) -> float:
    """CPU seconds of the fastest of some calls."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
        if seconds[0] > LIMIT / 4:
            break
    return min(seconds)


def measure(what: str, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """CPU seconds of ``trace``, ``earlier`` (one call), ``peer`` or ``forward``; or the error."""
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    row: dict[str, Any] = {}

    def forward() -> None:
        with torch.no_grad():
            model(*arguments)

    def peer() -> None:
        import torch_pruning

        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
        list(graph.get_all_groups())

    def trace() -> None:
        from lightning_filterdiv.channel_graph import ChannelGraph

        graph = ChannelGraph.trace(model, arguments)
        row["channels"] = sum(group.size for group in graph.groups)
        row["reads values"] = getattr(graph, "read_values", "")

    if what == "earlier":
        signal.setitimer(signal.ITIMER_PROF, LIMIT)  # nobody handles the signal: the process ends
    call = {"trace": trace, "earlier": trace, "peer": peer, "forward": forward}[what]
    try:
        row["seconds"] = _fastest(call, 1 if what == "earlier" else 2)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    return row


def _import(columns: list[str]) -> None:
    """Import what the columns need, and compile what every trace does."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import timm  # noqa: F401
    import torchvision  # noqa: F401

    if "peer" in columns:
        import torch_pruning  # noqa: F401
    if {"trace", "earlier"} & set(columns):
        from lightning_filterdiv.channel_graph import ChannelGraph

        ChannelGraph.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), torch.zeros(1, 3, 8, 8))


def _run(columns: list[str], network: tuple[str, str, int]) -> dict[str, dict[str, Any]]:
    """:func:`measure` of several columns in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT + 30, LIMIT + 30))
        with os.fdopen(writing, "w") as pipe:
            model, inputs = build(*network)
            for what in columns:
                print(json.dumps([what, measure(what, model, inputs)]), file=pipe, flush=True)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        done: dict[str, dict[str, Any]] = dict(json.loads(line) for line in pipe)
    os.waitpid(child, 0)
    return {what: done.get(what, {"error": "stopped"}) for what in columns}


def _earlier(network: tuple[str, str, int], source: Path) -> dict[str, Any]:
    """The column of another version of the package, which is at ``source``."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", *map(str, network)]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=source)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:200]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures that are promised: medians, the worst network, errors."""
    rows = {n: r for n, r in rows.items() if "trace" in r}
    answered = {n: r for n, r in rows.items() if "seconds" in r["trace"]}
    ratios = {
        n: r["trace"]["seconds"] / r["peer"]["seconds"] for n, r in answered.items() if "seconds" in r.get("peer", {})
    }
    above = {
        n: answered[n]["trace"]["seconds"] - 10 * answered[n]["peer"]["seconds"] - 0.5
        for n in ratios
        if not answered[n]["trace"]["reads values"]
    }
    real = {
        n: r["trace"]["seconds"] - 2 * r["forward"]["seconds"] - 0.5
        for n, r in answered.items()
        if r["trace"]["reads values"] and "forward" in r
    }
    gains = [
        min(LIMIT, r["earlier"].get("seconds", LIMIT)) / r["trace"]["seconds"]
        for r in answered.values()
        if "earlier" in r
    ]
    return {
        "networks": len(rows),
        "errors": {n: r["trace"]["error"] for n, r in rows.items() if "error" in r["trace"]},
        "median seconds": _median([r["trace"]["seconds"] for r in answered.values()]),
        "median ratio to torch-pruning": _median(list(ratios.values())),
        "above 10 x torch-pruning + 0.5 s": {n: s for n, s in above.items() if s > 0},
        "above 2 forward passes + 0.5 s, on real tensors": {n: s for n, s in real.items() if s > 0},
        "median gain over the earlier version": _median(gains),
    }


def summary_table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures of :func:`summary` as Markdown. Rows without a trace do not count."""
    rows = {name: row for name, row in rows.items() if "forward" in row}
    s = summary(rows)
    compared = sum("seconds" in row["trace"] and "seconds" in row.get("peer", {}) for row in rows.values())
    before = sum("earlier" in row for row in rows.values())
    above = s["above 10 x torch-pruning + 0.5 s"] | s["above 2 forward passes + 0.5 s, on real tensors"]
    slow = ", ".join(sorted(name.partition("@")[0] for name in above)) or "none"
    gain = s["median gain over the earlier version"]
    lines = [
        "| | |",
        "|---|---|",
        f"| networks traced | {len(rows) - len(s['errors'])} of {len(rows)} |",
        f"| median CPU seconds of a trace | {s['median seconds']:.2f} |",
        f"| median time over that of torch-pruning ({compared} networks) | {s['median ratio to torch-pruning']:.1f} |",
        "| networks whose trace takes longer than ten times torch-pruning plus 0.5 s "
        f"(on values: than two forward passes plus 0.5 s) | {slow} |",
        f"| median speed-up over version 0.1 ({before} networks) | {'-' if gain is None else f'{gain:.0f}'} |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "NAME", "SIZE"), help="trace once and print JSON")
    parser.add_argument("--earlier", type=Path, help="checkout of an earlier version of the package")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--what", nargs="*", default=["trace", "peer", "forward"], help="columns to measure")
    parser.add_argument("--missing", action="store_true", help="only what the results do not have yet")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.one:
        library, name, size = options.one
        _import(["earlier"])
        print(json.dumps(_run(["earlier"], (library, name, int(size)))["earlier"]))
        return
    _import(options.what)
    rows: dict[str, dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    wanted = [network for network in networks() if options.only in network[1]]
    # Every fourth network first: a run that is stopped has seen some of every kind.
    for network in [network for first in range(4) for network in wanted[first::4]]:
        row = rows.setdefault(f"{network[1]}@{network[2]}", {})
        columns = [*options.what, *(["earlier"] if options.earlier is not None else [])]
        columns = [what for what in columns if not (options.missing and what in row)]
        if not columns:
            continue
        row.update(_run([what for what in columns if what != "earlier"], network))
        if "earlier" in columns:
            row["earlier"] = _earlier(network, options.earlier)
        print(network[1], row, flush=True)
        record = {"torch": version("torch"), "torch-pruning": version("torch-pruning"), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if any("seconds" in row.get("trace", {}) for row in rows.values()):
        print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
