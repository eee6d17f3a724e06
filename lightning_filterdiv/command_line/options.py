"""Options of all commands.

Nothing here imports torch, so that ``--help``, ``--version`` and a misspelt command answer at once. Choices that are a
Literal or a table in another module are therefore repeated here, and ``tests/command_line/test_options.py`` compares
them.

All options have one style:

- the size of an input is ``--input-shape N,C,H,W``, a path is a FILE or a FOLDER;
- files that exist are replaced only with ``--overwrite``;
- help begins with a verb or a noun, and :class:`_Help` adds the default.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lightning_filterdiv import __version__

__all__ = ["COMMANDS", "DATA_SOURCES", "LABELLED_SOURCES", "MODEL_SOURCES", "TRAINING", "parse"]

#: Commands of LightningCLI, which parses their options itself.
TRAINING = {
    "fit": "train a LightningModule from YAML or flags",
    "validate": "run the validation loop of a LightningModule",
    "test": "run the test loop of a LightningModule",
}
MODEL_SOURCES = "pkg.module:Class, torchvision:NAME or timm:NAME"
DATA_SOURCES = (
    "digits, fashion_mnist, torchvision:NAME, pkg.module:Name (a data set or LightningDataModule), or a folder"
)
LABELLED_SOURCES = "digits, fashion_mnist, or pkg.module:Name of a data set or LightningDataModule"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help formatter that adds the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == argparse.SUPPRESS:
            return action.help
        default = " ".join(action.default) if isinstance(action.default, list) else "%(default)s"
        return f"{action.help} (default: {default})"


class _Parser(argparse.ArgumentParser):
    """Parser that reports a wrong argument in one line. The usage of some commands is longer than a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command that is not in :data:`TRAINING`.

    Args:
        arguments: the command and its options, without the program name.

    Returns:
        The options, and the name of the command as ``command``.

    Raises:
        SystemExit: status 0 after ``--help`` or ``--version``; 2 if the arguments are wrong, explained on stderr.
    """
    parser = _Parser(
        prog="filterdiv",
        description="Train convolutional networks with diverse filters, measure how alike filters are,\n"
        "and make networks smaller. Help for a command: filterdiv COMMAND --help",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"filterdiv {__version__}", help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, description, add_options) in COMMANDS.items():
        whole = f"{text[0].upper()}{text[1:]}.\n{description}"
        add_options(commands.add_parser(name, help=text, description=whole, formatter_class=_Help))
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        near = difflib.get_close_matches(arguments[0], commands.choices, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(commands.choices)}"
        parser.error(f"there is no command {arguments[0]!r}; {fix}")
    if (empty := _find_empty(arguments)) is not None:
        parser = commands.choices.get(arguments[0], parser)
        parser.error(f"{empty} is empty, as an unset variable of a shell leaves it; give a value")
    return parser.parse_args(arguments)


def _find_empty(arguments: Sequence[str]) -> str | None:
    """Say which argument is an empty text; ``None`` if none is. As a path it would mean the current folder."""
    for number, argument in enumerate(arguments):
        if argument == "":
            return f"the argument after {arguments[number - 1]!r}"
        if argument.startswith("--") and argument.endswith("="):
            return argument
    return None


# -- commands --------------------------------------------------------------------------------------------------------


def _demo(parser: argparse.ArgumentParser) -> None:
    methods = ("csgd", "soft", "repr", "wau", "shared", "expand", "importance", "entropy")
    parser.add_argument(
        "--method",
        nargs="+",
        choices=methods,
        default=["csgd"],
        metavar="METHOD",
        help="methods to compare with plain training: %(choices)s",
    )
    parser.add_argument(
        "--data",
        choices=("digits", "fashion_mnist"),
        default="digits",
        help="images to train on; scikit-learn brings digits, fashion_mnist has to be installed",
    )
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="epochs of each training")
    _seed(parser, "the weights, the order of the images and the callback")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("filterdiv_demo"),
        metavar="FOLDER",
        help="folder for TensorBoard files and the merged network; every run gets a new folder inside",
    )


def _methods(parser: argparse.ArgumentParser) -> None:
    """Add no options."""


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"network: a .ckpt or .pt file, {MODEL_SOURCES}")
    _model(parser)
    _report(parser, "report")
    parser.add_argument(
        "--max-figures", type=int, default=8, metavar="N", help="save pictures of the N most redundant layers"
    )


def _compare(parser: argparse.ArgumentParser) -> None:
    for name in ("first", "second"):
        parser.add_argument(
            name,
            metavar={"first": "A", "second": "B"}[name],
            help=f"{name} network: a .ckpt or .pt file, {MODEL_SOURCES}",
        )
    _model(parser)
    _report(parser, "comparison")


def _report(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add the options of commands that look at networks and write a report."""
    _weights(parser)
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help=f"also compare what the channels compute on images: a .pt file with a batch, {DATA_SOURCES}",
    )
    _root(parser)
    parser.add_argument("--max-images", type=int, default=64, metavar="N", help="run the network on at most N images")
    _layers(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.9, metavar="COSINE", help="two filters are alike above this |cos|"
    )
    parser.add_argument("--out", type=Path, default=Path(folder), metavar="FOLDER", help="folder for the report")
    _overwrite(parser)


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="Lightning checkpoint from the end of a fit with CentripetalSGD; with --twins also a file with any "
        f"weights, {MODEL_SOURCES}",
    )
    _model(parser)
    _weights(parser)
    _input_shape(parser, "the checkpoint or the network")
    parser.add_argument(
        "--twins",
        nargs="?",
        type=float,
        const=0.99,
        metavar="COSINE",
        help="merge filters of any network whose cosine similarity is at least COSINE, 0.99 if none is given",
    )
    parser.add_argument(
        "--network", metavar="NAME", help="with --twins: merge only in this submodule, such as backbone"
    )
    _layers(parser, "with --twins: ")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        metavar="CHANGE",
        help="refuse if replacing the filters of a cluster by their mean changes the outputs by more than this "
        "relative CHANGE; 'inf' never refuses",
    )
    _form(parser)
    _narrow_network(parser)


