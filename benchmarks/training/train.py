"""Train one run from composed YAML: data x model x recipe x method x trainer.

    python -m benchmarks.training.train fit -c benchmarks/configs/data/fashion_mnist.yaml \\
        -c benchmarks/configs/model/c3.yaml -c benchmarks/configs/recipe/fm5k.yaml \\
        -c benchmarks/configs/method/repr.yaml -c benchmarks/configs/trainer/cpu.yaml \\
        --seed_everything 1 --trainer.default_root_dir runs/repr-seed1

Later files win over earlier ones, flags over files. The same command continues a run that was stopped (killed, requeued
by Slurm, or in the middle of an epoch) and does nothing if the run is finished. At the end the run is tested and
described in ``result.json`` in its folder. Works under ``torchrun`` and Slurm as it is: Lightning finds the processes.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, Namespace

import benchmarks.training.data
from benchmarks.common.device import description
from benchmarks.models import check_network
from benchmarks.training.classification import Classification
from benchmarks.training.record import LastCheckpoint, Record, SeededSteps, WholeFiles, run_differences
from benchmarks.training.requeue import RequeueAtStep
from benchmarks.training.runs import write_whole
from lightning_filterdiv import *  # noqa: F403  # a configuration names only classes that are loaded
from lightning_filterdiv.narrowing import count_parameters

__all__ = ["BenchmarkCLI", "compact", "planned_processes", "run_settings"]

#: Settings that change where or how fast a run goes, not what it computes.
_NEUTRAL = {
    "data": {"root", "download", "workers", "seed"},
    "model": {"channels_last"},
}
_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "sync_batchnorm",
            "gradient_clip_algorithm", "limit_train_batches")  # fmt: skip
#: Recorded only where they are not Lightning's defaults, which are nothing.
_RARE = ("min_epochs", "min_steps", "max_time", "fast_dev_run", "overfit_batches", "limit_test_batches")


def compact(result: dict[str, Any]) -> str:
    """JSON with one line per flat object: readable, and small enough to commit."""
    text = json.dumps(result, indent=1) + "\n"
    return re.sub(r"\{[^{}\[\]]*\}", lambda match: re.sub(r"\s*\n\s*", " ", match[0]), text)


def _plain(value: Any) -> Any:
    """Convert values without a JSON form, such as namespaces, devices and functions."""
    if isinstance(value, Namespace):
        return {key: _plain(entry) for key, entry in vars(value).items()}
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | int | float):
        return value
    named = hasattr(value, "__qualname__")  # the text of a function holds its address, which is another in every run
    return f"{value.__module__}.{value.__qualname__}" if named else str(value)


def _class(path: str) -> str:
    """Name of a class in the settings, short for ours and Lightning's: no other is taken for one of them."""
    package, _, _ = path.partition(".")
    return path.rpartition(".")[2] if package in {"benchmarks", "lightning", "lightning_filterdiv"} else path


def _methods(callbacks: Any) -> list[dict[str, Any]]:
    """Callbacks of the trainer's list with the arguments that were given."""
    entries = callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
    return [{"class": _class(entry["class_path"]), **(_plain(entry.get("init_args")) or {})} for entry in entries]


def run_settings(config: Namespace) -> dict[str, Any]:
    """Return the settings of a run that determine its results. Runs with equal settings and numbers of processes are
    the same.

    Args:
        config: config of one subcommand.
    """
    data, model, trainer = _plain(config["data"]), _plain(config["model"]), config["trainer"]
    arguments = data.get("init_args", {})
    return {
        "seed": int(config["seed_everything"]),
        "data": {
            "class": _class(data["class_path"]),
            **{k: v for k, v in arguments.items() if k not in _NEUTRAL["data"]},
        },
        "model": {k: v for k, v in model.items() if k not in _NEUTRAL["model"]},
        "trainer": {key: _plain(trainer[key]) for key in _TRAINER}
        | {key: _plain(trainer[key]) for key in _RARE if trainer[key]},
        "callbacks": _methods(trainer["callbacks"]),
    }


def planned_processes(config: Namespace) -> int | None:
    """Return the number of processes that the configuration asks for; ``None`` if the machine decides."""
    devices = str(config["trainer"]["devices"])  # a number, a list, "auto" or -1
    return int(devices) * int(config["trainer"]["num_nodes"]) if devices.isdigit() else None


