"""Contents of a record: constants, attributes, shared tensors, random numbers, buffers, reads."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.models import channel_graph as models
from lightning_filterdiv.channel_graph import ChannelGraph, ExampleInputsError, TraceError, capture_inputs
from lightning_filterdiv.channel_graph.forms import refusal
from lightning_filterdiv.channel_graph.labels import core

from .checks import EXACT, check_exact, mergeable

IMAGE = models.image()


class Stride(nn.Module):
    """The head of YOLOv8 reads a number from a tensor that is a plain attribute."""

    def __init__(self, stride: Any) -> None:
        super().__init__()
        self.cv1, self.m = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.cv2, self.head = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 4, 1)
        self.stride = stride

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.cv1(x).relu().chunk(2, 1)
        y = self.head(self.cv2(torch.cat([a, b, b + self.m(b)], 1)))
        return y, torch.full((4, 1), self.stride[0])


def test_numbers_in_tensor_attributes_are_constants() -> None:
    graph = ChannelGraph.trace(Stride(torch.tensor([8.0])), IMAGE)
    plain = ChannelGraph.trace(Stride([8.0]), IMAGE)
    assert [(g.name, g.size) for g in graph.groups] == [(g.name, g.size) for g in plain.groups]
    assert [g.name for g in graph.groups] == ["cv1[0]", "cv1[1]", "cv2"]
    assert graph.read_values == ""


class Body(nn.Module):
    """Two convolutions with ``body(self, x)`` between them."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.body = body
        self.kernel = torch.rand(8, 1, 3, 3)
        self.index = [torch.tensor([3, 1, 2, 0, 7, 6, 5, 4])]
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.body(self, self.first(x)))


def _in_place(module: Body, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :, 1:] = x[:, :, :-1]
    return y.relu_().add_(x)


def _buffer(module: Body, x: Tensor) -> Tensor:
    module.calls.add_(1)
    return x.relu()


class Sign(torch.autograd.Function):
    """The straight-through estimator, as it is mostly written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign() if not any(ctx.needs_input_grad) else x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (ctx.saved_tensors[0].abs() < 1)


class Swish(torch.autograd.Function):
    """With its context set up apart."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


FREE = {
    "constants on the device of the input": lambda module, x: x * torch.ones(1, device=x.device),
    "a grid made in forward": lambda module, x: x * torch.linspace(0, 1, x.shape[-1]),
    "a number read from a constant": lambda module, x: x * torch.arange(3.0).sum().item(),
    "in-place edits of slices": _in_place,
    "a buffer that counts": _buffer,
    "a custom gradient": lambda module, x: Sign.apply(x),
    "a custom gradient with its context apart": lambda module, x: Swish.apply(x),
    "a checkpoint": lambda module, x: checkpoint(torch.relu, x, use_reentrant=True),
}


@pytest.mark.parametrize("kind", FREE)
def test_what_treats_all_channels_alike_pins_nothing(kind: str) -> None:
    model = Body(FREE[kind])
    graph, _ = check_exact(model, IMAGE)
    assert graph.pinned == {"second": "network output"}


PINNED = {
    "a kernel in a plain attribute": (
        lambda module, x: F.conv2d(x, module.kernel, padding=1, groups=8),
        "input of conv2d in forward, whose weight is tensor attribute kernel",
    ),
    "random numbers": (lambda module, x: x + torch.randn_like(x), "meets values that no channel owns"),
    "a different number for every channel": (
        lambda module, x: x * torch.arange(8.0).view(1, 8, 1, 1),
        r"meets values that no channel owns \(computed by arange in forward\)",
    ),
}


@pytest.mark.parametrize("kind", PINNED)
def test_what_tells_channels_apart_pins_them(kind: str) -> None:
    body, reason = PINNED[kind]
    graph = ChannelGraph.trace(Body(body), IMAGE)
    assert "first" in graph.pinned
    assert graph.groups == []
    assert re.search(reason, graph.pinned["first"]), graph.pinned["first"]


class AsksForGradients(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 2).requires_grad_(True))


def test_a_forward_that_asks_for_gradients_is_recorded() -> None:
    graph, _ = check_exact(AsksForGradients(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)), IMAGE)
    assert set(graph.pinned) == {"1"}


