"""NaN, infinity, zeros, extreme sizes and empty batches: every callback continues with a finite state, or names the
layer and the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_filterdiv import CentripetalSGD, FilterCallback
from lightning_filterdiv.centripetal.forecast import ClipMeter
from lightning_filterdiv.centripetal.functional import CentripetalUpdate, relative_deviations
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_importance.gates import ChannelGate
from lightning_filterdiv.channel_importance.selection import select_channels
from lightning_filterdiv.filters import NoLayersError
from lightning_filterdiv.monitor.functional import redundancy_metrics
from lightning_filterdiv.narrowing.clusters import ClusteredTensor
from tests.registry import CASES, ONE_EACH, PER_STEP, Case
from tests.support.training import OPTIMIZERS, Classifier, batches, differing, fit, same, small_net

# They trace the network, which takes a second: run in one place each by default, everywhere under soak.
TRACING = ("csgd", "repr", "entropy")


def _make(case: Case) -> FilterCallback:
    return case.make(figures=False) if case.name == "monitor" else case.make()


def _numbers(state: Any) -> Iterator[float]:
    """Every number in a nested state, of a tensor its sum of magnitudes."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list | tuple):
        for part in state:
            yield from _numbers(part)
    elif isinstance(state, Tensor):
        yield float(state.double().abs().sum())
    elif isinstance(state, float):
        yield state


def _check_finite(run: Any, callback: FilterCallback) -> None:
    broken = [name for name, value in run.tensors().items() if not bool(torch.isfinite(value).all())]
    assert not broken
    assert all(map(math.isfinite, _numbers(callback.extra_state())))


# --------------------------------------------------------------------------- layers


def _normed(edit: Callable[[Tensor], object]) -> nn.Sequential:
    """Three convolutions with norms (which take any scale away); ``edit`` gets the weight of the middle one."""
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    edit(net[3].weight.data)  # type: ignore[arg-type]
    return net


def _chain(*convolutions: nn.Module, features: int, size: int = 2) -> nn.Sequential:
    parts = [part for conv in convolutions for part in (conv, nn.ReLU())]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(size), nn.Flatten(), nn.Linear(features, 4))


NETS: dict[str, Callable[[], nn.Sequential]] = {
    "zero_filters": lambda: _normed(lambda w: w[:3].zero_()),
    "zero_layer": lambda: _normed(lambda w: w.zero_()),
    "huge": lambda: _normed(lambda w: w.mul_(1e18)),
    "tiny": lambda: _normed(lambda w: w.mul_(1e-30)),
    "nan_filter": lambda: _normed(lambda w: w[2].fill_(math.nan)),
    "one_filter": lambda: _chain(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 1, 3), nn.Conv2d(1, 8, 3), features=32),
    "only_one_filter": lambda: _chain(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), features=4),
    "more_filters": lambda: _chain(nn.Conv2d(1, 12, 1), nn.Conv2d(12, 3, 3), nn.Conv2d(3, 9, 1), features=36),
    "one_pixel": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), *_chain(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 8, 3, padding=1), features=8, size=1)
    ),
}  # fmt: skip
REFUSED: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("huge", "basis"): (MisconfigurationException, "'net.3' is not finite at the start: its weights are so large"),
    ("nan_filter", "basis"): (MisconfigurationException, "'net.3' is not finite at the start: its weights contain NaN"),
    ("nan_filter", "expand"): (ValueError, "layer 'net.3' cannot keep its weight: it contains NaN or inf"),
    ("nan_filter", "csgd"): (ValueError, "'net.3': 1 of 8 filters contain NaN or inf and cannot be clustered"),
    ("nan_filter", "repr"): (ValueError, "net.0: 6 of 6 filters contain NaN or inf; has the training diverged?"),
    ("only_one_filter", "csgd"): (NoLayersError, "would leave every channel as it is"),
    ("only_one_filter", "repr"): (NoLayersError, "would drop no filter: prune_fraction=0.3 of the 2 filters of"),
}  # fmt: skip
#: Weights that the network itself cannot train with, whatever the callback.
HOPELESS = ("nan_filter",)
#: The form's own weight is for networks of many filters: with few, or after a layer of zeros (whose first steps a norm
#: makes hundreds of times larger), its step is beyond the edge of divergence. The way out that the error names.
SMALLER_WEIGHT = {("only_one_filter", "basis"), ("zero_layer", "basis"), ("tiny", "basis")}
_BY_DEFAULT = {("huge", "csgd"), ("nan_filter", "csgd"), ("only_one_filter", "repr"), ("one_pixel", "entropy")}
CELLS = [
    pytest.param(
        net,
        case,
        marks=pytest.mark.soak if case.name in TRACING and (net, case.name) not in _BY_DEFAULT else (),
        id=f"{net}-{case.name}",
    )
    for net in NETS
    for case in ONE_EACH
]


