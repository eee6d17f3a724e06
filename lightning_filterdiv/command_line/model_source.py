"""Build the network of a command from a class, a torchvision or timm name, or a LightningCLI YAML, with its weights.

Nothing here unpickles arbitrary objects unless it is told to trust the file.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import pickle
import re
import sys
import tarfile
import textwrap
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_filterdiv.channel_importance.checkpoints import restore_gates
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.options import MODEL_SOURCES
from lightning_filterdiv.command_line.yaml_errors import find_cause
from lightning_filterdiv.files import find_damage, is_pickled
from lightning_filterdiv.filters import canonical_name, find_prefix
from lightning_filterdiv.selection import quote_names

__all__ = [
    "PICKLED",
    "build_model",
    "load_named",
    "load_source",
    "load_weights",
    "read_checkpoint",
    "restore_model",
    "saved_gate_means",
    "search_here",
    "suggest_source",
    "with_values",
    "zeros",
]

#: Predicate for a file that a restricted unpickler refuses.
PICKLED = "holds objects that only unpickling would open, which can run any code; it was not opened"
#: Last level of the key under which a module stores extra state.
_EXTRA_STATE = "_extra_state"
#: Entries that ``filterdiv fit`` (LightningCLI) saves among a network's arguments. Here --model names the class.
_LIGHTNING_CLI = {"_class_path", "_instantiator"}
#: Prefix of a network's name -> module whose ``list_models`` has the names.
_LIBRARIES = {"torchvision": "torchvision.models", "timm": "timm"}
_NO_CHECKPOINT = "is not a checkpoint: torch.save did not write it, or a part of it is missing; copy or save it again"


def build_model(
    model: str | None = None, config: Path | None = None, hyper_parameters: Mapping[str, Any] | None = None
) -> nn.Module:
    """Construct a network, without weights from anywhere.

    Args:
        model: ``"pkg.module:Class"`` (or a function that returns a module), ``"torchvision:NAME"`` or ``"timm:NAME"``.
        config: YAML file for LightningCLI, whose ``model`` is built. Give either ``model`` or ``config``.
        hyper_parameters: arguments for ``pkg.module:Class``, as Lightning saves them in a checkpoint.

    Raises:
        CommandError: there is no such network or file, or its constructor lacks arguments.
    """
    if (model is None) == (config is None):
        raise CommandError(f"say which network is meant by one of --model ({MODEL_SOURCES}) and --config run.yaml")
    if config is not None:
        return _from_config(config)
    assert model is not None
    kind, separator, name = model.partition(":")
    if not separator or not kind or not name:
        raise CommandError(f"--model {model!r} is none of {MODEL_SOURCES}{suggest_source(model)}")
    if kind == "torchvision":
        return _from_torchvision(name)
    if kind == "timm":
        return _from_timm(name)
    return _from_class(kind, name, {k: v for k, v in (hyper_parameters or {}).items() if k not in _LIGHTNING_CLI})


def load_named(source: str, weights: str, trust_pickle: bool = False) -> nn.Module:
    """Construct a network of a library with trained weights. Nothing else in this module downloads.

    Args:
        source: ``"torchvision:NAME"`` or ``"timm:NAME"``.
        weights: library's name of the weights; ``"DEFAULT"`` for its own choice.
        trust_pickle: see :func:`read_checkpoint`, which checks a file that is already on this machine.

    Raises:
        CommandError: no such network or weights, or they cannot be loaded.
    """
    kind, _, name = source.partition(":")
    if kind not in ("torchvision", "timm"):
        raise CommandError(
            f"--weights belongs to torchvision:NAME and timm:NAME; {source!r} brings its own, or name a file"
        )
    build_model(source)  # its errors name the network
    try:
        if kind == "timm":
            import timm

            tagged = name if weights == "DEFAULT" else f"{name.partition('.')[0]}.{weights}"
            return timm.create_model(tagged, pretrained=True)
        import torchvision

        known = torchvision.models.get_model_weights(name)
        names = ["DEFAULT", *known.__members__] if len(known) else []
        if weights not in names:
            raise CommandError(
                f"torchvision has no weights {weights!r} of {name}; there are {', '.join(names) or 'none'}"
            )
        file = Path(torch.hub.get_dir()) / "checkpoints" / known[weights].url.rpartition("/")[2]
        if file.is_file() and not trust_pickle:
            read_checkpoint(file)  # torchvision would unpickle any file there
        built: nn.Module = torchvision.models.get_model(name, weights=weights)
    except CommandError:
        raise
    except Exception as error:  # of networks, servers and caches, by many types
        raise CommandError(
            f"--weights {weights} of {source} cannot be loaded: {_reason(error)}. Without internet access, name a file "
            f"with --model {source}"
        ) from error
    return built


def _reason(error: Exception) -> str:
    """Return the message of an error on one line, with its type if the message alone is unclear."""
    said = textwrap.shorten(str(error), 300, placeholder=" ...")  # torch may list all its backends
    return said if isinstance(error, TypeError) and said else f"{type(error).__name__}: {said}".removesuffix(": ")


def _did_you_mean(name: str, names: Sequence[str], prefix: str = "") -> str:
    """Return the end of a message about a name that is not in ``names``: the closest ones; ``""`` if none is close."""
    lower = name.lower()
    near = [lower] if lower in names else difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    *most, last = [prefix + one for one in near] or [""]
    return f"; did you mean {', '.join(most)}{' or ' if most else ''}{last}?" if last else ""


def _library_names(kind: str) -> list[str]:
    """Return the networks of torchvision or timm; none if it is not installed. Nothing is downloaded."""
    try:
        library: Any = importlib.import_module(_LIBRARIES[kind])
    except ImportError:
        return []
    return list(library.list_models())


def suggest_source(source: str) -> str:
    """Return the end of a message about a text that is neither a file nor a network: ``"; did you mean
    timm:resnet18?"``.

    Args:
        source: the user's text, such as ``resnet18``, ``timm.resnet18`` or ``torchvison:resnet18``.

    Returns:
        ``""`` if no library has a name like this one.
    """
    parts = re.fullmatch(r"(\w+)[:./](\w[\w.-]*)", source)
    written, name = (parts[1], parts[2]) if parts else ("", source)
    kinds = difflib.get_close_matches(written, _LIBRARIES, n=1) if written else list(_LIBRARIES)
    if exact := [f"{kind}:{name}" for kind in kinds if name in _library_names(kind)]:
        return f"; did you mean {' or '.join(exact)}?"
    return _did_you_mean(name, _library_names(kinds[0]), f"{kinds[0]}:") if written and kinds else ""


def _no_model(kind: str, name: str) -> CommandError:
    """Return the error for a name that a library lacks. Another library may have it, or a similar one."""
    for other in _LIBRARIES:
        if other != kind and name in _library_names(other):
            return CommandError(f"{kind} has no model {name!r}; did you mean {other}:{name}?")
    near = _did_you_mean(name, _library_names(kind), f"{kind}:")
    return CommandError(f"{kind} has no model {name!r}{near or f'; {_LIBRARIES[kind]}.list_models() lists them'}")


def _from_torchvision(name: str) -> nn.Module:
    import torchvision

    names = torchvision.models.list_models()
    if name not in names:
        raise _no_model("torchvision", name)
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    detector = (
        {"weights_backbone": None} if name in torchvision.models.list_models(torchvision.models.detection) else {}
    )
    built: nn.Module = torchvision.models.get_model(name, weights=None, **extra, **detector)
    return built


def _from_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise CommandError(f"--model timm:{name} needs the package timm: pip install timm") from error
    if not timm.is_model(name):
        raise _no_model("timm", name)
    return timm.create_model(name, pretrained=False)


def search_here() -> None:
    """Let imports find modules in the current folder."""
    # A console script does not search the current folder, where users keep the classes that they name.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _from_class(path: str, name: str, hyper_parameters: Mapping[str, Any]) -> nn.Module:
    search_here()
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise CommandError(
            f"--model {path}:{name}: cannot import {path!r} ({error})"
            f"{suggest_source(f'{path}:{name}') or '; name an installed module, or one in the current folder'}"
        ) from error
    if not hasattr(module, name):
        callables = [key for key in dir(module) if not key.startswith("_")]  # dir: rooms load their names on first use
        raise CommandError(f"--model {path}:{name}: {path} has no {name!r}{_did_you_mean(name, callables)}")
    try:
        built = getattr(module, name)(**hyper_parameters)
    except Exception as error:  # an error of the user's class with arguments from a file
        raise CommandError(
            f"--model {path}:{name} cannot be constructed: {_reason(error)}. Give its arguments in a YAML file "
            f"with --config, or call save_hyperparameters() in its constructor"
        ) from error
    if not isinstance(built, nn.Module):
        raise CommandError(
            f"--model {path}:{name} gives an object of type {type(built).__name__}, not a torch.nn.Module; name a "
            f"network"
        )
    return built


def _from_config(config: Path) -> nn.Module:
    import lightning.pytorch as pl
    from jsonargparse import ArgumentError, ArgumentParser

    if config.is_dir():
        raise CommandError(f"--config {config} is a folder; name the YAML file in it")
    if not config.exists():
        raise CommandError(f"--config {config}: no such file; name a YAML file")
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # also of values: a date that does not exist, nesting without end
        raise CommandError(
            f"--config {config} is not YAML in UTF-8: {_reason(error)}; compare it with what filterdiv fit "
            f"--print_config prints"
        ) from error
    # A configuration saved for one sub-command has the model at the top, one for several below its name.
    sections = (
        [content] + [value for value in (content or {}).values() if isinstance(value, dict)]
        if isinstance(content, dict)
        else []
    )
    section = next((s["model"] for s in sections if s.get("model") is not None), None)
    if section is None:
        raise CommandError(f"--config {config} has no entry 'model'; name the class there, as class_path")
    search_here()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model", required=True)
    try:
        instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # renamed in jsonargparse 4.49
        built = instantiate(parser.parse_object({"model": section})).model
    except (ArgumentError, TypeError, ValueError) as error:
        reason = find_cause(str(error)) or " ".join(str(error).split())
        raise CommandError(f"--config {config}: its model cannot be built: {reason}") from error
    except Exception as error:  # of a constructor, or of jsonargparse about a value that no one would write
        raise CommandError(f"--config {config}: its model cannot be built: {_reason(error)}") from error
    if not isinstance(built, nn.Module):
        raise CommandError(f"--config {config}: its model is no LightningModule; name one, as class_path")
    return built


def with_values(model: nn.Module) -> nn.Module:
    """Return ``model``, whose layers are ready to run.

    Raises:
        CommandError: a layer is lazy or on the meta device.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            what = "is lazy and has no shape yet" if is_lazy(parameter) else "has no values (device meta)"
            raise CommandError(
                f"{name!r} of {type(model).__name__} {what}; build the network with its sizes, on a real device"
            )
    return model


