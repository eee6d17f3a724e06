"""Exceptions at every hook of a short fit and in every call of a logger: nothing stays behind, and nothing is poisoned.

After each fault the optimizers and modules are free of hooks, the state loads with ``weights_only=True``, and the next
fit with the same object is that with a new one. A checkpoint of the fault resumes like one of a fit without the
callback: where that resume is exact, ours is too. A callback that changes the network refuses one without its state.

An error of a logger that takes *our* numbers or images ends no fit: it is one warning, and the weights are those of a
fit without it. An interrupt there is a fault like the others.
"""

from __future__ import annotations

import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_filterdiv import WeightAsynchronousUpdate
from tests.registry import CASES, ONE_EACH, Case
from tests.support.training import SAFELY, Classifier, Run, batches, differing, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS, STEPS = 3, 2

#: Hook -> how often Lightning calls it in the fit of this suite.
HOOKS: dict[str, int] = {
    "setup": 1,
    "on_fit_start": 1,
    "on_sanity_check_start": 1,
    "on_sanity_check_end": 1,
    "on_train_start": 1,
    "on_train_epoch_start": 3,
    "on_train_batch_start": 6,
    "on_before_zero_grad": 6,
    "on_before_backward": 6,
    "on_after_backward": 6,
    "on_before_optimizer_step": 6,
    "on_train_batch_end": 6,
    "on_validation_start": 4,
    "on_validation_epoch_start": 4,
    "on_validation_batch_start": 4,
    "on_validation_batch_end": 4,
    "on_validation_epoch_end": 4,
    "on_validation_end": 4,
    "on_train_epoch_end": 3,
    "state_dict": 3,
    "on_save_checkpoint": 3,
    "on_train_end": 1,
    "on_fit_end": 1,
    "teardown": 1,
}
#: Called in a resumed fit only.
LOADING = ("on_load_checkpoint", "load_state_dict")
#: Calls of a logger that are not by a callback of ours.
LOGGING: dict[str, int] = {"log_hyperparams": 1, "log_graph": 1, "save": 4, "after_save_checkpoint": 3, "finalize": 1}


class Point(NamedTuple):
    """The ``at``-th call of a hook of a callback ``"before"`` or ``"after"`` ours, or of a method of the ``"logger"``;
    ``"interrupt"``: that of a method of the logger is no error but an interrupt, as by Ctrl-C."""

    place: str
    hook: str
    at: int

    def __str__(self) -> str:
        return f"{self.place} {self.hook} {self.at}"


BEFORE_ON_EXCEPTION = Point("before", "on_train_batch_end", 3)


class _BoomError(Exception):
    pass


class _InterruptError(BaseException):
    pass


class Fuse:
    """Counts calls by name and raises at one of them, once.

    Attributes:
        calls: (place, hook) -> number of calls.
        during: call of a logger -> the call of a hook before it.
    """

    def __init__(self, point: Point | None = None) -> None:
        self.point = point
        self.calls: dict[tuple[str, str], int] = {}
        self.during: dict[Point, Point] = {}
        self._latest = Point("before", "setup", 0)

    def called(self, place: str, hook: str) -> None:
        number = self.calls.get((place, hook), 0)
        self.calls[place, hook] = number + 1
        call = Point(place, hook, number)
        if place == "before":
            self._latest = call
        elif place == "logger":
            self.during[call] = self._latest
        # A fault in on_exception needs one before it.
        first = self.point is not None and self.point.hook == "on_exception" and call == BEFORE_ON_EXCEPTION
        if first or call == self.point:
            raise _BoomError(str(call))
        if place == "logger" and call._replace(place="interrupt") == self.point:
            raise _InterruptError(str(call))


