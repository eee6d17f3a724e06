"""Runs of the benchmarks: composed, resumed exactly, never mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from benchmarks.training import train
from benchmarks.training.classification import Classification
from benchmarks.training.data import Digits
from benchmarks.training.record import Record, WholeFiles, differences, run_differences
from benchmarks.training.sweep import CONFIGS, plan

QUICK = [("data", "digits"), ("model", "c3"), ("recipe", "quick"), ("trainer", "cpu")]


def arguments(folder: Path, method: str = "wau", *more: str) -> list[str]:
    files = [*QUICK[:3], ("method", method), QUICK[3]]
    composed = [part for kind, name in files for part in ("-c", str(CONFIGS / kind / f"{name}.yaml"))]
    return ["fit", *composed, "--seed_everything", "3", "--data.train_images", "200", "--trainer.max_epochs", "4",
            "--trainer.default_root_dir", str(folder), "--label", method, "--look", "50", *more]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


class WithDropout(Classification):
    """Zeroes features at random."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.dropout(images, 0.3, self.training))


class KilledError(Exception):
    pass


class KillAt(Callback):
    """Ends the process, as far as one process can show it, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


def kill(arguments: list[str], step: int) -> None:
    """Run until ``step`` begins."""
    original = train.BenchmarkCLI.instantiate_trainer

    def killed(self: train.BenchmarkCLI, **kwargs: Any) -> pl.Trainer:
        trainer = original(self, **kwargs)
        trainer.callbacks.append(KillAt(step))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.BenchmarkCLI, "instantiate_trainer", killed)
        with pytest.raises(KilledError):
            train.main(arguments)


@pytest.fixture(autouse=True)
def _only_this_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks.training.train"])


@pytest.mark.parametrize(
    ("every", "device"),
    [
        pytest.param(2, "cpu", id="inside an epoch"),
        pytest.param(3, "cpu", id="after the last of three steps, before the end of the epoch"),
        pytest.param(2, "gpu_float32", id="on a GPU",
                     marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")),
    ],
)  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, device: str
) -> None:
    # Dropout and augmented images: a resume repeats them only if randomness is keyed by the step.
    more = ("--data.augment", "true", "--checkpoint.every_n_train_steps", str(every), "-c",
            str(CONFIGS / "trainer" / f"{device}.yaml"))  # fmt: skip
    monkeypatch.setattr(train, "Classification", WithDropout)
    train.main(arguments(tmp_path / "whole", "wau", *more))
    kill(arguments(tmp_path / "cut", "wau", *more), 5)
    assert not (tmp_path / "cut" / "result.json").exists()
    train.main(arguments(tmp_path / "cut", "wau", *more))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut")]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    assert [row["epoch"] for row in results[0]["curve"]] == [1, 2, 3, 4]


def test_seconds_are_those_of_all_starts() -> None:
    first = Record({"seed": 1}, 0)
    first._started -= 100
    second = Record({"seed": 1}, 0)
    second.load_state_dict(first.state_dict())
    assert 100 <= second.seconds < 110


def test_a_checkpoint_is_replaced_by_a_complete_one_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, path)

    def cut_off(self: TorchCheckpointIO, checkpoint: Any, path: str, *_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(TorchCheckpointIO, "save_checkpoint", cut_off)
        with pytest.raises(KilledError):
            WholeFiles().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    WholeFiles().save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_finished_run_is_left_alone_and_another_is_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(arguments(tmp_path))
    before, final = (tmp_path / "result.json").read_text(), weights(tmp_path)
    train.main(arguments(tmp_path))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"holds the result of another run: this run has model.lr: 0.5, not 0.02"):
        train.main(arguments(tmp_path, "wau", "--model.lr", "0.5"))
    assert (tmp_path / "result.json").read_text() == before
    (tmp_path / "result.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint belongs to another run: this run has model.lr: 0.5, not 0.02"):
        train.main(arguments(tmp_path, "wau", "--model.lr", "0.5"))
    result = json.loads(before)
    assert result["method"] == "wau"
    model = Classification(image_shape=(1, 8, 8)).eval()
    model.load_state_dict(final)
    data = Digits(train_images=200, seed=3)
    data.setup()
    with torch.no_grad():
        hits = model(data.parts[2]).argmax(1) == data.parts[3]
    assert result["test_accuracy"] == pytest.approx(float(hits.double().mean()))
    assert result["settings"]["callbacks"][0]["class"] == "WeightAsynchronousUpdate"
    assert set(result["before"]) == set(result["after"]) == {"net.conv1", "net.conv2", "net.conv3"}


def test_the_control_slows_convolutions_only(tmp_path: Path) -> None:
    model = Classification(convolution_lr=0.5, lr=0.1)
    (optimizer,), _ = [model.configure_optimizers()["optimizer"]], None
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert {rates[id(p)] for p in model.net.classifier.parameters()} == {0.1}
    assert {rates[id(p)] for name in ("conv1", "conv2", "conv3") for p in model.net.get_submodule(name).parameters()} \
        == {0.05}  # fmt: skip


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    donor = Classification()
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "last.ckpt")
    started = Classification(weights=str(tmp_path / "last.ckpt"))
    assert torch.equal(started.net.conv2.weight, donor.net.conv2.weight)
    with pytest.raises(ValueError, match="is not of this network"):
        Classification(network="c8", weights=str(tmp_path / "last.ckpt"))


def test_a_run_needs_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(tmp_path)
    given[given.index("--seed_everything") + 1] = "true"
    with pytest.raises(SystemExit):
        train.main(given)
    assert "seed" in capsys.readouterr().err


def small_network(channels: int, size: int, classes: int, width: int = 4) -> torch.nn.Module:
    """Of a user: eight by eight pixels, as digits have."""
    assert size == 8
    return torch.nn.Sequential(
        torch.nn.Conv2d(channels, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3), torch.nn.Flatten(),
        torch.nn.Linear(16 * width, classes),
    )  # fmt: skip


def test_a_network_of_ones_own_is_trained_and_resumed(tmp_path: Path) -> None:
    own = ("--model.network", f"{__name__}.small_network", "--model.options", "{width: 5}")
    train.main(arguments(tmp_path / "whole", "wau", *own))
    kill(arguments(tmp_path / "cut", "wau", *own), 7)
    assert (tmp_path / "cut" / "checkpoints" / "last.ckpt").exists()
    train.main(arguments(tmp_path / "cut", "wau", *own))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole["net.0.weight"].shape == (5, 1, 3, 3)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    settings = json.loads((tmp_path / "cut" / "result.json").read_text())["settings"]
    assert settings["model"]["network"] == f"{__name__}.small_network"


def test_a_network_that_there_is_not_is_an_error_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path, "wau", "--model.network", "resnet21"))
    assert "model.network must be one of c3, c8" in capsys.readouterr().err
    (run,) = plan("digits", "c3", "quick", ["wau"], [1], "cpu", tmp_path, ["--model.network=resnet21"])
    with pytest.raises(SystemExit):
        run.settings()


def test_the_optimizer_is_that_of_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an option of Lightning's would replace is not recorded in the result, so there is no such option."""
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path, "wau", "--optimizer", "Adam"))
    assert "--optimizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--trainer.limit_test_batches=1", "trainer.limit_test_batches: 1"),
        ("--trainer.overfit_batches=2", "trainer.overfit_batches: 2"),
        ("--trainer.fast_dev_run=true", "trainer.fast_dev_run: True"),
        ("--trainer.devices=2", "processes: 2, not 1"),
    ],
)
def test_what_changes_a_result_makes_another_run(tmp_path: Path, override: str, said: str) -> None:
    (plain,) = plan("digits", "c3", "quick", ["wau"], [1], "cpu", tmp_path)
    (other,) = plan("digits", "c3", "quick", ["wau"], [1], "cpu", tmp_path, [override])
    (difference,) = run_differences(other.settings(), plain.settings())
    assert said in difference
    old = {key: value for key, value in plain.settings().items() if key != "processes"}  # from before it was recorded
    assert run_differences(plain.settings(), old) == []


