"""The networks of the authors' code: what is expanded in them, and what it weighs (GUOShuxuan/expandnets)."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import SmallNet
from lightning_filterdiv import ExpandNet
from lightning_filterdiv.expansion import contract, expand
from lightning_filterdiv.expansion.cost import composing_macs
from lightning_filterdiv.narrowing import count_parameters


# exp_cifar/models/cifar_tiny_7.py, every class counted. Hidden layers have biases; fc2 is not expanded.
@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("CL", 547_102), ("FC", 1_624_970), ("CL+FC", 2_105_886), ("CK", 186_982), ("CK+FC", 1_745_766)],
)
def test_the_7x7_small_net_has_the_official_size(kind: Any, parameters: int) -> None:
    torch.manual_seed(0)
    net = SmallNet(kernel_size=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expand(net, kind, exclude=["fc2"] if "FC" in kind else None)
    assert count_parameters(net) == parameters
    afresh = [
        str(warning.message)
        for warning in caught
        if "'conv1': expanded, they start from new weights" in str(warning.message)
    ]
    assert len(caught) == len(afresh) == ("CK" in kind)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    contract(net).load_state_dict(SmallNet(kernel_size=7).state_dict())


def test_ck_keeps_every_layer_but_the_one_that_reads_the_image() -> None:
    torch.manual_seed(0)
    net = SmallNet(kernel_size=7).double()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.warns(UserWarning, match="'conv1'"):
        contract(expand(net, "CK"))
    for name, tensor in net.state_dict().items():
        if name.startswith("conv1."):
            assert not torch.allclose(tensor, before[name])
        else:
            torch.testing.assert_close(tensor, before[name], rtol=1e-12, atol=1e-12)


def test_an_expanded_image_layer_keeps_its_weights() -> None:
    torch.manual_seed(0)
    net = SmallNet(kernel_size=7).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = net.eval()(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expand(net, "CK", expand_image=True)
    assert [tuple(p.shape) for n, p in net.conv1.named_parameters() if ".weight." in n] == [
        (12, 3, 3, 3), (32, 12, 3, 3), (8, 32, 3, 3),
    ]  # fmt: skip
    torch.testing.assert_close(net(images), expected, rtol=1e-12, atol=1e-12)


def test_a_frozen_image_layer_is_left_as_it_is() -> None:
    net = SmallNet(kernel_size=7)
    net.conv1.requires_grad_(False)
    with pytest.warns(UserWarning, match="'conv1': frozen, they are left as they are"):
        expand(net, "CK")
    assert set(dict(net.conv1.named_parameters())) == {"weight", "bias"}


def mobilenet_v1() -> nn.Sequential:
    """MobileNetV1 (Howard et al. 2017) for 1,000 classes."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        ]  # fmt: skip

    widths = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
    widths += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]
    stem = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    layers = [layer for entry in widths for layer in block(*entry)]
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


def test_mobilenet_has_the_official_size() -> None:
    """exp_imagenet/models/mobilenetv1.py expands the stem to 12 channels."""
    net = mobilenet_v1()
    assert count_parameters(net) == 4_231_976
    assert count_parameters(expand(net, "CL", expand_image=True, initial="fresh")) == 4_958_348


class Fit(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(net: nn.Module, images: Tensor) -> list[str]:
    """Warnings of ExpandNet in a fit of one step."""
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, callbacks=[ExpandNet()])  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Fit(net), torch.utils.data.DataLoader(images, batch_size=len(images)))
    return [str(warning.message) for warning in caught if "composing" in str(warning.message)]


def wide() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(1024, 2)
    )


def test_composing_is_counted_as_by_hand() -> None:
    net = expand(wide())
    # W1 into W2, then W3: r m * m * r n * 9 + r n * m * 9 * n, with r = 4.
    first = 16 * 4 * 64 * 9 + 64 * 4 * 9 * 16
    second = 64 * 16 * 64 * 9 + 64 * 16 * 9 * 16
    assert composing_macs([net[0], net[1]]) == first + second == 811_008


def test_a_fit_whose_steps_composing_lengthens_says_by_how_much() -> None:
    """The network of a batch of 4: 4 * 64 * 9 * (4 * 16 + 16 * 16) + 4 * 1024 * 2 = 745,472 multiply-adds."""
    (message,) = fit(wide(), torch.randn(4, 4, 8, 8))
    assert "0.000811 G multiply-adds of every step, the network itself 0.000745 G" in message
    assert "about 2.1 times a plain one" in message


def test_a_fit_whose_steps_composing_hardly_lengthens_says_nothing() -> None:
    assert fit(wide(), torch.randn(48, 4, 8, 8)) == []
