"""The ``RePr`` callback in real fits."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_filterdiv import RePr
from lightning_filterdiv.channel_graph import ExampleInputsError
from lightning_filterdiv.filters import NoLayersError, filter_matrix
from lightning_filterdiv.repr_.functional import RePrEvent
from lightning_filterdiv.similarity import cosine_similarity
from tests.suites.test_resume import KINDS
from tests.support.training import STEPS_PER_EPOCH, Classifier, batches, differing, fit, small_net

SHORT: dict[str, Any] = {"full_epochs": 1, "sub_epochs": 1, "cycles": 1}


class Watch(Callback):
    """What is dropped at every step, and the filters of every layer."""

    def __init__(self, callback: RePr) -> None:
        self.callback = callback
        self.counts: list[int] = []
        self.filters: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counts.append(sum(rows.numel() for rows in self.callback.dropped.values()))
        self.filters.append({n: filter_matrix(c).clone() for n, c in self.callback.layers.items()})


def test_events_happen_when_planned() -> None:
    callback = RePr(full_epochs=2, sub_epochs=1, cycles=2)
    watch = Watch(callback)
    fit([callback, watch], max_epochs=7)
    expected = [0] * 12 + [7] * 6 + [0] * 12 + [7] * 6 + [0] * 6  # int(24 * 0.3): the first layer is not ranked
    assert watch.counts == expected
    assert [(e["kind"], e["cycle"], e["epoch"], e["step"]) for e in callback.history] == [
        ("drop", 1, 2, 12),
        ("regrow", 1, 3, 18),
        ("drop", 2, 5, 30),
        ("regrow", 2, 6, 36),
    ]
    assert callback.plan()[0] == {"cycle": 1, "kind": "drop", "epoch": 2}
    assert callback.history[0]["filters"] == callback.history[1]["filters"]
    assert list(callback.layers) == ["net.3", "net.5", "net.7"]


def test_dropped_filters_stay_zero_and_come_back_orthogonal() -> None:
    callback = RePr(**SHORT)
    watch = Watch(callback)
    grown: dict[str, Tensor] = {}

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 12:
                grown.update({n: filter_matrix(c).clone() for n, c in callback.layers.items()})

    fit([callback, watch, Looks()])
    event = callback.history[0]["filters"]
    assert sum(map(len, event.values())) == 7
    for layer, rows in event.items():
        others = [j for j in range(8) if j not in rows]
        assert all(not bool(watch.filters[step][layer][rows].any()) for step in range(6, 12))
        old, last = watch.filters[5][layer], watch.filters[11][layer]
        new = grown[layer]
        assert torch.equal(new[others], last[others]), "survivors are not touched"
        together = torch.cat([new[rows], old[rows], last[others]]).double()
        cosine = cosine_similarity(together)[: len(rows)].abs()
        assert float((cosine - torch.eye(len(rows), len(together))).abs().max()) < 1e-6
        assert new[rows].norm(dim=1) == pytest.approx(float(last[others].norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 3},
        {"val_check_interval": 2, "validation": batches(steps=1)},
        {"max_epochs": -1, "max_steps": 18},
        {"max_epochs": -1, "max_time": "00:00:00:05", "limit_train_batches": 2},
    ],
    ids=lambda option: next(iter(option)),
)
def test_ways_to_drive_a_fit(option: dict[str, Any]) -> None:
    callback = RePr(**SHORT)
    fit([callback], **option)
    assert [event["kind"] for event in callback.history] == ["drop", "regrow"]
    assert [event["epoch"] for event in callback.history] == [1, 2]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw_fused"])
def test_dropped_filters_are_bit_still_under_a_scaler(optimizer: str) -> None:
    """Steps that overflow fire the hook before but not the one after (fused optimizers fire both)."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=4)
    callback = RePr(full_epochs=1, sub_epochs=3, cycles=1)
    watch = Watch(callback)
    fit(
        [callback, watch],
        model=Classifier(optimizer),
        max_epochs=5,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    for layer, rows in callback.history[0]["filters"].items():
        for filters in watch.filters[6:24]:
            assert not bool(filters[layer][rows].any())
        assert bool(watch.filters[-1][layer][rows].any())


class _Stops(Callback):
    """Ends the fit at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def test_a_fit_that_stops_inside_a_phase_says_so(tmp_path: Path) -> None:
    callback = RePr(**SHORT)
    with pytest.warns(UserWarning, match="7 filters stay dropped"):
        run = fit([callback, _Stops(8), ModelCheckpoint(dirpath=tmp_path, filename="end")], min_epochs=0)
    zero = {n: int((filter_matrix(c).norm(dim=1) == 0).sum()) for n, c in callback.layers.items()}
    assert sum(zero.values()) == 7
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    model = Classifier(seed=1)
    model.load_state_dict(checkpoint["state_dict"])
    assert RePr.restore(model, checkpoint) == 7
    assert not any(bool((filter_matrix(c).norm(dim=1) == 0).any()) for c in model.net if isinstance(c, nn.Conv2d))
    assert RePr.restore(model, {"callbacks": {RePr().state_key: {"extra": {"dropped": None}}}}) == 0
    with pytest.raises(KeyError, match="holds no state of RePr"):
        RePr.restore(model, {"callbacks": {}})
    assert not differing(run.model.state_dict(), checkpoint["state_dict"])


class Mine(RePr):
    """A schedule of one's own is a subclass."""


def test_restored_filters_compute_what_they_did(tmp_path: Path) -> None:
    """Their norm saw silent channels for a whole phase: its statistics must come back with them."""
    before: dict[str, Tensor] = {}

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not callback.dropped:
                before.update({n: t.clone() for n, t in pl_module.state_dict().items()})

    callback = Mine(full_epochs=1, sub_epochs=4, cycles=1, include=["net.3"])
    with pytest.warns(UserWarning, match="filters stay dropped"):
        fit([Looks(), callback, ModelCheckpoint(dirpath=tmp_path, filename="end"), _Stops(24)], max_epochs=6)
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    model = Classifier(seed=1)
    model.load_state_dict(checkpoint["state_dict"])
    (rows,) = checkpoint["callbacks"][callback.state_key]["extra"]["dropped"]["filters"].values()
    assert not bool(model.net[4][0].running_mean[rows].isclose(before["net.4.0.running_mean"][rows]).all())
    assert Mine.restore(model, checkpoint) == RePr.restore(model, checkpoint) == len(rows)
    for name in ("net.3.weight", "net.3.bias", "net.4.0.weight", "net.4.0.running_mean", "net.4.0.running_var"):
        assert torch.equal(model.state_dict()[name][rows], before[name][rows]), name


def test_a_layer_frozen_inside_a_phase_still_comes_back() -> None:
    class Freezes(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[3].requires_grad_(trainer.current_epoch != 2)

    callback = RePr(full_epochs=1, sub_epochs=2, cycles=1)
    run = fit([Freezes(), callback], max_epochs=5)
    rows = callback.history[0]["filters"]["net.3"]
    assert [event["kind"] for event in callback.history] == ["drop", "regrow"]
    assert bool(run.model.net[3].weight[rows].flatten(1).any(dim=1).all())


def test_the_plan_as_rows() -> None:
    assert RePr(**SHORT).plan() == [
        {"cycle": 1, "kind": "drop", "epoch": 1},
        {"cycle": 1, "kind": "regrow", "epoch": 2},
    ]


def test_early_stopping_inside_a_phase() -> None:
    with pytest.warns(UserWarning, match="filters stay dropped"):
        fit(
            [RePr(full_epochs=1, sub_epochs=3, cycles=1), EarlyStopping("val_loss", patience=1, mode="max")],
            max_epochs=6,
            validation=batches(steps=1),
        )


def test_the_checkpoint_of_a_phase_is_the_network_that_was_validated(tmp_path: Path) -> None:
    """Loaded without the callback it gives the metric it was saved with."""
    checkpoint = ModelCheckpoint(
        dirpath=tmp_path, filename="{epoch}-{val_loss:.6f}", monitor="val_loss", save_top_k=-1, every_n_epochs=1
    )
    validation = batches(steps=2)
    fit([RePr(full_epochs=1, sub_epochs=2, cycles=1), checkpoint], max_epochs=5, validation=validation)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 5
    for file in files:
        model = Classifier(seed=1)
        model.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
        model.eval()
        losses = [float(F.cross_entropy(model(x), y)) for x, y in batches(steps=2)]
        monitored = float(re.search(r"val_loss=([\d.]+)\.ckpt", file.name)[1])  # type: ignore[index]
        assert sum(losses) / len(losses) == pytest.approx(monitored, abs=2e-6)


# --------------------------------------------------------------------------- resume


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_before_at_and_after_every_event(kind: str, optimizer: str, tmp_path: Path) -> None:
    """Two cycles of one epoch each; every checkpoint of the run is resumed from, all end in the same bits."""
    arguments, _ = KINDS[kind]

    def run(callbacks: list[Callback], seed: int = 0, **options: Any) -> Any:
        model = Classifier(optimizer, seed=seed)
        return fit(callbacks, model=model, max_epochs=6, validation=batches(steps=1), **options)

    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **arguments)
    first = RePr(full_epochs=1, sub_epochs=1, cycles=2, next_layer="small_random")
    whole = run([first, saving])
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(files) >= 6
    # Before, at and after each of the four events (steps 6 to 24), whatever the kind.
    for file in files[:7]:
        again = RePr(full_epochs=1, sub_epochs=1, cycles=2, next_layer="small_random")
        resumed = run([again], seed=1, ckpt_path=str(file))
        assert not differing(whole.tensors(), resumed.tensors()), file.stem
        assert again.history == first.history


def test_joining_a_run_at_a_drop(tmp_path: Path) -> None:
    """Saved before the epoch's end, without our state and example inputs: ranked at the first batch that can."""
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_on_train_epoch_end=False)
    fit([saving], max_epochs=1, validation=batches(steps=1))
    callback = RePr(**SHORT)
    path = str(tmp_path / "step=6.ckpt")
    fit([callback], model=_NeverCallsForward(), ckpt_path=path, validation=batches(steps=1))
    assert [event["kind"] for event in callback.history] == ["drop", "regrow"]