class Clamps(nn.Module):
    """As in DETR: where half precision overflows, numbers are cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not torch.isfinite(x).all() or torch.isinf(x).any():
            x = x.clamp(-1e4, 1e4)
        return self.last(self.second(x)[:, :5])


def test_a_check_for_infinite_numbers_is_no_read() -> None:
    graph, _ = check_exact(Clamps(), IMAGE)
    assert not graph.read_values
    assert graph.pinned == {"last": "network output"}
    assert "asks whether its tensors are finite" in str(refusal(graph, ""))


class Vector(nn.Module):
    """A gate from a linear layer on a vector, whose dimension of size one goes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.second = nn.Conv2d(3, 8, 3), nn.Linear(5, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.second(self.first(x) * self.gate(condition).view(1, -1, 1, 1))


def test_a_linear_layer_on_a_vector_is_followed() -> None:
    graph, _ = check_exact(Vector(), (IMAGE, torch.rand(5)))
    assert graph.pinned == {"second": "network output"}
    assert {*graph.groups[0].producers} == {"first", "gate"}


def test_a_custom_gradient_still_works_after_a_trace() -> None:
    before = Sign.__dict__.get("apply"), torch.autograd.Function.__dict__["apply"]
    ChannelGraph.trace(Body(lambda module, x: Sign.apply(x)), IMAGE)
    assert (Sign.__dict__.get("apply"), torch.autograd.Function.__dict__["apply"]) == before
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    Sign.apply(x).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0]


def test_an_index_in_a_list_is_followed() -> None:
    graph, _ = check_exact(Body(lambda module, x: x + 0 * x[:, :, :, :1].relu()), IMAGE)
    assert mergeable(graph) == 8


def test_random_state_and_hooks_are_as_before() -> None:
    model = Body(lambda module, x: x + torch.randn_like(x))
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("hook"))
    before = torch.random.get_rng_state()
    ChannelGraph.trace(model, IMAGE)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert calls, "hooks are part of the forward pass"
    assert len(model.first._forward_hooks) == 1


class Capturing(nn.Sequential):
    """Installs a hook at its first call, as models of transformers do."""

    installed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            self[0].register_forward_hook(lambda module, inputs, output: output + 1)
            self.installed = True
        return super().forward(x)


