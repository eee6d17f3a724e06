"""Channel graphs side by side: this package and torch-pruning, on networks and on operators that mix channels.

    python -m benchmarks.cost.peers

Each tool is judged in its own terms, in float64, with random norm statistics and affines:

*this package*
    random clusters of every group of channels are tied, the network is physically narrowed (about 60 % of the channels
    stay) and its outputs are compared with the tied original. ``pinned, rest exact``: the layer in front of the
    operator keeps all its channels, which the graph says, and the rest is narrowed.
*torch-pruning*
    removes channels and does not merge them, so it gets the easier task: for each group of its ``DependencyGraph``
    (documented API: ``get_all_groups``, ``group.prune``), 40 % of the channels are chosen (the same ones in each part
    of a grouped convolution or group norm) and *silenced*, that is, every producer row and norm entry that its own
    group lists is set to zero. Then the group is pruned. A silent channel contributes nothing, so if the group is
    right the outputs do not change.

``exact``: relative difference of the outputs at most 1e-9. ``wrong (x)``: the largest difference, relative to the
largest output. ``crash``: an exception. Times are tracing (ours) and building the dependency graph (theirs), one
thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning
import torchvision
from torch import Tensor, nn

from benchmarks.common.paths import RESULTS
from benchmarks.models import channel_graph as models
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.modules import find_tensors
from lightning_filterdiv.channel_graph.verify import randomise

RESULT = RESULTS / "peers.json"
TOLERANCE = 1e-9
TORCHVISION = (
    "resnet18",
    "resnet50",
    "densenet121",
    "vgg11_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "shufflenet_v2_x0_5",
    "squeezenet1_0",
    "googlenet",
    "resnext50_32x4d",
)


@dataclass
class Case:
    """One network; ``layer``: whose channels an operator mixes, so that it is either exact or must be pinned."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Any
    layer: str | None = None


def cases() -> list[Case]:
    """The networks of the specification."""
    image = models.image()
    small: dict[str, tuple[Callable[[], nn.Module], Any]] = {
        "plain, norms": (models.plain, image),
        "plain, no norms": (lambda: models.plain(norm=False), image),
        "conv, flatten, linear": (models.flatten_linear, image),
        "ResNet, projection": (models.CifarResNet, image),
        "ResNet, option A (submodule)": (lambda: models.CifarResNet("module"), image),
        "ResNet, option A (in forward)": (lambda: models.CifarResNet("relative"), image),
        "ResNet, pre-activation": (models.PreActivation, image),
        "DenseNet": (models.DenseNet, image),
        "MobileNet block": (models.mobile, image),
        "MobileNet block with SE": (lambda: models.mobile(excite=True), image),
        "ShuffleNet": (models.ShuffleNet, image),
        "ShuffleNet (submodules)": (models.ModuleShuffle, image),
        "U-Net": (models.UNet, image),
        "two inputs, two outputs": (models.TwoInTwoOut, (image, models.image(channels=1))),
    }
    found = [Case(name, make, inputs) for name, (make, inputs) in small.items()]
    for name in TORCHVISION:
        size = 224 if name == "googlenet" else 96 if name == "squeezenet1_0" else 64
        found.append(Case(name, lambda name=name: build(name), models.image(n=1, size=size)))
    for name, make in models.MIXING.items():
        found.append(Case(f"between convolutions: {name}", lambda make=make: models.Between(make()), image, "first"))
    return found


def build(name: str) -> nn.Module:
    """A torchvision network with random weights."""
    options = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, weights=None, **options)


def ours(case: Case) -> tuple[str, float]:
    """(verdict, seconds) of this package."""
    model = case.make().eval()
    start = time.perf_counter()
    try:
        graph = ChannelGraph.trace(model, case.inputs)
        seconds = time.perf_counter() - start
        graph.verify()
    except Exception as error:
        return f"crash ({type(error).__name__})", time.perf_counter() - start
    return ("pinned, rest exact" if case.layer in graph.pinned else "exact"), seconds


def theirs(case: Case) -> tuple[str, float]:
    """(verdict, seconds) of torch-pruning."""
    generator = torch.Generator().manual_seed(0)
    model = case.make().double().eval()
    randomise(model, generator)
    inputs = case.inputs if isinstance(case.inputs, tuple) else (case.inputs,)
    inputs = tuple(x.double() for x in inputs)
    seconds, worst = 0.0, 0.0
    try:
        start = time.perf_counter()
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
        seconds = time.perf_counter() - start
        for group in graph.get_all_groups(ignored_layers=outputs(model), root_module_types=[nn.Conv2d, nn.Linear]):
            worst = max(worst, prune_silently(model, graph, group, inputs, generator))
    except Exception as error:
        return f"crash ({type(error).__name__})", seconds
    return ("exact" if worst <= TOLERANCE else f"wrong ({worst:.2g})"), seconds


def outputs(model: nn.Module) -> list[nn.Module]:
    """Layers that write network outputs, which no tool may narrow: told apart by name, as its user would have to."""
    last = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]
    named = [getattr(model, name) for name in ("classify", "mask", "third") if hasattr(model, name)]
    return [last, *named]


@torch.no_grad()
def prune_silently(
    model: nn.Module,
    graph: Any,
    group: Any,
    inputs: tuple[Tensor, ...],
    generator: torch.Generator,
    share: float = 0.4,
) -> float:
    """Silence a share of the channels of a group, prune them, and return the relative change of the outputs."""
    module, function = group[0].dep.target.module, group[0].dep.handler
    count = graph.get_out_channels(module)
    parts = max(group_count(dependency.target.module) for dependency, _ in group)
    if count % parts or count // parts < 2:
        return 0.0
    local = torch.randperm(count // parts, generator=generator)[: max(1, int(share * count / parts))]
    channels = sorted(int(p * (count // parts) + i) for p in range(parts) for i in local)
    chosen = graph.get_pruning_group(module, function, idxs=channels)
    for dependency, index in chosen:
        target = dependency.target.module
        if "in_channels" in dependency.handler.__name__ and not isinstance(target, nn.modules.batchnorm._NormBase):
            continue  # a consumer
        for tensor in (getattr(target, "weight", None), getattr(target, "bias", None)):
            if tensor is not None:
                tensor[index] = 0
    before = list(find_tensors(copy.deepcopy(model)(*inputs)))
    chosen.prune()
    after = list(find_tensors(model(*inputs)))
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(before, after, strict=True))


def group_count(module: object) -> int:
    """Parts of a module that must stay equally wide: groups of a convolution (not depthwise) or of a group norm."""
    if isinstance(module, nn.Conv2d) and module.groups < module.in_channels:
        return module.groups
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


def table(rows: list[dict[str, Any]]) -> str:
    """All cases as a Markdown table."""
    lines = [
        "| network | channel graph | torch-pruning |",
        "|---|---|---|",
    ]
    lines += [f"| {row['network']} | {row['ours'][0]} | {row['theirs'][0]} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for case in cases():
        torch.manual_seed(0)
        rows.append({"network": case.name, "ours": ours(case), "theirs": theirs(case)})
        print(table(rows).splitlines()[-1], flush=True)
    record = {"torch": version("torch"), "torch_pruning": version("torch-pruning"), "threads": 1, "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
