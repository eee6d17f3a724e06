"""Tracing leaves no trace, works wherever the model lives, and says clearly what is wrong."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from benchmarks.models import channel_graph as models
from lightning_filterdiv.channel_graph import (
    ChannelGraph,
    ChannelGraphError,
    ExampleInputsError,
    StaleGraphError,
    capture_inputs,
)
from lightning_filterdiv.channel_graph.verify import random_clusters

from .checks import EXACT, check_exact, merge, mergeable

IMAGE = models.image()


def summary(graph: ChannelGraph) -> Any:
    return [(g.name, g.layers, g.size) for g in graph.groups], graph.pinned


class Restless(nn.Module):
    """Everything a trace could disturb: attributes set in forward, buffers, dropout, gradients, hooks, mixed modes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.out = nn.Conv2d(6, 2, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.count, self.last = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.calls = self.calls + 1
        return self.out(self.drop(F.relu(self.norm(self.conv(x)))))


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = Restless().train()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model(IMAGE).sum().backward()
    model.norm.register_forward_hook(lambda *_: None)
    model.out.register_forward_pre_hook(lambda *_: None)
    modes = {n: m.training for n, m in model.named_modules()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    identities = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    versions = {n: t._version for n, t in [*model.named_parameters(), *model.named_buffers()]}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    hooks = {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()}
    attributes = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    count, random_state = model.count, torch.random.get_rng_state()
    graph = ChannelGraph.trace(model, IMAGE)
    assert mergeable(graph) == 6
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]} == identities
    assert {n: t._version for n, t in [*model.named_parameters(), *model.named_buffers()]} == versions
    for n, p in model.named_parameters():
        assert (p.grad is None and grads[n] is None) or torch.equal(p.grad, grads[n])
    assert {n: p.requires_grad for n, p in model.named_parameters()}["conv.weight"] is False
    assert {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == attributes
    assert model.count == count
    assert torch.equal(torch.random.get_rng_state(), random_state)
    model(IMAGE)


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    model = Restless().train()
    count, random_state = model.count, torch.random.get_rng_state()
    with pytest.raises(ExampleInputsError):
        ChannelGraph.trace(model, models.image(channels=2))
    assert model.training
    assert model.norm.training
    assert model.count == count
    assert isinstance(model.calls, Tensor)
    assert torch.equal(torch.random.get_rng_state(), random_state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.CifarResNet().to(memory_format=torch.channels_last),
        lambda: models.CifarResNet().to(torch.bfloat16),
        lambda: models.CifarResNet().half(),
        lambda: models.CifarResNet().requires_grad_(False),
        lambda: models.CifarResNet().train(),
    ],
    ids=["channels_last", "bfloat16", "half", "frozen", "train"],
)
def test_variants_have_the_same_channels_and_keep_their_kind(make: Any) -> None:
    model = make()
    reference = models.CifarResNet()
    graph = ChannelGraph.trace(model, IMAGE)
    assert summary(graph) == summary(ChannelGraph.trace(reference, IMAGE))
    assert graph.verify() <= EXACT
    clusters = random_clusters(graph, torch.Generator().manual_seed(0))
    narrowed = merge(model, graph, clusters)
    for (name, old), new in zip(model.named_parameters(), narrowed.parameters(), strict=True):
        assert old.dtype == new.dtype, name
        assert old.requires_grad == new.requires_grad, name
        if old.ndim == 4 and not old.is_contiguous():
            assert new.is_contiguous(memory_format=torch.channels_last), name
    assert [m.training for m in narrowed.modules()] == [m.training for m in model.modules()]


def test_meta_models_are_traced_and_narrowed() -> None:
    with torch.device("meta"):
        model = models.CifarResNet("module")
    graph = ChannelGraph.trace(model, IMAGE)
    reference = models.CifarResNet("module")
    assert summary(graph) == summary(ChannelGraph.trace(reference, IMAGE))
    narrowed = merge(model, graph, random_clusters(graph, torch.Generator().manual_seed(0)))
    assert all(p.is_meta for p in narrowed.parameters())
    assert narrowed(IMAGE.to("meta")).shape == (2, 5)


