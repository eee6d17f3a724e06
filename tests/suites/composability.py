"""Which callbacks work together, in which order: tried, one fit of three epochs each.

    python -m tests.suites.composability   # writes benchmarks/results/composability.json, a table of the README

A pair works if the fit ends with finite weights that differ from those of each of the two alone, as far as a callback
changes training at all.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)

from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, Run, batches, differing, fit, since_lightning_2_6

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "composability.json"
WORKS, SWAP = "works", "swap"

#: What else users put beside a callback: callbacks, and options of the trainer.
BESIDE: dict[str, tuple[Callable[[Path], list[Callback]], dict[str, Any]]] = {
    "EMA": (lambda folder: [since_lightning_2_6("EMAWeightAveraging")(decay=0.9)], {}),
    "SWA": (lambda folder: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)], {}),
    "early stopping": (lambda folder: [EarlyStopping("val_loss", patience=5)], {}),
    "top-k checkpoints": (
        lambda folder: [ModelCheckpoint(dirpath=folder, monitor="val_loss", save_top_k=2, filename="{epoch}")], {},
    ),
    "timer": (lambda folder: [Timer(timedelta(hours=1))], {}),
    "clipping by norm": (lambda folder: [], {"gradient_clip_val": 0.5}),
    "clipping by value": (lambda folder: [], {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
}  # fmt: skip


def _train(callbacks: list[Callback], scale: float, **options: Any) -> Run:
    model = Classifier(lr_scale=scale)
    return fit(callbacks, model=model, max_epochs=3, validation=batches(steps=1), **options)


def _outcome(make: Callable[[], list[Callback]], parts: list[Case], scale: float, **options: Any) -> str:
    try:
        run = _train(make(), scale, **options)
    except Exception as error:
        return SWAP if "Swap the two" in str(error) else f"refused: {error}"
    weights = run.tensors()
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    for case in parts:
        others = [c.make() for c in parts if c is not case]
        if case.trains_differently and not options:
            alone = _train(others, scale).tensors()
            assert differing(weights, alone), f"{case.name} did nothing beside {[c.name for c in parts]}"
    return WORKS


def pairs() -> dict[str, dict[str, str]]:
    """First callback of the list -> second -> what happens."""
    found: dict[str, dict[str, str]] = {}
    for first in ONE_EACH:
        row = found.setdefault(first.cls.__name__, {})
        for second in ONE_EACH:
            if first.cls is not second.cls:
                scale = min(first.lr_scale, second.lr_scale)
                row[second.cls.__name__] = _outcome(
                    lambda a=first, b=second: [a.make(), b.make()], [first, second], scale
                )
    return found


def beside(folder: Path) -> dict[str, dict[str, str]]:
    """Callback -> what stands beside it -> what happens."""
    found: dict[str, dict[str, str]] = {}
    for case in ONE_EACH:
        row = found.setdefault(case.cls.__name__, {})
        for name, (others, options) in BESIDE.items():
            place = folder / case.name / name
            row[name] = _outcome(lambda c=case, o=others, p=place: [c.make(), *o(p)], [], case.lr_scale, **options)
    return found


def everything(folder: Path) -> dict[str, Any]:
    """Both tables."""
    with warnings.catch_warnings(), contextlib.chdir(folder):  # where the monitor writes its figures
        warnings.simplefilter("ignore")
        return {"pairs": pairs(), "beside": beside(folder)}


def main() -> None:
    """Write the result file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        result = everything(Path(folder))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
