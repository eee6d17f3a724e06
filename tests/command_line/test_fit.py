"""``filterdiv fit``, ``validate`` and ``test``."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_filterdiv
from lightning_filterdiv import RePr
from lightning_filterdiv.command_line import fit
from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.command_line.yaml_errors import find_cause
from lightning_filterdiv.demo import Digits, SmallConvNet
from tests.registry import ONE_EACH

_DEMO = {"model": "lightning_filterdiv.demo.SmallConvNet", "data": "lightning_filterdiv.demo.Digits"}


def configure(*callbacks: Any, **sections: Any) -> list[str]:
    """Write ``run.yaml`` for the demo's network and return the arguments that name it."""
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "callbacks": list(callbacks)}
    Path("run.yaml").write_text(yaml.safe_dump(_DEMO | {"trainer": trainer} | sections))
    return ["--config", "run.yaml"]


def test_wrong_yaml_names_the_argument(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"class_path": "WeightAsynchronousUpdate", "init_args": {"axis": "sideways"}}
    assert main(["fit", *configure(wrong)]) == 2
    error = capsys.readouterr().err
    for part in ("WeightAsynchronousUpdate", "axis", "sideways", "'out'"):
        assert part in error.splitlines()[0]


def test_launchers_are_refused_before_processes_start(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "validate", "test"):
        assert main([command, *configure("RePr"), "--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"filterdiv {command}: RePr cannot be used with a launcher that trains in child proc")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends in, beside what Lightning logs."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("filterdiv ")]
    assert len(said) == 1
    return said[0]


def test_files_that_are_no_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    weights = SmallConvNet().state_dict()
    torch.save(weights, "weights.pt")
    torch.save([1, 2], "list.pt")
    Path("half.ckpt").write_bytes(Path("weights.pt").read_bytes()[:2000])
    Path("text.ckpt").write_text("hello")
    Path("folder").mkdir()
    said = {
        "": "filterdiv fit: --ckpt_path is empty",
        "folder": "folder: Is a directory",
        "none.ckpt": "filterdiv fit: Checkpoint file not found: none.ckpt",
        "weights.pt": "--ckpt_path weights.pt holds weights and no state of a training; name a file that Trainer",
        "list.pt": "--ckpt_path list.pt holds neither a Lightning checkpoint nor a state dict",
        "half.ckpt": "--ckpt_path half.ckpt is not a checkpoint",
        "text.ckpt": "--ckpt_path text.ckpt is not a checkpoint",
    }
    for path, words in said.items():
        assert words in refused(capsys, "fit", *configure(), "--ckpt_path", path)


def test_files_that_are_no_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(SmallConvNet().state_dict(), "weights.pt")
    Path("folder").mkdir()
    assert refused(capsys, "fit", "--config", "").startswith("filterdiv fit: --config is empty")
    assert refused(capsys, "fit", "--config=").startswith("filterdiv fit: --config is empty")
    assert "--config weights.pt is not YAML in UTF-8" in refused(capsys, "fit", "--config", "weights.pt")
    assert "Path is not a file" in refused(capsys, "fit", "--config", "folder")
    assert "File does not exist" in refused(capsys, "fit", "-c", "none.yaml")
    for option in ("--trainer", "--model"):
        assert f"{option} weights.pt is not YAML in UTF-8" in refused(capsys, "fit", *configure(), option, "weights.pt")


def test_what_a_callback_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    long = {"class_path": "RePr", "init_args": {"full_epochs": 50}}
    assert "RePr" in refused(capsys, "fit", *configure(long))
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, logger=False, callbacks=[RePr(full_epochs=0.2)])
    with contextlib.suppress(MisconfigurationException):
        trainer.fit(SmallConvNet(), datamodule=Digits())
    trainer.save_checkpoint("run.ckpt")
    checkpoint = torch.load("run.ckpt", weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("RePr"))
    state["extra"].pop("history")
    torch.save(checkpoint, "damaged.ckpt")
    said = refused(capsys, "fit", *configure("RePr"), "--ckpt_path", "damaged.ckpt")
    assert said.startswith("filterdiv fit: the checkpoint's state of RePr cannot be used: missing entry 'history'")