class Neighbour(Callback):
    """Stands before or after the callback and tells the fuse about every hook."""

    def __init__(self, place: str, fuse: Fuse) -> None:
        self.place = place
        for hook in (*HOOKS, *LOADING, "on_exception"):
            setattr(self, hook, self._told(hook, fuse))

    def _told(self, hook: str, fuse: Fuse) -> Any:
        def told(*_: Any, **__: Any) -> Any:
            fuse.called(self.place, hook)
            return {"some": "state"} if hook == "state_dict" else None

        return told

    @property
    def state_key(self) -> str:
        return f"Neighbour {self.place}"


OUR_TAGS = ("filterdiv/", "Filters/", "filterdiv_layers/")


class Experiment:
    """Takes images as TensorBoard does."""

    def __init__(self, fuse: Fuse) -> None:
        self.fuse = fuse

    def add_image(self, *_: Any, **__: Any) -> None:
        self.fuse.called("logger", "add_image")

    def add_custom_scalars(self, *_: Any) -> None:
        self.fuse.called("logger", "add_custom_scalars")


class Told(Logger):
    """A logger that tells the fuse about every call; ``ours`` are the numbers of the callbacks of the package."""

    name, version = "told", 0

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse, self.experiment = fuse, Experiment(fuse)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.fuse.called("logger", "ours" if any(key.startswith(OUR_TAGS) for key in metrics) else "log_metrics")

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.fuse.called("logger", "log_hyperparams" if "some" in params else "our_hyperparams")

    def log_graph(self, *_: Any, **__: Any) -> None:
        self.fuse.called("logger", "log_graph")

    def save(self) -> None:
        self.fuse.called("logger", "save")

    def after_save_checkpoint(self, *_: Any) -> None:
        self.fuse.called("logger", "after_save_checkpoint")

    def finalize(self, status: str) -> None:
        self.fuse.called("logger", "finalize")


def train(callbacks: list[Any], folder: Path, fuse: Fuse, path: Path | None = None, seed: int = 0) -> Run:
    """The fit of this suite; the trainer and model of one that fails are found on the exception."""
    model = Classifier(seed=seed)
    model.save_hyperparameters({"some": "number"})
    trainer = make_trainer(
        [
            Neighbour("before", fuse),
            *callbacks,
            Neighbour("after", fuse),
            ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, enable_version_counter=False),
            OnExceptionCheckpoint(folder, "fault"),
        ],
        max_epochs=EPOCHS,
        limit_train_batches=STEPS,
        limit_val_batches=1,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        logger=Told(fuse),
        enable_checkpointing=True,
    )
    run = Run(model, trainer, callbacks)
    try:
        trainer.fit(model, batches(), batches(steps=1), ckpt_path=path and str(path), **(SAFELY if path else {}))
    except BaseException as error:
        error.run = run  # type: ignore[attr-defined]
        raise
    return run


@cache
def whole(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], Fuse]:
    """The fit without a fault, and who was called in it; its checkpoints are in ``folder``."""
    fuse = Fuse()
    made = [case.make() for case in CASES if case.name == name]
    return train(made, folder / (name or "nobody"), fuse).tensors(), fuse


@cache
def resumes_exactly(point: Point, folder: Path) -> bool:
    """True if Lightning by itself resumes exactly from a checkpoint of this fault."""
    place = folder / "control" / str(point).replace(" ", "-")
    start = folder / "nobody" / "step=2.ckpt" if point.hook in LOADING else None
    expected, _ = whole("", folder)
    with pytest.raises(_BoomError):
        train([], place, Fuse(point), start)
    if not (place / "fault.ckpt").exists():
        return False
    try:
        return not differing(train([], place, Fuse(), place / "fault.ckpt", seed=1).tensors(), expected)
    except Exception:  # a half-restored trainer saves what it cannot read
        return False