class BenchmarkCLI(LightningCLI):
    """LightningCLI over the data modules and networks of the benchmarks."""

    def __init__(self, arguments: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            Classification,
            LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=1,
            save_config_callback=None,  # result.json says it
            auto_configure_optimizers=False,  # the model's own, from its settings
            args=None if arguments is None else list(arguments),
            run=run,
            parser_kwargs={"prog": "benchmarks.training.train", "fit": {"description": __doc__}} if run else {},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``: it tests at the end."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of a run, and what the network takes from the data."""
        parser.add_argument("--label", type=str, default="", help="name of the method in the result")
        parser.add_argument("--result", type=str | None, default=None, help="file; result.json in the run's folder")
        parser.add_argument("--resume", type=bool, default=True, help="go on from checkpoints/last.ckpt if it is there")
        parser.add_argument("--look", type=int, default=2500, help="test images to look at after every epoch")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("data.image_shape", "model.image_shape", apply_on="instantiate")
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """A network that there is not is an error of the command line, also of a sweep that only parses it."""
        super().parse_arguments(parser, args)
        try:
            check_network(self.options["model"]["network"])
        except ValueError as error:
            parser.error(str(error))

    @property
    def options(self) -> Namespace:
        """The configuration of the run."""
        subcommand = self.config.get("subcommand")  # self.subcommand is set only after parsing
        options: Namespace = self.config[subcommand] if subcommand else self.config
        return options

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has."""
        options = self.options
        self.record = Record(run_settings(options), options["look"])
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        at = next((i for i, c in enumerate(callbacks) if isinstance(c, LastCheckpoint)), len(callbacks))
        self.requeue = RequeueAtStep()
        self.record.settings["processes"] = trainer.world_size  # batches are per process
        trainer.strategy.checkpoint_io = WholeFiles()
        callbacks[at:at] = [SeededSteps(int(options["seed_everything"])), self.record, self.requeue]
        return trainer

    def result_path(self) -> Path:
        """Path of the result."""
        return Path(self.options["result"] or Path(self.trainer.default_root_dir) / "result.json")

    def fit(self, **arguments: Any) -> None:
        """Train unless it is done, going on from where it stopped."""
        path = self.result_path()
        self.finished = path.exists()
        if self.finished:
            found = json.loads(path.read_text())
            if changed := run_differences(self.record.settings, found["settings"]):
                raise SystemExit(
                    f"benchmarks.training.train: {path} holds the result of another run: this run has "
                    f"{'; '.join(changed)}; choose another --trainer.default_root_dir or --result"
                )
            print(f"benchmarks.training.train: {path} is there: nothing to do")
            return
        last = Path(self.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if self.options["resume"] and arguments.get("ckpt_path") is None and last.exists():
            arguments["ckpt_path"] = str(last)
        if "weights_only" in signature(Trainer.fit).parameters:  # from Lightning 2.6 on
            arguments["weights_only"] = True
        self.requeue.listen()
        self.trainer.fit(**arguments)
        self.seconds = self.record.seconds

    def after_fit(self) -> None:
        """Test, and write the result."""
        trainer = self.trainer
        if self.finished or trainer.interrupted:
            return
        (test,) = trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if not trainer.is_global_zero:
            return
        result = {
            "method": self.options["label"],
            "seed": self.record.settings["seed"],
            "test_accuracy": test["test_acc"],
            "parameters": count_parameters(self.model),
            "processes": trainer.world_size,
            "device": description(trainer.strategy.root_device),
            "seconds": round(self.seconds, 1),
            "settings": self.record.settings,
            "curve": self.record.rows,
            "before": self.record.before,
            "after": self.record.after,
            "versions": {
                "torch": torch.__version__,
                "lightning": version("lightning"),
                "python": platform.python_version(),
            },
        }
        path = self.result_path()
        write_whole(path, compact(result))
        print(f"benchmarks.training.train: test accuracy {100 * test['test_acc']:.2f} %, result in {path}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    _ = benchmarks.training.data  # its classes are found by name
    BenchmarkCLI(arguments)


if __name__ == "__main__":
    main()
