"""Layers, optimizers and strategies that a callback cannot act on: it refuses with a fix, or it truly acts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.ao.nn.qat
import torch.ao.nn.quantized.dynamic
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.ao.quantization import default_dynamic_qconfig, get_default_qat_qconfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGraphError, TraceError
from lightning_filterdiv.filters import NoLayersError
from lightning_filterdiv.shared_basis import SharingError, share_filter_bases
from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, Run, differing, fit, small_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*poor numerical accuracy.*"),
    pytest.mark.filterwarnings("ignore:.*quantized::conv2d_dynamic.*"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation.*"),
]
each = pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
CONVOLUTIONS = (0, 3, 5, 7)
FLOAT_FIRST = "train the float network, and quantise it afterwards"
NO_PARAMETRIZATION = "remove the parametrization first"


def short_fit(case: Case | None, model: Classifier) -> Run:
    """Three epochs of one step: enough for RePr to drop and regrow."""
    options = {"figures": False} if case is not None and case.name == "monitor" else {}
    return fit([] if case is None else [case.make(**options)], model=model, limit_train_batches=1)


# --------------------------------------------------------------------------- layers


class IntegerConv2d(nn.Conv2d):
    """Weights as bitsandbytes keeps them: int8 and a scale per filter, or packed into a column of bytes."""

    def __init__(self, like: nn.Conv2d, packed: bool = False) -> None:
        super().__init__(like.in_channels, like.out_channels, 3, padding=1, bias=False)
        values = like.weight.detach()
        self.register_buffer("scale", values.abs().amax((1, 2, 3), keepdim=True) / 127)
        self.form = values.shape
        integers = (values / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers.view(torch.uint8).reshape(-1, 1) if packed else integers, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight.view(torch.int8).view(self.form) * self.scale, None)


def _old_weight_norm(conv: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(conv)


def _dynamic(conv: nn.Module) -> nn.Module:
    conv.qconfig = default_dynamic_qconfig
    return torch.ao.nn.quantized.dynamic.Conv2d.from_float(conv)


def _aware(conv: nn.Module) -> nn.Module:
    """Quantisation-aware: a float weight that forward rounds."""
    conv.qconfig = get_default_qat_qconfig("fbgemm")
    return torch.ao.nn.qat.Conv2d.from_float(conv)


#: What is done to a layer, what its weight then is, the way out.
LEFT_OUT: dict[str, tuple[Callable[..., nn.Module], str, str]] = {
    "weight_norm": (parametrizations.weight_norm, "computed by a parametrization", NO_PARAMETRIZATION),
    "spectral_norm": (parametrizations.spectral_norm, "computed by a parametrization", NO_PARAMETRIZATION),
    "old weight_norm": (_old_weight_norm, "computed by a parametrization", NO_PARAMETRIZATION),
    "prune": (lambda c: prune.random_unstructured(c, "weight", 0.3), "computed by a param", NO_PARAMETRIZATION),
    "int8": (IntegerConv2d, "quantised (torch.int8)", FLOAT_FIRST),
    "packed": (lambda conv: IntegerConv2d(conv, packed=True), "quantised (torch.uint8)", FLOAT_FIRST),
    "dynamic": (_dynamic, "quantised", FLOAT_FIRST),
}
QUICK = ("packed",)


def changed(change: Callable[..., nn.Module], *places: int) -> Classifier:
    model = Classifier()
    for place in places:
        model.net[place] = change(model.net[place])
    # training_step gives images the type of the first parameter.
    model.first = nn.Parameter(torch.zeros(()))
    return model


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.soak) for k in LEFT_OUT])
@each
def test_one_such_layer_is_left_out_by_name(case: Case, kind: str) -> None:
    change, what, way_out = LEFT_OUT[kind]
    traces = case.name in ("repr", "csgd")
    if kind == "dynamic" and traces:  # nothing after a packed kernel can be followed
        with pytest.raises(
            TraceError, match=f"'net.3' is quantised, and packed integers cannot be traced; {FLOAT_FIRST}"
        ):
            short_fit(case, changed(change, 3))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = short_fit(case, changed(change, 3))
    said = [str(warning.message) for warning in caught if what in str(warning.message)]
    assert any("'net.3'" in text and way_out in text for text in said), said
    assert list(run.callbacks[0].layers) == ["net.0", "net.5", "net.7"]  # type: ignore[attr-defined]
    moved = differing(run.tensors(), short_fit(None, changed(change, 3)).tensors())
    assert bool(moved) is case.trains_differently


#: ``filters.py`` refuses such layers: for callbacks that ask for its default, for all, or change the network before.
CHOOSERS = [case for case in ONE_EACH if case.name in ("wau", "csgd", "expand", "importance")]


@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("case", CHOOSERS, ids=lambda case: case.name)
def test_nothing_but_such_layers_is_an_error(case: Case, kind: str) -> None:
    change, _, way_out = LEFT_OUT[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NoLayersError, match=re.escape(way_out)) as caught:
            short_fit(case, changed(change, *CONVOLUTIONS))
    assert "'net.0'" in str(caught.value)


@each
def test_a_lazy_layer_is_refused_until_it_has_seen_a_batch(case: Case) -> None:
    model = Classifier()
    model.net[3] = nn.LazyConv2d(8, 3, padding=1)
    with pytest.raises(ValueError, match=r"layer 'net.3' .*no weight yet.*run one forward pass.* exclude"):
        short_fit(case, model)
    model = Classifier()
    model.net[3] = nn.LazyConv2d(8, 3, padding=1)
    model(torch.zeros(2, 1, 8, 8))
    assert "net.3" in short_fit(case, model).callbacks[0].layers  # type: ignore[attr-defined]


@each
def test_a_lazy_layer_of_another_kind_is_no_obstacle(case: Case) -> None:
    model = Classifier()
    model.net[-1] = nn.LazyLinear(4)
    assert len(short_fit(case, model).callbacks[0].layers) == 4  # type: ignore[attr-defined]


#: Callback -> what it says where every layer is quantisation-aware; the others act on the float weights.
AWARE_REFUSED = {
    "expand": "every selected layer is a torch.ao.nn.qat.modules.conv.Conv2d; only nn.Conv2d and nn.Linear themselves",
    "importance": "'net.0' is a torch.ao.nn.qat.modules.conv.Conv2d with 1 group",
    "csgd": "prepare it for quantisation afterwards",
    "repr": "prepare it for quantisation afterwards",
}


@each
def test_quantisation_aware_layers(case: Case) -> None:
    if case.name in AWARE_REFUSED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(NoLayersError, match=re.escape(AWARE_REFUSED[case.name])):
                short_fit(case, changed(_aware, *CONVOLUTIONS))
        return
    run = short_fit(case, changed(_aware, *CONVOLUTIONS))
    assert list(run.callbacks[0].layers) == ["net.0", "net.3", "net.5", "net.7"]  # type: ignore[attr-defined]
    moved = differing(run.tensors(), short_fit(None, changed(_aware, *CONVOLUTIONS)).tensors())
    assert ("model.net.3.weight" in moved) is case.trains_differently
    if case.name == "entropy":
        assert run.callbacks[0].depth.total == 4  # type: ignore[attr-defined]


def test_the_channel_graph_follows_a_norm_behind_a_fake_quantised_layer() -> None:
    """The norm reads channels that nobody owns, and there are no others."""
    graph = ChannelGraph.trace(nn.Sequential(_aware(nn.Conv2d(1, 6, 3)), nn.BatchNorm2d(6)), torch.zeros(2, 1, 8, 8))
    assert not graph.groups


@pytest.mark.parametrize("kind", ["int8", "packed", "weight_norm"])
def test_no_basis_is_shared_with_such_a_layer(kind: str) -> None:
    change, what, way_out = LEFT_OUT[kind]
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), change(nn.Conv2d(4, 4, 3, padding=1)))
    with pytest.raises(SharingError, match=f"^'1' (is|has a weight) {re.escape(what)}") as caught:
        share_filter_bases(net, layers=["0", "1"])
    assert way_out in str(caught.value)


# --------------------------------------------------------------------------- optimizers

LBFGS_REFUSED = {
    "wau": "LBFGS searches along a line within a step; use SGD, Adam",
    "repr": "LBFGS keeps a history of the whole network .*; use SGD, Adam",
    "csgd": "LBFGS mixes those of the whole network; use SGD, or Adam",
}


class _LBFGS(Classifier):
    def __init__(self, line_search: str | None = None) -> None:
        super().__init__()
        self.line_search = line_search

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=3, line_search_fn=self.line_search)


@each
def test_lbfgs(case: Case) -> None:
    """Refused where a callback edits single filters, in order where it changes the network, the loss, or nothing."""
    if case.name in LBFGS_REFUSED:
        with pytest.raises(MisconfigurationException, match=LBFGS_REFUSED[case.name]):
            short_fit(case, _LBFGS())
        return
    run = short_fit(case, _LBFGS())
    assert run.trainer.global_step == 3
    assert bool(differing(run.tensors(), short_fit(None, _LBFGS()).tensors())) is case.trains_differently
    if case.name == "basis":
        with pytest.raises(MisconfigurationException, match="use line_search_fn=None or add the penalty to your loss"):
            short_fit(case, _LBFGS("strong_wolfe"))


# --------------------------------------------------------------------------- sharded weights


class _Trainer:
    """Just what ``setup`` looks at."""

    def __init__(self, callback: Any) -> None:
        self.strategy, self.callbacks = object.__new__(FSDPStrategy), [callback]


@each
def test_a_strategy_is_refused_before_the_network_is_touched(case: Case) -> None:
    model, callback = Classifier(), case.make()
    before = {name: (type(module), list(module._parameters)) for name, module in model.named_modules()}
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} works on whole parameters"):
        callback.setup(_Trainer(callback), model, "fit")  # type: ignore[arg-type]
    assert {name: (type(module), list(module._parameters)) for name, module in model.named_modules()} == before


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CHOOSERS, ids=lambda case: case.name)
def test_a_module_sharded_by_hand_under_a_trusted_strategy(case: Case, mesh: Any) -> None:
    """``fully_shard`` in a model's constructor: the strategy knows nothing of it."""
    model = Classifier()
    fully_shard(model.net, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NoLayersError, match=r"'net\.0'|DTensor") as caught:
            short_fit(case, model)
    assert "a DTensor" in str(caught.value)
    assert "use strategy='ddp' or a single device, with whole, plain weights" in str(caught.value)


def test_a_sharded_part_cannot_be_traced(mesh: Any) -> None:
    net = small_net()
    fully_shard(net[3], mesh=mesh)
    with pytest.raises(
        ChannelGraphError, match=r"'3.weight' is a DTensor, a shard or a packed form.* use strategy='ddp'"
    ):
        ChannelGraph.trace(net, torch.zeros(2, 1, 8, 8))
