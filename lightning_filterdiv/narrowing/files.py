"""Save a merged network as tensors and plain values, and put it back into a fresh instance of the original class."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph.channel_map import ChannelMap
from lightning_filterdiv.channel_graph.counted import COUNTED, CountedNorm, counted
from lightning_filterdiv.channel_graph.modules import bare_module, device_of, update_attributes
from lightning_filterdiv.files import find_damage, why_unwritable, write_files
from lightning_filterdiv.filters import canonical_name, named_modules, named_tensors

__all__ = ["MergedFileError", "load_merged", "save_merged"]

_FORMAT = "lightning_filterdiv merged network"
_VERSION = 2
#: Entry -> whether its value is one that :func:`save_merged` writes.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "version": lambda value: isinstance(value, int),
    "class": lambda value: isinstance(value, str),
    "tensors": lambda value: (
        isinstance(value, dict)
        and all(
            isinstance(key, str) and isinstance(tensor, Tensor) and not tensor.is_meta for key, tensor in value.items()
        )
    ),
    "maps": lambda value: isinstance(value, list) and all(isinstance(name, str) and name for name in value),
    "norms": lambda value: (
        isinstance(value, dict)
        and all(
            isinstance(name, str)
            and isinstance(form, tuple)
            and len(form) == 2
            and form[0] in COUNTED
            and isinstance(form[1], dict)
            and set(form[1]) == {"eps", "dim", "groups"}
            for name, form in value.items()
        )
    ),
}


class MergedFileError(ValueError):
    """The file is no merged network, or one of another class. The message says what does not fit."""


def save_merged(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a merged network: its tensors under canonical names and where its channel maps sit; no pickled objects.

    Args:
        model: a result of :func:`~lightning_filterdiv.narrowing.merge.merge_channels`, trained further or not.
        path: the file to write; :func:`load_merged` reads it.

    Raises:
        OSError: it cannot be written. Nothing is left behind then, and an older file stays as it was.
    """
    if reason := why_unwritable(path):
        raise OSError(f"{os.fspath(path)} cannot be written: {reason}")
    model = bare_module(model)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in named_tensors(model).items()}
    norms = {
        name: (type(module).__name__, module.options)
        for name, module in named_modules(model).items()
        if isinstance(module, CountedNorm)
    }
    content = io.BytesIO()  # on disk, torch would report a full one as an internal error
    torch.save(
        {
            "format": _FORMAT,
            "version": _VERSION if norms else 1,  # without norms that weigh, older releases read it, too
            "class": type(model).__name__,
            "tensors": tensors,
            "maps": [name for name, _ in _maps(model)],
            "norms": norms,
        },
        content,
    )
    folder, name = os.path.split(os.fspath(path))
    write_files(folder or ".", {name: content.getbuffer()})


def _maps(model: nn.Module) -> list[tuple[str, ChannelMap]]:
    return [(name, module) for name, module in named_modules(model).items() if isinstance(module, ChannelMap)]


