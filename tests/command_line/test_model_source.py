"""Networks and weights for the commands: every source, and what each wrong one says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import ResNet

from lightning_filterdiv.command_line.errors import CommandError
from lightning_filterdiv.command_line.model_source import build_model, load_weights, read_checkpoint, restore_model
from lightning_filterdiv.demo import SmallConvNet
from lightning_filterdiv.narrowing import load_merged


def number() -> int:
    return 3


def needy(width: int) -> nn.Module:
    return nn.Conv2d(1, width, 3)


def test_a_class() -> None:
    assert isinstance(build_model("lightning_filterdiv.demo:SmallConvNet"), SmallConvNet)
    model = build_model("lightning_filterdiv.demo:SmallConvNet", hyper_parameters={"width": 7})
    assert isinstance(model, SmallConvNet)
    assert model.net.conv1.out_channels == 7


def test_a_file_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets_for_this_test.py").write_text(
        "import torch\n\nclass Net(torch.nn.Conv2d):\n    def __init__(self):\n        super().__init__(1, 2, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build_model("my_nets_for_this_test:Net").out_channels == 2


def test_libraries() -> None:
    assert isinstance(build_model("torchvision:resnet18"), ResNet)
    assert sum(p.numel() for p in build_model("torchvision:googlenet").parameters()) > 1e6
    assert build_model("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn").backbone is not None
    assert sum(isinstance(m, nn.Conv2d) for m in build_model("timm:resnet10t").modules()) > 10


@pytest.mark.parametrize("below", [None, "fit"])
def test_a_configuration(below: str | None, tmp_path: Path) -> None:
    section = {"model": {"class_path": "lightning_filterdiv.demo.SmallConvNet", "init_args": {"width": 5}}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({below: section} if below else section | {"trainer": {"max_epochs": 1}}))
    model = build_model(config=path)
    assert isinstance(model, SmallConvNet)
    assert model.net.conv1.out_channels == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("resnet18", "--model 'resnet18' is none of pkg.module:Class, torchvision:NAME or timm:NAME"),
        ("torchvision:resnet19", "torchvision has no model 'resnet19'; did you mean torchvision:resnet1"),
        ("timm:resnet50x", "timm has no model 'resnet50x'; did you mean timm:resnet50"),
        ("timm:squeezenet1_0", "timm has no model 'squeezenet1_0'; did you mean torchvision:squeezenet1_0\\?"),
        ("torchvision:convnext_atto", "did you mean timm:convnext_atto\\?"),
        ("torchvision:ResNet18", "did you mean torchvision:resnet18\\?"),
        ("torchvison:resnet18", "cannot import 'torchvison' .*; did you mean torchvision:resnet18\\?"),
        ("timm.models:resnet18x", "timm.models has no 'resnet18x'; did you mean resnet18"),
        ("timm.resnet18", "is none of .*; did you mean timm:resnet18\\?"),
        ("torchvision:zzz", "has no model 'zzz'; torchvision.models.list_models\\(\\) lists them"),
        ("no.such.thing:Net", "cannot import 'no.such.thing' .*; name an installed module"),
        ("lightning_filterdiv.demo:SmalConvNet", "has no 'SmalConvNet'; did you mean SmallConvNet\\?"),
        (f"{__name__}:needy", "cannot be constructed: .*width.*--config"),
        (f"{__name__}:number", "gives an object of type int, not a torch.nn.Module"),
    ],
)
def test_wrong_sources(source: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        build_model(source)


def test_one_of_two_is_needed() -> None:
    for arguments in ({}, {"model": "torchvision:resnet18", "config": Path("run.yaml")}):
        with pytest.raises(CommandError, match="say which network is meant"):
            build_model(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("a: [", "is not YAML"),
        ("trainer: {}", "has no entry 'model'"),
        ("just text", "has no entry 'model'"),
        ("model: {class_path: lightning_filterdiv.demo.SmallConvNet, init_args: {wdth: 3}}", "cannot be built: .*wdth"),
        ("model: {class_path: no.such.Net}", "cannot be built"),
    ],
)
def test_wrong_configurations(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CommandError, match=message):
        build_model(config=path)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is a folder; name the YAML file in it"):
        build_model(config=tmp_path)


# --------------------------------------------------------------------------- files


def test_checkpoints_and_state_dicts(tmp_path: Path) -> None:
    weights = SmallConvNet().state_dict()
    torch.save(weights, tmp_path / "bare.pt")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "full.ckpt")
    assert read_checkpoint(tmp_path / "bare.pt")["state_dict"].keys() == weights.keys()
    assert read_checkpoint(tmp_path / "full.ckpt")["epoch"] == 3


def test_a_network_with_the_arguments_and_weights_of_its_checkpoint() -> None:
    trained = SmallConvNet(width=5)
    of_cli = {"_class_path": "somewhere.Else", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    for hyper_parameters in ({"width": 5}, {"width": 5, **of_cli}):
        checkpoint = {"hyper_parameters": hyper_parameters, "state_dict": trained.state_dict()}
        model = restore_model("lightning_filterdiv.demo:SmallConvNet", None, checkpoint)
        assert torch.equal(model.net.conv2.weight, trained.net.conv2.weight)
    with pytest.raises(CommandError, match="the weights are not those of a SmallConvNet"):
        restore_model("lightning_filterdiv.demo:SmallConvNet", None, {"state_dict": trained.state_dict()})


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["FILTERDIV_TEST_FOLDER"],)


def test_a_pickle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that would run code runs none, and the message says how to insist."""
    trap = tmp_path / "trap"
    monkeypatch.setenv("FILTERDIV_TEST_FOLDER", str(trap))
    torch.save({"state_dict": {}, "more": Malicious()}, tmp_path / "evil.ckpt")
    with pytest.raises(CommandError, match=r"only unpickling would open.*--trust-pickle"):
        read_checkpoint(tmp_path / "evil.ckpt")
    assert not trap.exists()
    read_checkpoint(tmp_path / "evil.ckpt", trust_pickle=True)
    assert trap.exists()