def test_compiled_parts_are_traced_as_what_they_were() -> None:
    model = models.CifarResNet()
    expected = summary(ChannelGraph.trace(model, IMAGE))
    partly = copy.deepcopy(model)
    partly.layers[2] = torch.compile(partly.layers[2], backend="eager")
    partly.layers[3].compile(backend="eager")
    compiled_call = partly.layers[3]._compiled_call_impl
    assert summary(ChannelGraph.trace(partly, IMAGE)) == expected
    assert isinstance(partly.layers[2], torch._dynamo.eval_frame.OptimizedModule), "still compiled"
    assert partly.layers[3]._compiled_call_impl is compiled_call
    assert summary(ChannelGraph.trace(torch.compile(model, backend="eager"), IMAGE)) == expected
    assert ChannelGraph.trace(partly, IMAGE).verify() <= EXACT


def test_inputs_as_tensor_tuple_dict() -> None:
    depth = models.image(channels=1)
    model = models.TwoInTwoOut()
    by_tuple = ChannelGraph.trace(model, (IMAGE, depth))
    by_dict = ChannelGraph.trace(model, {"depth": depth, "image": IMAGE})
    assert summary(by_tuple) == summary(by_dict)
    assert by_dict.verify() <= EXACT


class NeverForward(LightningModule):
    """training_step uses parts of the module and never calls forward."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = models.CifarResNet()
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return self.loss(self.backbone(x), y)

    def train_dataloader(self) -> Any:
        data = torch.utils.data.TensorDataset(models.image(n=8), torch.arange(8) % 5)
        return torch.utils.data.DataLoader(data, batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_inputs_of_a_lightning_module_that_never_calls_forward_are_captured() -> None:
    module = NeverForward()
    with pytest.raises(ExampleInputsError, match="no example inputs for NeverForward"):
        ChannelGraph.trace(module)
    with capture_inputs(module.backbone) as captured:
        with pytest.raises(ExampleInputsError, match="has not been called yet"):
            ChannelGraph.trace(module, captured, network="backbone")
        trainer = Trainer(
            max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
        )
        trainer.fit(module)
    assert not module.backbone._forward_pre_hooks, "the hook removed itself"
    assert captured.arguments is not None
    assert captured.arguments[0][0].shape == (2, 3, 8, 8), "no more of the batch than needed"
    # The module is attached to a Trainer now.
    graph = ChannelGraph.trace(module, captured, network="backbone")
    assert graph.pinned == {"backbone.fc": "network output"}
    assert graph.groups[0].layers[0] == "backbone.conv1", "names are those of the whole module"
    assert graph.verify() <= EXACT
    narrowed = merge(module, graph, random_clusters(graph, torch.Generator().manual_seed(0)))
    assert isinstance(narrowed, NeverForward)
    assert narrowed.backbone.conv1.out_channels < 8
    assert module.trainer is trainer


class WithExample(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = IMAGE
        self.net = models.plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_example_input_array_is_used() -> None:
    module = WithExample()
    assert mergeable(ChannelGraph.trace(module)) == 26


def test_capture_works_on_a_compiled_module() -> None:
    module = torch.compile(models.plain(), backend="eager")
    with capture_inputs(module, limit=1) as captured:
        module(IMAGE)
    assert captured.arguments is not None
    assert captured.arguments[0][0].shape[0] == 1


def test_detector_through_its_backbone() -> None:
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None).eval()
    images = [torch.rand(3, 64, 64)]
    with capture_inputs(model.backbone) as captured, torch.no_grad():
        model(images)
    graph = ChannelGraph.trace(model, captured, network="backbone")
    # Everything behind the pyramid counts as network output; of its layers only the last ones write to it.
    assert graph.pinned == dict.fromkeys(
        ["backbone.fpn.layer_blocks.0.0", "backbone.fpn.layer_blocks.1.0"], "network output"
    )
    assert mergeable(graph) == 7672
    assert graph.verify() <= EXACT
    narrowed = merge(model, graph, random_clusters(graph, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        assert set(narrowed(images)[0]) == {"boxes", "labels", "scores"}


class Auxiliary(nn.Module):
    """A head that only training uses, as in GoogLeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.head = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Dropout2d(), nn.Conv2d(6, 2, 1))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.first(x)))
        return (self.second(x), self.head(x)) if self.training else self.second(x)


def test_heads_used_in_training_only_are_narrowed_too() -> None:
    model = Auxiliary()
    graph, narrowed = check_exact(model, IMAGE)
    assert graph.consumers_of("first") == ("second", "head.0")
    assert [(g.name, g.size) for g in graph.groups] == [("first", 8), ("head.0", 6)]
    a, b = narrowed.train()(IMAGE.double())
    assert a.shape[1] == 4
    assert b.shape[1] == 2


