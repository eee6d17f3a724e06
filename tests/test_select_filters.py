"""Names of layers, choosing them by pattern, what is left out and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_filterdiv.filters import (
    NoLayersError,
    canonical_name,
    check_patterns,
    find_submodule,
    find_weight_obstacle,
    named_convolutions,
    named_modules,
    named_tensors,
    select_filters,
)
from lightning_filterdiv.selection import Obstacle, select_layers

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


def test_modules_and_tensors_by_canonical_name() -> None:
    """Under every name they have, in the order of the network; of a wrapper and what it wraps, the latter."""
    net = Net()
    net.again = net.conv1
    wrapped = Wrapper(torch.compile(net, backend="eager"))
    assert named_modules(wrapped) == dict(net.named_modules(remove_duplicate=False))
    assert list(named_modules(wrapped)) == list(dict(net.named_modules(remove_duplicate=False)))
    assert list(named_tensors(wrapped)) == list(net.state_dict())
    assert named_tensors(wrapped)["again.weight"] is net.conv1.weight


def test_modules_whose_canonical_names_collide_stay_long() -> None:
    net = Wrapper(nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "other": nn.ReLU()}))
    net.conv = nn.Conv2d(1, 2, 1)
    assert list(named_modules(net)) == ["", "module.conv", "other", "conv"]
    assert named_modules(net)["module.conv"] is net.module["conv"]


def test_a_submodule_is_found_with_its_wrapper() -> None:
    net = Net()
    inner = net.layer1
    net.layer1 = torch.compile(inner, backend="eager")
    model = Wrapper(net)
    assert find_submodule(model, "layer1") is net.layer1
    assert find_submodule(model, "layer1.0") is inner[0]
    assert find_submodule(model, None) is find_submodule(model, "") is model
    with pytest.raises(OwnError, match=r"Wrapper has no submodule network='layer2'; its children are "):
        find_submodule(model, "layer2", OwnError)


class OwnError(ValueError):
    """An error of the caller's own."""


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


class Own(nn.Module):
    obstacle = Obstacle("is somebody's own", "ask somebody")

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_parametrization_may_say_why_itself() -> None:
    net = Net()
    nn.utils.parametrize.register_parametrization(net.conv1, "weight", Own())
    assert find_weight_obstacle(net.conv1) == Own.obstacle
    with pytest.warns(UserWarning, match="left out, because each is somebody's own: 'conv1'; ask somebody") as caught:
        assert "conv1" not in select_filters(net)
    assert caught[0].filename == __file__


def test_one_warning_per_obstacle_and_all_of_them_in_the_error() -> None:
    """The selector knows nothing of layers: candidates are numbers here."""
    odd, big = Obstacle("is odd", "double it"), Obstacle("is big", "halve it")

    def select(include: list[str] | None, exclude: list[str] | None = None) -> dict[str, int]:
        return select_layers(
            {"one": 1, "two": 2, "three": 3, "eight": 8},
            include,
            exclude,
            noun="number",
            is_default=lambda n: n != 2,
            no_default="two must be named",
            find_obstacle=lambda name, n: odd if n % 2 else big if n > 4 else None,
        )

    with pytest.warns(UserWarning, match="left out") as caught:
        assert select(["t*", "one", "eight"]) == {"two": 2}
    assert [str(warning.message) for warning in caught] == [
        "left out, because each is odd: 'one', 'three'; double it",
        "left out, because each is big: 'eight'; halve it",
    ]
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NoLayersError) as refused:
        select(None)
    assert str(refused.value) == (
        "no layer is left: every selected layer is odd; double it, or is big; halve it. "
        "Available: 'one', 'two', 'three', 'eight'"
    )
    with pytest.raises(NoLayersError, match="no layer is left: exclude leaves no number"):
        select(None, ["*"])


@pytest.mark.parametrize("parametrize", PARAMETRIZERS)
def test_nothing_but_parametrized_layers_is_an_error(parametrize: Callable[[nn.Module], object]) -> None:
    net = Net()
    parametrize(net.conv1)
    with (
        pytest.warns(UserWarning, match="'conv1'"),
        pytest.raises(
            NoLayersError,
            match=r"every selected layer has a weight computed by a parametriz.*; remove the parametrization first",
        ),
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
    with pytest.raises(ValueError, match=r"include=\[\] selects no layer; use include=None for the default layers"):
        select_filters(Net(), include=[])
    assert list(select_filters(Net(), exclude=[])) == ORDINARY_NAMES
    assert check_patterns("include", None) is None


def test_named_convolutions_yields_parametrized_layers_too() -> None:
    net = Net()
    prune(net.conv1)
    assert [name for name, _ in named_convolutions(net)] == [*ORDINARY_NAMES, "up"]
