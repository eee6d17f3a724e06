"""Files and states that are refused."""

from __future__ import annotations

from pathlib import Path

from lightning_filterdiv import (
    CentripetalSGD,
    RePr,
)
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import load_weights, read_checkpoint
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.narrowing import load_merged, save_merged
from lightning_filterdiv.narrowing.files import MergedFileError
from tests.suites.wrong_uses.row import Row
from tests.suites.wrong_uses.support import (
    load_state,
    merged,
    net,
    other_content,
    text_file,
    truncated,
    weights,
)

CHECKPOINT: list[Row] = [
    Row(
        "a state of text",
        lambda: load_state("text"),
        ValueError,
        "state of WeightAsynchronousUpdate",
        "remove checkpoint['callbacks']",
    ),
    Row(
        "a state without a version",
        lambda: load_state({}),
        ValueError,
        "'version'",
        "remove checkpoint['callbacks']",
    ),
    Row(
        "a state of a newer release",
        lambda: load_state({"version": 2, "arguments": {}, "layers": {}, "extra": {}}),
        ValueError,
        "state version 2",
        "Resume from another checkpoint",
    ),
    Row(
        "a state with layers in a list",
        lambda: load_state({"version": 1, "arguments": {}, "layers": [1, 2], "extra": {}}),
        ValueError,
        "layers",
        "remove checkpoint['callbacks']",
    ),
    Row(
        "a state without its numbers",
        lambda: load_state({"version": 1, "arguments": {}, "layers": {}, "extra": {}}),
        ValueError,
        "'steps'",
        "remove checkpoint['callbacks']",
    ),
    Row(
        "a state with wrong numbers",
        lambda: load_state({"version": 1, "arguments": {}, "layers": {}, "extra": {"steps": "many"}}),
        ValueError,
        "steps",
        "remove checkpoint['callbacks']",
    ),
    Row(
        "a merged network that is not there",
        lambda: load_merged(net(), "nothing.pt"),
        FileNotFoundError,
        "nothing.pt",
        "filterdiv merge",
    ),
    Row(
        "a merged network of text",
        lambda: load_merged(net(), text_file()),
        MergedFileError,
        "text.ckpt",
        "merge the checkpoint again",
    ),
    Row(
        "half a merged network",
        lambda: load_merged(net(), truncated()),
        MergedFileError,
        "half.pt",
        "merge the checkpoint again",
    ),
    Row(
        "weights as a merged network",
        lambda: load_merged(net(), weights()),
        MergedFileError,
        "bare.pt",
        "merge the checkpoint again",
    ),
    Row(
        "a list as a merged network",
        lambda: load_merged(net(), other_content()),
        MergedFileError,
        "list.pt",
        "merge the checkpoint again",
    ),
    Row(
        "a merged network of another class",
        lambda: load_merged(SmallConvNet(), merged()),
        MergedFileError,
        "'net.conv1.weight'",
        "Construct the network with the arguments",
    ),
    Row(
        "a merged network of a newer release",
        lambda: load_merged(net(), merged(version=9)),
        MergedFileError,
        "merged.pt",
        "update the package",
    ),
    Row(
        "a merged network without its tensors",
        lambda: load_merged(net(), merged(tensors=None)),
        MergedFileError,
        "'tensors'",
        "merge the checkpoint again",
    ),
    Row(
        "a merged network with a text among its tensors",
        lambda: load_merged(net(), merged(tensors={"0.weight": "text"})),
        MergedFileError,
        "'tensors'",
        "merge the checkpoint again",
    ),
    Row(
        "a merged network with a map of nothing",
        lambda: load_merged(net(), merged(maps=[""])),
        MergedFileError,
        "'maps'",
        "merge the checkpoint again",
    ),
    Row(
        "a merged network into a missing folder",
        lambda: save_merged(net(), "none/narrow.pt"),
        OSError,
        "none/narrow.pt",
        "make it first",
    ),
    Row(
        "a merged network into a folder",
        lambda: save_merged(net(), "."),
        OSError,
        ". cannot be written",
        "name a file in it",
    ),
    Row(
        "no checkpoint at all",
        lambda: CentripetalSGD.clusters_from(None),
        TypeError,
        "checkpoint",
        "torch.load(path, weights_only=True)",
    ),
    Row(
        "a checkpoint without clusters",
        lambda: CentripetalSGD.clusters_from({"callbacks": {}}),
        KeyError,
        "CentripetalSGD",
        "saved in a fit with that callback",
    ),
    Row(
        "a checkpoint without RePr",
        lambda: RePr.restore(net(), {"state_dict": {}}),
        KeyError,
        "RePr",
        "load one of a fit with RePr",
    ),
    Row(
        "the path of a checkpoint for RePr",
        lambda: RePr.restore(net(), "run.ckpt"),  # type: ignore[arg-type]
        TypeError,
        "checkpoint",
        "what torch.load(path, weights_only=True) returns",
    ),
    Row(
        "a damaged state of RePr",
        lambda: RePr.restore(net(), {"callbacks": {"RePr{}": {"extra": {"dropped": {"filters": {}}}}}}),
        ValueError,
        "RePr",
        "load another checkpoint of the fit",
    ),
    Row(
        "clusters of a network that is none",
        lambda: CentripetalSGD().merge("run.ckpt"),  # type: ignore[arg-type]
        TypeError,
        "model",
        "build the network first",
    ),
    Row(
        "weights of another network",
        lambda: load_weights(SmallConvNet(), net().state_dict()),
        CommandError,
        "'net.conv1.weight'",
        "Name the network that they were saved from",
    ),
    Row(
        "a checkpoint that is a list",
        lambda: read_checkpoint(Path(other_content())),
        CommandError,
        "list.pt",
        "torch.save(model.state_dict(), path)",
    ),
]