def test_a_ranking_does_not_survive_a_resume(tmp_path: Path) -> None:
    """Stopped between ranking and drop, then resumed from another file: the new weights are ranked."""
    fit([RePr(**SHORT), ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)])
    used, fresh = RePr(**SHORT), RePr(**SHORT)
    fit([used, _Stops(6)], model=Classifier(seed=5))
    assert used._ranked is not None
    for callback in (used, fresh):
        fit([callback], ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert used.history == fresh.history


def test_joining_a_run_skips_what_is_past(tmp_path: Path) -> None:
    """Not a drop and a regrowth in one go: it starts with the next whole cycle."""
    fit([ModelCheckpoint(dirpath=tmp_path, filename="end")], max_epochs=2)
    callback = RePr(full_epochs=1, sub_epochs=1, cycles=2)
    with pytest.warns(UserWarning, match="joins the run at epoch 2 without a saved state: the first 2 of 4 events"):
        fit([callback], max_epochs=6, ckpt_path=str(tmp_path / "end.ckpt"))
    assert [(event["kind"], event["epoch"]) for event in callback.history] == [("drop", 3), ("regrow", 4)]


# --------------------------------------------------------------------------- the plan


def test_the_plan_is_printed_with_the_learning_rate_that_remains(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit([RePr(**SHORT)], max_epochs=4)
    assert re.search(r"RePr plan\n +cycle +event +after epoch\n +1 +drop +1\n +1 +regrow +2\n", caplog.text)
    assert "50 % of the summed learning rate remains" in caplog.text
    assert "RePr dropped 7 of 24 filters (cycle 1, epoch 1)" in caplog.text


class _Decays(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.01)]


def test_too_little_learning_rate_left_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="only 1 % of the summed learning rate remains after RePr's last regrowth"):
        fit([RePr(**SHORT)], model=_Decays(), max_epochs=4)


