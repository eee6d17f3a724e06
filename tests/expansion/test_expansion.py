"""Expanding and contracting: against the chain of layers that the paper draws, and against the network before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_filterdiv.expansion import ExpansionError, compose, contract, expand, is_expanded, unrolled
from lightning_filterdiv.expansion.layers import factor_product, show_compact
from lightning_filterdiv.filters import NoLayersError


def relative(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


def move(model: nn.Module, seed: int = 0) -> None:
    """What training does: every factor and every bias elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))


def check(layer: nn.Module, kind: Any, x: Tensor, rate: int = 3, initial: Any = "keep") -> None:
    """Kept at the start; equal to the unrolled chain in outputs and gradients, and to itself after contraction."""
    model = nn.Sequential(layer).double()
    before = model(x).detach()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expand(model, kind, rate, initial=initial)
    if initial == "keep":
        assert relative(model(x), before) <= 1e-12
    move(model)
    chain = unrolled(model[0])
    assert len(chain) >= 2
    outputs, expected = model(x), chain(x)
    assert relative(outputs, expected) <= 1e-12
    assert relative(outputs, before) > 1e-2
    loss = torch.linspace(0, 1, outputs.numel(), dtype=torch.float64).view_as(outputs)
    parameters = list(model.parameters())
    assert {id(p) for p in parameters} == {id(p) for p in chain.parameters()}
    ours, theirs = (torch.autograd.grad((y * loss).sum(), parameters) for y in (outputs, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert relative(one, other) <= 1e-10
    contract(model)
    assert type(model[0]) in (nn.Conv2d, nn.Linear)
    assert relative(model(x), expected) <= 1e-12
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


GRID: list[tuple[str, dict[str, Any], str]] = [
    ("plain", {"kernel_size": 3, "padding": 1}, "CL"),
    ("stride, no bias", {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}, "CL"),
    ("dilation", {"kernel_size": 3, "padding": 2, "dilation": 2}, "CL"),
    ("oblong", {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)}, "CL"),
    ("same", {"kernel_size": 5, "padding": "same"}, "CL"),
    ("reflect", {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, "CL"),
    ("circular", {"kernel_size": 5, "padding": 2, "padding_mode": "circular", "stride": 2}, "CK"),
    ("grouped", {"kernel_size": 3, "padding": 1, "groups": 2}, "CL"),
    ("depthwise", {"kernel_size": 3, "padding": 1, "groups": 4, "stride": 2}, "CL"),
    ("5x5", {"kernel_size": 5, "padding": 2, "stride": 2}, "CK"),
    ("7x7", {"kernel_size": 7, "padding": 3, "dilation": 2}, "CK"),
    ("depthwise 5x5", {"kernel_size": 5, "padding": 2, "groups": 4, "bias": False}, "CK"),
]


@pytest.mark.parametrize("initial", ["keep", "fresh"])
@pytest.mark.parametrize(("options", "kind"), [row[1:] for row in GRID], ids=[row[0] for row in GRID])
def test_convolutions(options: dict[str, Any], kind: str, initial: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 15, 14, dtype=torch.float64)
    check(nn.Conv2d(4, 8, **options), kind, x, rate=6 if kind == "CK" else 3, initial=initial)


@pytest.mark.parametrize("initial", ["keep", "fresh"])
@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (1, 1)])
def test_linear(shape: tuple[int, int], initial: str) -> None:
    torch.manual_seed(0)
    check(nn.Linear(*shape), "FC", torch.randn(5, 2, shape[0], dtype=torch.float64), initial=initial)


