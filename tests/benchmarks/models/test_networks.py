"""Networks by name: shapes, published sizes, and what does not fit."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from benchmarks.models import NetworkName, build_network
from lightning_filterdiv.demo import three_convolutions
from lightning_filterdiv.narrowing import count_parameters


@pytest.mark.parametrize("name", get_args(NetworkName))
def test_every_network_takes_the_images_of_its_data(name: str) -> None:
    with torch.device("meta"):
        for shape, classes in (((3, 32, 32), 100), ((1, 28, 28), 10)):
            if name == "vgg16_bn" and shape[1] < 32:
                continue
            net = build_network(name, shape, classes).eval()
            assert net(torch.empty(2, *shape)).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 269_722),  # He et al., table 6: 0.27 M, 0.46 M, 0.85 M, 1.7 M
        ("resnet32", 464_154),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("wrn28_10", 36_479_194),  # Zagoruyko and Komodakis: 36.5 M
        ("wrn16_4", 2_748_890),  # 2.7 M
        ("densenet40", 1_019_754),  # Huang et al.: 1.0 M
        ("c3_released", 3 * 32 * 25 + 32 + 2 * (32 * 32 * 25 + 32) + 512 * 10 + 10),  # repr-ortho, model.py
        ("small_net", 66_186),  # GUOShuxuan/expandnets, cifar_tiny_7.py, Cifar_Tiny counted
    ],
)
def test_networks_have_the_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build_network(name, (3, 32, 32), 10)) == parameters


def test_c3_is_the_network_of_the_demo() -> None:
    """Down to the draws of its weights, and the names under which a checkpoint keeps them."""
    torch.manual_seed(0)
    ours = build_network("c3", (1, 28, 28), 10, width=6).state_dict()
    torch.manual_seed(0)
    demo = three_convolutions(6, 28, 10)
    assert list(ours) == list(demo.state_dict())
    assert all(torch.equal(ours[name], value) for name, value in demo.state_dict().items())
    assert [type(layer) for layer in build_network("c3", (1, 28, 28), 10)] == [type(layer) for layer in demo]


def test_large_images_keep_the_published_start() -> None:
    with torch.device("meta"):
        large, small = (build_network("resnet18", (3, size, size), 1000) for size in (224, 32))
        assert large.conv1.stride == (2, 2)
        assert small.conv1.stride == (1, 1)
        assert count_parameters(large) == 11_689_512  # torchvision's


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("resnet21", (3, 32, 32), {}, "model.network must be one of c3, c3_released, c8"),
        ("c3", (1, 28, 20), {}, "square images, got 28x20"),
        ("c3", (1, 28, 28), {"widht": 3}, "do not fit c3"),
        ("vgg16_bn", (1, 28, 28), {}, "at least 32 pixels, got 28"),
        ("nothing.here", (1, 28, 28), {}, r"'nothing.here' cannot be imported \(No module named 'nothing'\)"),
        ("torch.nn.Nothing", (1, 28, 28), {}, "no attribute 'Nothing'.*give module.function"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, shape: tuple[int, int, int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(name, shape, 10, **options)


def test_what_is_imported_must_make_a_module() -> None:
    with pytest.raises(TypeError, match=r"no_network made int, not a torch.nn.Module"):
        build_network(f"{__name__}.no_network", (1, 28, 28), 10)


def no_network(channels: int, size: int, classes: int) -> int:
    return 3


def broken_network(channels: int, size: int, classes: int) -> torch.nn.Module:
    return torch.nn.Conv2d(channels, "many", 3)


def test_an_error_of_ones_own_function_is_not_called_a_wrong_option() -> None:
    with pytest.raises(ValueError, match=r"model.options \{'width': 3\} do not fit .*no_network: .*'width'"):
        build_network(f"{__name__}.no_network", (1, 28, 28), 10, width=3)
    with pytest.raises(TypeError) as caught:
        build_network(f"{__name__}.broken_network", (1, 28, 28), 10)
    assert "model.options" not in str(caught.value)


def test_released_c3_starts_as_the_released_code_does() -> None:
    """Weights from a normal distribution of deviation .04, cut off at two of them: what is left deviates by .0352."""
    torch.manual_seed(0)
    net = build_network("c3_released", (3, 32, 32), 10)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert float(parameter.detach().abs().max()) <= 0.08
            assert float(parameter.detach().std()) == pytest.approx(0.0352, abs=0.001)
    sizes = [image.shape[-1] for image in _outputs(net, torch.zeros(1, 3, 32, 32), torch.nn.MaxPool2d)]
    assert sizes == [16, 8, 4]


def _outputs(net: torch.nn.Sequential, images: torch.Tensor, kind: type[torch.nn.Module]) -> list[torch.Tensor]:
    found = []
    for layer in net:
        images = layer(images)
        if isinstance(layer, kind):
            found.append(images)
    return found
