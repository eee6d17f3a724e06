"""Save a merged network as tensors and plain values, and put it back into a fresh instance of the original class."""

from __future__ import annotations

import copy
import io
import os
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGraphError
from lightning_filterdiv.channel_graph.channel_map import ChannelMap
from lightning_filterdiv.channel_graph.counted import COUNTED, CountedNorm, CountedReduction, counted
from lightning_filterdiv.channel_graph.forms import FORMS
from lightning_filterdiv.channel_graph.graph_body import CONSTANT, GraphBody
from lightning_filterdiv.channel_graph.history import chosen_channels, example_inputs_of, history_of, set_history
from lightning_filterdiv.channel_graph.inputs import without_targets
from lightning_filterdiv.channel_graph.modules import bare_module, copy_network, device_of, update_attributes
from lightning_filterdiv.channel_graph.narrow import Narrowing
from lightning_filterdiv.files import find_damage, is_pickled, why_unwritable, write_files
from lightning_filterdiv.filters import canonical_name, named_modules, named_tensors

__all__ = ["MergedFileError", "load_merged", "save_merged"]

_FORMAT = "lightning_filterdiv merged network"
_VERSION = 2
#: Entry -> check that its value is one that :func:`save_merged` writes.
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
            and set(form[1]) - {"sizes"} == {"eps", "dim", "groups"}
            and _are_sizes(form[1].get("sizes", ()))
            for name, form in value.items()
        )
    ),
    "graphs": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "steps": lambda value: (
        isinstance(value, dict)
        and all(isinstance(path, str) and isinstance(steps, list) and steps for path, steps in value.items())
        and all(_is_step(step) for steps in value.values() for step in steps)
    ),
}
_ADDED = {"norms": dict[str, Any], "graphs": list[Any], "steps": dict[str, Any]}  # since version 1


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) and size > 0 for size in value)


def _is_step(value: Any) -> bool:
    """True if ``value`` is the record of a narrowing."""
    if not isinstance(value, dict) or value.keys() != {"network", "inputs", "form", "keep", "sums"}:
        return False
    tables = [(value["keep"], 1), (value["sums"], 2)]
    return (
        isinstance(value["network"], str)
        and value["form"] in FORMS
        and all(
            isinstance(table, dict)
            and all(
                isinstance(name, str)
                and isinstance(rows, Tensor)
                and (rows.dtype, rows.layout, rows.dim()) == (torch.int64, torch.strided, dims)
                and rows.numel() > 0
                and not rows.is_meta
                for name, rows in table.items()
            )
            for table, dims in tables
        )
    )


class MergedFileError(ValueError):
    """The file is no merged network, or one of another class. The message names the difference."""


