"""Do the neighbouring methods help? Test accuracy under the FM5k protocol, one small JSON file per run.

Data and network C3(32) are those of the recipe ``fm5k``, the schedule is a quarter as long: 15 epochs, the learning
rate divided by ten after 12 and 14 of them. The figure is the test accuracy after the last epoch. Arms:

``baseline``       the plain network
``expand_cl``      ExpandNet(kind="CL"): convolutions over-parameterised four times, the same function at the start
``*_third``        the same with a third of the learning rate: a product of three factors takes three steps at once
``narrow``         C3(16) from scratch
``ucp``            a third of the epochs with ChannelImportance, then half of the filters of every layer (the most open
                   gates), drawn anew and trained for the rest, as published
``ucp_kept``       the same with the weights that were trained with the gates
``resnet``         ResNet-14 (option A) on the images averaged to 14x14, 5 epochs, Nesterov, learning rate 0.1
``anchored``       the same with one kernel per stage (C3 has no blocks to share in)
``anchored_regulator``   with regulators
``wavelet``        the details of a wavelet decomposition (db2, one level) added to the images
``wavelet_edges``  the details instead of the images
``maxima``         local modulus maxima (haar, scale 2) added to the images

    python -m benchmarks.neighbours --arms baseline expand_cl --seeds 1 2 3     # skips runs whose file exists
    python -m benchmarks.neighbours --table
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from scipy import stats
from torch.nn import functional as F

from benchmarks.classifier import Classifier
from benchmarks.loader import SeededBatches
from benchmarks.models import CifarResNet
from benchmarks.runs import interval, read_runs, run_missing, run_parser
from lightning_filterdiv import ChannelImportance, ExpandNet
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_importance import prune_channels, remove_gates, select_channels
from lightning_filterdiv.demo import FashionMNIST, SmallConvNet
from lightning_filterdiv.shared_basis import share_anchored_filters
from lightning_filterdiv.wavelet import WaveletModulusMaxima, WaveletReconstruction

EPOCHS, RESNET_EPOCHS, LEARNING_RATE, BATCH, WIDTH = 15, 5, 0.02, 64, 32
RESULTS = Path(__file__).parent / "results" / "neighbours"


def data(seed: int) -> FashionMNIST:
    """FM5k: 5,000 training and all test images."""
    source = FashionMNIST(train_images=5_000, batch_size=BATCH, seed=seed)
    source.setup()
    return source


def classifier(seed: int, epochs: int = EPOCHS, width: int = WIDTH, rate: float = LEARNING_RATE) -> SmallConvNet:
    """C3(width), its schedule scaled to ``epochs``."""
    pl.seed_everything(seed, verbose=False)
    milestones = [round(0.8 * epochs), round(0.92 * epochs)]
    model = SmallConvNet(width=width, image_size=28, lr=rate, weight_decay=1e-4, milestones=milestones)
    return model.to(memory_format=torch.channels_last)


def train(
    model: pl.LightningModule, source: FashionMNIST, seed: int, callbacks: Sequence[Callback] = (), epochs: int = EPOCHS
) -> float:
    """Fit, and return the seconds it took."""
    assert source._train is not None
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, callbacks=list(callbacks), limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(model, SeededBatches(source._train.tensors, BATCH, seed))
    return time.perf_counter() - started


@torch.no_grad()
def accuracy(model: torch.nn.Module, source: FashionMNIST) -> float:
    """On all test images, in eval mode."""
    assert source._test is not None
    images, labels = source._test.tensors
    model.eval()
    hits = torch.cat([model(part).argmax(1) for part in images.split(500)]) == labels
    return round(float(hits.double().mean()), 5)


def _fit(
    seed: int,
    callbacks: list[Callback],
    rate: float = LEARNING_RATE,
    width: int = WIDTH,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Any]:
    source, model = data(seed), classifier(seed, width=width, rate=rate)
    if transform is not None:
        _change(source, transform)
    seconds = train(model, source, seed, callbacks)
    return {
        "test_accuracy": accuracy(model, source),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "callbacks": [repr(callback) for callback in callbacks],
    }


def _change(source: FashionMNIST, transform: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for part in (source._train, source._test):
        assert part is not None
        part.tensors = (transform(part.tensors[0]), part.tensors[1])


def _ucp(seed: int, fresh: bool) -> dict[str, Any]:
    source, model, callback = data(seed), classifier(seed, EPOCHS // 3), ChannelImportance()
    seconds = train(model, source, seed, [callback], EPOCHS // 3)
    second = classifier(seed, EPOCHS - EPOCHS // 3)
    if not fresh:
        second.load_state_dict(remove_gates(model).state_dict())
    graph = ChannelGraph.trace(second)
    narrow = prune_channels(second, graph, select_channels(graph, callback.importance, keep_fraction=0.5))
    assert isinstance(narrow, SmallConvNet)
    seconds += train(narrow, source, seed, epochs=EPOCHS - EPOCHS // 3)
    return {
        "test_accuracy": accuracy(narrow, source),
        "parameters": sum(p.numel() for p in narrow.parameters()),
        "seconds": round(seconds, 1),
        "gates": {name: [round(float(g), 3) for g in gates] for name, gates in callback.importance.items()},
    }


def _resnet(seed: int, share: Callable[[torch.nn.Module], Any]) -> dict[str, Any]:
    source = data(seed)
    _change(source, lambda images: F.avg_pool2d(images, 2))
    pl.seed_everything(seed, verbose=False)
    net = CifarResNet(14, channels=1)
    share(net)
    seconds = train(Classifier(net, RESNET_EPOCHS, 0.1), source, seed, epochs=RESNET_EPOCHS)
    return {
        "protocol": f"FM5k/ResNet-14, 14x14, {RESNET_EPOCHS} epochs",
        "test_accuracy": accuracy(net, source),
        "parameters": sum(p.numel() for p in net.parameters()),
        "seconds": round(seconds, 1),
    }


ARMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "baseline": lambda seed: _fit(seed, []),
    "baseline_third": lambda seed: _fit(seed, [], LEARNING_RATE / 3),
    "expand_cl": lambda seed: _fit(seed, [ExpandNet(kind="CL")]),
    "expand_cl_third": lambda seed: _fit(seed, [ExpandNet(kind="CL")], LEARNING_RATE / 3),
    "narrow": lambda seed: _fit(seed, [], width=WIDTH // 2),
    "ucp": lambda seed: _ucp(seed, fresh=True),
    "ucp_kept": lambda seed: _ucp(seed, fresh=False),
    "resnet": lambda seed: _resnet(seed, lambda net: net),
    "anchored": lambda seed: _resnet(seed, share_anchored_filters),
    "anchored_regulator": lambda seed: _resnet(seed, lambda net: share_anchored_filters(net, regulator=True)),
    "wavelet": lambda seed: _fit(seed, [], transform=WaveletReconstruction(output="add")),
    "wavelet_edges": lambda seed: _fit(seed, [], transform=WaveletReconstruction()),
    "maxima": lambda seed: _fit(seed, [], transform=WaveletModulusMaxima(output="add")),
}


def run(arm: str, seed: int) -> dict[str, Any]:
    """One arm of one seed."""
    return {
        "arm": arm,
        "seed": seed,
        "protocol": f"FM5k/C3({WIDTH}), {EPOCHS} epochs",
        **ARMS[arm](seed),
        "torch": torch.__version__,
    }


def table(folder: Path, beginnings: Sequence[str] = ("",), baseline: str = "baseline") -> str:
    """Markdown: parameters, mean accuracy with a 95 % interval, paired difference to the baseline, paired t-test.

    Args:
        folder: of the results.
        beginnings: of the names of the arms to show beside the baseline.
        baseline: the arm to compare with.
    """
    chosen = [arm for arm in ARMS if arm == baseline or arm.startswith(tuple(beginnings))]
    results = read_runs(folder, chosen)
    base = {result["seed"]: result["test_accuracy"] for result in results.get(baseline, [])}
    rows = [
        "| arm | seeds | parameters | test accuracy % | difference to baseline | p (uncorrected) |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        values = [100 * result["test_accuracy"] for result in runs]
        shared = [result for result in runs if result["seed"] in base]
        difference = [100 * (result["test_accuracy"] - base[result["seed"]]) for result in shared]
        delta = p = ""
        if arm != baseline and len(difference) > 1:
            delta, p = interval(difference, "+"), f"{stats.ttest_1samp(difference, 0).pvalue:.2f}"
        rows.append(f"| {arm} | {len(runs)} | {runs[0]['parameters']:,} | {interval(values)} | {delta} | {p} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    options = run_parser(__doc__, "--arms", list(ARMS), [1, 2, 3], RESULTS).parse_args()
    if options.table:
        print(table(options.out))
        return
    run_missing(options, run)


if __name__ == "__main__":
    main()