def _fit_net(net: str, case: Case, callback: FilterCallback) -> Any:
    torch.manual_seed(0)
    model = Classifier(net=NETS[net](), lr_scale=case.lr_scale)
    return fit([callback], model=model, max_epochs=3, limit_train_batches=3)


@pytest.mark.parametrize(("net", "case"), CELLS)
def test_layer(net: str, case: Case) -> None:
    callback = _make(case)
    if (net, case.name) in SMALLER_WEIGHT:
        callback = case.make(weight=1e-3)
    if (net, case.name) in REFUSED:
        error, message = REFUSED[net, case.name]
        with pytest.raises(error, match=re.escape(message)):
            _fit_net(net, case, callback)
        return
    run = _fit_net(net, case, callback)
    if net not in HOPELESS:
        _check_finite(run, callback)


def test_a_penalty_that_diverges_stops_the_fit() -> None:
    """A layer of zeros behind a norm jumps in its first step: the cubic gradient of the penalty then runs away."""
    case = next(case for case in ONE_EACH if case.name == "basis")
    with pytest.raises(MisconfigurationException, match=r"'net.0' is not finite after this epoch.*a smaller weight"):
        fit([case.make()], model=Classifier(net=NETS["zero_layer"]()), max_epochs=3)


def test_holding_nothing_is_said() -> None:
    """Layers of one filter are updated at every step."""
    case = next(case for case in ONE_EACH if case.name == "wau")
    with pytest.warns(UserWarning, match=r"holds nothing still: update_fraction=0.5 comes to all filters of 'net.0'"):
        _fit_net("only_one_filter", case, case.make())


# --------------------------------------------------------------------------- gradients


def _broken_rows(tensors: dict[str, Tensor]) -> set[tuple[str, int]]:
    return {
        (name, row)
        for name, tensor in tensors.items()
        for row in range(len(tensor))
        if not bool(torch.isfinite(tensor[row]).all())
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("case", PER_STEP, ids=lambda case: case.name)
def test_a_broken_gradient_stays_in_its_filter(case: Case, optimizer: str, bad: float) -> None:
    """One step after a gradient with one bad number: no other filter is broken than without the callback."""
    assert case.per_step is not None

    def step(build: Any) -> set[tuple[str, int]]:
        torch.manual_seed(0)
        model = small_net()
        chosen = OPTIMIZERS[optimizer](model.parameters())
        before, after = build(model, chosen) if build else (lambda at: None, lambda: None)
        for at in range(2):
            generator = torch.Generator().manual_seed(at)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            if at:
                model[3].weight.grad[4, 1, 0, 2] = bad  # type: ignore[union-attr, index]
            before(at)
            chosen.step()
            after()
        return _broken_rows(dict(model.named_parameters()))

    alone = step(None)
    assert alone == {("3.weight", 4)}
    assert step(case.per_step) <= alone


class _Sanitizes(Classifier):
    """One gradient is broken at one step, and set to zero where clipping would come: a run that can go on."""

    BROKEN_AT = 4

    def _weights(self) -> dict[str, nn.Parameter]:
        """That of the layer, or its factors."""
        names = ("3.weight", "3.parametrizations.weight")
        return {name: p for name, p in self.net.named_parameters() if name.startswith(names)}

    def on_after_backward(self) -> None:
        if self.trainer.global_step == self.BROKEN_AT:
            gradient = list(self._weights().values())[0].grad  # noqa: RUF015  # next() would end the epoch in silence
            assert gradient is not None
            gradient[1] = math.nan

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        gradients = {name: p.grad for name, p in self.net.named_parameters() if p.grad is not None}
        if self.trainer.global_step == self.BROKEN_AT:
            assert _broken_rows(gradients) <= {(name, 1) for name in self._weights()}
        for gradient in gradients.values():
            gradient.nan_to_num_(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.soak if c.variant or c.name in TRACING else (), id=c.name) for c in CASES],
)
def test_a_run_that_drops_broken_gradients_goes_on(case: Case) -> None:
    callback = _make(case)
    run = fit([callback], model=_Sanitizes(lr_scale=case.lr_scale))
    assert run.trainer.global_step == 18
    _check_finite(run, callback)
    losses = list(run.model.losses.values())
    assert sum(losses[-3:]) < sum(losses[:3])


