"""The C-SGD rule against a loop over filters, and the deviation against the scalar recursion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import CifarResNet
from lightning_filterdiv import CentripetalSGD
from lightning_filterdiv.centripetal import (
    CentripetalUpdate,
    ClusteredTensor,
    centripetal_gradient,
    deviation_factors,
    reached_k,
    solve_strength,
)
from lightning_filterdiv.centripetal.forecast import safe_strength
from lightning_filterdiv.centripetal.functional import cluster_distances
from lightning_filterdiv.tensors.flat_buffer import FlatBuffer
from lightning_filterdiv.training.learning_rates import StepSettings
from tests.registry import Case
from tests.suites.test_per_step_cost import fake_gpu_kernels
from tests.support.fake_gpu import needs_fake_gpu

SHAPES = {"a": (8, 3, 3, 3), "b": (8, 3, 3, 3), "c": (6, 8, 1, 1), "scale": (8,), "shift": (8,)}
CLUSTERS = {
    "a": (0, 1, 0, 2, 2, 1, 0, 3),
    "b": (0, 0, 0, 0, 1, 2, 3, 4),
    "c": (0, 1, 1, 0, 2, 2),
    "scale": (0, 1, 0, 2, 2, 1, 0, 3),
    "shift": (0, 1, 2, 3, 4, 5, 6, 6),
}


def _parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {n: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for n, s in SHAPES.items()}


def _clustered(parameters: dict[str, nn.Parameter]) -> list[ClusteredTensor]:
    return [ClusteredTensor(name, p, 0, CLUSTERS[name]) for name, p in parameters.items()]


def _gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def direct_step(
    values: dict[str, Tensor], buffers: dict[str, Tensor], gradients: dict[str, Tensor], o: dict[str, Any], eps: float
) -> None:
    """The rule filter by filter, as the specification writes it, with momentum as torch has it."""
    for name, value in values.items():
        old = value.clone()
        for j, cluster in enumerate(CLUSTERS[name]):
            members = [k for k, other in enumerate(CLUSTERS[name]) if other == cluster]
            mean_gradient = sum(gradients[name][k] for k in members) / len(members)
            mean_filter = sum(old[k] for k in members) / len(members)
            d = mean_gradient + o["weight_decay"] * old[j] - eps * (mean_filter - old[j])
            if o["momentum"]:
                if name in buffers:
                    buffers[name][j] = o["momentum"] * buffers[name][j] + (1 - o["dampening"]) * d
                d_buffer = buffers.setdefault(name, torch.full_like(value, math.nan))
                if d_buffer[j].isnan().any():
                    d_buffer[j] = d
                d = d + o["momentum"] * d_buffer[j] if o["nesterov"] else d_buffer[j]
            value[j] = old[j] - o["lr"] * d


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
        {"momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 1e-2},
        {"momentum": 0.7, "dampening": 0.2, "nesterov": False, "weight_decay": 1e-3},
    ],
    ids=["plain", "nesterov", "dampening"],
)
def test_the_batched_rule_equals_a_loop_over_filters(options: dict[str, Any]) -> None:
    parameters = _parameters()
    values = {name: p.detach().clone() for name, p in parameters.items()}
    buffers: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05, **options)
    update = CentripetalUpdate(_clustered(parameters), optimizer, strength=0.3)
    for step in range(25):
        for name, gradient in _gradients(step).items():
            parameters[name].grad = gradient
        update.before_step()
        optimizer.step()
        update.after_step()
        direct_step(values, buffers, _gradients(step), options | {"lr": 0.05}, 0.3)
    for name, value in values.items():
        assert float((parameters[name].detach() - value).abs().max()) <= 1e-12, name


def test_one_tensor_form_equals_the_batched_one() -> None:
    parameters, gradients = _parameters(), _gradients(0)
    update = CentripetalUpdate(_clustered(parameters), torch.optim.SGD(parameters.values(), lr=0.1), strength=0.2)
    kept = {}
    for name, p in parameters.items():
        p.grad = kept[name] = gradients[name].clone()
    update.before_step()
    for name, p in parameters.items():
        assert p.grad is kept[name], "gradients are edited in place: DDP's buckets are views of them"
        one = centripetal_gradient(gradients[name], p.detach(), torch.tensor(CLUSTERS[name]), 0.2)
        torch.testing.assert_close(p.grad, one, rtol=1e-12, atol=1e-12)


def test_equal_members_stay_bit_equal_in_float32() -> None:
    p = nn.Parameter(torch.randn(16, 40))
    clusters = tuple(i // 4 for i in range(16))
    with torch.no_grad():
        p.copy_(p[torch.tensor(clusters) * 4])
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    update = CentripetalUpdate([ClusteredTensor("p", p, 0, clusters)], optimizer, strength=0.1)
    for _ in range(50):
        p.grad = torch.randn_like(p)
        update.before_step()
        optimizer.step()
        update.after_step()
    assert torch.equal(p[0::4], p[3::4])
    assert not torch.equal(p[0], p[4])


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameters = _parameters()
    update = CentripetalUpdate(_clustered(parameters), torch.optim.SGD(parameters.values(), lr=0.1), strength=0.2)
    parameters["a"].grad = _gradients(0)["a"]
    update.before_step()
    assert parameters["b"].grad is None
    assert parameters["scale"].grad is None


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_an_entry_that_is_not_finite_is_not_averaged(
    optimizer: Callable[..., torch.optim.Optimizer], bad: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing is looked for while all numbers are finite. The results are those of other devices."""
    found = []
    for shortcuts in (True, False):
        monkeypatch.setattr(FlatBuffer, "cpu_shortcuts", shortcuts)
        parameters = _parameters()
        update = CentripetalUpdate(_clustered(parameters), optimizer(parameters.values(), lr=0.1), strength=0.05)
        for name, gradient in _gradients(0).items():
            parameters[name].grad = gradient
        kernel = parameters["a"].grad
        assert kernel is not None
        if bad is not None:
            kernel[4, 1, 0, 2] = bad
        originals = kernel.clone()
        update.before_step()
        kept = torch.isclose(kernel, originals, rtol=1e-12, equal_nan=True).all(dim=0)
        assert bool(kept[1, 0, 2]) == (bad is not None)
        assert int(kept.sum()) == (bad is not None)
        update.optimizer.step()
        update.after_step()
        found.append([p.grad for p in parameters.values()] + [p.detach() for p in parameters.values()])
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


