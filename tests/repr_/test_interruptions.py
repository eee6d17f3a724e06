"""Exceptions and Ctrl-C at every point of a drop, a phase, a regrowth: model, state and messages agree afterwards."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn

from lightning_filterdiv import RePr
from lightning_filterdiv.filters import filter_matrix
from lightning_filterdiv.repr_ import DroppedFilters, functional, network
from tests.repr_.fits import Stops
from tests.support.training import Classifier, batches, differing, fit, make_trainer

PHASE: dict[str, Any] = {"full_epochs": 1, "sub_epochs": 2, "cycles": 1}
PLANNED = [("drop", 1), ("regrow", 3)]
Patch = Callable[[pytest.MonkeyPatch, Callable[[], None]], None]


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Lightning ignores further Ctrl-C once it has seen one."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class ExceptionCheckpoint(Checkpoint):
    """Saves on the way out, as Lightning's own does from 2.6 on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.path)


class FailingLogger(Logger):
    """Calls ``fail`` when it is handed numbers of an event."""

    name, version = "failing", 0

    def __init__(self, event: str, fail: Callable[[], None]) -> None:
        super().__init__()
        self.event, self.fail = event, fail

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any(f"repr/{self.event}/" in name for name in metrics):
            self.fail()


def _around(owner: Any, name: str, *, before: bool) -> Patch:
    def patch(patches: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
        original = getattr(owner, name)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if before:
                fail()
            result = original(*args, **kwargs)
            fail()
            return result

        patches.setattr(owner, name, replaced)

    return patch


def _half_a_silence(patches: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
    original = DroppedFilters.silence
    failed = []

    def replaced(self: DroppedFilters) -> None:
        if not failed:
            failed.append(True)
            layer = next(iter(self.filters))
            with torch.no_grad():
                self.model.get_parameter(f"{layer}.weight")[self.filters[layer]] = 0
            fail()
        original(self)

    patches.setattr(DroppedFilters, "silence", replaced)


def _in_a_step(patches: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
    """After the update, before what is held is put back."""
    original = torch.optim.SGD._init_group

    def replaced(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        weights = [p.detach() for p in args[0]["params"] if p.dim() == 4]
        if any(bool((weight.flatten(1).norm(dim=1) == 0).any()) for weight in weights):
            for weight in weights:
                weight.add_(0.01)
            fail()
        return result

    patches.setattr(torch.optim.SGD, "_init_group", replaced)


def _none(patches: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
    """The logger is interrupted."""


# name -> (what fails, what the failing logger waits for, events that count afterwards)
POINTS: dict[str, tuple[Patch, str, int]] = {
    "ranking": (_around(functional, "share", before=False), "", 0),
    "collecting": (_around(DroppedFilters, "collect", before=True), "", 0),
    "half a drop": (_half_a_silence, "", 1),
    "before zeroing": (_around(DroppedFilters, "silence", before=True), "", 1),
    "after zeroing": (_around(DroppedFilters, "silence", before=False), "", 1),
    "holding": (_around(DroppedFilters, "hold", before=True), "", 1),
    "logging the drop": (_none, "dropped", 1),
    "a step": (_in_a_step, "", 1),
    "new directions": (_around(DroppedFilters, "new_filters", before=True), "", 1),
    "sharing new directions": (_around(network, "share", before=False), "", 1),
    "half a regrowth": (_around(DroppedFilters, "restore", before=False), "", 1),
    "most of a regrowth": (_around(network, "write_filters", before=False), "", 1),
    "after a regrowth": (_around(DroppedFilters, "regrow", before=False), "", 1),
    "logging the regrowth": (_none, "regrew", 2),
}


def zeros(weights: dict[str, torch.Tensor]) -> int:
    convolutions = [w for name, w in weights.items() if name.startswith("net.") and w.dim() == 4]
    return sum(int((w.flatten(1).norm(dim=1) == 0).sum()) for w in convolutions)


def happened(callback: RePr) -> list[tuple[str, int]]:
    return [(event["kind"], event["epoch"]) for event in callback.history]


@pytest.mark.parametrize(
    ("point", "error"),
    [
        # An error of a logger is a warning.
        *((point, KeyboardInterrupt if point.startswith("logging") else OSError) for point in POINTS),
        ("half a drop", KeyboardInterrupt),
        ("half a regrowth", KeyboardInterrupt),
    ],
)
def test_every_way_out(point: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, logged, counted = POINTS[point]
    armed = [True]

    def fail() -> None:
        if armed:
            armed.clear()
            raise error("No space left on device")

    def interrupted() -> tuple[Any, Classifier, RePr]:
        armed[:] = [True]
        model, callback = Classifier(), RePr(**PHASE, next_layer="small_random")
        trainer = make_trainer(
            [callback, ExceptionCheckpoint(tmp_path / "out.ckpt")], max_epochs=5, logger=FailingLogger(logged, fail)
        )
        with monkeypatch.context() as patches, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            patch(patches, fail)
            with pytest.raises((error, SystemExit)):
                trainer.fit(model, batches())
        assert not armed
        said = [str(warning.message) for warning in caught if "broke off inside" in str(warning.message)]
        assert len(said) == (counted == 1)
        if said:
            layer, rows = next(iter(callback.dropped.items()))
            assert "7 filters stay dropped" in said[0]
            assert f"{layer}: {', '.join(map(str, rows.tolist()))}" in said[0]
            assert "callback.restore_now(model)" in said[0]
        return trainer, model, callback

    # Model, state and checkpoint say the same.
    trainer, model, callback = interrupted()
    out = 7 if counted == 1 else 0
    saved = torch.load(tmp_path / "out.ckpt", weights_only=True)
    extra = saved["callbacks"][callback.state_key]["extra"]
    assert happened(callback) == PLANNED[:counted]
    assert sum(map(len, callback.dropped.values())) == zeros(model.state_dict()) == zeros(saved["state_dict"]) == out
    assert (extra["dropped"] is not None, extra["applied"]) == (out > 0, counted)

    # The same objects go on.
    trainer.fit(model, batches())
    assert happened(callback) == PLANNED
    assert zeros(model.state_dict()) == 0

    # A new trainer starts anew, with all filters.
    _, model, callback = interrupted()
    seen: list[int] = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(zeros(pl_module.state_dict()))

    fit([callback, Looks()], model=model, max_epochs=5)
    assert seen == [0] * 6 + [7] * 12 + [0] * 12
    assert happened(callback) == PLANNED

    # A resume goes on.
    callback = RePr(**PHASE, next_layer="small_random")
    run = fit([callback], model=Classifier(seed=1), max_epochs=5, ckpt_path=str(tmp_path / "out.ckpt"))
    assert happened(callback) == PLANNED
    assert zeros(run.model.state_dict()) == 0


def _stopped(step: int = 8, **arguments: Any) -> tuple[Classifier, RePr]:
    model, callback = Classifier(), RePr(**(PHASE | arguments))
    with pytest.warns(UserWarning, match="7 filters stay dropped"):
        fit([callback, Stops(step)], model=model, max_epochs=5, min_epochs=0)
    return model, callback


def test_filters_come_back_in_memory() -> None:
    model, callback = _stopped()
    other = Classifier(seed=3)
    other.load_state_dict(model.state_dict())
    copy = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert callback.restore_now(model) == 7
    assert zeros(model.state_dict()) == 0
    assert callback.dropped == {}
    assert callback.restore_now(model) == 0
    back = _stopped()[1]
    assert back.restore_now(other) == 7
    assert not differing(other.state_dict(), model.state_dict())
    assert differing(copy, model.state_dict())
    with pytest.raises(ValueError, match="the network has no tensor 'net"):
        _stopped()[1].restore_now(nn.Linear(2, 2))


def test_no_restoring_in_a_running_fit() -> None:
    class Restores(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            callback.restore_now(pl_module)

    callback = RePr(**PHASE)
    with pytest.raises(RuntimeError, match="call it after the fit"):
        fit([callback, Restores()], max_epochs=5)


def test_the_next_fit_begins_with_all_filters_and_says_so() -> None:
    model, callback = _stopped()
    with pytest.warns(UserWarning, match="ended inside a sub-network phase of RePr: its 7 filters .* start this fit"):
        fit([callback, Stops(1)], model=model, max_epochs=5, min_epochs=0)
    assert zeros(model.state_dict()) == 0
    # Another model is left alone, and so is the first.
    model, callback = _stopped()
    with pytest.warns(UserWarning, match=r"forgets the 7 filters .* left out of another model, where they stay zero"):
        fit([callback], model=Classifier(seed=2), max_epochs=5)
    assert happened(callback) == PLANNED
    assert zeros(model.state_dict()) == 7
    # One that was changed since is nobody's.
    model, callback = _stopped()
    model.net[5] = nn.Identity()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([callback], model=Classifier(seed=2), max_epochs=5)
    assert happened(callback) == PLANNED
    assert not [str(warning.message) for warning in caught if "another model" in str(warning.message)]


def _copy(model: Classifier) -> Classifier:
    other = Classifier(seed=3)
    other.load_state_dict(model.state_dict())
    return other


def test_a_copy_of_the_model_is_as_good_as_the_model() -> None:
    """Filters are zero in the copy, too, and nobody else would bring them back."""
    runs = []
    for copied in (False, True):
        model, callback = _stopped()
        model = _copy(model) if copied else model
        assert zeros(model.state_dict()) == 7
        with pytest.warns(UserWarning, match=r"or of one that it is a copy of, .* its 7 filters .* start this fit"):
            runs.append(fit([callback], model=model, max_epochs=5))
        assert happened(callback) == PLANNED
    assert not differing(runs[0].tensors(), runs[1].tensors())


def test_a_copy_goes_on_with_the_phase() -> None:
    """The same trainer, with the network that an exception left, or a copy."""
    runs = []
    for copied in (False, True):
        model, callback = Classifier(), RePr(**PHASE)
        breaks = _Breaks()
        trainer = make_trainer([callback, breaks], max_epochs=9)
        with pytest.warns(UserWarning, match="broke off inside"), pytest.raises(OSError, match="disk"):
            trainer.fit(model, batches())
        model, breaks.at = _copy(model) if copied else model, -1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(model, batches())
        assert not [warning for warning in caught if "RePr forgets" in str(warning.message)]
        assert happened(callback) == PLANNED
        assert zeros(model.state_dict()) == 0
        runs.append(model.state_dict())
    assert not differing(runs[0], runs[1])


def test_weights_that_are_loaded_in_a_phase(tmp_path: Path) -> None:
    """The filters are out again at the next epoch, as in a resume from a checkpoint that was saved before it."""

    class Loads(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 10:
                pl_module.load_state_dict(Classifier(seed=4).state_dict())

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            out.append(zeros(pl_module.state_dict()))

    out: list[int] = []
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
    callback = RePr(**PHASE)
    with pytest.warns(UserWarning, match=r"7 filters that RePr dropped .* were changed during the phase"):
        run = fit([callback, Loads(), saving], max_epochs=5)
    assert out == [0, 0, 7, 0, 0]
    assert happened(callback) == PLANNED
    resumed = fit([RePr(**PHASE)], model=Classifier(seed=1), max_epochs=5, ckpt_path=str(tmp_path / "step=12.ckpt"))
    assert not differing(run.tensors(), resumed.tensors())


class _Breaks(Callback):
    """Raises after a step, in a phase."""

    at = 8

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise OSError("disk")


def test_filters_that_moved_meanwhile_are_left_as_they_are() -> None:
    model, callback = Classifier(), RePr(**PHASE)
    trainer = make_trainer([callback, _Breaks()], max_epochs=9)
    with pytest.warns(UserWarning, match="broke off inside"), pytest.raises(OSError, match="disk"):
        trainer.fit(model, batches())
    model.load_state_dict(Classifier(seed=4).state_dict())
    trainer.callbacks[-1].__class__ = Callback
    with pytest.warns(UserWarning, match="forgets the 7 filters"):
        trainer.fit(model, batches())
    assert callback.dropped == {}
    assert happened(callback) == PLANNED[:1], "the only cycle is past"


def test_a_warning_that_is_true_with_momentum() -> None:
    """Trained on without the callback, saved momentum moves filters that no gradient reaches."""
    model, callback = _stopped()
    names = callback.dropped
    with pytest.warns(UserWarning, match="only saved momentum may move them"):
        fit([RePr(**PHASE), Stops(8)], max_epochs=5, min_epochs=0)
    fit(model=model, max_epochs=4)
    for layer, rows in names.items():
        conv = model.get_submodule(layer)
        assert isinstance(conv, nn.Conv2d)
        if layer != "net.7":  # no activation follows it: a gradient does reach
            assert not bool(filter_matrix(conv)[rows].any())
