"""What the command line accepts: all commands with all their options.

Nothing here imports torch, so that ``--help``, ``--version`` and a misspelt command answer at once. Choices that are a
Literal or a table elsewhere therefore stand here again; ``tests/command_line/test_options.py`` compares them.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_filterdiv import __version__

__all__ = ["COMMANDS", "DATA_SOURCES", "MODEL_SOURCES", "TRAINING", "parse"]

#: Commands of LightningCLI, which parses their options itself.
TRAINING = {
    "fit": "train a LightningModule from YAML or flags, all callbacks available by short name",
    "validate": "validate it",
    "test": "test it",
}
MODEL_SOURCES = "pkg.module:Class, torchvision:NAME or timm:NAME"
DATA_SOURCES = (
    "digits, fashion_mnist, torchvision:NAME, pkg.module:Name (a data set or LightningDataModule), or a folder"
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command that is not in :data:`TRAINING`.

    Args:
        arguments: the command and its options, without the program name.

    Returns:
        The options, and the name of the command as ``command``.

    Raises:
        SystemExit: status 0 after ``--help`` or ``--version``; 2 if the arguments are wrong, explained on stderr.
    """
    parser = argparse.ArgumentParser(
        prog="filterdiv", description="Train networks with diverse filters, and look at how diverse they are."
    )
    parser.add_argument("--version", action="version", version=f"filterdiv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_options) in COMMANDS.items():
        add_options(commands.add_parser(name, help=text))
    for name, text in TRAINING.items():
        commands.add_parser(name, help=text, add_help=False)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        near = difflib.get_close_matches(arguments[0], commands.choices, n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(commands.choices)}"
        parser.error(f"there is no command {arguments[0]!r}; {fix}")
    return parser.parse_args(arguments)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        nargs="+",
        choices=("csgd", "soft", "repr", "wau", "shared", "expand", "importance", "entropy"),
        default=["csgd"],
        metavar="METHOD",
        help="what to train beside the plain network: %(choices)s (default: csgd)",
    )
    parser.add_argument(
        "--data",
        choices=("digits", "fashion_mnist"),
        default="digits",
        help="digits comes with scikit-learn; for fashion_mnist see README (default: %(default)s)",
    )
    parser.add_argument("--epochs", type=int, default=15, help="epochs per run (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, batches and the callback (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("filterdiv_demo"), help="folder for TensorBoard's files (default: %(default)s)"
    )


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"a .ckpt or .pt file, {MODEL_SOURCES}")
    _model(parser)
    _report(parser, "report")
    parser.add_argument(
        "--max-figures", type=int, default=8, help="picture files of at most so many layers (default: %(default)s)"
    )


def _compare(parser: argparse.ArgumentParser) -> None:
    for name in ("first", "second"):
        parser.add_argument(
            name, metavar={"first": "A", "second": "B"}[name], help=f"a .ckpt or .pt file, {MODEL_SOURCES}"
        )
    _model(parser)
    _report(parser, "comparison")