def test_the_forecast_does_not_touch_the_schedule() -> None:
    with pytest.warns(UserWarning, match="of the summed"):
        run = fit([RePr(**SHORT)], model=_Decays(), max_epochs=4)
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.01)


@pytest.mark.parametrize("epochs", [1, 2])
def test_cycles_that_do_not_fit(epochs: int) -> None:
    with pytest.raises(MisconfigurationException, match="does not fit into this fit of") as caught:
        fit([RePr(**SHORT)], max_epochs=epochs)
    assert "last regrowth is due after epoch 2" in str(caught.value)
    assert "Use fewer cycles" in str(caught.value)
    assert re.search(r"1 +regrow +2", str(caught.value))


def test_the_defaults_do_not_fit_a_short_fit_and_say_so() -> None:
    with pytest.raises(MisconfigurationException, match="RePr does not fit into this fit of 3 epochs"):
        fit([RePr()])


def test_fast_dev_run_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit([RePr()], fast_dev_run=True)
    assert "fast_dev_run stops before them" in caplog.text


def test_a_schedule_of_ones_own() -> None:
    class Late(RePr):
        def schedule(self) -> list[RePrEvent]:
            return [RePrEvent(1, "drop", 3), RePrEvent(1, "regrow", 4)]

    callback = Late()
    fit([callback], max_epochs=5)
    assert [event["epoch"] for event in callback.history] == [3, 4]


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
    with pytest.raises(NoLayersError, match="leaves out the network's first convolution"):
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


class _NeverCallsForward(Classifier):
    """training_step goes to the submodule directly."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_training_step_that_never_calls_forward() -> None:
    callback = RePr(**SHORT)
    fit([callback], model=_NeverCallsForward())
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