def save_merged(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a merged network: its tensors under canonical names and how it was narrowed; no pickled objects.

    The file does not hold the code of submodules in graph form. It names them, the channels that were kept, and the
    shapes of the example inputs. With these :func:`load_merged` records and narrows a fresh network again.

    Args:
        model: a result of :func:`~lightning_filterdiv.narrowing.merge.merge_channels`, trained further or not.
        path: the file to write; :func:`load_merged` reads it.

    Raises:
        OSError: it cannot be written. Nothing is left behind then, and an older file stays as it was.
        ValueError: ``model`` is a part of a merged network in graph form, without the record of its narrowing.
    """
    if reason := why_unwritable(path):
        raise OSError(f"{os.fspath(path)} cannot be written: {reason}")
    model = bare_module(model)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in _tensors(model).items()}
    steps = {name: history_of(module) for name, module in named_modules(model).items() if history_of(module)}
    graphs = [name for name, module in named_modules(model).items() if isinstance(module, GraphBody)]
    if graphs and not steps:
        raise ValueError(
            f"{graphs[0]!r} is in graph form, and this {type(model).__name__} does not know how it was narrowed: save "
            "the whole network that merge_channels returned, or a module that holds it"
        )
    norms = {
        name: (type(module).__name__, module.options)
        for name, module in named_modules(model).items()
        if isinstance(module, CountedNorm) and not isinstance(module, CountedReduction)
    }
    content = io.BytesIO()  # torch would report a full disk as an internal error
    torch.save(
        {
            "format": _FORMAT,
            "version": _VERSION if norms or graphs else 1,  # without them, older releases read it, too
            "class": type(model).__name__,
            "tensors": tensors,
            "maps": [name for name, _ in _maps(model)],
            "norms": norms,
            "graphs": graphs,
            "steps": steps,
        },
        content,
    )
    folder, name = os.path.split(os.fspath(path))
    write_files(folder or ".", {name: content.getbuffer()})


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors except the constants of graphs."""
    bodies = [name for name, module in named_modules(model).items() if isinstance(module, GraphBody)]
    constants = tuple(f"{name}.{CONSTANT}" if name else CONSTANT for name in bodies)
    return {name: tensor for name, tensor in named_tensors(model).items() if not name.startswith(constants)}


def _maps(model: nn.Module) -> list[tuple[str, ChannelMap]]:
    return [(name, module) for name, module in named_modules(model).items() if isinstance(module, ChannelMap)]


def load_merged(fresh_original: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Narrow a fresh instance of the original network to the widths in the file and load the values, in place.

    A copy is recorded and narrowed like the network in the file, and its tensors are compared with those of the file,
    before anything of ``fresh_original`` changes.

    Args:
        fresh_original: a network constructed like the one that was merged (its weights do not matter); also one that
            is merged already. Device and ``requires_grad`` stay as they are, dtypes become those of the file.
        path: file of :func:`save_merged`. It is read with ``weights_only=True``.

    Returns:
        ``fresh_original``, or a ``GraphModule`` instead if its own forward takes graph form.

    Raises:
        FileNotFoundError, PermissionError: there is no such file, or it must not be read.
        MergedFileError: it is no merged network, its entries contradict each other, or its tensors are not those of
            ``fresh_original``. ``fresh_original`` is left as it was.
    """
    shown = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{shown}: no such file; save_merged and filterdiv merge write files of merged networks"
        )
    foreign = f"{shown} is not a file that save_merged wrote, or only a part of one; merge the checkpoint again"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not is_pickled(path):
            raise MergedFileError(foreign) from error
        raise MergedFileError(
            f"{shown} is not a file that save_merged wrote: only unpickling would open it, which can run any code, so "
            f"it was not opened; merge the checkpoint again"
        ) from error
    except Exception as error:  # torch reports a file that is none by many types
        if isinstance(error, PermissionError):
            raise
        raise MergedFileError(foreign) from error
    if damage := find_damage(path):
        raise MergedFileError(f"{shown} is damaged: {damage}; copy it or merge the checkpoint again")
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise MergedFileError(foreign)
    content |= {key: kind() for key, kind in _ADDED.items() if key not in content}
    if missing := [key for key in _ENTRIES if key not in content]:
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
    rebuilt = _rebuild(model, content) if content["steps"] else None
    for name in content["maps"]:
        _install_map(model, name, tensors)
    for name, (kind, options) in content["norms"].items():
        _install_norm(model, name, COUNTED[kind], options, tensors[f"{name}.counts"])
    result = model if rebuilt is None else _take_forms(model, rebuilt)
    _replace(result, tensors)
    return fresh_original if result is model else result


def _rebuild(model: nn.Module, content: dict[str, Any]) -> nn.Module:
    """Return a copy of ``model``, narrowed like the network of the file, if its tensors then fit those of the file."""
    fresh = f"a {type(model).__name__} constructed like this"
    result = copy_network(model)
    for path, steps in content["steps"].items():
        part = named_modules(result).get(path)
        done = [] if part is None else history_of(part)
        if part is None or not _alike(done, steps[: len(done)]):
            raise MergedFileError(
                f"the file holds a merged {content['class']}, which {fresh} is not: {path or 'it'!r} was narrowed in "
                "another way. Construct a fresh network with the arguments it was trained with"
            )
        for step in steps[len(done) :]:
            try:
                part = _repeat(part, step)
            except (ChannelGraphError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
                raise MergedFileError(
                    f"the file holds a merged {content['class']}, and {fresh} cannot be narrowed in the same way: "
                    f"{error}. Construct the network with the arguments it was trained with, or merge again"
                ) from error
        result = _put(result, path, part)
    tensors, own = content["tensors"], _tensors(result)
    graphs = [name for name, module in named_modules(result).items() if isinstance(module, GraphBody)]
    wrong = [
        f"{name!r} has shape {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in a network with the "
        "channels that the file says were kept"
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    if own.keys() ^ tensors.keys():
        wrong.append(f"{min(own.keys() ^ tensors.keys())!r} is in only one of them")
    if graphs != content["graphs"]:
        wrong.append(f"submodules in graph form are {graphs}, the file names {content['graphs']}")
    if wrong:
        raise MergedFileError(f"the entries of the file contradict each other: {wrong[0]}; merge the checkpoint again")
    return result


def _repeat(part: nn.Module, step: dict[str, Any]) -> nn.Module:
    """Repeat the narrowing ``step``."""
    args, kwargs = example_inputs_of(step["inputs"])
    if not (isinstance(args, list | tuple) and isinstance(kwargs, dict)):
        raise ValueError("no example inputs")
    inputs = without_targets(part, tuple(args), kwargs)
    graph = ChannelGraph.trace(part, inputs, network=step["network"] or None)
    keep, sums = chosen_channels(graph, step["keep"], step["sums"])
    return Narrowing(graph, keep, sums, form=step["form"])(part)


def _alike(first: Any, second: Any) -> bool:
    """True if two records are equal, tensors entry by entry."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_alike(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(_alike(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def _put(model: nn.Module, path: str, part: nn.Module) -> nn.Module:
    """Return ``model`` with ``part`` at ``path``."""
    if not path:
        return part
    parent, _, child = path.rpartition(".")
    named_modules(model)[parent]._modules[child] = part
    return model


def _take_forms(model: nn.Module, rebuilt: nn.Module) -> nn.Module:
    """Copy graphs, new classes and history from submodules of ``rebuilt`` to those of ``model``."""
    result = model
    for path, new in sorted(named_modules(rebuilt).items(), key=lambda item: -len(item[0])):
        old = named_modules(result).get(path)
        if isinstance(new, GraphBody) and old is not None:
            result = _put(result, path, GraphBody(old, copy.deepcopy(new.graph), new.constants))
        elif old is not None and type(old) is not type(new) and not isinstance(new, ChannelMap):
            result = _put(result, path, new.train(old.training))
    for path, module in named_modules(rebuilt).items():
        if (steps := history_of(module)) and path in named_modules(result):
            set_history(named_modules(result)[path], steps)
    return result


def _check(model: nn.Module, content: dict[str, Any]) -> None:
    """Raise an error, before any change, unless the file's tensors are those of ``model`` at other widths."""
    tensors: dict[str, Tensor] = content["tensors"]
    inside = [f"{name}." for name in content["maps"]]
    mapped = {f"{name}." for name, _ in _maps(model)}

    def renamed(name: str) -> str:
        site = next((site for site in inside if name.startswith(site) and site not in mapped), None)
        return name if site is None else f"{site}inner.{name.removeprefix(site)}"

    own = {renamed(name): tensor for name, tensor in _tensors(model).items()}
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
    """True if ``given`` is ``own`` with another number of channels. Other dimensions of a kernel must be equal."""
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
    """Give every module tensors with the file's shapes and values. Shared ones stay shared."""
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
            if isinstance(module, CountedReduction) or (isinstance(module, GraphBody) and key.startswith(CONSTANT)):
                continue
            if (buffer := module._buffers[key]) is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = tensors[prefix + key].to(device)
                module._buffers[key] = made[id(buffer)]
        now = {key: t.shape for key, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}
        if now != before:
            update_attributes(module)
    del olds  # kept until here, so that no id is reused
