"""CPU seconds of a merge with its proof, part by part, and of the question which counts forward can express.

    python -m benchmarks.cost.merge_time

ResNet-50 at 96 x 96 pixels, half as many channels in every group, one thread. The merge runs several times, and the
fastest counts. Time spent in a part that another one calls belongs to the inner part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
import torchvision
from torch import nn

from benchmarks.common.device import description, result_path
from lightning_filterdiv.channel_graph import ChannelGraph, verify
from lightning_filterdiv.channel_graph.decisions import FollowDecisions, RecordDecisions
from lightning_filterdiv.channel_graph.modules import copy_network
from lightning_filterdiv.channel_graph.narrow import Narrowing, tie
from lightning_filterdiv.channel_graph.verify import random_clusters, randomise
from lightning_filterdiv.narrowing import merge

RESULT = result_path("merge_time.json", "cpu")
REST = "all else"
#: Networks whose forward splits and joins channels.
ASKED: dict[str, Callable[[], nn.Module]] = {
    "shufflenet_v2_x1_0": torchvision.models.shufflenet_v2_x1_0,
    "res2net50_26w_4s": lambda: timm.create_model("res2net50_26w_4s"),
}


class Parts:
    """Seconds of the parts of a piece of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = [REST]
        self._mark = time.process_time()

    def _close(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the body to part ``name``."""
        self._close()
        self._open.append(name)
        try:
            yield
        finally:
            self._close()
            self._open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, counted to part ``name``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return run

    def end(self) -> dict[str, float]:
        """Seconds of every part."""
        self._close()
        return self.seconds


def profile(model: nn.Module, images: torch.Tensor, clusters: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of the parts of one merge."""
    parts = Parts()
    narrow = "narrow, in both types"

    class Timed(Narrowing):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with parts.part(narrow):
                super().__init__(*args, **kwargs)

        def __call__(self, model: nn.Module) -> nn.Module:
            with parts.part(narrow):
                return super().__call__(model)

    def watched(mode: Any) -> Any:
        class Watched(mode):  # type: ignore[misc]
            def __enter__(self) -> Any:
                self._part = parts.part("forward passes of the proof, in float64")
                self._part.__enter__()
                return super().__enter__()

            def __exit__(self, *error: Any) -> None:
                super().__exit__(*error)
                self._part.__exit__(*error)

        return Watched

    replaced = (
        (ChannelGraph, "trace", parts.timed("trace", ChannelGraph.trace)),
        (merge, "Narrowing", Timed),
        (merge, "copy_network", parts.timed("copy and tie", copy_network)),
        (merge, "tie", parts.timed("copy and tie", tie)),
        (verify, "as_type", parts.timed("copies in float64", verify.as_type)),
        (verify, "RecordDecisions", watched(RecordDecisions)),
        (verify, "FollowDecisions", watched(FollowDecisions)),
    )
    with ExitStack() as stack:
        for owner, name, new in replaced:
            stack.enter_context(patch.object(owner, name, new))
        merge.merge_channels(model, clusters, images, tolerance=float("inf"))
    return parts.end()


def merged(times: int) -> dict[str, float]:
    """Parts of the fastest of some merges of a ResNet-50."""
    model = torchvision.models.resnet50(weights=None).eval()
    images = torch.rand(1, 3, 96, 96)
    randomise(model, torch.Generator().manual_seed(0))
    graph = ChannelGraph.trace(model, images)
    clusters = random_clusters(graph, torch.Generator().manual_seed(0), keep=0.5)
    return min((profile(model, images, clusters) for _ in range(times)), key=lambda parts: sum(parts.values()))


def asked(name: str, times: int) -> float:
    """Seconds of ``expressible_counts`` for half of all channels; the fastest of some calls."""
    graph = ChannelGraph.trace(ASKED[name]().eval(), torch.zeros(1, 3, 96, 96))
    wanted = {group.name: max(1, group.size // 2) for group in graph.groups}
    seconds = []
    for _ in range(times):
        start = time.process_time()
        graph.expressible_counts(wanted)
        seconds.append(time.process_time() - start)
    return min(seconds)


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    parts = sorted(record["merge"].items(), key=lambda part: (part[0] == REST, -part[1]))
    whole = sum(record["merge"].values())
    lines = ["| | CPU seconds |", "|---|---|", f"| merge of a ResNet-50, with proof | {whole:.2f} |"]
    lines += [f"| of this: {name} | {seconds:.2f} |" for name, seconds in parts]
    lines += [f"| `expressible_counts`, {name} | {seconds:.2f} |" for name, seconds in record["asked"].items()]
    return "\n".join([*lines, "", f"{record['device']}, torch {record['torch']}; 96 x 96 pixels."])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="calls, of which the fastest counts")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    record = {"device": description("cpu"), "torch": version("torch"), "merge": merged(options.times)}
    record["asked"] = {name: asked(name, options.times) for name in ASKED}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
