"""Files are read without running code from them: what the package writes needs none, what others made gets none."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_filterdiv.channel_importance import ChannelGate, insert_gates
from lightning_filterdiv.command_line import fit as cli
from lightning_filterdiv.command_line.main import main
from lightning_filterdiv.command_line.model_source import read_checkpoint
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.expansion import contract, expand
from lightning_filterdiv.narrowing import load_merged, merge_channels, save_merged
from lightning_filterdiv.narrowing.files import MergedFileError
from tests.registry import ONE_EACH, Case
from tests.suites.wrong_uses.support import CLUSTERS, IMAGES, MODEL, CommandError, command, net, prune
from tests.support.malicious import FORMS, TRAP, payload, write
from tests.support.training import Classifier, fit

# --------------------------------------------------------------------------- what the package writes


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_a_trainer_s_checkpoint_holds_tensors_and_plain_values(case: Case, tmp_path: Path) -> None:
    callback = case.make(**({"figures": False} if case.name == "monitor" else {}))
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit([callback, saving], limit_train_batches=1)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 3  # RePr: before a drop, in it, after the regrowth
    for file in files:
        loaded = torch.load(file, weights_only=True)
        state = loaded["callbacks"][callback.state_key]
        assert state["layers"].keys() == callback.layers.keys()
        assert read_checkpoint(file)["epoch"] == loaded["epoch"]


@pytest.mark.parametrize("kind", ["merged", "pruned", "contracted", "gated"])
def test_a_changed_network_is_saved_as_tensors(kind: str) -> None:
    if kind == "merged":
        small = merge_channels(net(), {"0": CLUSTERS}, IMAGES, tolerance=float("inf")).network
        save_merged(small, "small.pt")
        content = torch.load("small.pt", weights_only=True)
        assert isinstance(content["tensors"]["0.weight"], torch.Tensor)
        again = load_merged(net(), "small.pt")
        assert torch.equal(again(IMAGES), small(IMAGES))
        return
    small = {
        "pruned": lambda: prune({"0": torch.tensor([0, 2])}),
        "contracted": lambda: contract(expand(net(), rate=2)),
        "gated": lambda: insert_gates(net()),
    }[kind]()
    torch.save(small.state_dict(), "small.pt")
    loaded = read_checkpoint(Path("small.pt"))["state_dict"]
    assert all(torch.equal(loaded[name], value) for name, value in small.state_dict().items())
    assert loaded["0.weight"].shape[0] == (2 if kind == "pruned" else 4)
    assert any("gate" in name for name in loaded) is (kind == "gated")
    assert any(isinstance(module, ChannelGate) for module in small.modules()) is (kind == "gated")


# --------------------------------------------------------------------------- what somebody else made

READERS: dict[str, Callable[[str], Any]] = {
    "inspect": lambda path: command("inspect", path),
    "inspect a network": lambda path: command("inspect", path, *MODEL),
    "merge": lambda path: command("merge", path, "--out", "narrow.pt", *MODEL),
    "load_merged": lambda path: load_merged(SmallConvNet(), path),
}
#: What a file is called in the message, where it is no pickle that a restrained reader recognises.
CALLED = {
    "tar.pt": "is a tar archive",
    "script.pt": "is a TorchScript archive",
    "exported.pt2": "is an exported program",
}


def test_the_payload_does_what_it_says() -> None:
    pickle.loads(payload())
    assert Path(TRAP).is_dir()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FORMS)
def test_a_malicious_file_is_refused_and_does_nothing(name: str, reader: str) -> None:
    path = write(name)
    with pytest.raises((CommandError, MergedFileError)) as caught:
        READERS[reader](str(path))
    assert not Path(TRAP).exists()
    said = str(caught.value)
    assert name in said
    if reader != "load_merged":
        assert CALLED.get(name, "holds objects that only unpickling would open, which can run any code") in said
        assert "not opened" in said
        way_out = "save the weights, torch.save(model.state_dict(), path)" if name in CALLED else "add --trust-pickle"
        assert way_out in said
    else:
        assert "is not a file that save_merged wrote" in said
        assert "merge the checkpoint again" in said


@pytest.mark.parametrize("name", ["zip.ckpt", pytest.param("old.pth", marks=pytest.mark.soak), "inside.ckpt"])
def test_only_trust_opens_it(name: str) -> None:
    """The files above are what they are taken for: with the option, the code in them runs."""
    path = write(name)
    try:
        main(["inspect", str(path), "--trust-pickle", "--max-figures", "0"])
    finally:
        assert Path(TRAP).is_dir()


def test_the_option_states_the_danger(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("inspect", "merge"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "Opening runs any code inside: use it only for files from people you trust" in text


def test_weights_in_torch_s_hub_folder_are_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import SqueezeNet1_0_Weights

    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    folder = Path("hub/checkpoints")
    folder.mkdir(parents=True)
    write("zip.ckpt").rename(folder / SqueezeNet1_0_Weights.DEFAULT.url.split("/")[-1])
    with pytest.raises(CommandError, match=r"squeezenet1_0-\w+\.pth holds objects that only unpickling would open"):
        command("inspect", "torchvision:squeezenet1_0")
    assert not Path(TRAP).exists()


def test_the_training_commands_do_not_unpickle_either(monkeypatch: pytest.MonkeyPatch) -> None:
    write("zip.ckpt")
    demo = ("--model", "lightning_filterdiv.demo.SmallConvNet", "--data", "lightning_filterdiv.demo.Digits")
    if cli._lightning_restrains_loading():
        with pytest.raises(CommandError, match=r"the file of --ckpt_path holds objects .* add --weights_only false"):
            command("validate", *demo, "--trainer.logger", "false", "--ckpt_path", "zip.ckpt")
    # Lightning 2.5 cannot be told to, and does not look into the file before it runs.
    monkeypatch.setattr("lightning.pytorch.cli.LightningCLI._parse_ckpt_path", lambda _: None, raising=False)
    monkeypatch.setattr(cli, "_lightning_restrains_loading", lambda: False)
    monkeypatch.setattr("lightning.pytorch.Trainer._run", lambda *_, **__: pytest.fail("Lightning was asked to"))
    with pytest.raises(CommandError, match=r"the file of --ckpt_path holds objects .* in a script of your own"):
        command("validate", *demo, "--trainer.logger", "false", "--ckpt_path", "zip.ckpt")
    assert not Path(TRAP).exists()


@pytest.mark.skipif(not cli._lightning_restrains_loading(), reason="Lightning 2.5 has no such argument")
def test_a_trainer_given_weights_only_refuses_and_does_nothing() -> None:
    write("zip.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        fit([ONE_EACH[-1].make()], model=Classifier(), ckpt_path="zip.ckpt")
    assert not Path(TRAP).exists()