@pytest.mark.soak
@settings(max_examples=200, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 3]),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 3),
    bias=st.booleans(),
    rate=st.integers(1, 4),
)
def test_any_convolution(
    groups: int, per_group: tuple[int, int], kernel: tuple[int, int], stride: int, dilation: int, padding: int,
    bias: bool, rate: int,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    inputs, outputs = (groups * n for n in per_group)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
    model, x = nn.Sequential(conv).double(), torch.randn(2, inputs, 12, 13, dtype=torch.float64)
    before = model(x)
    expand(model, "CL", rate, include=["0"])
    assert relative(model(x), before) <= 1e-12
    move(model)
    expected = unrolled(model[0])(x)
    assert relative(contract(model)(x), expected) <= 1e-12


def test_compose_is_the_definition() -> None:
    """Against the convolution of one kernel with the other, entry by entry."""
    torch.manual_seed(0)
    first, second = torch.randn(4, 3, 3, 2).double(), torch.randn(5, 4, 2, 3).double()
    expected = torch.zeros(5, 3, 4, 4).double()
    for p in range(2):
        for q in range(3):
            for a in range(3):
                for b in range(2):
                    expected[:, :, a + p, b + q] += second[:, :, p, q] @ first[:, :, a, b]
    assert relative(compose(first, second), expected) <= 1e-14
    assert relative(F.conv_transpose2d(second, first), expected) <= 1e-14


def test_shapes_are_those_of_the_paper() -> None:
    def hidden(layer: nn.Module, kind: Any) -> list[tuple[int, ...]]:
        expand(nn.Sequential(layer), kind, 4)
        return [tuple(p.shape) for name, p in layer.named_parameters() if ".weight." in name]

    assert hidden(nn.Conv2d(8, 16, 7), "CL") == [(32, 8, 1, 1), (64, 32, 7, 7), (16, 64, 1, 1)]
    assert hidden(nn.Conv2d(3, 8, 7), "CL") == [(3, 3, 1, 1), (32, 3, 7, 7), (8, 32, 1, 1)]
    assert hidden(nn.Conv2d(8, 8, 3, groups=8), "CL") == [(32, 1, 1, 1), (32, 4, 3, 3), (8, 4, 1, 1)]
    assert hidden(nn.Conv2d(8, 16, 7), "CK") == [(32, 8, 3, 3), (64, 32, 3, 3), (16, 64, 3, 3)]
    assert hidden(nn.Linear(512, 64), "FC") == [(2048, 512), (256, 2048), (64, 256)]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "layers"), [("CL", "03"), ("FC", "7"), ("CL+FC", "037"), ("CK", "0"), ("CK+FC", "07")]
)
def test_a_network(kind: Any, layers: str) -> None:
    model, x = small(), torch.randn(2, 1, 9, 9)
    plain = copy.deepcopy(model)
    assert expand(model, kind, 6) is model
    expanded = [name for name, m in model.named_modules() if is_expanded(m)]
    assert "".join(expanded) == layers
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    copy.deepcopy(model).load_state_dict(model.state_dict())
    contract(model)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(x), plain(x))


def test_factors_depend_on_seed_and_name_alone() -> None:
    def factors(**options: Any) -> list[Tensor]:
        torch.manual_seed(options.pop("noise", 0))
        return list(expand(small(), **options).parameters())

    torch.manual_seed(5)
    state = torch.get_rng_state()
    expand(nn.Sequential(nn.Conv2d(2, 2, 3)), "CL")
    generator = torch.Generator()
    generator.set_state(state)
    nn.Conv2d(2, 2, 3)
    first, again, other = factors(seed=1), factors(seed=1, noise=3), factors(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_global_generator_is_left_alone() -> None:
    model = small()
    state = torch.get_rng_state()
    expand(model, "CL+FC", initial="fresh")
    assert torch.equal(state, torch.get_rng_state())


def test_every_added_direction_learns() -> None:
    """Kept factors are not just the old ones in disguise: the gradient of the inner factor has more than their rank."""
    conv = nn.Conv2d(4, 5, 3)
    model = nn.Sequential(conv)
    expand(model, "CL", 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 4, 9, 9, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    first, inner, *_ = (p.grad for p in conv.parameters())
    assert inner is not None
    assert first is not None
    gradient = inner.permute(0, 2, 3, 1).reshape(-1, 16)
    assert int(torch.linalg.matrix_rank(gradient, rtol=1e-4)) > 4
    assert int(torch.linalg.matrix_rank(first.flatten(1))) == 4


def test_layout_and_flags_come_back() -> None:
    model = (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 3)).to(memory_format=torch.channels_last).bfloat16().eval()
    )
    model[1].requires_grad_(False)
    expand(model, "CL")
    assert not any(p.requires_grad for p in model[1].parameters())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    contract(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].training
    assert [p.requires_grad for p in (model[0].weight, model[1].weight, model[1].bias)] == [True, False, False]


def test_a_module_under_two_names() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    expand(model, "CL")
    assert len(list(model.parameters())) == 6
    contract(model)
    assert model[0] is model[2] is conv


