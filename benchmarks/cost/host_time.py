"""Time of the hooks of a step on one CPU thread, here and at another commit.

    python -m benchmarks.cost.host_time
    python -m benchmarks.cost.host_time --against 26da89e

There are two kinds of networks. Stacks of 18 and 108 convolutions with norms have two to eight channels. Their
arithmetic takes almost no time, so that the host's time remains, for which a GPU waits. ResNet-20 at batch 64 shows the
share of a step. Times are CPU time of one thread, so that other work on the machine adds little. A measurement is the
mean over some steps, which includes work done for many steps at once. The table shows medians of measurements.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.common.device import description, result_path
from benchmarks.cost import against
from benchmarks.models.cifar_resnet import CifarResNet
from lightning_filterdiv.async_update import AsynchronousUpdate
from lightning_filterdiv.centripetal import CentripetalUpdate, ClusteredTensor
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.orthonormality import OrthonormalityPenalty, filter_blocks

RESULT = result_path("host_time.json", "cpu")
FORMS = ("wau", "csgd", "soft", "srip", "convolutional")
NETWORKS = {"stack-18": 18, "stack-108": 108, "resnet-20": 20}
STEPS = {"stack-18": 64, "stack-108": 64, "resnet-20": 4}


def stack(depth: int, width: int = 2) -> nn.Sequential:
    """``depth`` pairs of a 3x3 convolution and a norm; three stages of ``width``, 2 and 4 times as many channels."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(3):
        for _ in range(depth // 3):
            layers += [nn.Conv2d(channels, width * 2**stage, 3, bias=False), nn.BatchNorm2d(width * 2**stage)]
            channels = width * 2**stage
    return nn.Sequential(*layers)


def hooks(
    form: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Callable[[int], object], Callable[[], object]]:
    """Return the functions to call before and after the optimizer's step."""
    if form == "wau":
        update = AsynchronousUpdate(select_filters(model), optimizer)
        return update.before_step, update.after_step
    if form == "csgd":
        tensors = [
            ClusteredTensor(name, parameter, 0, tuple(i * 5 // 8 for i in range(len(parameter))))
            for name, parameter in model.named_parameters()
            if not name.startswith("fc.")
        ]
        pull = CentripetalUpdate(tensors, optimizer, strength=0.05)
        return (lambda step: pull.before_step()), pull.after_step
    arguments: Any = {"form": form}
    penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, **arguments)
    return (lambda step: penalty.before_step(weight=1e-5, step=step)), penalty.after_step


def prepare(case: str) -> Callable[[], Mapping[str, float]]:
    """A measurement of ``"FORM NETWORK"``: microseconds in hooks and of the rest of a step, means over some steps."""
    form, network = case.split()
    torch.manual_seed(0)
    trained = network == "resnet-20"
    model: nn.Module = CifarResNet(20) if trained else stack(NETWORKS[network])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before, after = hooks(form, model, optimizer)
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    number = 0

    def measure() -> Mapping[str, float]:
        nonlocal number
        inside = rest = 0.0
        for _ in range(STEPS[network]):
            start = time.thread_time()
            if trained:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
            marks = [time.thread_time()]
            before(number)
            marks.append(time.thread_time())
            if trained:
                optimizer.step()
            marks.append(time.thread_time())
            after()
            end = time.thread_time()
            inside += marks[1] - marks[0] + end - marks[2]
            rest += marks[0] - start + marks[2] - marks[1]
            number += 1
        return {"inside": 1e6 * inside / STEPS[network], "rest": 1e6 * rest / STEPS[network]}

    return measure


def worker() -> None:
    """Run in a process of :func:`benchmarks.cost.against.compare`."""
    torch.set_num_threads(1)
    against.serve(prepare)


def rows(found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> list[dict[str, Any]]:
    """One row per case: per version the microseconds, and in a trained network their share of the rest of the step."""
    listed = []
    for case, versions in found.items():
        form, network = case.split()
        row: dict[str, Any] = {"form": form, "network": network, "microseconds": {}, "share": {}}
        for name, measured in versions.items():
            row["microseconds"][name] = median(one["inside"] for one in measured)
            if network == "resnet-20":
                row["share"][name] = median(one["inside"] / one["rest"] for one in measured)
        if len(versions) == 2:
            here, other = versions.values()
            row["ratio"] = median(a["inside"] / b["inside"] for a, b in zip(here, other, strict=True))
        listed.append(row)
    return listed


def table(record: Mapping[str, Any]) -> str:
    """Markdown."""
    names = list(record["rows"][0]["microseconds"])
    head = ["hooks", "network", *(f"us per step, {name}" for name in names)]
    head += [f"share of the step, {name}" for name in names] + ["ratio"] * (len(names) == 2)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in record["rows"]:
        cells = [row["form"], row["network"], *(f"{row['microseconds'][name]:.0f}" for name in names)]
        cells += [f"{100 * row['share'][name]:.2f} %" if row["share"] else "" for name in names]
        cells += [f"{row['ratio']:.2f}"] * (len(names) == 2)
        lines.append(f"| {' | '.join(cells)} |")
    line = f"{record['device']}, torch {record['torch']}; CPU time, medians of {record['rounds']} measurements."
    return "\n".join([*lines, "", line])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each case and version")
    parser.add_argument("--against", metavar="REV", help="a commit to compare with, in the same run")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    cases = [f"{form} {network}" for network in options.networks for form in options.forms]
    found = against.compare("benchmarks.cost.host_time", cases, options.rounds, options.against)
    torch.set_num_threads(1)
    head = {"device": description("cpu"), "torch": version("torch"), "rounds": options.rounds}
    record = head | {"rows": rows(found)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