def test_channels_last_and_transposed_rows() -> None:
    w = nn.Parameter(torch.randn(4, 6, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last))
    clusters = (0, 0, 1, 1, 1, 2)
    gradient = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    w.grad = gradient.clone().to(memory_format=torch.channels_last)
    CentripetalUpdate([ClusteredTensor("w", w, 1, clusters)], torch.optim.SGD([w], lr=0.1), strength=0.2).before_step()
    rows = centripetal_gradient(gradient.movedim(1, 0), w.detach().movedim(1, 0), torch.tensor(clusters), 0.2).movedim(
        0, 1
    )
    torch.testing.assert_close(w.grad, rows, rtol=1e-12, atol=1e-12)
    assert w.grad.is_contiguous(memory_format=torch.channels_last)


# --------------------------------------------------------------------------- forecast

SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 0.02,
    "steps": lambda step: 0.05 if step < 60 else 0.005,
    "cosine": lambda step: 0.025 * (1 + math.cos(math.pi * step / 120)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("strength", "momentum"), [(0.02, 0.9), (0.2, 0.9), (0.5, 0.5), (1.0, 0.0)])
def test_measured_deviation_follows_the_recursion(
    strength: float, momentum: float, nesterov: bool, schedule: str
) -> None:
    """Whatever the gradients: kernels and vectors shrink by the same number, to 1e-9, sign included."""
    parameters = _parameters()
    clustered = _clustered(parameters)

    def off() -> dict[str, Tensor]:
        found = {}
        for name, p in parameters.items():
            index = torch.tensor(CLUSTERS[name])
            means = torch.stack([p.detach()[index == c].mean(0) for c in range(int(index.max()) + 1)])
            found[name] = p.detach() - means[index]
        return found

    start = off()
    nesterov = nesterov and momentum > 0
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": 5e-3}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0, **options)
    update = CentripetalUpdate(clustered, optimizer, strength=strength)
    settings = [StepSettings(SCHEDULES[schedule](s), 5e-3, momentum, 0.0, nesterov) for s in range(120)]
    for step, at in enumerate(settings):
        optimizer.param_groups[0]["lr"] = at.lr
        for name, gradient in _gradients(step).items():
            parameters[name].grad = gradient
        update.before_step()
        optimizer.step()
        update.after_step()
    factor = deviation_factors(settings, strength)[-1]
    for name, now in off().items():
        assert float((now - factor * start[name]).abs().max()) <= 1e-9, name
    assert any(float(first.abs().max()) > 0.1 for first in start.values())