# --------------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.soak if c.variant or c.name in TRACING[1:] else (), id=c.name) for c in CASES],
)
def test_a_skipped_step_leaves_no_trace(case: Case) -> None:
    """A step that a gradient scaler skips did not happen: the callback's state is what it was before it."""
    callback = _make(case)
    seen: list[tuple[int, Tensor, Any]] = []

    def remember(model: Classifier, step: int) -> None:
        weights = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        seen.append((model.current_epoch, weights, callback.extra_state()))

    model = Classifier(lr_scale=case.lr_scale)
    model.hook = remember
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=10**6))
    fit([callback], model=model, max_epochs=3, plugins=[plugin], log_every_n_steps=0)
    skipped = 0
    # The first step makes clusters, whether or not it is skipped.
    for (epoch, before, state), (later, after, now) in pairwise(seen[1:]):
        if epoch == later and torch.equal(before, after):
            skipped += 1
            # Gates let images through in the forward call, which did happen.
            if case.name != "importance":
                assert same(state, now)
    assert 1 <= skipped < len(seen) - 2


# --------------------------------------------------------------------------- empty batches


class _SumOfLosses(Classifier):
    """The mean over no image would be NaN."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum") / max(1, len(batch[0]))
        self.losses[self.trainer.global_step] = loss.item()
        return loss


class _EmptyAt:
    """The batches of :func:`batches`, those at ``indices`` without a row."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices, self.batches = indices, batches(steps=4)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for index, batch in enumerate(self.batches):
            yield [part[:0] for part in batch] if index in self.indices else batch


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.soak if c.variant or c.name in TRACING[1:] else (), id=c.name) for c in CASES],
)
def test_empty_batches(case: Case) -> None:
    """The first one too: callbacks that trace the network see its shapes there."""
    callback = _make(case)
    # Without norms: the statistics of no image are NaN.
    net = _chain(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3), features=32)
    run = fit([callback], model=_SumOfLosses(net=net, lr_scale=case.lr_scale), loader=_EmptyAt([0, 2]))
    _check_finite(run, callback)


def test_the_harness_itself() -> None:
    """Without a callback these runs are finite: what fails above is a callback's doing."""
    for net in NETS.keys() - set(HOPELESS):
        torch.manual_seed(0)
        run = fit(model=Classifier(net=NETS[net]()), max_epochs=3, limit_train_batches=3)
        assert all(bool(torch.isfinite(value).all()) for value in run.tensors().values()), net
    assert differing(fit(model=_Sanitizes()).tensors(), fit().tensors())


# --------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_measures_do_not_depend_on_scale(scale: float) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 8, 3)
    conv.weight.data[3] *= 1e-4
    tensor = ClusteredTensor("conv.weight", conv.weight, 0, (0, 0, 1, 1, 2, 2, 3, 3))
    expected = relative_deviations([tensor])["conv.weight"], redundancy_metrics({"conv": conv})["conv"]
    conv.weight.data *= scale
    assert relative_deviations([tensor])["conv.weight"] == pytest.approx(expected[0], rel=1e-5)
    assert redundancy_metrics({"conv": conv})["conv"] == pytest.approx(expected[1], rel=1e-4)
    assert expected[1]["dead_filters"] == 1 / 8


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_tensor_is_not_called_tied(bad: float) -> None:
    tensors = [ClusteredTensor(name, nn.Parameter(torch.ones(4, 3)), 0, (0, 0, 1, 1)) for name in ("a", "b")]
    assert relative_deviations(tensors) == {"a": 0.0, "b": 0.0}
    tensors[0].parameter.data[1, 1] = bad
    found = relative_deviations(tensors)
    assert math.isnan(found["a"])
    assert found["b"] == 0.0
    callback = CentripetalSGD()
    callback._tensors = tensors
    assert math.isnan(callback.largest_deviation or 0.0)


def test_clipping_is_measured_on_finite_gradients() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    tensors = [ClusteredTensor("w", parameter, 0, (0, 0, 1, 1))]
    update = CentripetalUpdate(tensors, torch.optim.SGD([parameter], lr=0.1), strength=0.1)
    meter = ClipMeter()
    meter._active = True
    for value, clipped in ((1.0, 0.5), (math.nan, 0.5), (1.0, 0.5)):
        parameter.grad = torch.full((4, 3), value)
        update.before_step()
        meter.before_step(update)
        parameter.grad.mul_(clipped)
        meter.after_step(update)
    assert meter.mean == pytest.approx((0.5 + 1.0 + 0.5) / 3)


def test_gates_that_are_not_finite_do_not_count() -> None:
    gate = ChannelGate(4).train()
    gate.total = torch.zeros(5)
    images = torch.rand(3, 4, 2, 2)
    expected = gate.factors(images)[[0, 2]].sum(0)
    images[1, 2, 0, 0] = math.nan
    gate(images)
    assert torch.equal(gate.total[:4], expected.detach())
    assert gate.total[4] == 2


def test_an_importance_that_is_not_finite_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    graph = ChannelGraph.trace(net, torch.rand(1, 1, 8, 8))
    importance = {"0": torch.tensor([0.5, math.nan, 0.2, 0.1])}
    with pytest.raises(ValueError, match=r"importance of '0' holds NaN or inf"):
        select_channels(graph, importance)