def load_merged(fresh_original: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Narrow a fresh instance of the original network to the widths in the file and load the values, in place.

    Args:
        fresh_original: a network constructed like the one that was merged (its weights do not matter); also one that
            is merged already. Device and ``requires_grad`` stay as they are, dtypes become those of the file.
        path: what :func:`save_merged` wrote. It is read with ``weights_only=True``.

    Returns:
        ``fresh_original``.

    Raises:
        FileNotFoundError: there is no such file.
        MergedFileError: it is no merged network, or its tensors are not those of ``fresh_original``.
    """
    shown = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{shown}: no such file; save_merged and filterdiv merge write them")
    foreign = f"{shown} is not a file that save_merged wrote, or only a part of one; merge the checkpoint again"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MergedFileError(
            f"{shown} is not a file that save_merged wrote: only unpickling would open it, which can run any code, so "
            f"it was not opened; merge the checkpoint again"
        ) from error
    except Exception as error:  # torch reports a file that is none by many types
        raise MergedFileError(foreign) from error
    if damage := find_damage(path):
        raise MergedFileError(f"{shown} is damaged: {damage}; copy it or merge the checkpoint again")
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise MergedFileError(foreign)
    content.setdefault("norms", {})  # files of version 1 have none
    if missing := [key for key in ("version", "class", "tensors", "maps") if key not in content]:
        raise MergedFileError(f"{shown} lacks its entry {missing[0]!r}: it was edited; merge the checkpoint again")
    if damaged := [key for key, right in _ENTRIES.items() if not right(content[key])]:
        raise MergedFileError(
            f"{shown} has an entry {damaged[0]!r} that save_merged does not write: it was edited; merge the checkpoint "
            f"again"
        )
    if content["version"] > _VERSION:
        raise MergedFileError(
            f"{shown} was written by a newer release of lightning_filterdiv (format {content['version']}, this one "
            f"reads {_VERSION}); update the package"
        )
    model = bare_module(fresh_original)
    tensors: dict[str, Tensor] = content["tensors"]
    _check(model, content)
    for name in content["maps"]:
        _install_map(model, name, tensors)
    for name, (kind, options) in content["norms"].items():
        _install_norm(model, name, COUNTED[kind], options, tensors[f"{name}.counts"])
    _replace(model, tensors)
    return fresh_original


def _check(model: nn.Module, content: dict[str, Any]) -> None:
    """Raise unless the file's tensors are those of ``model`` at other widths; before anything is changed."""
    tensors: dict[str, Tensor] = content["tensors"]
    inside = [f"{name}." for name in content["maps"]]
    mapped = {f"{name}." for name, _ in _maps(model)}

    def renamed(name: str) -> str:
        site = next((site for site in inside if name.startswith(site) and site not in mapped), None)
        return name if site is None else f"{site}inner.{name.removeprefix(site)}"

    own = {renamed(name): tensor for name, tensor in named_tensors(model).items()}
    selections = {f"{name}{part}" for name in inside for part in ("expand", "keep")}
    selections |= {f"{name}.counts" for name in content["norms"]}
    missing = [name for name in own if name not in tensors and name not in selections]
    unknown = [name for name in tensors if name not in own and name not in selections]
    modules = named_modules(model)
    unknown += [name for name in (*content["maps"], *content["norms"]) if name not in modules]
    shared = [name for name in own if name in tensors and name not in selections]
    shapes = [name for name in shared if not _may_be_narrowed(own[name], tensors[name])]
    if missing or unknown or shapes:
        parts = [f"the file lacks {missing[0]!r}"] if missing else []
        parts += [f"the network has no {unknown[0]!r}"] if unknown else []
        parts += (
            [f"{shapes[0]!r} has shape {tuple(tensors[shapes[0]].shape)}, not a narrower {tuple(own[shapes[0]].shape)}"]
            if shapes
            else []
        )
        raise MergedFileError(
            f"the file holds a merged {content['class']}, which a {type(model).__name__} constructed like this is not: "
            f"{'; '.join(parts)}. Construct the network with the arguments it was trained with"
        )


def _may_be_narrowed(own: Tensor, given: Tensor) -> bool:
    """Whether ``given`` is ``own`` at another number of channels: the rest of a kernel does not change."""
    kind = (own.dim(), own.shape[2:], own.layout, own.is_floating_point(), own.is_complex())
    return kind == (given.dim(), given.shape[2:], given.layout, given.is_floating_point(), given.is_complex())


def _install_map(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    modules = named_modules(model)
    inner = modules[name]
    if isinstance(inner, ChannelMap):
        inner = inner.inner
    new = ChannelMap(inner, tensors.get(f"{name}.expand"), tensors.get(f"{name}.keep"))
    new.train(inner.training)
    parent, _, child = name.rpartition(".")
    modules[parent]._modules[child] = new


def _install_norm(
    model: nn.Module, name: str, kind: type[CountedNorm], options: dict[str, Any], counts: Tensor
) -> None:
    modules = named_modules(model)
    module = modules[name]
    if not isinstance(module, CountedNorm):
        new = counted(module, (kind, options), counts.to(device_of(model)))
        for parent in list(model.modules()):
            for child, inner in parent._modules.items():
                if inner is module:
                    parent._modules[child] = new


def _replace(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every module tensors of the file's shape and values; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    # Collected first: a module or tensor with several names is met once, under the first of them.
    places = [
        (module, f"{canonical_name(full)}." if canonical_name(full) else "", [*module._parameters], [*module._buffers])
        for full, module in model.named_modules()
    ]
    olds = [old for module, _, _, _ in places for old in [*module._parameters.values(), *module._buffers.values()]]
    for module, prefix, parameters, buffers in places:
        before = {key: t.shape for key, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}
        for key in parameters:
            if (old := module._parameters[key]) is not None:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(tensors[prefix + key].to(old.device), old.requires_grad)
                module._parameters[key] = made[id(old)]
        for key in buffers:
            if (buffer := module._buffers[key]) is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = tensors[prefix + key].to(device)
                module._buffers[key] = made[id(buffer)]
        now = {key: t.shape for key, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}
        if now != before:
            update_attributes(module)
    del olds  # kept until here, so that no identity was given away twice
