"""Counts for the cost model, and its predictions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common.device import RESULTS
from benchmarks.cost import communication, scaling
from benchmarks.cost.fake_device import KernelCounter, fake_stage
from benchmarks.cost.launches import Count, count_hooks
from benchmarks.cost.overhead import METHODS
from benchmarks.cost.scaling import GPUS, WORKLOADS
from benchmarks.models import CifarResNet
from tests.support.fake_gpu import needs_fake_gpu


def test_bytes_are_those_read_and_written() -> None:
    x, y = torch.zeros(10, 4), torch.zeros(10, 4)
    expected = {
        "add": (lambda: x + y, 3 * 160),
        "add_": (lambda: x.add_(y), 3 * 160),  # x is read and written
        "copy_": (lambda: x.copy_(y), 2 * 160),
        "zero_": (lambda: x.zero_(), 160),
        "foreach": (lambda: torch._foreach_add_([x, y], 1.0), 4 * 160),
        "expanded": (lambda: x * y[:1].expand(10, 4), 160 + 16 + 160),
        "view": (lambda: x.view(-1), 0),
    }
    for name, (action, size) in expected.items():
        with KernelCounter("cpu") as counter:
            action()
        assert counter.bytes == size, name


def test_operations_of_products_are_counted() -> None:
    with KernelCounter("cpu") as counter:
        torch.bmm(torch.zeros(3, 4, 5), torch.zeros(3, 5, 6))
        torch.addmm(torch.zeros(2, 7), torch.zeros(2, 5), torch.zeros(5, 7))
        torch.zeros(3, 4, 6).baddbmm_(torch.zeros(3, 4, 5), torch.zeros(3, 5, 6))
    assert counter.flops == 2 * (2 * 3 * 4 * 5 * 6) + 2 * 2 * 5 * 7


def test_counted_products_of_the_soft_penalty_are_those_of_its_formula() -> None:
    """The gradient 4 w (W W^T - I) W is two products of J x J x d per layer."""
    model = CifarResNet(8)
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    expected = 0
    for conv in convs:
        filters, fan_in = conv.weight.flatten(1).shape
        # The smaller of W W^T and W^T W is formed.
        expected += 2 * 2 * filters * fan_in * min(filters, fan_in)
    assert count_hooks("soft", model).flops == expected


@needs_fake_gpu
@pytest.mark.parametrize("method", ["wau", "wau hold=gradient", "basis", "soft", "srip"])
def test_counts_on_a_cpu_are_those_of_a_fake_gpu(method: str) -> None:
    """What is drawn on the host does not count, the copy of it does."""
    found = count_hooks(method, CifarResNet(20))
    counter = KernelCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_stage() as crossings:
        with torch.device("cuda"):
            model = CifarResNet(20)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        before, after = METHODS[method](model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        before(0)
        after()
        crossings.clear()
        with counter:
            before(1)
            after()
    assert found.kernels == counter.kernels.total() + len(crossings)
    assert found.flops == counter.flops


def test_forward_operations_are_the_published_ones() -> None:
    # torchvision: ResNet-50 4.09 billion multiply-adds; Zagoruyko and Komodakis: WRN-28-10 5.2.
    assert scaling.forward_flops(WORKLOADS["ResNet-50, ImageNet"]) == pytest.approx(2 * 4.09e9, rel=0.01)
    assert scaling.forward_flops(WORKLOADS["WRN-28-10, CIFAR"]) == pytest.approx(2 * 5.2e9, rel=0.02)


def test_the_model_adds_what_it_says() -> None:
    gpu = GPUS[0]
    assert scaling.device_seconds(Count(10, 0, 0), gpu) == pytest.approx(40e-6)
    assert scaling.device_seconds(Count(0, int(0.6 * gpu.bandwidth), 0), gpu) == pytest.approx(1)
    assert scaling.device_seconds(Count(0, 0, int(0.3 * gpu.fp32)), gpu) == pytest.approx(1)
    assert scaling.device_seconds(Count(0, 0, int(0.3 * gpu.tf32)), gpu, tf32=True) == pytest.approx(1)
    assert scaling.host_seconds(Count(50, 10**9, 10**9)) == pytest.approx(2.2e-3)
    assert scaling.hook_seconds(Count(50, 0, 0), gpu) == pytest.approx(2.2e-3)  # the host is the slower one
    assert scaling.hook_seconds(Count(50, 0, int(0.3 * gpu.fp32)), gpu) == pytest.approx(1 + 50 * 4e-6)
    assert scaling.communication_seconds(1_000_000, 1, gpu) == 0
    assert scaling.communication_seconds(1_000_000, 1024, gpu) == pytest.approx(8e6 / gpu.network, rel=1e-3)


def test_the_host_is_fitted_to_some_methods_and_predicts_the_others() -> None:
    """Against the committed measurement of a GPU; within a factor of two, as docs/scaling.md says."""
    measured = json.loads((RESULTS / "gpu" / "large_steps.json").read_text())
    counted = measured["counted"]  # of the version that was measured
    gpu = next(gpu for gpu in GPUS if gpu.name in measured["device"])
    ratios: dict[str, list[float]] = {}
    rows, seconds = [], []
    for row in measured["rows"]:
        count = Count(**counted[row["network"]]["hooks"][row["method"]])
        ratios.setdefault(row["method"], []).append(scaling.hook_seconds(count, gpu, row["tf32"]) / row["hooks"])
        if row["method"] in scaling.FITTED:
            assert scaling.device_seconds(count, gpu, row["tf32"]) < row["hooks"]
            rows.append([1.0, count.kernels])
            seconds.append(row["hooks"])
    weights = 1 / np.array(seconds)
    fit, *_ = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(rows)), rcond=None)
    assert fit == pytest.approx([scaling.HOST_STEP, scaling.HOST_KERNEL], rel=0.05)
    others = [ratio for method, of in ratios.items() if method not in scaling.FITTED for ratio in of]
    assert len(others) >= 12
    assert all(0.5 < ratio < 2 for ratio in others)


def test_a_divided_event_takes_what_its_busiest_rank_takes() -> None:
    """Divided by estimates, here wrong ones, it takes what was measured."""
    gpu = GPUS[0]
    event = scaling.Event(divided=(((3.0, 1.0, 2.0), (30.0, 20.0, 5.0), 10**9),), whole=0.5, per_epoch=1.0)
    assert event.seconds(1, gpu) == pytest.approx(6.5)
    assert event.seconds(2, gpu) == pytest.approx(0.5 + 3.0 + 2 * scaling.COLLECTIVE + 1e9 / gpu.network + 1)
    assert event.seconds(64, gpu) == pytest.approx(0.5 + 3.0 + 2 * scaling.COLLECTIVE + 2e9 / gpu.network + 1, abs=0.01)


def test_the_numbers_of_a_look_stay_below_two_percent_of_an_epoch_on_64_gpus() -> None:
    """As docs/scaling.md says, from the committed measurements; all layers on one rank take more."""
    counted, event = json.loads(scaling.RESULT.read_text()), scaling.measured_events()["monitor, numbers every epoch"]
    divided, alike = (scaling.event_share(event, 64, counted, divided=way) for way in (True, False))
    assert divided < 0.02 < alike


def test_no_callback_sends_anything_in_a_step() -> None:
    """The committed measurement; the run itself needs two processes."""
    methods = json.loads(communication.RESULT.read_text())["methods"]
    assert set(methods) == set(communication.METHODS)
    assert methods["none"]["bytes"] > 4 * 269_000  # every gradient once
    assert all(of == methods["none"] for of in methods.values())