def check(case: Case, point: Point, folder: Path, shared: Path) -> None:
    """Inject one fault; raise AssertionError unless everything is as the head of this file says."""
    expected, calls = whole(case.name, shared)
    callback = case.make()
    start = shared / case.name / "step=2.ckpt" if point.hook in LOADING else None
    with pytest.raises((_BoomError, _InterruptError)) as caught:
        train([callback], folder, Fuse(point), start)
    if point != ("before", "on_exception", 0):  # there ours is not called any more, and the next fit cleans up
        check_nothing_stays(caught.value.run)  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save(callback.state_dict(), buffer)
    buffer.seek(0)
    case.make().load_state_dict(torch.load(buffer, weights_only=True))
    again = train([callback], folder / "again", Fuse())
    assert not differing(again.tensors(), expected), "the next fit with the same object is another one"
    fault = folder / "fault.ckpt"
    if not fault.exists():
        return
    moment = calls.during.get(point._replace(place="logger"), point)
    exact = resumes_exactly(moment, shared)
    if point.place == "interrupt" and not exact:
        # Lightning repeats something after a fault here. Then an interrupted log must do what a fault right after it
        # does.
        with pytest.raises(_BoomError):
            train([case.make()], folder / "twin", Fuse(moment._replace(place="after")))
        twin = train([case.make()], folder / "twin-resumed", Fuse(), folder / "twin" / "fault.ckpt", seed=1)
        exact, expected = True, twin.tensors()
    try:
        resumed = train([case.make()], folder / "resumed", Fuse(), fault, seed=1)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        # Saved before the callback was set up, it holds no state.
        no_state = case.refuses_without_state is not None and case.refuses_without_state in str(error)
        if (exact and not no_state) or "manual optimization" in str(error):
            pytest.fail(f"an exact resume is refused, or for a wrong reason: {error}")
        return
    assert not exact or not differing(resumed.tensors(), expected), "the resume from the fault is not exact"