@pytest.mark.parametrize("method", sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml")))
def test_every_method_composes(tmp_path: Path, method: str) -> None:
    (run,) = plan("fashion_mnist", "resnet20", "fm5k", [method], [4], "cpu", tmp_path)
    settings = run.settings()
    assert settings["seed"] == 4
    transform = settings["data"].pop("transform")
    expected = {"class": "FashionMNIST", "batch_size": 64, "train_images": 5000, "augment": False, "wrong_labels": None}
    assert settings["data"] == expected
    assert (transform is not None) == method.startswith("wavelet")
    assert settings["model"]["milestones"] == [48, 55]
    (plain,) = plan("fashion_mnist", "resnet20", "fm5k", ["baseline"], [4], "cpu", tmp_path)
    assert bool(differences(run.settings(), plain.settings())) == (method != "baseline")


@pytest.mark.parametrize(
    ("data", "model", "recipe", "trainer"),
    [
        ("cifar10", "c3", "cifar_repr", "gpu"),
        ("cifar100", "resnet32", "cifar_dsfb", "ddp"),
        ("cifar10", "resnet56_projection", "cifar_csgd", "cpu"),
        ("cifar10", "densenet40", "cifar_wau", "ddp_cpu"),
        ("cifar100", "wrn28_10", "cifar_orthogonality", "ddp"),
        ("imagenet", "resnet50", "imagenet", "ddp"),
        ("digits", "c8", "quick", "cpu"),
    ],
)
def test_recipes_compose_with_their_data(tmp_path: Path, data: str, model: str, recipe: str, trainer: str) -> None:
    (run,) = plan(data, model, recipe, ["wau"], [1], trainer, tmp_path)
    settings = run.settings()
    assert settings["model"]["network"] == model
    assert settings["trainer"]["max_epochs"] > 1


class Digits8(Digits):
    """Not the benchmarks' own."""


def test_a_class_of_ones_own_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"data: {{class_path: {__name__}.Digits8}}\n")
    ours, own = (
        plan(data, "c3", "quick", ["wau"], [1], "cpu", tmp_path)[0].settings()
        for data in ("digits", str(tmp_path / "own.yaml"))
    )
    assert ours["data"]["class"] == "Digits"
    assert own["data"]["class"] == f"{__name__}.Digits8"
    assert [entry["class"] for entry in own["callbacks"]] == ["WeightAsynchronousUpdate"]