def _prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"network: a .ckpt or .pt file, {MODEL_SOURCES}")
    _model(parser)
    _input_shape(parser, "the network")
    parser.add_argument("--network", metavar="NAME", help="prune only this submodule, for example backbone")
    _weights(parser)
    parser.add_argument(
        "--keep-fraction",
        action="append",
        type=_share,
        metavar="[PATTERN=]SHARE",
        help="keep this SHARE of each layer's channels (give this or a --target). Repeat the option for several "
        "patterns: --keep-fraction 'layer1.*=0.75' --keep-fraction 'layer2.*=0.5'",
    )
    parser.add_argument("--target-macs", type=float, metavar="SHARE", help="end at this SHARE of the network's MACs")
    parser.add_argument(
        "--target-parameters", type=float, metavar="SHARE", help="end at this SHARE of the network's parameters"
    )
    parser.add_argument(
        "--importance",
        choices=("l1", "l2", "bn_scale", "taylor", "gates", "redundancy", "random"),
        default="l2",
        help="measure by which channels are ranked; the lowest are removed. taylor needs --data; gates needs a "
        "checkpoint of a fit with ChannelImportance as SOURCE, and measures gates anew with --data",
    )
    parser.add_argument(
        "--scope",
        choices=("layer", "global"),
        default="layer",
        help="layer: remove the same share of every layer; global: rank the channels of all layers together",
    )
    parser.add_argument(
        "--max-layer-fraction", type=float, metavar="SHARE", help="remove at most this SHARE of a layer's channels"
    )
    parser.add_argument(
        "--channels-multiple", type=int, default=1, metavar="N", help="round the channels of a layer to multiples of N"
    )
    _layers(parser)
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help=f"(inputs, labels): {LABELLED_SOURCES}. At most 16 batches serve --importance taylor, and give the means "
        "of removed channels, which are added to the next biases. All validation data give accuracies before and after",
    )
    _seed(parser, "--importance random and the order of the data")
    _form(parser)
    _narrow_network(parser)


def _entropy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="SOURCE", help=f"training images: {DATA_SOURCES}")
    _root(parser)
    parser.add_argument("--unit", choices=("nats", "bits"), default="nats", help="unit of the entropy")
    parser.add_argument(
        "--rounding", choices=("ceil", "floor", "round"), default="ceil", help="how the mean entropy becomes a depth"
    )
    parser.add_argument(
        "--max-images", type=int, metavar="N", help="measure N images, evenly spaced in the data (default: all)"
    )
    _model(parser, "network whose depth is compared with the bound")
    _input_shape(parser, "the network or the images")


# -- options of several commands -------------------------------------------------------------------------------------


