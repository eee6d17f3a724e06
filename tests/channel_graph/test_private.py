"""``private(layer)``: zeroing what it lists is the same as removing the filters.

The reference never asks the graph: the positions through which a filter leaves its private region are written by hand
for each network, and zeroed there while the untouched network runs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.models import channel_graph as models
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.channel_graph.verify import randomise
from lightning_filterdiv.filters import named_tensors

IMAGE = models.image(n=4)
FILTERS = torch.tensor([1, 4])
Exit = tuple[str, str, Callable[[int], list[int]]]  # module, "input" or "output", filter -> channels there


def same(j: int) -> list[int]:
    return [j]


def shifted(by: int) -> Callable[[int], list[int]]:
    return lambda j: [j + by]


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6)
        self.scale, self.out = nn.Parameter(torch.rand(6, 1, 1)), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(self.conv(x)) * self.scale))


CASES: dict[str, tuple[Callable[[], nn.Module], str, list[Exit], set[str]]] = {
    "plain": (models.plain, "0", [("3", "input", same)], {"0.weight", "1.weight", "1.bias"}),
    "plain without norm": (lambda: models.plain(norm=False), "0", [("2", "input", same)], {"0.weight", "0.bias"}),
    "norm without affine": (
        lambda: models.plain(affine=False),
        "0",
        [("3", "input", same)],
        {"0.weight", "1.running_mean"},
    ),
    "residual, inner": (
        models.CifarResNet,
        "layers.0.conv1",
        [("layers.0.conv2", "input", same)],
        {"layers.0.conv1.weight", "layers.0.bn1.weight", "layers.0.bn1.bias"},
    ),
    "residual, into the sum": (
        models.CifarResNet,
        "layers.0.conv2",
        [("layers.0.bn2", "output", same)],
        {"layers.0.conv2.weight", "layers.0.bn2.weight", "layers.0.bn2.bias"},
    ),
    "mobile": (
        models.mobile,
        "3.expand",
        [("3.project", "input", same)],
        {"3.expand.weight", "3.bn1.weight", "3.bn1.bias", "3.depthwise.weight", "3.bn2.weight", "3.bn2.bias"},
    ),
    "squeeze and excite": (
        lambda: models.mobile(excite=True),
        "3.expand",
        [("3.project", "input", same), ("3.reduce", "input", same)],
        {"3.expand.weight", "3.bn1.weight", "3.bn1.bias", "3.depthwise.weight", "3.bn2.weight", "3.bn2.bias"},
    ),
    "dense, stem": (
        models.DenseNet,
        "stem",
        [(name, "input", same) for name in ("convs.0", "convs.1", "convs.2", "transition")],
        {"stem.weight"} | {f"{n}.{p}" for n in ("norms.0", "norms.1", "norms.2", "norm") for p in ("weight", "bias")},
    ),
    "dense, layer": (
        models.DenseNet,
        "convs.0",
        [(name, "input", shifted(8)) for name in ("convs.1", "convs.2", "transition")],
        {"convs.0.weight"} | {f"{n}.{p}" for n in ("norms.1", "norms.2", "norm") for p in ("weight", "bias")},
    ),
    "flatten": (
        models.flatten_linear,
        "2",
        [("6", "input", lambda j: list(range(16 * j, 16 * (j + 1))))],
        {"2.weight", "2.bias", "5.weight", "5.bias"},
    ),
    "frozen norm": (
        Frozen,
        "conv",
        [("out", "input", same)],
        {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "scale"},
    ),
    "transposed": (models.UNet, "up", [("n3", "output", same)], {"up.weight", "up.bias", "n3.weight", "n3.bias"}),
}


def run_without(model: nn.Module, exits: list[Exit], x: Tensor) -> Tensor:
    """The network with those channels zeroed where they leave their private region."""
    model = copy.deepcopy(model)

    def cut(tensor: Tensor, where: Callable[[int], list[int]]) -> Tensor:
        mask = torch.ones(tensor.shape[1], dtype=tensor.dtype)
        mask[[c for j in FILTERS.tolist() for c in where(j)]] = 0
        return tensor * mask.reshape(1, -1, *[1] * (tensor.ndim - 2))

    for name, side, where in exits:
        module = model.get_submodule(name)
        if side == "input":
            module.register_forward_pre_hook(lambda _, args, where=where: (cut(args[0], where),))
        else:
            module.register_forward_hook(lambda _, __, output, where=where: cut(output, where))
    return model(x)


def silence(model: nn.Module, graph: ChannelGraph, entries: list[tuple[str, Tensor]]) -> nn.Module:
    model = copy.deepcopy(model)
    tensors = named_tensors(model)
    with torch.no_grad():
        for name, rows in entries:
            tensors[name].index_fill_(graph.row_dim(name), rows, 0)
    return model


@pytest.mark.parametrize(
    "training", [pytest.param(False, marks=pytest.mark.soak, id="eval"), pytest.param(True, id="train")]
)
@pytest.mark.parametrize("name", CASES)
def test_silenced_filters_leave_no_trace(name: str, training: bool) -> None:
    make, layer, exits, expected = CASES[name]
    model = make().double()
    randomise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():  # what a constant leaks must pass the next relu
        for tensor_name, tensor in named_tensors(model).items():
            if tensor_name.endswith(("bias", "mean")):
                tensor.copy_(tensor.abs() if tensor_name.endswith("bias") else -tensor.abs())
    graph = ChannelGraph.trace(model, IMAGE)
    model.train(training)
    entries = graph.private(layer, FILTERS)
    assert isinstance(entries, list)
    assert {tensor for tensor, _ in entries} == expected
    x = IMAGE.double()
    silent = silence(model, graph, entries)(x)
    assert (silent - run_without(model, exits, x)).abs().max() <= 1e-14
    # The channels matter in the first place, and so does what a constant would leak through.
    assert (silent - copy.deepcopy(model)(x)).abs().max() > 1e-6
    weights = [e for e in entries if not e[0].endswith(("bias", "running_mean"))]
    # (In training the next norm may subtract that constant again; a zero scale would hide it.)
    if len(weights) < len(entries) and not training and name != "frozen norm":
        assert (silence(model, graph, weights)(x) - silent).abs().max() > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_rows_follow_the_filters(name: str) -> None:
    make, layer, _, _ = CASES[name]
    graph = ChannelGraph.trace(make(), IMAGE)
    everything = graph.private(layer)
    chosen = graph.private(layer, FILTERS)
    assert isinstance(everything, list)
    assert isinstance(chosen, list)
    assert [(t, rows[FILTERS].tolist()) for t, rows in everything] == [(t, rows.tolist()) for t, rows in chosen]


def test_consumer_columns_are_what_reads_the_filters() -> None:
    for name, (make, layer, exits, _) in CASES.items():
        graph = ChannelGraph.trace(make(), IMAGE)
        found = {
            (c.tensor, c.dim, int(column), int(j))
            for c in graph.consumer_columns(layer)
            for column, j in zip(c.columns, c.filters, strict=True)
            if j in FILTERS
        }
        if any(side == "output" for _, side, _ in exits) and name != "transposed":
            assert not found, name
            continue
        if name == "transposed":
            assert found == {("fuse.weight", 1, 6 + j, j) for j in FILTERS.tolist()}
            continue
        expected = {
            (f"{module}.weight", 1, column, j)
            for module, _, where in exits
            for j in FILTERS.tolist()
            for column in where(j)
        }
        if name == "squeeze and excite":  # behind the gate the channel is joined with another
            expected = {e for e in expected if e[0] == "3.reduce.weight"}
        assert found == expected, name


def test_grouped_consumers_are_given_per_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 2, 1))
    graph = ChannelGraph.trace(model, IMAGE)
    columns = [(c.tensor, c.columns.tolist(), c.filters.tolist(), c.block) for c in graph.consumer_columns("0")]
    assert columns == [("1.weight", [0, 1], [0, 1], (0, 3)), ("1.weight", [0, 1], [2, 3], (3, 6))]
    assert isinstance(graph.private("0"), list), "a grouped convolution reads each channel like a dense one"
    assert graph.consumers_of("0") == ("1",)


class Reasons(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.out = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.layer_norm = nn.BatchNorm2d(6), nn.LayerNorm([6, 8, 8])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.kind == "sigmoid":
            return self.out(torch.sigmoid(x))
        if self.kind == "shift":
            return self.out(x + 0.5)
        if self.kind == "mixer":
            return self.out(self.layer_norm(x))
        if self.kind == "maximum":
            return self.out(torch.maximum(x, self.out(x)))
        if self.kind == "border of ones":
            return self.out(F.pad(F.relu(x), (1, 1, 0, 1), value=1.0))
        if self.kind == "border of zeros":
            return self.out(F.pad(F.relu(x), (1, 1, 0, 1)))
        if self.kind == "own product":  # silu written out: zero times one half
            return self.out(x * torch.sigmoid(x))
        return self.out(self.norm(self.out(F.relu(self.norm(x)))))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sigmoid", "sigmoid in forward does not map zero to zero"),
        ("shift", "add in forward does not map zero to zero"),
        ("mixer", "input of layer_norm in layer_norm, which mixes channels"),
        ("maximum", "joined by maximum in forward"),
        ("border of ones", "pad in forward does not map zero to zero"),
        ("shared norm", r"norm\.\w+ is shared with other channels"),
    ],
)
def test_what_cannot_be_silenced_says_why(kind: str, reason: str) -> None:
    graph = ChannelGraph.trace(Reasons(kind), IMAGE)
    answer = graph.private("conv")
    assert isinstance(answer, str)
    assert re.search(reason, answer), answer


@pytest.mark.parametrize("kind", ["own product", "border of zeros"])
def test_what_maps_zero_to_zero_is_silent(kind: str) -> None:
    assert isinstance(ChannelGraph.trace(Reasons(kind), IMAGE).private("conv"), list)


def test_a_border_of_ones_can_still_be_merged() -> None:
    """It keeps equal channels equal, though not silent ones silent."""
    graph = ChannelGraph.trace(Reasons("border of ones"), IMAGE)
    assert [group.name for group in graph.groups] == ["conv"]
    assert graph.verify() < 1e-9


def test_depthwise_layers_point_to_their_producer() -> None:
    answer = ChannelGraph.trace(models.mobile(), IMAGE).private("3.depthwise")
    assert answer == "3.depthwise is depthwise: its filters belong to the channels of 3.expand"


def test_unknown_filters_and_layers_are_errors() -> None:
    graph = ChannelGraph.trace(models.plain(), IMAGE)
    with pytest.raises(IndexError, match="0 has 8 filters, there is no filter 8"):
        graph.private("0", torch.tensor([8]))
    with pytest.raises(ValueError, match="'1' is not a layer of the traced network: 0, 3, 6, 12"):
        graph.private("1")