def average(old: torch.Tensor, new: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    return old + (new - old) / (count + 1)


def test_settings_that_json_has_no_form_for_are_written_by_name(tmp_path: Path) -> None:
    """Callbacks of others take devices and functions."""
    (tmp_path / "swa.yaml").write_text(
        "trainer:\n"
        "  callbacks:\n"
        "    - class_path: lightning.pytorch.callbacks.StochasticWeightAveraging\n"
        f"      init_args: {{swa_lrs: 0.1, device: cpu, avg_fn: {__name__}.average}}\n"
    )
    more = ("-c", str(tmp_path / "swa.yaml"), "--trainer.max_epochs", "1")
    train.main(arguments(tmp_path / "run", "baseline", *more))
    train.main(arguments(tmp_path / "run", "baseline", *more))  # the settings read back are the same
    (swa,) = json.loads((tmp_path / "run" / "result.json").read_text())["settings"]["callbacks"]
    assert swa["class"] == "StochasticWeightAveraging"
    assert (swa["device"], swa["avg_fn"]) == ("cpu", f"{__name__}.average")


def test_differences_name_the_setting() -> None:
    assert differences({"a": {"b": 1, "c": None}, "d": [1]}, {"a": {"b": 2}, "d": [1]}) == ["a.b: 1, not 2"]