def test_a_whole_module_only_when_trusted(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(1, 2, 3), tmp_path / "module.pt")
    with pytest.raises(CommandError, match="--trust-pickle"):
        read_checkpoint(tmp_path / "module.pt")
    assert set(read_checkpoint(tmp_path / "module.pt", trust_pickle=True)["state_dict"]) == {"weight", "bias"}


def test_a_file_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "run.ckpt")

    torch.save(nn.Conv2d(1, 2, 3).state_dict(), tmp_path / "run.ckpt")
    monkeypatch.setattr(torch, "load", denied)  # the superuser may read everything
    with pytest.raises(CommandError, match=r"run\.ckpt cannot be read: Permission denied; change its permissions"):
        read_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(PermissionError):
        load_merged(nn.Conv2d(1, 2, 3), tmp_path / "run.ckpt")


def test_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CommandError, match=r"text\.ckpt is not a checkpoint"):
        read_checkpoint(tmp_path / "text.ckpt")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    with pytest.raises(CommandError, match="is not a checkpoint"):
        read_checkpoint(tmp_path / "empty.ckpt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(
        CommandError, match="neither a Lightning checkpoint nor a state dict, but an object of type list"
    ):
        read_checkpoint(tmp_path / "list.pt")
    torch.save({"model": {"weight": torch.zeros(1)}, "epoch": 3}, tmp_path / "nested.pt")
    with pytest.raises(CommandError, match=r"but a dict with the entries 'model', 'epoch'; torch\.save"):
        read_checkpoint(tmp_path / "nested.pt")
    (tmp_path / "program.py").write_text("\nimport torch\n")  # also a pickle of 1995, to its first letters
    with pytest.raises(CommandError, match=r"program\.py is not a checkpoint"):
        read_checkpoint(tmp_path / "program.py")


def test_weights_fit_under_wrappers_and_inside_modules() -> None:
    source, target = SmallConvNet(), SmallConvNet()
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in source.state_dict().items()}
    load_weights(target, wrapped)
    assert torch.equal(source.net.conv1.weight, target.net.conv1.weight)
    inner = SmallConvNet().net
    load_weights(inner, source.state_dict())
    assert torch.equal(source.net.conv1.weight, inner.conv1.weight)


def test_weights_of_another_network() -> None:
    with pytest.raises(CommandError, match=r"not those of a SmallConvNet: .*missing.*unknown"):
        load_weights(SmallConvNet(), build_model("torchvision:resnet18").state_dict())
    with pytest.raises(CommandError, match=r"has shape \(16, 1, 3, 3\), the network \(32, 1, 3, 3\)"):
        load_weights(SmallConvNet(), SmallConvNet(width=16).state_dict())
