"""Events of a fit: their times, and the state after a phase."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_filterdiv import RePr
from lightning_filterdiv.filters import filter_matrix
from lightning_filterdiv.similarity import cosine_similarity
from tests.repr_.fits import SHORT, Stops, Watch
from tests.support.training import Classifier, batches, differing, fit


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

    class Snapshot(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 12:
                grown.update({n: filter_matrix(c).clone() for n, c in callback.layers.items()})

    fit([callback, watch, Snapshot()])
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


def test_a_fit_that_stops_inside_a_phase_says_so(tmp_path: Path) -> None:
    callback = RePr(**SHORT)
    with pytest.warns(UserWarning, match="7 filters stay dropped"):
        run = fit([callback, Stops(8), ModelCheckpoint(dirpath=tmp_path, filename="end")], min_epochs=0)
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

    class Snapshot(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if not callback.dropped:
                before.update({n: t.clone() for n, t in pl_module.state_dict().items()})

    callback = Mine(full_epochs=1, sub_epochs=4, cycles=1, include=["net.3"])
    with pytest.warns(UserWarning, match="filters stay dropped"):
        fit([Snapshot(), callback, ModelCheckpoint(dirpath=tmp_path, filename="end"), Stops(24)], max_epochs=6)
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
