"""Objects of the table of wrong uses: small networks, damaged files, and the command called in-process."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_filterdiv import CentripetalSGD, WeightAsynchronousUpdate
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.narrowing import merge_channels, narrow, save_merged

#: An image that :func:`net` takes.
IMAGES = torch.zeros(2, 1, 8, 8)
#: Clusters of the first layer of :func:`net`.
CLUSTERS = torch.tensor([0, 0, 1, 2])
#: ``--model`` for the demo's network.
MODEL = ("--model", "lightning_filterdiv.demo:SmallConvNet")


class CommandError(Exception):
    """``filterdiv`` ended with exit status 2; the message is what it wrote to stderr."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )


def graph() -> ChannelGraph:
    return ChannelGraph.trace(_remembered(net()), IMAGES)


_NETWORKS: list[nn.Module] = []


def _remembered(model: nn.Module) -> nn.Module:
    """A graph keeps no network alive but its own."""
    _NETWORKS[:] = [model]
    return model


def prune(keep: Any) -> nn.Module:
    model = net()
    return narrow(model, ChannelGraph.trace(model, IMAGES), keep)


def command(*arguments: str) -> None:
    """Run ``filterdiv``; an error is what a user reads."""
    text = io.StringIO()
    code: Any
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(text):
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = stop.code
    if code == 2:
        raise CommandError(text.getvalue())
    raise AssertionError(f"exit status {code!r}")


def fit_from_yaml(callback: str, arguments: str, more: str = "") -> None:
    """``filterdiv fit`` with one callback in the YAML file."""
    Path("run.yaml").write_text(
        "model: lightning_filterdiv.demo.SmallConvNet\ndata: lightning_filterdiv.demo.Digits\n" + more + "trainer:\n"
        f"  max_epochs: 1\n  callbacks:\n    - class_path: {callback}\n      init_args: {arguments}\n"
    )
    command("fit", "--config", "run.yaml")


# --------------------------------------------------------------------------- files, in the current folder


def text_file() -> str:
    Path("text.ckpt").write_text("hello")
    return "text.ckpt"


def weights() -> str:
    torch.save(SmallConvNet().state_dict(), "bare.pt")
    return "bare.pt"


def checkpoint(**entries: Any) -> str:
    torch.save({"state_dict": SmallConvNet().state_dict(), "epoch": 1, **entries}, "plain.ckpt")
    return "plain.ckpt"


def flipped() -> str:
    """One bit of a weight is another one."""
    content = bytearray(Path(checkpoint()).read_bytes())
    content[len(content) // 2] ^= 1
    Path("flipped.ckpt").write_bytes(content)
    return "flipped.ckpt"


def clusters(**changes: Any) -> str:
    """A checkpoint with a state of CentripetalSGD, damaged by ``changes``."""
    state = CentripetalSGD().state_dict()
    state["extra"] |= {"clusters": {"net.conv1": torch.zeros(32, dtype=torch.int64)}, "strength": 1.0}
    return checkpoint(callbacks={"CentripetalSGD": state | changes})


def truncated() -> str:
    content = Path(weights()).read_bytes()
    Path("half.pt").write_bytes(content[: len(content) // 2])
    return "half.pt"


def other_content() -> str:
    torch.save([1, 2], "list.pt")
    return "list.pt"


def merged(**changes: Any) -> str:
    """A file of save_merged; an entry set to ``None`` is missing."""
    save_merged(merge_channels(net(), {"0": CLUSTERS}, IMAGES, tolerance=float("inf")).network, "merged.pt")
    content = torch.load("merged.pt", weights_only=True) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, "merged.pt")
    return "merged.pt"


def load_state(state: Any) -> None:
    WeightAsynchronousUpdate().load_state_dict(state)