def test_a_part_of_a_checkpoint_that_cannot_be_restored(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, logger=False, enable_checkpointing=False)
    trainer.fit(SmallConvNet(), datamodule=Digits())
    trainer.save_checkpoint("run.ckpt")

    def said(part: str, value: Any = None, *keys: Any) -> str:
        checkpoint = torch.load("run.ckpt", weights_only=True)
        entry = checkpoint
        for key in (first := [part, *keys])[:-1]:
            entry = entry[key]
        if value is None:
            del entry[first[-1]]
        else:
            entry[first[-1]] = value
        torch.save(checkpoint, "damaged.ckpt")
        return refused(capsys, "fit", *configure(), "--trainer.max_epochs", "2", "--ckpt_path", "damaged.ckpt")

    start = "filterdiv fit: --ckpt_path damaged.ckpt: its"
    weight = next(iter(SmallConvNet().state_dict()))
    assert said("state_dict", None, weight).startswith(f"{start} model cannot be restored (RuntimeError: Error(s) in l")
    assert said("optimizer_states", None, 0, "param_groups").startswith(
        f"{start} optimizers cannot be restored (KeyError: 'param_groups')"
    )
    assert said("optimizer_states", 5, 0).startswith(f"{start} optimizers cannot be restored (")
    progress = ("fit_loop", "epoch_loop.batch_progress", "total")
    assert said("loops", None, *progress).startswith(f"{start} loops cannot be restored (KeyError: 'total')")
    assert said("pytorch-lightning_version", 3).startswith(f"{start} version cannot be restored (InvalidVersion: ")
    assert said("loops", 3).startswith(f"{start} loops cannot be restored (")
    assert said("lr_schedulers").startswith(f"{start} optimizers and schedulers cannot be restored (KeyError")


def test_a_configuration_of_an_earlier_run_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """LightningCLI saves the configuration before training, and a refused fit must not stand in the way of the next."""
    long = {"class_path": "RePr", "init_args": {"full_epochs": 50}}
    refused(capsys, "fit", *configure(long))
    assert not Path("config.yaml").exists()
    assert main(["fit", *configure(), "--trainer.limit_train_batches", "1"]) == 0
    saved = Path("config.yaml").read_text()
    said = refused(capsys, "fit", *configure())
    assert "config.yaml is of an earlier run and would be lost" in said
    assert "--trainer.default_root_dir" in said
    assert Path("config.yaml").read_text() == saved


@pytest.mark.skipif(not fit._lightning_restrains_loading(), reason="Lightning 2.5 has no --weights_only")
def test_a_file_that_is_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    """The way out that the refusal names is one."""
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, logger=False, enable_checkpointing=False)
    trainer.fit(SmallConvNet(), datamodule=Digits())
    trainer.save_checkpoint("run.ckpt")
    checkpoint = torch.load("run.ckpt", weights_only=True)
    torch.save({**checkpoint, "note": Path("something")}, "pickled.ckpt")
    command = ["validate", *configure(), "--ckpt_path", "pickled.ckpt"]
    assert "add --weights_only false" in refused(capsys, *command)
    assert main([*command, "--weights_only", "false"]) == 0


