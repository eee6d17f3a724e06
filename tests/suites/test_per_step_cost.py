"""Per-step paths on fake GPU tensors and under the profiler: no synchronisation, cost independent of depth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmarks.cost.fake_device import DeviceTrafficError, KernelCounter, fake_stage, profiled_operations
from benchmarks.models import CifarResNet
from tests.registry import PER_STEP, Case
from tests.support.fake_gpu import needs_fake_gpu


def _with_gradients(model: nn.Module) -> torch.optim.Optimizer:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.SGD(model.parameters(), lr=0.1)


def fake_gpu_kernels(case: Case, depth: int) -> KernelCounter:
    """Kernels of one step of ``case`` on a ResNet of ``depth`` on a fake GPU."""
    counter = KernelCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_stage() as crossings:
        with torch.device("cuda"):
            model = CifarResNet(depth)
            optimizer = _with_gradients(model)
        assert case.per_step is not None
        before, after = case.per_step(model, optimizer)
        with counter:
            before(0)
            after()
    assert len(crossings) <= 1, "more than one copy to the device per step"
    return counter


@needs_fake_gpu
@pytest.mark.parametrize("case", PER_STEP, ids=lambda case: case.name)
def test_kernels_do_not_depend_on_depth(case: Case) -> None:
    shallow = fake_gpu_kernels(case, 20)
    deep = fake_gpu_kernels(case, 110)
    assert shallow.kernels == deep.kernels
    assert 0 < shallow.kernels.total() <= case.kernels


@pytest.mark.parametrize("case", [c for c in PER_STEP if not c.gradients_only], ids=lambda case: case.name)
def test_profiled_operations_do_not_depend_on_depth(case: Case) -> None:
    """Gradients live in storages of their own, so writing them is one operation per layer on a CPU (one kernel for all
    on a GPU, above); everything else is constant."""
    counts = []
    for depth in (20, 110):
        model = CifarResNet(depth)
        assert case.per_step is not None
        before, after = case.per_step(model, _with_gradients(model))

        def step(before: Callable[[int], None] = before, after: Callable[[], None] = after) -> None:
            before(0)
            after()

        step()  # buffers are made once
        counts.append(profiled_operations(step))
    assert counts[0] == counts[1]
    assert counts[0].total() > 0


@needs_fake_gpu
def test_the_counter_notices() -> None:
    """Each of these would make the device wait, or launch per layer; none may pass."""
    with FakeTensorMode(), KernelCounter() as counter:
        x = torch.ones(4, 4, device="cuda")
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        for wrong in (lambda: x.cpu(), lambda: torch.ones(4).to("cuda"), lambda: torch.linalg.svdvals(x)):
            with pytest.raises(DeviceTrafficError):
                wrong()
        counter.kernels.clear()
        many = [torch.ones(3, 3, device="cuda") for _ in range(5)]
        torch._foreach_mul_(many, [torch.ones(3, 3, device="cuda") for _ in range(5)])
        assert counter.kernels["_foreach_mul_"] == 1
        rows = [torch.ones(3, 1, device="cuda") for _ in range(5)]
        torch._foreach_mul_(many, rows)
        assert counter.kernels["_foreach_mul_"] == 1 + 5


@needs_fake_gpu
def test_a_loop_over_layers_is_caught() -> None:
    def naive(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Callable[[int], None], Callable[[], None]]:
        from lightning_filterdiv.async_update import functional

        weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]

        def before(step: int) -> None:
            masks: Tensor = functional.stage(torch.rand(len(weights)) < 0.5, torch.device("cuda"))
            for weight, mask in zip(weights, masks, strict=True):
                assert weight.grad is not None
                weight.grad.mul_(mask)

        return before, lambda: None

    case = Case(name="naive", cls=PER_STEP[0].cls, per_step=naive)
    shallow = fake_gpu_kernels(case, 20)
    assert shallow.kernels.total() < fake_gpu_kernels(case, 110).kernels.total()
