"""Merge every group of channels to half on the committed list of networks, and torch-pruning's answer to the same task.

    python -m benchmarks.experiments.zoo                 # all networks; hours on one core
    python -m benchmarks.experiments.zoo --only resnet   # a part, added to what is there

Weights are random, norm statistics and affines too. Each network runs in a process of its own, one thread, and is
stopped at 300 s of CPU time (``--limit``).

*This package* ties random clusters, half as many as channels in every group, and merges them with ``merge_channels``.
*Share* is the number of removed convolution filters, divided by half of all convolution filters. *Deviation* is the
relative difference between the outputs of the narrow and the tied network, in float64, or in the network's own type if
its forward casts. *Form* says whether all modules kept their class ("module") or how many became a graph.

*torch-pruning* gets the easier task. Half of the channels of each of its groups are silenced: every row of a producer
and of a norm in the group is set to zero. Then they are pruned. If the group is right, the outputs do not change.
Layers that write network outputs are taken from our graph and left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
import warnings
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.common.paths import RESULTS
from benchmarks.cost.channel_graph_speed import NETWORKS, build, networks
from benchmarks.cost.peers import TOLERANCE, prune_silently
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.narrow import tie
from lightning_filterdiv.channel_graph.verify import random_clusters, randomise
from lightning_filterdiv.narrowing import MergeReport, merge_channels

RESULT = RESULTS / "zoo.json"
LIMIT = 300
#: Networks that version 0.1 narrowed least, or did not answer for.
HARD = (
    "convnext_atto_ols", "cs3darknet_s", "dla60_res2net", "dpn48b", "edgenext_small", "fasternet_s", "fastvit_s12",
    "ghostnetv2_100", "inception_next_atto", "mambaout_femto", "nf_resnet26", "regnety_002", "res2net50_26w_4s",
    "resnest14d", "shvit_s1", "skresnet18", "tf_mixnet_s", "visformer_tiny", "ecaresnet26t", "vit_tiny_patch16_224",
    "coatnet_pico_rw_224", "resnext50_32x4d", "convnext_tiny", "shufflenet_v2_x1_0", "hrnet_w18_small_v2", "resnet50",
)  # fmt: skip


def filters_of(model: nn.Module) -> int:
    """Number of convolution filters."""
    return sum(m.out_channels for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd))


def ours(library: str, name: str, size: int) -> dict[str, Any]:
    """Share, deviation, form, CPU seconds and the reasons of pinned filters; or the error."""
    model, inputs = build(library, name, size)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    randomise(model, torch.Generator().manual_seed(0))
    before = filters_of(model)
    row: dict[str, Any] = {"filters": before}
    try:
        graph = ChannelGraph.trace(model, arguments)
        clusters = random_clusters(graph, torch.Generator().manual_seed(0), keep=0.5)
        row["pinned"] = reasons(graph)
        if clusters:
            tie(model, graph, clusters)
            start = time.process_time()
            merged = merge_channels(model, clusters, arguments, tolerance=float("inf"))
            row["seconds"] = time.process_time() - start
            row["deviation"] = merged.report.trim
            row["form"] = form_of(merged.report)
            if merged.report.precision != "float64":
                row["precision"] = merged.report.precision
            row["share"] = (before - filters_of(merged.network)) / (before / 2)
        else:
            row |= {"share": 0.0, "deviation": 0.0, "form": "-"}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row


def form_of(report: MergeReport) -> str:
    """``module``: every module kept its class; ``graph (n)``: n submodules became graphs."""
    written = sum(choice.form == "graph" for choice in report.forms)
    return f"graph ({written})" if written else "module"


def reasons(graph: ChannelGraph) -> dict[str, int]:
    """Reason -> number of layers that are pinned with it, in whole or in part; the most frequent ones."""
    counts = Counter(graph.pinned.values())
    return dict(counts.most_common(8))


def theirs(library: str, name: str, size: int) -> dict[str, Any]:
    """Verdict of torch-pruning, and CPU seconds of its groups."""
    import torch_pruning

    # Dependencies are found by autograd.
    model, inputs = build(library, name, size)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    graph = ChannelGraph.trace(model, arguments)
    modules = dict(model.named_modules())
    outputs = [modules[layer] for layer, reason in graph.pinned.items() if reason == "network output"]
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    randomise(model, generator)
    wide = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, arguments)
    worst, seconds = 0.0, 0.0
    try:
        start = time.process_time()
        peer = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=wide)
        options = {"ignored_layers": outputs, "root_module_types": [nn.Conv2d, nn.Linear]}
        list(peer.get_all_groups(**options))
        seconds = time.process_time() - start
        for group in peer.get_all_groups(**options):  # each is found after those before it were pruned
            worst = max(worst, prune_silently(model, peer, group, wide, generator, share=0.5))
    except Exception as error:
        return {"verdict": "crash", "error": f"{type(error).__name__}: {error}"[:200], "seconds": seconds}
    return {"verdict": "exact" if worst <= TOLERANCE else "wrong", "deviation": worst, "seconds": seconds}


def _run(what: str, network: tuple[str, str, int], limit: int = LIMIT) -> dict[str, Any]:
    """``ours`` or ``theirs`` in a process of its own, forked from this one: the libraries are imported already."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, what, network, limit))
    process.start()
    sending.close()
    try:
        row: dict[str, Any] = receiving.recv()
    except EOFError:
        row = {}
    process.join()
    if not row:
        error = f"stopped at {limit} s" if (process.exitcode or 0) < 0 else "it ended without an answer"
        return {"error": error, "verdict": "no answer"}
    return row