def test_every_tensor_keeps_its_own_flag() -> None:
    """Not only whole layers are frozen."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    expand(model)
    assert [p.requires_grad for p in model.parameters()] == [True] * 3 + [False] * 3
    contract(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {"0.weight": True, "0.bias": False}


def test_a_copy_has_factors_of_its_own() -> None:
    """The bias is made of the factors of the weight, too: those of the copy."""
    model, x = small(), torch.randn(2, 1, 9, 9)
    expand(model, "CL+FC")
    move(model)
    before, copied = model(x), copy.deepcopy(model)
    move(copied, seed=1)
    assert torch.equal(model(x), before)
    moved = copied(x)
    assert not torch.equal(moved, before)
    torch.testing.assert_close(contract(copied)(x), moved, rtol=1e-4, atol=1e-5)


def test_a_compact_state_of_an_expanded_layer() -> None:
    """It has the compact layer's names; loading another one changes nothing and marks that layer, not the original."""
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    expand(nn.Sequential(layer))
    handles = show_compact(layer)
    compact, before = layer.state_dict(), layer(x)
    assert list(compact) == ["weight", "bias"]
    assert not any(tensor.requires_grad for tensor in compact.values())
    copied = copy.deepcopy(layer)
    for weight, stale in ((compact["weight"], False), (compact["weight"] + 1, True)):
        result = copied.load_state_dict({**compact, "weight": weight})
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert [factor_product(each).stale for each in (copied, layer)] == [stale, False]
        assert torch.equal(copied(x), before)
    with pytest.raises(
        RuntimeError, match=r"Missing key.*weight(.|\n)*Unexpected key.*gain(.|\n)*size mismatch for bias"
    ):
        copied.load_state_dict({"bias": compact["bias"][1:], "gain": compact["bias"]})
    for handle in handles:
        handle.remove()
    assert len(layer.state_dict()) == 6


def test_it_compiles_into_one_graph() -> None:
    model, x = expand(small(), "CL+FC"), torch.randn(2, 1, 9, 9)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_tensor_of_an_expanded_layer_cannot_be_set() -> None:
    """Nothing would say which factors are meant."""
    model = expand(nn.Sequential(nn.Conv2d(4, 6, 3)))
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match="contract it first"):
            setattr(model[0], name, torch.zeros_like(getattr(model[0], name)))


class _Own(nn.Conv2d):
    pass


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    return model


def _refusals() -> Iterator[Any]:
    conv = nn.Conv2d
    yield nn.Sequential(_Own(2, 2, 3)), {"include": ["0"]}, ExpansionError, "'0' is a _Own; only nn.Conv2d"
    yield nn.Sequential(conv(2, 2, 3)), {"kind": "CK", "include": ["0"]}, ExpansionError, "take kind='CL'"
    yield nn.Sequential(conv(2, 2, 3)), {"kind": "CK"}, NoLayersError, "kind='CK' takes none of them"
    yield nn.Sequential(conv(2, 2, 3)), {"include": ["conv1"]}, NoLayersError, "'conv1' matches no convolution"
    yield expand(nn.Sequential(conv(2, 2, 3))), {}, ExpansionError, "is expanded already"
    yield _tied(), {"include": ["0"]}, ExpansionError, "shares its weight with another layer"
    yield (
        nn.Sequential(nn.LazyConv2d(2, 3)),
        {"include": ["0"]},
        ExpansionError,
        "run one forward pass before expanding",
    )
    yield (
        nn.Sequential(nn.LazyConv2d(2, 3), conv(2, 2, 3)),
        {},
        ExpansionError,
        "'0' has no weight yet (lazy or on meta)",
    )
    yield nn.Sequential(conv(2, 2, 3, device="meta")), {"include": ["0"]}, ExpansionError, "on meta"
    yield nn.Sequential(conv(9, 2, 7)), {"kind": "CK", "rate": 1}, ExpansionError, "or initial='fresh'"
    parametrized = nn.utils.parametrizations.weight_norm(conv(2, 2, 3))
    yield (
        nn.Sequential(parametrized),
        {"include": ["0"]},
        ExpansionError,
        "layer '0' has a weight computed by a parametrization (weight_norm, prune, ...); remove the parametrization",
    )
    yield nn.Sequential(conv(2, 2, 3)), {"kind": "C"}, ValueError, "kind must be one of"
    yield nn.Sequential(conv(2, 2, 3)), {"rate": 0}, ValueError, "rate must be an integer >= 1"
    yield nn.Sequential(conv(2, 2, 3)), {"initial": "old"}, ValueError, "initial must be one of"
    yield nn.Sequential(conv(2, 2, 3)), {"seed": -1}, ValueError, "seed must be an integer >= 0"


@pytest.mark.parametrize(("model", "options", "error", "message"), list(_refusals()))
def test_refused(model: nn.Module, options: dict[str, Any], error: type[Exception], message: str) -> None:
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(error) as caught:
        expand(model, **options)
    assert message in str(caught.value)
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_a_refusal_half_way_leaves_the_network() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 5), nn.Conv2d(9, 2, 7))
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ExpansionError, match="layer '1'"):
        expand(model, "CK", 2)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [type(m) for m in model] == [nn.Conv2d, nn.Conv2d]


def test_contract_what_is_not_expanded() -> None:
    with pytest.raises(NoLayersError, match="call expand first"):
        contract(small())


def test_unequal_padding_has_no_chain() -> None:
    model = expand(nn.Sequential(nn.Conv2d(2, 2, 4, padding="same")))
    with pytest.raises(ValueError, match="Conv2d is not expanded and has no chain; call expand first"):
        unrolled(nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match="unequally"):
        unrolled(model[0])
