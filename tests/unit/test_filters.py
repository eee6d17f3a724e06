"""What a filter is, checked against what a convolution computes, and how layers are chosen by name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_filterdiv.filters import (
    Conv,
    NoLayersError,
    canonical_name,
    check_patterns,
    filter_count,
    filter_matrix,
    mask_layout,
    named_convolutions,
    select_filters,
    write_filters,
)

ORDINARY = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CLASSES = ORDINARY + TRANSPOSED
KERNEL = (3, 2, 1)
IMAGE = (5, 4, 3)
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def spatial_dims(cls: type) -> int:
    return int(cls.__name__[-2])


def build(cls: type, channels: int, filters: int, groups: int = 1, layout: str = "contiguous") -> Conv:
    """A float64 convolution with asymmetric kernel and the weight in the given memory layout."""
    dims = spatial_dims(cls)
    conv = cls(channels, filters, KERNEL[:dims], groups=groups, dtype=torch.float64)
    if layout == "channels_last" and dims > 1:
        conv.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    elif layout == "strided":  # every second entry of a larger tensor: neither contiguous nor dense
        wide = torch.randn(*conv.weight.shape, 2, dtype=torch.float64)
        conv.weight.data = wide[..., 0]
    return conv


def inputs(conv: Conv) -> Tensor:
    dims = spatial_dims(type(conv))
    return torch.rand(2, conv.in_channels, *IMAGE[:dims], dtype=torch.float64) + 0.5


def weights_behind_output(conv: Conv, channel: int) -> Tensor:
    """Bool mask over the weight: which entries output channel ``channel`` depends on, by differentiation."""
    (gradient,) = torch.autograd.grad(conv(inputs(conv))[:, channel].sum(), conv.weight)
    return gradient != 0


def weights_behind_input(conv: Conv, channel: int) -> Tensor:
    """Bool mask over the weight: which entries see input channel ``channel``, by differentiation."""
    only = torch.zeros_like(image := inputs(conv))
    only[:, channel] = image[:, channel]
    (gradient,) = torch.autograd.grad(conv(only).sum(), conv.weight)
    return gradient != 0


@st.composite
def convolutions(draw: st.DrawFn) -> Conv:
    cls = draw(st.sampled_from(CLASSES))
    groups = draw(st.integers(1, 3))
    return build(
        cls,
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        groups,
        draw(st.sampled_from(["contiguous", "channels_last", "strided"])),
    )


# --- filter_matrix and write_filters -----------------------------------------------------------------------------


@PROPERTY
@given(convolutions())
def test_row_j_holds_the_weights_that_output_channel_j_depends_on(conv: Conv) -> None:
    matrix = filter_matrix(conv)
    assert matrix.shape == (conv.out_channels, conv.weight.numel() // conv.out_channels)
    assert filter_count(conv) == conv.out_channels
    for j in range(conv.out_channels):
        # Boolean indexing walks in (input channel, kernel position) order for a fixed filter.
        assert torch.equal(matrix[j], conv.weight.detach()[weights_behind_output(conv, j)])


@PROPERTY
@given(convolutions(), st.data())
def test_writing_one_filter_changes_its_output_channel_and_no_other(conv: Conv, data: st.DataObject) -> None:
    j = data.draw(st.integers(0, conv.out_channels - 1))
    image = inputs(conv)
    pointer, strides, parameter = conv.weight.data_ptr(), conv.weight.stride(), conv.weight
    with torch.no_grad():
        before, weight = conv(image), conv.weight.clone()
        write_filters(conv, [j], filter_matrix(conv)[[j]] + 1.0)
        after = conv(image)
    others = [i for i in range(conv.out_channels) if i != j]
    assert torch.equal(after[:, others], before[:, others])
    assert (after[:, j] != before[:, j]).all()
    assert torch.equal(conv.weight.detach() != weight, weights_behind_output(conv, j))
    assert conv.weight is parameter
    assert (conv.weight.data_ptr(), conv.weight.stride()) == (pointer, strides)


@PROPERTY
@given(convolutions(), st.data())
def test_write_filters_is_the_inverse_of_filter_matrix(conv: Conv, data: st.DataObject) -> None:
    original = filter_matrix(conv).clone()
    rows = data.draw(st.lists(st.integers(0, conv.out_channels - 1), unique=True))
    values = torch.randn(len(rows), original.shape[1], dtype=torch.float64)
    write_filters(conv, rows, values)
    expected = original.clone()
    expected[rows] = values
    assert torch.equal(filter_matrix(conv), expected)
    write_filters(conv, torch.arange(conv.out_channels), original)
    assert torch.equal(filter_matrix(conv), original)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("channels", "filters", "groups"), [(3, 5, 1), (4, 6, 2), (4, 4, 4), (3, 6, 3)])
def test_permuting_rows_permutes_output_channels(cls: type, channels: int, filters: int, groups: int) -> None:
    if groups > 1:  # filters of different groups see different inputs: exchange inside the first group only
        order = [*reversed(range(filters // groups)), *range(filters // groups, filters)]
    else:
        order = [*range(1, filters), 0]
    conv = build(cls, channels, filters, groups)
    image = inputs(conv)
    with torch.no_grad():
        conv.bias.zero_()
        before = conv(image)
        write_filters(conv, range(filters), filter_matrix(conv)[order].clone())
        torch.testing.assert_close(conv(image), before[:, order])


def test_matrix_of_a_contiguous_convolution_is_a_view_and_detached() -> None:
    conv = build(nn.Conv2d, 3, 4)
    matrix = filter_matrix(conv)
    assert matrix.data_ptr() == conv.weight.data_ptr()
    assert not matrix.requires_grad


@pytest.mark.parametrize("cls", CLASSES)
def test_columns_do_not_depend_on_the_memory_format(cls: type) -> None:
    conv = build(cls, 4, 6, 2)
    matrix = filter_matrix(conv).clone()
    if spatial_dims(cls) > 1:
        conv.to(memory_format=torch.channels_last if spatial_dims(cls) == 2 else torch.channels_last_3d)
        assert not conv.weight.is_contiguous()
    assert torch.equal(filter_matrix(conv), matrix)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_cast_to_the_dtype_of_the_weight(cls: type, dtype: torch.dtype) -> None:
    conv = build(cls, 2, 3).to(dtype)
    values = torch.randn(1, filter_matrix(conv).shape[1], dtype=torch.float64)
    write_filters(conv, [1], values)
    assert filter_matrix(conv).dtype == dtype
    assert torch.equal(filter_matrix(conv)[1], values[0].to(dtype))


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_values_are_moved_to_the_device_of_the_weight(cls: type) -> None:
    conv = cls(2, 3, 3, device="meta")
    matrix = filter_matrix(conv)
    assert (matrix.shape, matrix.device.type) == ((3, 18), "meta")
    write_filters(conv, [0, 2], torch.zeros(2, 18))


def test_values_that_require_grad_leave_no_graph_behind() -> None:
    conv = build(nn.Conv2d, 2, 3)
    write_filters(conv, [0], torch.ones(1, filter_matrix(conv).shape[1], dtype=torch.float64, requires_grad=True))
    assert conv.weight.is_leaf
    assert conv.weight.requires_grad
    assert conv.weight.grad_fn is None


@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(
    ("rows", "shape", "error", "message"),
    [
        ([3], (1, 12), IndexError, r"rows must be in 0\.\.2 for a layer of 3 filters, got \[3\]"),
        ([-1], (1, 12), IndexError, r"rows must be in 0\.\.2 for a layer of 3 filters, got \[-1\]"),
        ([1, 1], (2, 12), IndexError, r"rows must name each filter once, got \[1, 1\]"),
        ([0, 1], (1, 12), ValueError, r"values must have shape \(2, 12\).*fan-in 12.*got \(1, 12\)"),
        ([0], (1, 11), ValueError, r"values must have shape \(1, 12\).*got \(1, 11\)"),
        ([0], (12,), ValueError, r"values must have shape \(1, 12\).*got \(12,\)"),
        # A mask is not a list of indices: read as one, it would name filters 0 and 1.
        (torch.tensor([False, True, False]), (3, 12), TypeError, r"rows must be integers.*bool"),
        (torch.tensor([0.0, 1.5]), (2, 12), TypeError, r"rows must be integers.*float32"),
    ],
)
def test_a_bad_write_is_refused_and_changes_nothing(
    cls: type, rows: list[int] | Tensor, shape: tuple[int, ...], error: type[Exception], message: str
) -> None:
    conv = cls(2, 3, (3, 2))
    before = conv.weight.detach().clone()
    with pytest.raises(error, match=message):
        write_filters(conv, rows, torch.zeros(shape))
    assert torch.equal(conv.weight.detach(), before)


def test_writing_no_rows_changes_nothing() -> None:
    conv = build(nn.Conv2d, 2, 3)
    before = conv.weight.detach().clone()
    write_filters(conv, [], torch.zeros(0, filter_matrix(conv).shape[1]))
    assert torch.equal(conv.weight.detach(), before)


# --- mask_layout -------------------------------------------------------------------------------------------------


def broadcast(conv: Conv, axis: str, vector: Tensor) -> Tensor:
    weight_view, mask_view = mask_layout(conv, axis)
    return vector.view(mask_view).expand(weight_view).reshape(conv.weight.shape)


@PROPERTY
@given(convolutions())
def test_a_one_hot_vector_selects_exactly_one_filter(conv: Conv) -> None:
    for j in range(conv.out_channels):
        one_hot = torch.arange(conv.out_channels) == j
        assert torch.equal(broadcast(conv, "out", one_hot), weights_behind_output(conv, j))


@PROPERTY
@given(convolutions())
def test_a_one_hot_vector_selects_exactly_one_input_slice(conv: Conv) -> None:
    transposed = isinstance(conv, TRANSPOSED)
    slices = conv.in_channels if transposed else conv.in_channels // conv.groups
    assert math.prod(mask_layout(conv, "in")[1]) == slices
    for s in range(slices):
        # Slice s of an ordinary convolution is the s-th input channel of every group.
        seen = [weights_behind_input(conv, c) for c in ([s] if transposed else range(s, conv.in_channels, slices))]
        assert torch.equal(broadcast(conv, "in", torch.arange(slices) == s), torch.stack(seen).any(0))


# --- canonical names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("conv", "conv"),
        ("", ""),
        ("module.backbone._orig_mod.conv1", "backbone.conv1"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.b", "a.b"),
        ("my_module.conv", "my_module.conv"),
        ("modules.0", "modules.0"),
    ],
)
def test_canonical_name(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


class Wrapper(nn.Module):
    """What ``DataParallel`` and DDP look like to ``named_modules``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class Net(nn.Module):
    """conv1, layer1.{0,1}.{conv1,conv2}, up (transposed)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3)
        block = {"conv1": lambda: nn.Conv2d(2, 2, 3), "conv2": lambda: nn.Conv2d(2, 2, 3)}
        self.layer1 = nn.Sequential(*[nn.ModuleDict({key: make() for key, make in block.items()}) for _ in range(2)])
        self.up = nn.ConvTranspose2d(2, 2, 2)
        self.head = nn.Linear(2, 2)


ORDINARY_NAMES = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]


def test_default_selection_is_every_ordinary_convolution_in_order() -> None:
    model = Net()
    selected = select_filters(model)
    assert list(selected) == ORDINARY_NAMES
    assert all(conv is model.get_submodule(name) for name, conv in selected.items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: torch.compile(net, backend="eager"),
        Wrapper,
        lambda net: Wrapper(torch.compile(net, backend="eager")),
        lambda net: Wrapper(Wrapper(net)),
    ],
)
def test_names_are_canonical_under_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = Net()
    assert select_filters(wrap(net)) == select_filters(net)
    assert list(select_filters(wrap(net), include=["layer1.0.*"])) == ["layer1.0.conv1", "layer1.0.conv2"]


def test_a_compiled_submodule_keeps_its_name() -> None:
    net = Net()
    net.layer1 = torch.compile(net.layer1, backend="eager")
    assert list(select_filters(net)) == ORDINARY_NAMES


def test_layers_whose_canonical_names_collide_are_all_kept() -> None:
    # `module` is also a name that users give to a submodule of their own.
    net = Wrapper(nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}))
    net.conv = nn.Conv2d(1, 2, 1)
    selected = select_filters(net)
    assert selected == {"conv": net.conv, "module.conv": net.module["conv"]}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.conv2"], None, ["layer1.0.conv2", "layer1.1.conv2"]),  # `*` crosses the dot after layer1
        (["layer1*conv1"], None, ["layer1.0.conv1", "layer1.1.conv1"]),
        (["layer1.?.conv1"], None, ["layer1.0.conv1", "layer1.1.conv1"]),
        (["layer1.[1-9].*"], None, ["layer1.1.conv1", "layer1.1.conv2"]),
        (["conv1"], None, ["conv1"]),  # a whole name, not a suffix
        (["up"], None, ["up"]),  # a transposed convolution that is named
        (["*"], None, [*ORDINARY_NAMES, "up"]),
        (["*"], ["layer1.*"], ["conv1", "up"]),
        (None, ["layer1.0.*", "conv1"], ["layer1.1.conv1", "layer1.1.conv2"]),
        (("conv1", "up"), ("up",), ["conv1"]),  # any sequence
        (["layer1.1.conv1", "conv1"], None, ["conv1", "layer1.1.conv1"]),  # model order, not pattern order
    ],
)
def test_include_and_exclude(include: list[str] | None, exclude: list[str] | None, expected: list[str]) -> None:
    assert list(select_filters(Net(), include, exclude)) == expected


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(NoLayersError, match="'CONV1' matches no convolution"):
        select_filters(Net(), ["CONV1"])


def test_a_shared_module_and_a_shared_weight_appear_once() -> None:
    net = Net()
    net.again = net.conv1
    twin = nn.Conv2d(1, 2, 3)
    twin.weight = net.conv1.weight
    net.twin = twin
    assert list(select_filters(net)) == ORDINARY_NAMES


# --- what is left out, and what is refused -----------------------------------------------------------------------


def prune(conv: nn.Module) -> None:
    from torch.nn.utils.prune import l1_unstructured

    l1_unstructured(conv, "weight", amount=0.5)


def old_weight_norm(conv: nn.Module) -> None:
    if not hasattr(nn.utils, "weight_norm"):
        pytest.skip("this torch has no torch.nn.utils.weight_norm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(conv)


PARAMETRIZERS: list[Callable[[nn.Module], object]] = [
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
    nn.utils.parametrizations.orthogonal,
    old_weight_norm,
    prune,
]


@pytest.mark.parametrize("parametrize", PARAMETRIZERS)
def test_parametrized_layers_are_left_out_with_a_warning(parametrize: Callable[[nn.Module], object]) -> None:
    net = Net()
    parametrize(net.layer1[0]["conv2"])
    with pytest.warns(UserWarning, match=r"left out.*'layer1\.0\.conv2'; remove the parametrization") as caught:
        selected = select_filters(net)
    assert list(selected) == [name for name in ORDINARY_NAMES if name != "layer1.0.conv2"]
    assert "'conv1'" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(select_filters(net, include=["conv1"])) == ["conv1"]  # not asked for, not warned about


@pytest.mark.parametrize("parametrize", PARAMETRIZERS)
def test_nothing_but_parametrized_layers_is_an_error(parametrize: Callable[[nn.Module], object]) -> None:
    net = Net()
    parametrize(net.conv1)
    with (
        pytest.warns(UserWarning, match="'conv1'"),
        pytest.raises(NoLayersError, match="every selected layer is parametrized"),
    ):
        select_filters(net, ["conv1"])


def test_a_parametrized_bias_does_not_hide_the_layer() -> None:
    from torch.nn.utils.prune import l1_unstructured

    net = Net()
    l1_unstructured(net.conv1, "bias", amount=0.5)
    assert "conv1" in select_filters(net)


def test_a_removed_parametrization_brings_the_layer_back() -> None:
    from torch.nn.utils.prune import remove

    net = Net()
    prune(net.conv1)
    remove(net.conv1, "weight")
    assert list(select_filters(net)) == ORDINARY_NAMES


def test_a_lazy_layer_is_refused_until_it_has_a_weight() -> None:
    net = Net()
    net.lazy = nn.LazyConv2d(2, 1)
    with pytest.raises(ValueError, match=r"layer 'lazy' is lazy.*run one forward pass.*exclude=\['lazy'\]"):
        select_filters(net)
    assert list(select_filters(net, exclude=["lazy"])) == ORDINARY_NAMES
    net.lazy(torch.zeros(1, 3, 2, 2))
    assert "lazy" in select_filters(net)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("layer1", "'layer1' is a parent module, did you mean 'layer1.*'?"),
        ("layer1.0", "'layer1.0' is a parent module, did you mean 'layer1.0.*'?"),
        ("conv2", "did you mean '*.conv2' (it matches 'layer1.0.conv2')?"),
        ("0.conv?", "did you mean '*.0.conv?' (it matches 'layer1.0.conv1')?"),
        ("layer1.0.cnv2", "the closest name is 'layer1.0.conv2'"),
    ],
)
def test_an_unmatched_include_pattern_is_refused_with_the_closest_match(pattern: str, hint: str) -> None:
    with pytest.raises(NoLayersError) as caught:
        select_filters(Net(), ["conv1", pattern])
    message = str(caught.value)
    assert f"include pattern {pattern!r} matches no convolution; {hint}. Available: 'conv1', " in message
    assert all(repr(name) in message for name in [*ORDINARY_NAMES, "up"])


def test_an_include_pattern_like_nothing_gets_no_hint() -> None:
    with pytest.raises(NoLayersError, match=r"'@@@' matches no convolution\. Available: "):
        select_filters(Net(), ["@@@"])


def test_a_long_list_of_names_is_cut() -> None:
    model = nn.Sequential(*[nn.Conv1d(1, 1, 1) for _ in range(15)])
    with pytest.raises(NoLayersError, match=r"'11' and 3 more$"):
        select_filters(model, ["@@@"])


def test_an_unmatched_exclude_pattern_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"exclude pattern 'layer1' matches no convolution.*did you mean 'layer1\.\*'"):
        assert list(select_filters(Net(), exclude=["layer1"])) == ORDINARY_NAMES


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(NoLayersError, match=r"exclude leaves no convolution\. Available: 'conv1'"):
        select_filters(Net(), exclude=["*"])


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(NoLayersError, match="Sequential has no convolution"):
        select_filters(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_of_transposed_convolutions_must_name_them() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1))
    with pytest.raises(NoLayersError, match="only transposed convolutions, which must be named in include"):
        select_filters(model)
    assert list(select_filters(model, ["*"])) == ["0", "1"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("layer1.*", r"{0} must be a list of name patterns.*got 'layer1\.\*'; write {0}=\['layer1\.\*'\]"),
        (3, "{0} must be a list of name patterns.*got 3"),
        ({"a": 1}, "{0} must be a list of name patterns"),
        (["a", 3], r"{0} must be a list of strings, got \['a', 3\]"),
    ],
)
def test_patterns_of_the_wrong_type_are_refused(argument: str, patterns: object, message: str) -> None:
    with pytest.raises(TypeError, match=message.format(argument)):
        check_patterns(argument, patterns)
    with pytest.raises(TypeError, match=message.format(argument)):
        select_filters(Net(), **{argument: patterns})


def test_an_empty_include_is_refused_and_an_empty_exclude_is_not() -> None:
    with pytest.raises(ValueError, match=r"include=\[\] selects no layer; use include=None"):
        select_filters(Net(), include=[])
    assert list(select_filters(Net(), exclude=[])) == ORDINARY_NAMES
    assert check_patterns("include", None) is None


def test_named_convolutions_yields_parametrized_layers_too() -> None:
    net = Net()
    prune(net.conv1)
    assert [name for name, _ in named_convolutions(net)] == [*ORDINARY_NAMES, "up"]
