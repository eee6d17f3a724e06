"""Choice of layers and filters, by inputs and options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_filterdiv import RePr
from lightning_filterdiv.channel_graph import ExampleInputsError
from lightning_filterdiv.filters import NoLayersError
from tests.repr_.fits import SHORT, NeverCallsForward, Watch
from tests.support.training import STEPS_PER_EPOCH, Classifier, fit, small_net

# --------------------------------------------------------------------------- which layers


def test_default_layers() -> None:
    from torchvision.models import mobilenet_v2, resnet18

    chosen = RePr().choose(Classifier(net=resnet18()))
    assert len(chosen) == 16
    assert "net.conv1" not in chosen
    assert not any("downsample" in name for name in chosen)
    assert "net.conv1" in RePr(include=["net.conv1", "net.layer1.*"]).choose(Classifier(net=resnet18()))
    assert all(conv.groups == 1 for conv in RePr().choose(Classifier(net=mobilenet_v2())).values())


def test_a_frozen_network_registered_first_is_not_the_network() -> None:
    class Student(Classifier):
        def __init__(self) -> None:
            super().__init__()
            net = self.net
            del self.net
            self.teacher = nn.Sequential(nn.Conv2d(1, 4, 3)).requires_grad_(False)
            self.net = net

    callback = RePr(**SHORT)
    fit([callback], model=Student())
    assert list(callback.layers) == ["net.3", "net.5", "net.7"]


def test_a_network_with_one_convolution() -> None:
    only = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    with pytest.raises(NoLayersError, match="leaves out the first trainable convolution"):
        fit([RePr(**SHORT)], model=Classifier(net=only))
    callback = RePr(**SHORT, include=["net.0"])
    fit([callback], model=Classifier(net=only))
    assert len(callback.history) == 2


def test_everything_excluded() -> None:
    with pytest.raises(NoLayersError, match="no layer is left"):
        fit([RePr(**SHORT, exclude=["*"])])


def test_what_cannot_be_silenced_is_left_out_with_a_warning() -> None:
    net = small_net()
    net[6] = nn.Sigmoid()
    callback = RePr(**SHORT)
    with pytest.warns(UserWarning, match=r"RePr leaves 'net\.5' out: its filters cannot be silenced exactly"):
        fit([callback], model=Classifier(net=net))
    assert set(callback.history[0]["filters"]) <= {"net.3", "net.7"}
    assert sum(map(len, callback.history[0]["filters"].values())) == int(16 * 0.3)


# --------------------------------------------------------------------------- example inputs


def test_a_training_step_that_never_calls_forward() -> None:
    callback = RePr(**SHORT)
    fit([callback], model=NeverCallsForward())
    assert len(callback.history) == 2


class _Grows(Classifier):
    """A buffer beside the network changes its shape at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen_so_far", torch.zeros(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen_so_far = torch.cat([self.seen_so_far, torch.zeros(1)])
        return super().training_step(batch, batch_idx)


def test_a_module_whose_structure_changes_is_traced_again() -> None:
    callback = RePr(full_epochs=1, sub_epochs=1, cycles=2)
    fit([callback], model=_Grows(), max_epochs=5)
    assert [event["kind"] for event in callback.history] == ["drop", "regrow"] * 2


class _TwoParts(Classifier):
    """Two children with convolutions, called one after the other, never through the module."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:5], self.net[5:]
        del self.net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])


def test_a_named_submodule() -> None:
    with pytest.raises(ExampleInputsError, match="name the submodule that training_step calls"):
        fit([RePr(**SHORT)], model=_TwoParts())
    callback = RePr(**SHORT, network="head", include=["head.*"], prune_fraction=0.2)
    fit([callback], model=_TwoParts())
    assert len(callback.history) == 2
    assert set(callback.layers) == {"head.5", "head.7"} or set(callback.layers) == {"head.0", "head.2"}
    with pytest.raises(NoLayersError, match="network='neck' is no submodule with convolutions"):
        fit([RePr(**SHORT, network="neck")], model=_TwoParts())


# --------------------------------------------------------------------------- options


def test_criteria_choose_different_filters() -> None:
    chosen = {}
    for criterion in ("orthogonality", "norm", "random"):
        callback = RePr(**SHORT, criterion=criterion)  # type: ignore[arg-type]
        fit([callback])
        chosen[criterion] = callback.history[0]["filters"]
    assert chosen["orthogonality"] != chosen["norm"] != chosen["random"]


def test_layer_scope_takes_the_same_share_everywhere() -> None:
    callback = RePr(**SHORT, scope="layer")
    fit([callback])
    assert {layer: len(rows) for layer, rows in callback.history[0]["filters"].items()} == dict.fromkeys(
        ("net.3", "net.5", "net.7"), 2
    )


def test_losing_more_than_half_of_a_layer_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="RePr drops more than half of"):
        fit([RePr(**SHORT, prune_fraction=0.8)])


def test_consumers_drift_only_when_asked() -> None:
    norms = {}
    for hold in (True, False):
        callback = RePr(full_epochs=1, sub_epochs=2, cycles=1, hold_consumers=hold)
        watch = Watch(callback)
        fit([callback, watch], max_epochs=4)
        rows = callback.history[0]["filters"].get("net.3", [])
        assert rows
        readers = [w["net.5"].view(8, 8, 9)[:, rows].norm() for w in watch.filters]
        norms[hold] = (float(readers[6]), float(readers[17]))  # net.5 has dropped filters of its own
    assert norms[True][0] == norms[True][1]
    assert norms[False][1] != norms[False][0]


def test_logged_scalars(tmp_path: Path) -> None:
    fit([RePr(**SHORT)], logger=CSVLogger(tmp_path))
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    for name in ("dropped/network", "score_before_drop", "score_after_regrowth", "null_space/net.5", "regrew/net.5"):
        assert f"filterdiv/repr/{name}" in header


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Adafactor])
def test_state_that_is_not_per_filter_is_refused_at_the_start(optimizer: Any) -> None:
    class Other(Classifier):
        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters())

    with pytest.raises(MisconfigurationException, match=f"{optimizer.__name__} keeps a history"):
        fit([RePr(**SHORT)], model=Other())


def test_no_learning_rate_is_no_crash(caplog: pytest.LogCaptureFixture) -> None:
    class Frozen(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    with caplog.at_level(logging.INFO):
        fit([RePr(**SHORT)], model=Frozen())
    assert "no forecast of the learning rate: it is 0 at the start" in caplog.text


def test_steps_per_epoch_constant() -> None:
    assert STEPS_PER_EPOCH == 6, "the step numbers above assume it"