def zeros(shape: tuple[int, ...]) -> Tensor:
    """Return a batch of zeros of ``--input-shape``.

    Raises:
        CommandError: it does not fit into memory.
    """
    try:
        return torch.zeros(shape)
    except (RuntimeError, MemoryError, OverflowError) as error:
        listed = ",".join(map(str, shape))
        raise CommandError(f"--input-shape {listed} does not fit into memory; give a smaller one") from error


def _other_format(path: Path) -> str | None:
    """Return torch's name for a file that is no checkpoint and is not opened here; ``None`` if unknown."""
    try:
        if tarfile.is_tarfile(path):
            return "a tar archive, as torch.save wrote before 2017, with pickled objects"
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except Exception:  # a damaged archive
        return None
    if "constants.pkl" in names:
        return "a TorchScript archive, which is a program"
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "an exported program"
    return None


def read_checkpoint(path: Path, trust_pickle: bool = False) -> dict[str, Any]:
    """Read a Lightning checkpoint or a state dict.

    Args:
        path: a ``.ckpt`` or ``.pt`` file.
        trust_pickle: also accept a file that holds more than tensors and plain values. This can run any code.

    Returns:
        The checkpoint; a bare state dict comes back as ``{"state_dict": ...}``.

    Raises:
        CommandError: the file is missing, damaged, no checkpoint, or needs unpickling.
    """
    if path.is_dir():
        raise CommandError(f"{path} is a folder; name the .ckpt or .pt file in it")
    if not path.is_file():
        raise CommandError(f"{path}: no such file; name a .ckpt or .pt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        refused = "weights_only" in str(error).lower() or "unsupported" in str(error).lower()
        if not (refused and is_pickled(path)):
            raise CommandError(f"{path} {_NO_CHECKPOINT}") from error
        raise CommandError(f"{path} {PICKLED}. If you trust where it comes from, add --trust-pickle") from error
    except Exception as error:  # torch reports a file that is none by many types
        if isinstance(error, PermissionError):
            raise CommandError(f"{path} cannot be read: {error.strerror}; change its permissions") from error
        if (other := _other_format(path)) is not None:
            raise CommandError(
                f"{path} is {other}, which was not opened: save the weights, torch.save(model.state_dict(), path)"
            ) from error
        raise CommandError(f"{path} {_NO_CHECKPOINT}") from error
    if damage := find_damage(path):
        raise CommandError(f"{path} is damaged: {damage}; copy or save it again")
    if isinstance(content, nn.Module):
        return {"state_dict": content.state_dict()}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        _check_entries(path, content)
        return dict(content)
    if isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values()):
        _check_weights(path, content)
        return {"state_dict": dict(content)}
    what = f"an object of type {type(content).__name__}"
    if isinstance(content, Mapping):
        what = (
            f"a dict with the entries {quote_names([str(key) for key in content], 4)}" if content else "an empty dict"
        )
    raise CommandError(
        f"{path} holds neither a Lightning checkpoint nor a state dict, but {what}; torch.save(model.state_dict(), "
        f"path) makes one"
    )


