"""The mathematics is used by people who have no Lightning: it must import, and run, without it."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import lightning_filterdiv

#: Modules that may know Lightning; every other one of the package must import without it.
LIGHTNING = (
    "lightning_filterdiv.training.callback",
    "lightning_filterdiv.training.steps",
    "lightning_filterdiv.training.example_inputs",
    "lightning_filterdiv.centripetal.forecast",  # reads the trainer's schedule
    "lightning_filterdiv.centripetal.selection",  # refuses optimizers of a fit
    "lightning_filterdiv.squeezing.",  # fits
    "lightning_filterdiv.demo.",  # a LightningModule and LightningDataModules
    "lightning_filterdiv.__main__",  # runs the command
    "lightning_filterdiv.command_line.fit",
    "lightning_filterdiv.command_line.demo",
    "lightning_filterdiv.command_line.merge",  # reads checkpoints of CentripetalSGD
)

_BLOCKED = """
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "lightning_fabric"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def _modules() -> list[str]:
    names = ["lightning_filterdiv"]
    names += [m.name for m in pkgutil.walk_packages(lightning_filterdiv.__path__, "lightning_filterdiv.")]
    return [
        name
        for name in names
        if not name.endswith(".callback") and not any(f"{name}." == part or name.startswith(part) for part in LIGHTNING)
    ]


def _without_lightning(lines: str) -> str:
    process = subprocess.run([sys.executable, "-c", _BLOCKED + lines], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_everything_but_callbacks_imports_without_lightning() -> None:
    names = _modules()
    for method in ("async_update", "centripetal", "expansion", "orthonormality", "repr_", "wavelet"):
        assert f"lightning_filterdiv.{method}.functional" in names
    lines = f"""
failed = {{}}
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(failed)
"""
    assert _without_lightning(lines).strip() == "{}"


def test_the_public_mathematics_runs_without_lightning() -> None:
    """Names are looked up in the rooms, as users write them."""
    lines = """
import torch
from lightning_filterdiv.async_update import AsynchronousUpdate
from lightning_filterdiv.centripetal import CentripetalUpdate, cluster_channels, clustered_tensors
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.narrowing import merge_channels, tie_channels
from lightning_filterdiv.orthonormality import soft_orthogonality

conv = torch.nn.Conv2d(3, 8, 3)
model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
images = torch.randn(2, 3, 9, 9)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
update = AsynchronousUpdate(select_filters(model), optimizer)
(model(images).square().mean() + soft_orthogonality(conv.weight.flatten(1))).backward()
update.before_step(0)
optimizer.step()
update.after_step()
graph = ChannelGraph.trace(model, images)
clusters = cluster_channels(model, graph, 0.5)
CentripetalUpdate(clustered_tensors(model, graph, clusters), optimizer, strength=1.0)
tie_channels(model, clusters, images)
merge_channels(model, clusters, images)
print(sorted(name for name in sys.modules if name.split(".")[0] == "lightning"))
"""
    assert _without_lightning(lines).strip() == "[]"


def test_the_package_itself_imports_nothing_heavy() -> None:
    lines = "import sys, lightning_filterdiv; print({'torch', 'lightning', 'numpy'} & sys.modules.keys())"
    process = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


def test_a_callback_needs_lightning() -> None:
    """The block works: this is what everything else is free of."""
    lines = """
try:
    from lightning_filterdiv import RePr
except ImportError as error:
    print(error)
"""
    assert "is blocked" in _without_lightning(lines)