def _answer(sending: Connection, what: str, network: tuple[str, str, int], limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    try:
        row = (ours if what == "ours" else theirs)(*network)
    except Exception as error:  # the network cannot be built
        row = {"error": f"{type(error).__name__}: {error}"[:200], "verdict": "no answer"}
    sending.send(row)


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means of the shares, the largest deviation, what gave no answer."""
    shares = {name: row.get("ours", {}).get("share", 0.0) for name, row in rows.items()}
    hard = [share for name, share in shares.items() if name.partition("@")[0] in HARD]
    answers = [row["ours"] for row in rows.values() if "deviation" in row.get("ours", {})]
    deviations = [answer["deviation"] for answer in answers if "precision" not in answer]
    return {
        "networks": len(rows),
        "mean share": statistics.mean(shares.values()),
        "mean share, hard list": statistics.mean(hard) if hard else None,
        "complete": sum(share > 0.98 for share in shares.values()),
        "largest deviation": max(deviations, default=0.0),
        "no answer": {name: row["ours"]["error"] for name, row in rows.items() if "error" in row.get("ours", {})},
        "torch-pruning": dict(Counter(row["theirs"]["verdict"] for row in rows.values() if "theirs" in row)),
    }


def _listed() -> int:
    """Networks on the committed list, whether their library is installed or not."""
    return sum(bool(line) and not line.startswith("#") for line in NETWORKS.read_text().splitlines())


def summary_table(rows: dict[str, dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    s = summary(rows)
    peer = ", ".join(f"{count} {verdict}" for verdict, count in sorted(s["torch-pruning"].items()))
    tried = sum(s["torch-pruning"].values())
    # A merge that is not exact raises an error.
    single = sum("precision" in row.get("ours", {}) for row in rows.values())
    mine = [f"{s['networks'] - len(s['no answer'])} exact" + (f" ({single} of them in float32)" if single else "")]
    if s["no answer"]:
        mine.append(f"{len(s['no answer'])} no answer")
    lines = [
        "| | channel graph | torch-pruning |",
        "|---|---|---|",
        f"| networks measured, of those on the list | {s['networks']} of {_listed()} | {tried} of {_listed()} |",
        f"| verdict | {', '.join(mine)} | {peer} |",
        "| filters merged when every group is halved, of half of all filters (mean) "
        f"| {100 * s['mean share']:.0f} % | |",
        f"| the same, for the {len(HARD)} networks of which version 0.1 merged least "
        f"| {100 * (s['mean share, hard list'] or 0):.0f} % | |",
        f"| largest deviation of the outputs, in float64 | {s['largest deviation']:.0e} | |",
    ]
    return "\n".join(lines)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One row per network, as a Markdown table; "-": not measured."""

    def mine(row: dict[str, Any]) -> str:
        if "error" in row:
            return f"no answer: {row['error'].partition(':')[0]} | | | "
        seconds = f"{row['seconds']:.1f}" if "seconds" in row else "-"
        precision = f" ({row['precision']})" if "precision" in row else ""
        return f"{100 * row['share']:.0f} % | {row['deviation']:.0e}{precision} | {row['form']} | {seconds}"

    def other(row: dict[str, Any]) -> str:
        verdict = row["verdict"] + (f" ({row['deviation']:.1g})" if row["verdict"] == "wrong" else "")
        seconds = f"{row['seconds']:.1f}" if row.get("seconds") else "-"
        return f"{verdict} | {seconds}"

    lines = [
        "| network | share merged | deviation | form | merge (s) | torch-pruning | its groups (s) |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in rows.items():
        name = key.partition("@")[0]
        theirs = other(row["theirs"]) if "theirs" in row else "- | -"
        lines.append(f"| {name}{' (hard)' if name in HARD else ''} | {mine(row['ours'])} | {theirs} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--hard", action="store_true", help="the hard list only")
    parser.add_argument("--missing", action="store_true", help="only what the result file lacks")
    parser.add_argument("--what", nargs="+", choices=["ours", "theirs"], default=["ours", "theirs"])
    parser.add_argument("--limit", type=int, default=LIMIT, help="CPU seconds until a network is stopped")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for library in ("timm", "torchvision", *(["torch_pruning"] if "theirs" in options.what else [])):
        import_module(library)
    rows: dict[str, dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else {}
    for network in networks():
        if options.only not in network[1] or (options.hard and network[1] not in HARD):
            continue
        row = rows.setdefault(f"{network[1]}@{network[2]}", {})
        for what in options.what:
            if not options.missing or what not in row:
                row[what] = _run(what, network, options.limit)
        print(network[1], row, flush=True)
        libraries = {p: version(p) for p in ("torch", "torchvision", "timm", "torch-pruning")}
        options.out.write_text(json.dumps({"versions": libraries, "rows": rows}, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