def _report(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add the options of commands that look at networks and write a report."""
    parser.add_argument(
        "--weights",
        metavar="NAME",
        help="trained weights of torchvision:NAME or timm:NAME, DEFAULT for the library's choice; downloaded if they "
        "are not on this machine",
    )
    parser.add_argument(
        "--data", metavar="SOURCE", help=f"also compare channels on images: a .pt file with a batch, {DATA_SOURCES}"
    )
    parser.add_argument("--root", type=Path, help="where the files of fashion_mnist or torchvision:NAME are")
    parser.add_argument(
        "--max-images", type=int, default=64, metavar="N", help="show the network N images (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(folder), metavar="FOLDER", help="for the report (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is in the folder already")
    parser.add_argument(
        "--threshold", type=float, default=0.9, help="|cos| from which filters count as alike (default: %(default)s)"
    )
    parser.add_argument("--include", nargs="+", metavar="PATTERN", help="only layers of these names")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="leave layers of these names out")


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, help="a Lightning checkpoint of a fit with CentripetalSGD; with --twins, any weights"
    )
    parser.add_argument(
        "--twins",
        nargs="?",
        type=float,
        const=0.99,
        metavar="COSINE",
        help="merge filters that are nearly equal, of any network: their cosine similarity at least (default: 0.99)",
    )
    _export(parser)
    parser.add_argument("--out", type=Path, required=True, help="file for the narrow network, see load_merged")
    _model(parser)
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="N,C,H,W",
        help="shape of the input to trace with (default: what the checkpoint or the model knows)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest relative change of the outputs by setting members of clusters to their mean; 'inf' merges anyway "
        "(default: %(default)s)",
    )
    _form(parser)
    parser.add_argument(
        "--pairs", type=int, default=20, help="timed forward passes per network, 0 for no timing (default: %(default)s)"
    )


def _form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--form",
        choices=("auto", "module", "graph"),
        default="auto",
        help="module: keep every class; graph: write forwards that decide where channels go as torch.fx graphs; auto: "
        "only where the widths need it (default: %(default)s)",
    )


def _prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=f"a .ckpt or .pt file, {MODEL_SOURCES}")
    parser.add_argument("--out", type=Path, required=True, help="file for the narrow network, see load_merged")
    _model(parser)
    parser.add_argument(
        "--importance",
        choices=("l1", "l2", "bn_scale", "taylor", "redundancy", "random"),
        default="l2",
        help="what channels are judged by (default: %(default)s)",
    )
    parser.add_argument("--keep-fraction", type=float, metavar="SHARE", help="of every layer's channels to keep")
    parser.add_argument("--target-macs", type=float, metavar="SHARE", help="of the network's MACs to end at")
    parser.add_argument("--target-parameters", type=float, metavar="SHARE", help="of its parameters to end at")
    parser.add_argument(
        "--scope",
        choices=("layer", "global"),
        default="layer",
        help="the same share in every layer, or channels of all layers compete (default: %(default)s)",
    )
    parser.add_argument("--max-layer-fraction", type=float, metavar="SHARE", help="of a layer's channels that may go")
    parser.add_argument(
        "--channels-multiple", type=int, default=1, metavar="N", help="keep multiples of N (default: %(default)s)"
    )
    parser.add_argument("--include", nargs="+", metavar="PATTERN", help="only layers of these names")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="leave layers of these names out")
    parser.add_argument("--network", metavar="NAME", help="trace only this submodule, for example backbone")
    _form(parser)
    parser.add_argument(
        "--input-shape",
        type=_shape,
        metavar="N,C,H,W",
        help="shape of the input to trace with (default: what the model knows)",
    )
    parser.add_argument(
        "--data",
        metavar="pkg.module:Name",
        help="a data set or LightningDataModule of (inputs, labels): batches for taylor, for the means that go into "
        "biases, and for the accuracy before and after",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random and of the batches (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=int, default=20, help="timed forward passes per network, 0 for no timing (default: %(default)s)"
    )
    _export(parser)


def _entropy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="SOURCE", help=f"training images: {DATA_SOURCES}")
    parser.add_argument("--root", type=Path, help="where the files of fashion_mnist or torchvision:NAME are")
    parser.add_argument(
        "--unit", choices=("nats", "bits"), default="nats", help="of the entropy that is rounded (default: %(default)s)"
    )
    parser.add_argument(
        "--rounding",
        choices=("ceil", "floor", "round"),
        default="ceil",
        help="of the mean entropy (default: %(default)s)",
    )
    parser.add_argument("--max-images", type=int, metavar="N", help="measure N images, evenly spaced (default: all)")
    _model(parser)
    parser.add_argument(
        "--input-size", type=int, nargs="+", metavar="N", help="height and width that the network is traced with"
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--onnx",
        type=Path,
        metavar="FILE",
        help="also write an ONNX file with a dynamic batch, check it in onnxruntime and time both runtimes",
    )


def _model(parser: argparse.ArgumentParser) -> None:
    """Add the options by which a command is told its network, for :mod:`.model_source`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="SOURCE", help=f"the network: {MODEL_SOURCES}")
    source.add_argument("--config", type=Path, metavar="YAML", help="a LightningCLI configuration; its model is built")
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle a file that holds more than tensors and plain values: this runs whatever code it contains, so "
        "only for files from people you trust",
    )


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers such as 1,3,224,224, got {text!r}")
    return shape


#: Name of a command -> its line of help and what adds its options. Module ``NAME`` beside this one runs it.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("train a small network on real digits, squeeze it and merge it", _demo),
    "merge": ("merge a CentripetalSGD checkpoint into a narrower network", _merge),
    "prune": ("remove the least important channels of a network, as many as a target asks for", _prune),
    "entropy": ("estimate how deep a network can usefully be for a data set", _entropy),
    "inspect": ("report how redundant the filters of a network are", _inspect),
    "compare": ("report how the filters of two networks differ", _compare),
}