def test_hooks_that_forward_installs_are_installed_once() -> None:
    torch.manual_seed(0)
    model = Capturing(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    expected = copy.deepcopy(model)(IMAGE)
    ChannelGraph.trace(model, IMAGE)
    assert not model[0]._forward_hooks
    assert torch.equal(model(IMAGE), expected)


class AsksDevice(nn.Sequential):
    """Runs on values only, although it reads none: there is no autocast for meta tensors."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def test_forward_that_asks_for_the_device_pins_nothing() -> None:
    model = AsksDevice(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    graph = ChannelGraph.trace(model, IMAGE)
    assert graph.pinned == {"4": "network output"}
    assert [group.size for group in graph.groups] == [8, 6]


class Caching(nn.Sequential):
    """Keeps what it computes from its weights, by device, and its features, as LeViT and feature extractors do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.cache: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if str(x.device) not in self.cache:
            self.cache[str(x.device)] = self[0].weight.abs().amax()
        self.seen.append(x)
        return super().forward(x) * self.cache[str(x.device)]


def test_what_forward_keeps_in_containers_is_not_kept() -> None:
    model = Caching(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    cache, seen = model.cache, model.seen
    ChannelGraph.trace(model, IMAGE)
    assert model.cache is cache
    assert model.seen is seen
    assert not cache
    assert not seen


def test_tied_layers_are_one_layer() -> None:
    model = Body(lambda module, x: x)
    model.again = model.first
    assert ChannelGraph.trace(model, IMAGE).layers == ["first", "second"]


class Attributes(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = models.plain(), torch.tensor(2.0)
        self.example_input_array = IMAGE

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale


def test_attributes_of_a_lightning_module() -> None:
    module = Attributes()
    assert mergeable(ChannelGraph.trace(module)) == 26
    assert not module.scale.is_meta


class Reads(nn.Module):
    """The second convolution is used after a value was read, the first before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.second, self.third = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).relu())
        x = x * 2 if x.mean((2, 3)).max() > 0 else x
        return self.third(self.second(x))


def test_channels_are_pinned_from_the_read_on() -> None:
    graph, _ = check_exact(Reads(), IMAGE)
    assert [g.name for g in graph.groups] == ["stem"]
    assert set(graph.pinned) == {"first", "second", "third"}
    assert graph.pinned["second"] == "used after item in forward read values that decide what forward does"
    assert graph.read_values == "item in forward"


class FindsNothing(Reads):
    """No item of the batch is selected, as where a detector finds no box."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.third(self.second(self.first(x[x.mean((1, 2, 3)) < 0]).relu()).relu())


def test_layers_that_get_an_empty_batch_are_pinned_like_others() -> None:
    graph = ChannelGraph.trace(FindsNothing(), IMAGE)
    assert not graph.groups
    assert set(graph.pinned) == {"stem", "first", "second", "third"}
    assert graph.pinned["first"] == "used after index in forward read values that decide what forward does"


def test_no_channel_is_seen_in_a_slice_of_none() -> None:
    labels = torch.arange(1, 7)
    assert core(labels.reshape(1, 6, 1).expand(0, 6, 4)).flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert core(labels[None][:, 2:2]).shape == (1, 0)
    assert core(labels[None][:, 6:]).shape == (1, 0)


def test_a_forward_that_reads_values_needs_a_model_that_has_some() -> None:
    with pytest.raises(TraceError, match=r"cannot be traced on meta: .* the values of tensors"):
        ChannelGraph.trace(Reads().to("meta"), IMAGE)


class Exhausted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * next(iter([]))


def test_stop_iteration_never_leaves_a_trace() -> None:
    with pytest.raises(TraceError, match=r"StopIteration.*Give every next\(\) in it a default"):
        ChannelGraph.trace(Exhausted(), IMAGE)


def test_a_norm_without_tensors_takes_every_width() -> None:
    """Its width was once looked up with next(): an exception that Lightning takes for the end of the data."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16)
            self.conv2, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.norm(self.conv(x)).chunk(2, 1)
            return self.head(torch.cat([a.relu(), self.conv2(b.relu())], 1).mean((2, 3)))

    graph, _ = check_exact(Net(), IMAGE)
    assert [g.name for g in graph.groups] == ["conv[0]", "conv[1]", "conv2"]


def test_captured_targets_of_a_detector_are_left_out() -> None:
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    images = [torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[1.0, 1, 30, 30]]), "labels": torch.tensor([1])}]
    with capture_inputs(model) as captured:
        model.eval()(images, targets)
    graph = ChannelGraph.trace(model, captured)
    backbone = [g for g in graph.groups if g.name.startswith("backbone")]
    assert sum(g.size for g in backbone) > 5000


@pytest.mark.parametrize(
    "read",
    [
        lambda means: means.tolist()[0],
        lambda means: float(means.numpy()[0]),
        lambda means: float(means.detach().cpu().numpy()[0]),
        lambda means: float(np.asarray(means)[0]),
        lambda means: means[0].item(),
        lambda means: float(means[0]),
    ],
    ids=["tolist", "numpy", "detach", "asarray", "item", "float"],
)
def test_every_way_to_read_a_value_is_noticed(read: Callable[[Tensor], float]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).relu()).relu()
            return self.c(x) * read(x.mean((0, 2, 3)))

    torch.manual_seed(0)
    graph, _ = check_exact(Net(), IMAGE)
    assert [group.name for group in graph.groups] == ["a"]
    assert "input of item in forward, which reads its values" in graph.pinned["b"]


def test_lists_and_arrays_of_constants_are_no_reads() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            height, width = torch.tensor(x.shape[2:]).tolist()
            grid = torch.from_numpy(np.linspace(0.5, 1.0, height - 2, dtype=np.float32))
            return self.b(self.a(x) * grid[:, None]) / np.asarray(torch.tensor(width)).item()

    graph, _ = check_exact(Net(), IMAGE)
    assert graph.read_values == ""
    assert [(group.name, group.size) for group in graph.groups] == [("a", 8)]


def test_wrong_inputs_are_told_from_reads() -> None:
    with pytest.raises(ExampleInputsError, match="does not accept the example inputs"):
        ChannelGraph.trace(Reads(), torch.rand(1, 4, 8, 8))


class Positive(nn.Module):
    """The logarithm of a spectrogram: inputs drawn from the normal distribution are NaN behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(20, 16, 3, padding=1), nn.BatchNorm1d(16), nn.Conv1d(16, 4, 1)

    def forward(self, power: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(torch.log(power + 1e-6))).relu())


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 9, 10), nn.Linear(10, 3)

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        return self.out(self.fc(torchvision.ops.roi_align(self.conv(images), boxes, 3).flatten(1)).relu())


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)).float())


BOXES = torch.tensor([[0, 1.0, 1, 9, 9], [0, 2, 3, 12, 15]])


@pytest.mark.parametrize(
    ("make", "inputs", "group"),
    [(Positive, torch.rand(1, 20, 30), "conv"), (Boxes, (torch.rand(1, 3, 16, 16), BOXES), "fc")],
    ids=["positive inputs", "boxes"],
)
def test_proofs_draw_inputs_like_the_given_ones(make: Any, inputs: Any, group: str) -> None:
    graph = ChannelGraph.trace(make().eval(), inputs)
    assert group in [g.name for g in graph.groups]
    assert graph.verify() <= EXACT
    assert graph.verify(inputs) <= EXACT


def test_a_forward_that_casts_is_proved_in_its_own_type() -> None:
    from lightning_filterdiv.channel_graph.verify import verify

    graph = ChannelGraph.trace(Cast().eval(), torch.rand(1, 3, 8, 8))
    proof = verify(graph)
    assert proof.dtype == torch.float32
    assert proof.exact
    assert "float32, the network's own type, because forward casts" in str(proof)
    assert proof.cases == ("example inputs", "drawn inputs")
