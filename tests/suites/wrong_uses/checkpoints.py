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
        "the checkpoint's state of WeightAsynchronousUpdate cannot be used: it is a str, not a dict. Resume from "
        "another checkpoint, or remove checkpoint['callbacks'][\"WeightAsynchronousUpdate{'include': None, "
        "'exclude': None}\"] to start WeightAsynchronousUpdate afresh from these weights",
    ),
    Row(
        "a state without a version",
        lambda: load_state({}),
        ValueError,
        "the checkpoint's state of WeightAsynchronousUpdate cannot be used: missing entry 'version'. Resume from "
        "another checkpoint, or remove checkpoint['callbacks'][\"WeightAsynchronousUpdate{'include': None, "
        "'exclude': None}\"] to start WeightAsynchronousUpdate afresh from these weights",
    ),
    Row(
        "a state of a newer release",
        lambda: load_state({"version": 2, "arguments": {}, "layers": {}, "extra": {}}),
        ValueError,
        "the checkpoint's state of WeightAsynchronousUpdate cannot be used: state version 2 is not known to this "
        "release (it reads 1). Resume from another checkpoint, or remove "
        "checkpoint['callbacks'][\"WeightAsynchronousUpdate{'include': None, 'exclude': None}\"] to start "
        "WeightAsynchronousUpdate afresh from these weights",
    ),
    Row(
        "a state without its numbers",
        lambda: load_state({"version": 1, "arguments": {}, "layers": {}, "extra": {}}),
        ValueError,
        "the checkpoint's state of WeightAsynchronousUpdate cannot be used: missing entry 'steps'. Resume from "
        "another checkpoint, or remove checkpoint['callbacks'][\"WeightAsynchronousUpdate{'include': None, "
        "'exclude': None}\"] to start WeightAsynchronousUpdate afresh from these weights",
    ),
    Row(
        "a state with wrong numbers",
        lambda: load_state({"version": 1, "arguments": {}, "layers": {}, "extra": {"steps": "many"}}),
        ValueError,
        "the checkpoint's state of WeightAsynchronousUpdate cannot be used: steps must be a list of counts, got "
        "'many'. Resume from another checkpoint, or remove "
        "checkpoint['callbacks'][\"WeightAsynchronousUpdate{'include': None, 'exclude': None}\"] to start "
        "WeightAsynchronousUpdate afresh from these weights",
    ),
    Row(
        "a merged network that is not there",
        lambda: load_merged(net(), "nothing.pt"),
        FileNotFoundError,
        "nothing.pt: no such file; save_merged and filterdiv merge write them",
    ),
    Row(
        "a merged network of text",
        lambda: load_merged(net(), text_file()),
        MergedFileError,
        "text.ckpt is not a file that save_merged wrote, or only a part of one; merge the checkpoint again",
    ),
    Row(
        "half a merged network",
        lambda: load_merged(net(), truncated()),
        MergedFileError,
        "half.pt is not a file that save_merged wrote, or only a part of one; merge the checkpoint again",
    ),
    Row(
        "weights as a merged network",
        lambda: load_merged(net(), weights()),
        MergedFileError,
        "bare.pt is not a file that save_merged wrote, or only a part of one; merge the checkpoint again",
    ),
    Row(
        "a list as a merged network",
        lambda: load_merged(net(), other_content()),
        MergedFileError,
        "list.pt is not a file that save_merged wrote, or only a part of one; merge the checkpoint again",
    ),
    Row(
        "a merged network of another class",
        lambda: load_merged(SmallConvNet(), merged()),
        MergedFileError,
        "the file holds a merged Sequential, which a SmallConvNet constructed like this is not: the file lacks "
        "'net.conv1.weight'; the network has no '0.weight'. Construct the network with the arguments it was trained "
        "with",
    ),
    Row(
        "a merged network of a newer release",
        lambda: load_merged(net(), merged(version=9)),
        MergedFileError,
        "merged.pt was written by a newer release of lightning_filterdiv (format 9, this one reads 1); update the "
        "package",
    ),
    Row(
        "a merged network without its tensors",
        lambda: load_merged(net(), merged(tensors=None)),
        MergedFileError,
        "merged.pt lacks its entry 'tensors': it was edited; merge the checkpoint again",
    ),
    Row(
        "a merged network into a missing folder",
        lambda: save_merged(net(), "none/narrow.pt"),
        OSError,
        "none/narrow.pt cannot be written: there is no folder none; make it first",
    ),
    Row(
        "a merged network into a folder",
        lambda: save_merged(net(), "."),
        OSError,
        ". cannot be written: it is a folder; name a file in it",
    ),
    Row(
        "no checkpoint at all",
        lambda: CentripetalSGD.clusters_from(None),
        TypeError,
        "checkpoint must be what torch.load(path, weights_only=True) returns, got NoneType",
    ),
    Row(
        "a checkpoint without clusters",
        lambda: CentripetalSGD.clusters_from({"callbacks": {}}),
        KeyError,
        "the checkpoint holds no clusters of CentripetalSGD: it must be saved in a fit with that callback, after "
        "its first step",
    ),
    Row(
        "a checkpoint without RePr",
        lambda: RePr.restore(net(), {"state_dict": {}}),
        KeyError,
        "the checkpoint holds no state of RePr: there is nothing to bring back; load one of a fit with RePr",
    ),
    Row(
        "weights of another network",
        lambda: load_weights(SmallConvNet(), net().state_dict()),
        CommandError,
        "the weights are not those of a SmallConvNet: 8 missing ('net.conv1.weight', ...); 6 unknown ('0.weight', "
        "...). Name the network that they were saved from",
    ),
    Row(
        "a checkpoint that is a list",
        lambda: read_checkpoint(Path(other_content())),
        CommandError,
        "list.pt holds neither a Lightning checkpoint nor a state dict, but a list; torch.save(model.state_dict(), "
        "path) makes one",
    ),
]