@pytest.mark.parametrize(("lr", "strength", "momentum"), [(0.01, 0.05, 0.9), (0.001, 0.5, 0.9), (0.01, 1.0, 0.5)])
def test_small_steps_shrink_by_exp_of_minus_k(lr: float, strength: float, momentum: float) -> None:
    """Where lr (eps + eta) <= (1 - mu)^2 / 10 the printed K is within 5 % of the closed form."""
    eta = 1e-4
    assert lr * (strength + eta) <= (1 - momentum) ** 2 / 10
    steps = int(12 * (1 - momentum) / (lr * (strength + eta)))
    settings = [StepSettings(lr, eta, momentum)] * steps
    k = (strength + eta) / (1 - momentum) * lr * steps
    assert reached_k(settings, strength) == pytest.approx(k, rel=0.05)


def test_momentum_limits_what_any_strength_can_do() -> None:
    """The specification's example: eps .2, lr .1 has K 60 on paper and about 22 by the recursion."""
    settings = [StepSettings(0.1, 0.0, 0.9)] * 300
    assert pytest.approx(60) == 0.2 / (1 - 0.9) * 0.1 * 300
    assert reached_k(settings, 0.2) < 25


def test_auto_solves_the_recursion() -> None:
    settings = [StepSettings(0.05 if s < 500 else 0.005, 5e-4, 0.9, 0.0, True) for s in range(800)]
    solution = solve_strength([settings])
    assert solution.reached
    assert 18 <= reached_k(settings, solution.strength) <= 19.5
    assert reached_k(settings, 0.9 * solution.strength) < 18.2
    decoupled = solve_strength([settings], decoupled=True)
    assert reached_k(settings, decoupled.strength, decoupled=True) == pytest.approx(18, abs=0.7)


def test_a_short_fit_has_no_solution() -> None:
    settings = [StepSettings(0.05, 0.0, 0.9)] * 40
    solution = solve_strength([settings])
    assert not solution.reached
    assert solution.k < 18
    best = max(reached_k(settings, solution.strength * factor) for factor in (0.25, 0.5, 1.0))
    assert solution.k <= best + 0.5
    with pytest.raises(ValueError, match="no learning rate is left"):
        solve_strength([[StepSettings(0.0, 0.0)] * 5])
    with pytest.raises(ValueError, match="no learning rate is left"):
        solve_strength([[]])


def test_safe_strength_does_not_oscillate() -> None:
    at = StepSettings(0.1, 0.0, 0.9)
    path = deviation_factors([at] * 200, safe_strength([at]))
    assert all(0 < b < a for a, b in pairwise(path))