def test_fit_validate_test(tmp_path: Path) -> None:
    """The three commands of one YAML file; the callback is named by its short name."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {class_path: lightning_filterdiv.demo.SmallConvNet, init_args: {width: 8}}\n"
        "data: lightning_filterdiv.demo.Digits\n"
        "trainer:\n  max_epochs: 1\n  accelerator: cpu\n  enable_progress_bar: false\n"
        f"  logger: {{class_path: CSVLogger, init_args: {{save_dir: '{tmp_path}'}}}}\n"
        "  callbacks:\n    - class_path: WeightAsynchronousUpdate\n      init_args: {update_fraction: 0.5}\n"
    )
    assert main(["fit", "--config", str(path)]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert any(key.startswith("WeightAsynchronousUpdate{") for key in state)
    for command in ("validate", "test"):
        assert main([command, "--config", str(path), "--ckpt_path", str(checkpoint)]) == 0
    assert any("test_acc" in file.read_text() for file in tmp_path.rglob("metrics.csv"))


def test_short_names_of_all_callbacks_in_a_fresh_process() -> None:
    """Rooms are imported on first use, and a class that nobody has imported has no short name."""
    names = [case.cls.__name__ for case in ONE_EACH]
    assert set(names) | {"FilterCallback", "__version__"} == set(lightning_filterdiv.__all__)
    command = [sys.executable, "-m", "lightning_filterdiv", "fit", *configure(*names), "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    given = [entry["class_path"] for entry in yaml.safe_load(done.stdout)["trainer"]["callbacks"]]
    assert given == [f"lightning_filterdiv.{name}" for name in names]


def test_the_arguments_are_not_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when its arguments are given beside a command line."""
    for line in (["filterdiv", "fit", *configure()], ["notebook", "--something"]):
        monkeypatch.setattr(sys, "argv", line)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            given = None if line[0] == "filterdiv" else ["fit", *configure()]
            more = ["--trainer.fast_dev_run", "true"]
            if given is None:
                line += more
                assert main() == 0
            else:
                assert main([*given, *more]) == 0
        assert not [str(entry.message) for entry in caught if "args parameter" in str(entry.message)]


# --------------------------------------------------------------------------- values that a constructor refuses


class Picky(Callback):
    """A user's callback with a check of its own."""

    def __init__(self, level: int = 0) -> None:
        if level < 1:
            raise ValueError(f"level {level} is too low")


@pytest.mark.parametrize(
    ("callback", "arguments", "message"),
    [
        (
            "RePr",
            {"prune_fraction": 2.0},
            "prune_fraction must be a finite number with 0 < prune_fraction < 1, got 2.0",
        ),
        ("EarlyStopping", {"monitor": "val_acc", "mode": "up"}, "`mode` can be min, max, got up"),
    ],
)
def test_a_value_that_a_callback_refuses(
    callback: str, arguments: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {"class_path": callback, "init_args": arguments}
    assert main(["fit", *configure("ModelCheckpoint", refused)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("filterdiv")]
    assert said == [f"filterdiv fit: {message} (in the configuration)"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"data": {"class_path": _DEMO["data"], "init_args": {"batch_size": 0}}},
            "batch_size must be an integer >= 1, got 0",
        ),
        (
            {"model": {"class_path": _DEMO["model"], "init_args": {"width": 0}}},
            "width must be an integer >= 1, got 0",
        ),
    ],
    ids=["data", "model"],
)
def test_a_value_that_the_demo_refuses(
    section: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *configure(**section)]) == 2
    assert f"filterdiv fit: {message} (in the configuration)\n" in capsys.readouterr().err


def test_an_error_in_a_class_of_the_user_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match=r"^level 0 is too low$") as caught:
        main(["fit", *configure({"class_path": f"{__name__}.Picky"})])
    assert caught.traceback[-1].path == Path(__file__)
    assert caught.value.__suppress_context__
    options = ["--trainer.fast_dev_run", "true"]
    assert main(["fit", *configure({"class_path": f"{__name__}.Picky", "init_args": {"level": 1}}), *options]) == 0


def test_models_are_still_saved_with_their_arguments() -> None:
    """LightningCLI's own way to construct a model, which ours goes through, leaves the arguments in the checkpoint."""
    options = ["--model.init_args.width", "6", "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1"]
    assert main(["fit", *configure(), *options]) == 0
    (checkpoint,) = Path().rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    assert saved["width"] == 6
    assert saved["_instantiator"] == "lightning.pytorch.cli.instantiate_module"


