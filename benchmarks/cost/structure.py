"""Cost of a changed network per training step, relative to the plain one: interleaved pairs, medians, an A/A row.

    python -m benchmarks.cost.structure --pairs 40
    python -m benchmarks.cost.structure --networks ResNet-18 --pairs 5    # only these; the other rows stay

It is for methods that change the network instead of adding hooks to a step. Batch size is 64, images are 32x32. Seconds
are CPU seconds of one thread, which other work on the machine disturbs less than the clock. ResNet-18 (torchvision's,
with a stem for small images) is measured for ExpandNet, whose cost grows with the third power of the width.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common.paths import RESULTS
from benchmarks.cost.measure import interleaved, median_interval
from benchmarks.models import CifarResNet, build_network
from lightning_filterdiv.channel_importance import insert_gates
from lightning_filterdiv.expansion import expand
from lightning_filterdiv.narrowing import count_parameters
from lightning_filterdiv.shared_basis import share_anchored_filters, share_filter_bases
from lightning_filterdiv.wavelet import WaveletReconstruction

RESULT = RESULTS / "structure_cost.json"
BATCH = 64


class Enhanced(nn.Module):
    """A network behind a fixed wavelet layer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.layer, self.net = WaveletReconstruction(output="add"), net

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` images to ``(B, 10)`` logits."""
        logits: Tensor = self.net(self.layer(images))
        return logits


def _changed(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], nn.Module]:
    """``change`` works in place."""

    def build(net: nn.Module) -> nn.Module:
        change(net)
        return net

    return build


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "A/A": lambda net: net,
    "share_filter_bases": _changed(lambda net: share_filter_bases(net, shared=16, unique=1)),
    "share_anchored_filters": _changed(share_anchored_filters),
    "ExpandNet": _changed(expand),
    "ChannelImportance": _changed(insert_gates),
    "WaveletReconstruction": Enhanced,
}


#: Network -> how it is made, and what is measured on it.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "ResNet-20": (lambda: CifarResNet(20), tuple(CHANGES)),
    "ResNet-18": (lambda: build_network("resnet18", (3, 32, 32), 10), ("ExpandNet",)),
}


class Cost(NamedTuple):
    """Medians over pairs of steps."""

    change: str
    ratio: float
    low: float  # bootstrap 95 % interval
    high: float
    parameters: float  # relative to the plain network, while training
    network: str = "ResNet-20"


def measure(change: str, pairs: int, network: str = "ResNet-20") -> Cost:
    """Train the plain and the changed network side by side."""
    torch.manual_seed(0)
    make, _ = NETWORKS[network]
    plain = make()
    changed = CHANGES[change](make())
    models = [plain, changed]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4) for m in models]
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def step(which: int, number: int) -> float:
        start = time.process_time()
        optimizers[which].zero_grad()
        nn.functional.cross_entropy(models[which](images), labels).backward()
        optimizers[which].step()
        return time.process_time() - start

    ratio, low, high = median_interval([with_change / without for without, with_change in interleaved(step, pairs)])
    return Cost(change, ratio, low, high, count_parameters(changed) / count_parameters(plain), network)


def table(costs: list[Cost]) -> str:
    """Markdown."""
    rows = ["| network | with | step / plain step (95 %) | parameters while training / plain |", "|---|---|---|---|"]
    rows += [
        f"| {c.network} | {c.change} | {c.ratio:.2f} ({c.low:.2f} to {c.high:.2f}) | {c.parameters:.2f} |"
        for c in costs
    ]
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    there = [Cost(**cost) for cost in json.loads(options.out.read_text())["costs"]] if options.out.exists() else []
    costs = [cost for cost in there if cost.network not in options.networks]
    costs += [measure(change, options.pairs, name) for name in options.networks for change in NETWORKS[name][1]]
    costs.sort(key=lambda cost: list(NETWORKS).index(cost.network))
    print(table(costs))
    result = {"torch": version("torch"), "threads": 1, "batch": BATCH, "costs": [cost._asdict() for cost in costs]}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