def _model(parser: argparse.ArgumentParser, purpose: str = "network to load the weights into") -> None:
    """Add the options that name a command's network, for :mod:`.model_source`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="SOURCE", help=f"{purpose}: {MODEL_SOURCES}")
    source.add_argument("--config", type=Path, metavar="FILE", help="LightningCLI configuration that names the network")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="also open files that hold more than tensors and plain values. Opening runs any code inside: use it only "
        "for files from people you trust",
    )


def _weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="trained weights of torchvision:NAME or timm:NAME; DEFAULT is the choice of the library. They are "
        "downloaded unless they are on this machine",
    )


def _input_shape(parser: argparse.ArgumentParser, known_by: str) -> None:
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="N,C,H,W",
        help=f"shape of the input that the network is traced with, for example 1,3,224,224 (default: from {known_by})",
    )


def _layers(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument(
        "--include",
        nargs="+",
        metavar="PATTERN",
        help=f"{when}use only layers whose names match, for example 'layer1.*'",
    )
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help=f"{when}leave out layers whose names match")


def _root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root", type=Path, metavar="FOLDER", help="folder with the files of fashion_mnist or torchvision:NAME"
    )


def _seed(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"seed of {of}")


def _form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--form",
        choices=("auto", "module", "graph"),
        default="auto",
        help="module: keep every class; graph: write each forward that fixes the number of channels as a torch.fx "
        "graph; auto: graph only where the new widths need it",
    )


def _narrow_network(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that write a narrow network."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="file for the narrow network; load_merged reads it"
    )
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="also write an ONNX file for any batch size, check it in onnxruntime, and time both runtimes",
    )
    _overwrite(parser)
    parser.add_argument(
        "--pairs",
        type=int,
        default=20,
        metavar="N",
        help="time N forward passes of the network before and after; 0 skips the timing",
    )


def _overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist already")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers such as 1,3,224,224, got {text!r}")
    return shape


def _share(text: str) -> tuple[str, float]:
    """Return pattern (empty for all layers) and share."""
    pattern, _, number = text.rpartition("=")
    try:
        return pattern, float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a share such as 0.5 or PATTERN=SHARE such as 'layer1.*=0.5', got {text!r}"
        ) from None


#: Name of a command -> line of help, description with an example, and function that adds its options. The module of
#: this name runs it.
COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": (
        "train a small network on real digits, squeeze it and merge it",
        "Trains the same network without a method too, and compares them. Downloads nothing.\n\n"
        "  filterdiv demo --method csgd soft",
        _demo,
    ),
    "methods": (
        "list all methods and what each gained in our runs",
        "Callbacks go into a Trainer or a YAML file for filterdiv fit, functions change a network before training.",
        _methods,
    ),
    "inspect": (
        "report how redundant the filters of a network are",
        "Writes text, CSV, an HTML page and pictures.\n\n"
        "  filterdiv inspect torchvision:resnet18 --weights DEFAULT\n"
        "  filterdiv inspect run.ckpt --model my_package.nets:Net",
        _inspect,
    ),
    "compare": (
        "report how the filters of two networks differ",
        "Layers are matched by name. Writes text, CSV and an HTML page.\n\n  filterdiv compare before.ckpt after.ckpt",
        _compare,
    ),
    "merge": (
        "merge equal filters of a CentripetalSGD checkpoint, or nearly equal ones of any network",
        "The outputs of both networks are compared before anything is written. --twins merges nearly equal filters.\n\n"
        "  filterdiv merge end.ckpt --model my_package.nets:Net --out narrow.pt\n"
        "  filterdiv merge torchvision:resnet18 --weights DEFAULT --input-shape 1,3,224,224 --twins --out narrow.pt",
        _merge,
    ),
    "prune": (
        "remove the least important channels of a network",
        "The plan is printed first. Pruning changes the outputs: train the narrow network afterwards.\n\n"
        "  filterdiv prune end.ckpt --model my_package.nets:Net --target-macs 0.5 --out narrow.pt\n"
        "  filterdiv prune torchvision:resnet18 --weights DEFAULT --input-shape 1,3,224,224 --target-macs 0.5 "
        "--out narrow.pt",
        _prune,
    ),
    "entropy": (
        "estimate a useful depth from the entropy of images",
        "The bound is a heuristic. With a network, its depth is compared with the bound stage by stage.\n\n"
        "  filterdiv entropy --data digits --model torchvision:resnet18",
        _entropy,
    ),
}