# --------------------------------------------------------------------------- other optimizers


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_decoupled_pull_of_adamw_follows_its_recursion(decay: float, fused: bool) -> None:
    parameters = _parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=decay, fused=fused)
    update = CentripetalUpdate(_clustered(parameters), optimizer, strength=3.0)
    start = {name: p.detach()[0] - p.detach()[2] for name, p in parameters.items()}
    for step in range(60):
        for name, gradient in _gradients(step).items():
            parameters[name].grad = gradient
        update.before_step()
        optimizer.step()
        update.after_step()
    factor = deviation_factors([StepSettings(1e-2, decay, decoupled_weight_decay=True)] * 60, 3.0, decoupled=True)[-1]
    for name in ("a", "scale"):  # rows 0 and 2 share a cluster
        moved = parameters[name].detach()[0] - parameters[name].detach()[2]
        torch.testing.assert_close(moved, factor * start[name], rtol=1e-9, atol=1e-12)
        moments = optimizer.state[parameters[name]]["exp_avg"]
        torch.testing.assert_close(moments[0], moments[2], rtol=1e-12, atol=1e-14)


def test_state_is_equalised_once() -> None:
    parameters = _parameters()
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-2)
    for name, gradient in _gradients(0).items():
        parameters[name].grad = gradient
    optimizer.step()
    moments = optimizer.state[parameters["a"]]["exp_avg_sq"]
    expected = (moments[0] + moments[2] + moments[6]) / 3
    assert not torch.allclose(moments[0], moments[2])
    CentripetalUpdate(_clustered(parameters), optimizer, strength=1.0).equalise_state()
    for row in (0, 2, 6):
        torch.testing.assert_close(moments[row], expected)


def test_refused_optimizers() -> None:
    parameters = _parameters()
    with pytest.raises(ValueError, match="LBFGS"):
        CentripetalUpdate(_clustered(parameters), torch.optim.LBFGS(parameters.values()), strength=1.0)
    maximizing = torch.optim.SGD(parameters.values(), lr=0.1, maximize=True)
    with pytest.raises(ValueError, match="maximize=False"):
        CentripetalUpdate(_clustered(parameters), maximizing, strength=1.0)


# --------------------------------------------------------------------------- cost


def _adamw_step(model: nn.Module, _: torch.optim.Optimizer) -> tuple[Callable[[int], None], Callable[[], None]]:
    tensors: Sequence[ClusteredTensor] = [
        ClusteredTensor(name, p, 0, tuple(i * 5 // 8 for i in range(len(p))))
        for name, p in model.named_parameters()
        if "classifier" not in name
    ]
    update = CentripetalUpdate(tensors, torch.optim.AdamW(model.parameters()), strength=0.05)
    return (lambda step: update.before_step()), update.after_step


@needs_fake_gpu
def test_the_decoupled_form_does_not_depend_on_depth() -> None:
    case = Case(name="csgd_adamw", cls=CentripetalSGD, per_step=_adamw_step)
    shallow = fake_gpu_kernels(case, 20)
    assert shallow.kernels == fake_gpu_kernels(case, 110).kernels
    assert 0 < shallow.kernels.total() <= 130


def test_the_model_of_the_cost_tests_has_shared_shapes() -> None:
    """Without layers of equal shape the equality above would say nothing."""
    shapes = [p.shape for p in CifarResNet(20).parameters()]
    assert len(set(shapes)) < len(shapes) / 3


def test_distances_of_all_tensors_come_to_the_host_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.nn.Parameter(torch.randn(4, 3, dtype=dtype)) for dtype in (torch.float32, torch.float64) * 3]
    tensors = [ClusteredTensor(str(i), weight, 0, (0, 0, 1, 1)) for i, weight in enumerate(weights)]
    copies: list[tuple[int, ...]] = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (copies.append(tuple(self.shape)), original(self))[1])
    found = cluster_distances(tensors)
    assert copies == [(6, 3)]
    for name, weight in zip(found, weights, strict=True):
        assert found[name][1] == pytest.approx(float(weight.norm()), rel=1e-6)