def test_changed_models_are_an_error() -> None:
    model = models.CifarResNet()
    graph = ChannelGraph.trace(model, IMAGE)
    model.conv1.weight.data.mul_(2)
    model.train()
    assert graph.groups, "values and modes may change"
    model.layers[0].conv1 = nn.Conv2d(8, 9, 3, 1, 1)
    for ask in (
        lambda: graph.groups,
        lambda: graph.pinned,
        lambda: graph.private("conv1"),
        lambda: graph.consumers_of("conv1"),
        lambda: graph.coupled("conv1"),
        graph.describe,
        graph.verify,
    ):
        with pytest.raises(
            StaleGraphError, match=r"model changed after it was traced \('layers.0.conv1.weight'.* trace it again"
        ):
            ask()


def test_changed_module_types_are_an_error() -> None:
    model = models.plain()
    graph = ChannelGraph.trace(model, IMAGE)
    model[2] = nn.Sigmoid()
    with pytest.raises(StaleGraphError, match=r"'2'"):
        graph.groups  # noqa: B018


def test_compiling_is_no_change() -> None:
    model = models.CifarResNet()
    graph = ChannelGraph.trace(model, IMAGE)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert graph.groups


def test_clear_errors() -> None:
    with pytest.raises(ChannelGraphError, match="Linear has no convolution"):
        ChannelGraph.trace(nn.Linear(3, 3), torch.rand(1, 3))
    with pytest.raises(
        ExampleInputsError, match=r"submodule '0' \(Conv2d\) does not accept the example inputs: .*channel"
    ):
        ChannelGraph.trace(models.plain(), models.image(channels=1))
    with pytest.raises(ExampleInputsError, match=r"missing .* 'depth'"):
        ChannelGraph.trace(models.TwoInTwoOut(), IMAGE)
    with pytest.raises(ExampleInputsError, match=r"pass example_inputs=.*example_input_array.*capture_inputs"):
        ChannelGraph.trace(models.plain())
    with pytest.raises(ChannelGraphError, match="no submodule network='bone'; its children are 'backbone', 'loss'"):
        ChannelGraph.trace(NeverForward(), IMAGE, network="bone")


def test_errors_of_shapes_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExampleInputsError):
        ChannelGraph.trace(models.CifarResNet(), torch.rand(1, 3, 1, 1, 1))
    assert capfd.readouterr() == ("", "")


def test_describe_is_a_table() -> None:
    text = ChannelGraph.trace(models.mobile(), IMAGE).describe()
    lines = text.splitlines()
    assert lines[0].split()[:2] == ["group", "channels"]
    assert lines[3].split() == ["3.expand", "16", "3.expand,", "3.depthwise", "3.bn1,", "3.bn2", "3.project"]
    assert "40 channels in 3 groups may be clustered" in text
    assert lines[-1] == "  7: network output"


def test_coupled_layers_and_consumers() -> None:
    graph = ChannelGraph.trace(models.CifarResNet(), IMAGE)
    assert graph.coupled("layers.0.conv2") == ("conv1", "layers.1.conv2")
    assert graph.coupled("layers.0.conv1") == ()
    assert graph.consumers_of("conv1") == (
        "layers.0.conv1",
        "layers.1.conv1",
        "layers.2.conv1",
        "layers.2.shortcut.0",
    )
    assert graph.layers[0] == "conv1"
    assert graph.group("conv1").rows("layers.1.conv2").tolist() == list(range(8))


def test_operations_hold_what_depth_needs() -> None:
    graph = ChannelGraph.trace(models.CifarResNet(), IMAGE)
    convolutions = [o for o in graph.operations if o.operator == "conv2d"]
    assert len(convolutions) == 1 + 6 * 2 + 2
    depth: dict[str, int] = {}
    for o in graph.operations:
        depth[o.name] = max((depth.get(i, 0) for i in o.inputs), default=0) + (o.operator == "conv2d")
    assert max(depth.values()) == 13
    assert {o.shape[-1] for o in convolutions if o.shape} == {8, 4, 2}


def test_cost_does_not_grow_with_the_image() -> None:
    """Labels are constant along space: the same trace at 64 times the pixels allocates no more."""
    small = ChannelGraph.trace(models.CifarResNet(), models.image(n=1))
    large = ChannelGraph.trace(models.CifarResNet(), torch.empty(1, 3, 64, 64))
    assert summary(small) == summary(large)


def test_attributes_that_cannot_be_copied_are_shared() -> None:
    model = models.plain()
    model.lock = threading.Lock()
    graph, narrowed = check_exact(model, IMAGE)
    assert narrowed.lock is model.lock
    assert mergeable(graph) == 26