# --------------------------------------------------------------------------- misspelt names


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("RePrr", "RePr"),
        ("lightning_filterdiv.RePrr", "RePr"),
        ("CentripetalSgd", "CentripetalSGD"),
        ("WeightAsyncUpdate", "WeightAsynchronousUpdate"),
        ("EntropyDepth", "EntropyDepthBound"),
        ("FilterSimilarity", "FilterSimilarityMonitor"),
        ("BasisOrtonormality", "BasisOrthonormality"),
        ("ChannelImportence", "ChannelImportance"),
        ("ExpandNets", "ExpandNet"),
    ],
)
@pytest.mark.parametrize("where", ["yaml", "flag"])
def test_a_misspelt_callback(written: str, meant: str, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    if where == "yaml":
        arguments = configure("ModelCheckpoint", {"class_path": written})
    else:
        arguments = [*configure(), f"--trainer.callbacks+={written}"]
    assert main(["fit", *arguments]) == 2
    error = capsys.readouterr().err
    name = written.rpartition(".")[2]
    assert error.startswith(f"filterdiv fit: There is no callback {name!r}; did you mean {meant!r}?\n")
    assert error.count("did you mean") == 1
    assert error.endswith("The options are listed by: filterdiv fit --help\n")
    assert "usage:" not in error, "fifty lines that would hide the message"


@pytest.mark.parametrize(
    ("callbacks", "cause"),
    [
        (
            [{"class_path": "RePr", "init_args": {"full_epoch": 3}}],
            "RePr has no argument 'full_epoch'; did you mean 'full_epochs'?",
        ),
        ([{"class_path": "RePr", "init_args": {"colour": 3}}], "RePr has no argument 'colour'"),
        (
            [{"class_path": "RePr", "init_args": {"full_epochs": "many"}}],
            "RePr: full_epochs must be int or float, got 'many'",
        ),
        (
            [{"class_path": "ModelCheckpoint"}, {"class_path": "CentripetalSGD", "init_args": {"include": "conv1"}}],
            "CentripetalSGD: include must be list[str] or null, got 'conv1'",
        ),
        (
            [{"class_path": "WeightAsynchronousUpdate", "init_args": {"axis": "sideways"}}],
            "WeightAsynchronousUpdate: axis must be one of 'out', 'in', got 'sideways'",
        ),
        (
            [{"class_path": "ModelCheckpoint", "init_args": {"save_top_k": 3.5}}, f"{__name__}.Picky", "RePr"],
            "ModelCheckpoint: save_top_k must be int, got 3.5",
        ),
        ([{"class_path": "RePr", "init_args": {"seed": 2.5}}, "ModelCheckpoint"], "RePr: seed must be int, got 2.5"),
        (
            [{"class_path": "RePr", "init_args": {"include": ["a", 3]}}],
            "RePr: include must be list[str] or null, got ['a', 3]",
        ),
        (
            [{"class_path": "CentripetalSGD", "init_args": {"keep_fraction": {"conv*": "x"}}}],
            "CentripetalSGD: keep_fraction must be float or dict[str, float] or null, got {'conv*': 'x'}",
        ),
        (
            [{"class_path": "BasisOrthonormality", "init_args": {"milestones": {"ten": 1.0}}}],
            "BasisOrthonormality: milestones must be dict[int, float] or null, got {'ten': 1.0}",
        ),
        (
            [{"class_path": "RePr", "seed": 3}],
            "Callback is an entry with class_path and other names; write the arguments of the class under init_args",
        ),
        ([{"class_pat": "RePr"}], "Callback has no argument 'class_pat'; did you mean 'class_path'?"),
        (
            [{"class_path": "RePr", "init_args": [1]}],
            "RePr needs a mapping of argument names to values as init_args, got a list",
        ),
        (["Trainer"], "there is no class 'Trainer'"),
    ],
)
def test_the_first_line_is_the_cause(callbacks: list[Any], cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *configure(*callbacks)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[0] == f"filterdiv fit: trainer.callbacks: {cause}"
    assert "There is no callback" not in error
    assert error.splitlines()[1:] == ["The options are listed by: filterdiv fit --help"]


@pytest.mark.parametrize(
    ("section", "cause"),
    [
        ({"trainer": {"max_epochs": "x"}}, "trainer.max_epochs must be int or null, got 'x'"),
        (
            {"model": {"class_path": _DEMO["model"], "init_args": {"width": "x"}}},
            "model: SmallConvNet: width must be int, got 'x'",
        ),
        (
            {"model": {"class_path": "lightning_filterdiv.demo.SmalConvNet"}},
            "model: there is no class 'lightning_filterdiv.demo.SmalConvNet'; did you mean 'SmallConvNet'?",
        ),
        (
            {"data": {"class_path": _DEMO["data"], "init_args": {"bach_size": 3}}},
            "data: Digits has no argument 'bach_size'; did you mean 'batch_size'?",
        ),
        (
            {"trainr": {"max_epochs": 1}},
            "Subcommand 'fit' does not accept option 'trainr.max_epochs'; did you mean 'trainer.max_epochs'?",
        ),
        (
            {"optimizer": {"class_path": "SGD", "init_args": {"lr": "x"}}},
            "optimizer: SGD: lr must be float or Tensor, got 'x'",
        ),
        (
            {"trainer": {"callbacks": {"class_path": "RePr", "init_args": {"seed": "x"}}}},
            "trainer.callbacks: RePr: seed must be int, got 'x'",
        ),
        (
            {"trainer": {"logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "a", "version": [1]}}]}},
            "trainer.logger: CSVLogger: version must be int or str or null, got [1]",
        ),
        ({"trainer": {"callbacks": [3]}}, "trainer.callbacks must be list[Callback] or Callback or null, got [3]"),
    ],
)
def test_the_first_line_is_the_cause_in_every_section(
    section: dict[str, Any], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *configure(**section)]) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"filterdiv fit: {cause}"


@pytest.mark.parametrize(
    ("option", "cause"),
    [
        ("callbacks.seed=x", "trainer.callbacks: RePr: seed must be int, got 'x'"),
        ("callbacks.init_args.seed=2.5", "trainer.callbacks: RePr: seed must be int, got 2.5"),
        ("callbacks.sed=2", "trainer.callbacks: RePr has no argument 'sed'; did you mean 'seed'?"),
        (
            'callbacks=[{"class_path": "RePr", "init_args": {"seed": "x"}}]',
            "trainer.callbacks: RePr: seed must be int, got 'x'",
        ),
        ("max_epochs=x", "trainer.max_epochs must be int or null, got 'x'"),
        ("max_epchs=3", "unrecognized arguments: --trainer.max_epchs=3; did you mean 'trainer.max_epochs'?"),
    ],
)
def test_the_first_line_is_the_cause_for_a_flag(option: str, cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *configure(), "--trainer.callbacks+=RePr", f"--trainer.{option}"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"filterdiv fit: {cause}"


def test_the_command_line_of_a_script_says_the_cause_too() -> None:
    arguments = ["fit", "--trainer.callbacks+=RePr", "--trainer.callbacks.seed=2.5"]
    with pytest.raises(CommandError) as caught:
        fit.FilterDivCLI(SmallConvNet, Digits, args=arguments)
    assert str(caught.value) == "trainer.callbacks: RePr: seed must be int, got 2.5"
    assert caught.value.__suppress_context__, "the list of types does not follow"


def test_an_error_of_another_form_speaks_for_itself() -> None:
    for message in ("", "something else", 'Parser key "a":\n  something else', "Expected a <class 'int'>"):
        assert find_cause(message) == ""


def test_a_callback_of_the_user_is_none_of_ours_misspelt() -> None:
    message = "Given value: [RePrs, RePrz]"
    suggestion = "There is no callback {!r}; did you mean 'RePr'?"
    assert list(fit._meant(message)) == [suggestion.format("RePrs"), suggestion.format("RePrz")]
    of_the_user = type("RePrs", (lightning_filterdiv.RePr,), {})
    assert list(fit._meant(message)) == [suggestion.format("RePrz")]
    del of_the_user


def test_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--trainer.max_epochs", "3"]) == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("filterdiv test: ")
    assert "test.model" in first
    assert "required" in first
    assert last == "The options are listed by: filterdiv test --help"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "--trainer.max_epochs MAX_EPOCHS" in text
    assert "--trainer.callbacks+=RePr" in text