def check_nothing_stays(run: Run) -> None:
    for optimizer in run.trainer.optimizers:
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_step_pre_hooks
    for module in run.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert getattr(module, "total", None) is None  # of a gate
        assert not module._state_dict_hooks
    for parameter in run.model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def of_hooks() -> list[Point]:
    """First, middle and last call of every hook, before and after ours."""
    named = HOOKS | dict.fromkeys((*LOADING, "on_exception"), 1)
    calls = {hook: sorted({0, count // 2, count - 1}) for hook, count in named.items()}
    return [Point(place, hook, at) for place in ("before", "after") for hook, ats in calls.items() for at in ats]


def of_logger() -> list[Point]:
    return [Point("logger", hook, at) for hook, count in LOGGING.items() for at in sorted({0, count - 1})]


#: Calls of a logger by each callback.
OURS: dict[str, dict[str, int]] = {
    "repr": {"ours": 2},
    "csgd": {"ours": 3},
    "basis": {"ours": 7},
    "monitor": {"ours": 4, "add_custom_scalars": 1, "our_hyperparams": 1},
    "monitor_figures": {"ours": 4, "add_custom_scalars": 1, "our_hyperparams": 1, "add_image": 8},
    "entropy": {"ours": 2},
}
WITH_FIGURES = next(case for case in CASES if case.name == "monitor_figures")


#: A trace of the channel graph takes longer than the fits of this suite.
TRACE = ("repr", "csgd", "entropy")
QUICK = [case.name for case in ONE_EACH if case.name not in TRACE]


def in_default(case: Case, point: Point) -> bool:
    """Every hook once, before or after ours by turns, every call of a logger, each with one of the quick callbacks."""
    if point.place == "interrupt":
        return point.at == 0 or (point.at == OURS[case.name][point.hook] - 1 and case.name in QUICK)
    if case.name in TRACE:
        return point == ("after", "on_train_batch_end", 3)
    named = HOOKS | LOGGING | dict.fromkeys((*LOADING, "on_exception"), 1)
    turn = list(named).index(point.hook)
    place = "logger" if point.hook in LOGGING else ("before", "after")[(turn // len(QUICK)) % 2]
    wanted = 0 if point.hook in LOGGING else named[point.hook] // 2
    return QUICK[turn % len(QUICK)] == case.name and point.place == place and point.at == wanted


def rows() -> list[Any]:
    """The full product; what is not in the default selection is marked ``soak``."""
    made = []
    for case in ONE_EACH:
        own = [Point("interrupt", hook, at) for hook, count in OURS.get(case.name, {}).items() for at in range(count)]
        for point in (*of_hooks(), *of_logger(), *own):
            marks = [] if in_default(case, point) else [pytest.mark.soak]
            made.append(pytest.param(case, point, marks=marks, id=f"{case.name}-{point}"))
    return made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("injection")


@pytest.mark.parametrize(("case", "point"), rows())
def test_a_fault_poisons_nothing(case: Case, point: Point, tmp_path: Path, shared: Path) -> None:
    check(case, point, tmp_path, shared)


def logger_errors() -> list[Any]:
    """First and last call of a logger by each callback."""
    return [
        pytest.param(case, Point("logger", hook, at), id=f"{case.name}-{hook}-{at}")
        for case in (*ONE_EACH, WITH_FIGURES)
        for hook, count in OURS.get(case.name, {}).items()
        for at in sorted({0, count - 1})
        if case is not WITH_FIGURES or hook == "add_image"
    ]


@pytest.mark.parametrize(("case", "point"), logger_errors())
def test_an_error_of_a_logger_is_one_warning(case: Case, point: Point, tmp_path: Path, shared: Path) -> None:
    """Numbers and images of ours are not worth a training."""
    expected, _ = whole(case.name, shared)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = train([case.make()], tmp_path, Fuse(point))
    said = [str(warning.message) for warning in caught if "could not write" in str(warning.message)]
    assert len(said) == 1
    assert f"{case.cls.__name__} could not write" in said[0]
    assert f"(_BoomError: {point}). Training goes on" in said[0]
    assert not differing(run.tensors(), expected)


def test_every_call_is_in_the_tables(shared: Path) -> None:
    """Lightning calls no other hook and no other method of a logger, and none less often."""
    calls = whole("", shared)[1].calls
    covered = {point.hook for case in ONE_EACH for point in (*of_hooks(), *of_logger()) if in_default(case, point)}
    assert covered == {*HOOKS, *LOADING, *LOGGING, "on_exception"}
    for place in ("before", "after"):
        assert {hook: count for (at, hook), count in calls.items() if at == place} == HOOKS
    logger = {hook: count for (place, hook), count in calls.items() if place == "logger" and hook != "log_metrics"}
    assert logger == LOGGING
    for case in (*ONE_EACH, WITH_FIGURES):
        calls = whole(case.name, shared)[1].calls
        ours = {hook: count for (place, hook), count in calls.items() if place == "logger" and hook not in LOGGING}
        assert {hook: count for hook, count in ours.items() if hook != "log_metrics"} == OURS.get(case.name, {})
    hooks = {name for name in vars(Callback) if not name.startswith("_")} - {"state_key", "on_exception"}
    assert {name for name in hooks if "test" not in name and "predict" not in name} <= HOOKS.keys() | set(LOADING)


def test_the_controls_are_worth_something(shared: Path) -> None:
    """Without a callback most faults resume exactly, so that a checkpoint that does not is ours."""
    points = [Point("before", hook, HOOKS[hook] // 2) for hook in HOOKS]
    exact = [point.hook for point in points if resumes_exactly(point, shared)]
    assert {"on_fit_start", "on_train_batch_end", "on_train_epoch_end"} <= set(exact), exact


class _LeavesHooks(WeightAsynchronousUpdate):
    """Mutant: relies on teardown."""

    def on_exception(self, *_: Any) -> None:
        pass


def test_left_hooks_are_caught(shared: Path, tmp_path: Path) -> None:
    case = next(case for case in ONE_EACH if case.name == "wau")
    with pytest.raises(AssertionError):
        check(Case("wau", _LeavesHooks, case.arguments), Point("after", "on_train_batch_end", 3), tmp_path, shared)