def _check_entries(path: Path, checkpoint: Mapping[Any, Any]) -> None:
    """Raise an error unless the entries of a Lightning checkpoint that commands read have the types that Lightning
    writes."""
    _check_weights(path, checkpoint["state_dict"])
    for name in ("callbacks", "hyper_parameters"):
        entry = checkpoint.get(name)
        if not (entry is None or (isinstance(entry, Mapping) and all(isinstance(key, str) for key in entry))):
            raise CommandError(
                f"{path} is damaged: its entry {name!r} is of type {type(entry).__name__}, not a dict with names; save "
                f"it again"
            )


def _check_weights(path: Path, weights: Mapping[Any, Any]) -> None:
    for name, value in weights.items():
        if not isinstance(name, str):
            raise CommandError(f"{path}: {name!r} in its state dict is no name; save model.state_dict() again")
        # A module may keep anything as its extra state.
        if not isinstance(value, Tensor) and name.rpartition(".")[2] != _EXTRA_STATE:
            raise CommandError(
                f"{path}: {name!r} in its state dict is of type {type(value).__name__}, not a tensor; save "
                f"model.state_dict() again"
            )


def restore_model(model: str | None, config: Path | None, checkpoint: Mapping[str, Any]) -> nn.Module:
    """Construct the network of a checkpoint, with the gates that ChannelImportance gave it, and load its weights.

    Args:
        model: see :func:`build_model`. The hyper-parameters come from the checkpoint.
        config: see :func:`build_model`.
        checkpoint: result of :func:`read_checkpoint`.

    Raises:
        CommandError: the network cannot be constructed, or the weights belong to another network.
    """
    network = build_model(model, config, checkpoint.get("hyper_parameters"))
    saved_gate_means(network, checkpoint)
    load_weights(network, checkpoint["state_dict"])
    return network


