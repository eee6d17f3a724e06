"""Cost of a snapshot of FilterSimilarityMonitor: seconds and peak extra memory of one logging epoch on a large network.

    python -m benchmarks.cost.monitor --networks resnet50 wrn28_10

A real Trainer with a TensorBoard logger trains one batch per epoch. The hook at the end of an epoch is timed in CPU
time of the process. Peak memory is the kernel's high-water mark of resident memory, reset before each snapshot (Linux).
The first snapshot of a run also loads fonts, so only later ones count.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.common.paths import RESULTS
from benchmarks.cost.events import large_network
from benchmarks.cost.measure import measured
from benchmarks.training.classification import Classifier
from lightning_filterdiv import FilterSimilarityMonitor
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.monitor.functional import redundancy_metrics

RESULT = RESULTS / "monitor.json"


class _Timed(FilterSimilarityMonitor):
    """Monitor that times every snapshot."""

    costs: ClassVar[list[dict[str, float]]] = []

    def _take_snapshot(self, trainer: pl.Trainer, epoch: int, when: str) -> None:
        with measured() as cost:
            super()._take_snapshot(trainer, epoch, when)
        self.costs.append({"CPU seconds": cost.cpu_seconds, "peak extra MiB": cost.extra_mib})


def measure(network: str, looks: int) -> dict[str, float]:
    """Return the median of each cost over snapshots, without the first one, before training."""
    net, images = large_network(network)
    model = Classifier(net, images.shape[1:], lr=0.01, momentum=0.0)
    batch = torch.utils.data.TensorDataset(images, torch.tensor([0, 1]))
    monitor = _Timed(figures_every_n_looks=1)
    monitor.costs.clear()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=looks,
            logger=TensorBoardLogger(folder),
            callbacks=[monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
        trainer.fit(model, torch.utils.data.DataLoader(batch, batch_size=2))
        written = sum(file.stat().st_size for file in Path(folder).rglob("events*"))
    result = {key: median(cost[key] for cost in monitor.costs[1:]) for key in monitor.costs[0]}
    layers = select_filters(net)
    numbers: list[float] = []
    for _ in range(looks):
        started = time.thread_time()
        redundancy_metrics(layers)
        numbers.append(time.thread_time() - started)
    result["CPU seconds of the numbers alone"] = median(numbers)
    result["layers"] = float(len(monitor.layers))
    return result | {"MiB written per look": written / len(monitor.costs) / 2**20}


def table(record: dict[str, Any]) -> str:
    """Markdown, with a line on the machine."""
    results = record["looks"]
    names = list(results)
    rows = [f"| one look, 8 layers drawn | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
    rows += [f"| {key} | {' | '.join(f'{results[name][key]:.3g}' for name in names)} |" for key in results[names[0]]]
    busy = f"load average {record['load']:.1f} on {record['cores']} cores at the start"
    return "\n".join([*rows, "", f"CPU, {record['threads']} thread, torch {record['torch']}; {busy}."])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet50", "wrn28_10"])
    parser.add_argument("--looks", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    load, cores = os.getloadavg()[0], os.cpu_count()
    results = {name: measure(name, options.looks) for name in options.networks}
    record = {"torch": version("torch"), "threads": torch.get_num_threads(), "load": load, "cores": cores}
    print(table(record | {"looks": results}))
    options.out.write_text(json.dumps(record | {"looks": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
