"""The README's picture: one layer of one network after three trainings, as heat maps of filter similarity.

    python -m benchmarks.experiments.picture   # a minute; writes docs/img/similarity.png and results/picture.json

C3(32) on scikit-learn's digits. All three continue from the same eight epochs: plainly, with BasisOrthonormality, and
with CentripetalSGD, for equally many epochs more. One seed: it shows what the callbacks do, not what they gain.
"""

from __future__ import annotations

import argparse
import copy
import json
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from benchmarks.common.paths import RESULTS, ROOT
from lightning_filterdiv import BasisOrthonormality, CentripetalSGD
from lightning_filterdiv.demo import Digits, SmallConvNet
from lightning_filterdiv.monitor.comparison import compare_heat_maps
from lightning_filterdiv.monitor.figures import to_rgb
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.monitor.views import LayerView, view_layer

RESULT = RESULTS / "picture.json"
PICTURE = ROOT / "docs" / "img" / "similarity.png"
LAYER, START, EPOCHS, SEED = "net.conv2", 8, 24, 0
ARMS: dict[str, list[Callback]] = {
    "trained as usual": [],
    "+ BasisOrthonormality": [BasisOrthonormality(form="soft")],
    "+ CentripetalSGD": [CentripetalSGD(keep_fraction=0.5)],
}


def fit(model: SmallConvNet, epochs: int, callbacks: list[Callback]) -> float:
    """Train on digits; returns the test accuracy after the last epoch."""
    pl.seed_everything(SEED, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Digits(seed=SEED))
    return float(trainer.callback_metrics["val_acc"])


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    pl.seed_everything(SEED, verbose=False)
    start = SmallConvNet()
    fit(start, START, [])
    views: dict[str, LayerView] = {}
    arms: dict[str, Any] = {}
    for label, callbacks in ARMS.items():
        model = copy.deepcopy(start)
        accuracy = fit(model, EPOCHS, callbacks)
        conv = model.net.conv2
        assert isinstance(conv, torch.nn.Conv2d)
        views[label] = view_layer("conv2", conv)
        arms[label] = {"test_accuracy": accuracy, **redundancy_metrics({LAYER: conv})[LAYER]}
    record = {"seed": SEED, "epochs": [START, EPOCHS], "layer": LAYER, "torch": version("torch"), "arms": arms}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    Image.fromarray(to_rgb(compare_heat_maps(views))).quantize(256).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