def saved_gate_means(network: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Insert the gates of the checkpoint into ``network``, and return their means in the fit.

    Raises:
        CommandError: the state of ChannelImportance is damaged or belongs to another network.
    """
    try:
        return restore_gates(network, checkpoint)
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def load_source(options: argparse.Namespace) -> tuple[nn.Module, Mapping[str, Any]]:
    """Return the network that ``SOURCE`` names, and the checkpoint of its weights; ``{}`` without a file.

    Args:
        options: ``source``, ``model``, ``config``, ``weights`` and ``trust_pickle``.

    Raises:
        CommandError: no such file or network, options that do not go together, or layers without values.
    """
    source: str = options.source
    if ":" in source and not Path(source).exists():
        if options.model is not None or options.config is not None:
            raise CommandError(f"{source!r} names a network already; --model and --config belong to a file")
        if options.weights is not None:
            return load_named(source, options.weights, options.trust_pickle), {}
        built = build_model(source)
        if source.partition(":")[0] in _LIBRARIES:
            print("weights       random; name a file, or trained weights with --weights DEFAULT")
        return with_values(built), {}
    if options.weights is not None:
        raise CommandError(f"--weights belongs to torchvision:NAME and timm:NAME; {source} brings its own")
    if not Path(source).exists():
        raise CommandError(f"{source}: no such file, and none of {MODEL_SOURCES} either{suggest_source(source)}")
    checkpoint = read_checkpoint(Path(source), options.trust_pickle)
    return with_values(restore_model(options.model, options.config, checkpoint)), checkpoint


def load_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Load ``state_dict`` into ``model``. Levels that wrappers add to names (``_orig_mod``, ``module``) are ignored.

    A checkpoint of a LightningModule also fits the network inside it: one common prefix (``net.``) is taken off.

    Raises:
        CommandError: the tensors are not those of the network. The message names the first missing, unexpected and
            misshapen ones.
    """
    own = {canonical_name(name): name for name in model.state_dict()}
    given = {canonical_name(name): tensor for name, tensor in state_dict.items()}
    _, prefix = find_prefix(own, given) or ("", "")
    if prefix:
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    # A lazy layer takes the shape of what is loaded.
    shapes = {name: _shape(value) for name, value in model.state_dict().items() if not is_lazy(value)}
    wrong = [n for n, key in own.items() if n in given and key in shapes and _shape(given[n]) != shapes[key]]
    if missing or unexpected or wrong:
        parts = [f"{len(missing)} missing ({missing[0]!r}, ...)"] if missing else []
        parts += [f"{len(unexpected)} unknown ({unexpected[0]!r}, ...)"] if unexpected else []
        parts += [f"{n!r} has shape {_shape(given[n])}, the network {shapes[own[n]]}" for n in wrong[:2]]
        raise CommandError(
            f"the weights are not those of a {type(model).__name__}: {'; '.join(parts)}. Name the "
            f"network that they were saved from"
        )
    try:
        model.load_state_dict({own[name]: given[name] for name in own})
    except Exception as error:  # tensors without values or in another layout, and what a module's extra state raises
        raise CommandError(
            f"the weights cannot be loaded into a {type(model).__name__}: {_reason(error)}; save "
            f"model.state_dict() again, with dense tensors"
        ) from error


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor; extra state has none."""
    return tuple(value.shape) if isinstance(value, Tensor) else None
