"""Wavelet layers against PyWavelets, SciPy and loops."""

from __future__ import annotations

import builtins
from itertools import product
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from scipy import ndimage
from torch import nn

from lightning_filterdiv.demo import Digits
from lightning_filterdiv.wavelet import WaveletModulusMaxima, WaveletReconstruction, dilated_details, local_maxima
from lightning_filterdiv.wavelet.functional import filters_of

BANDS = ["approximation", "horizontal", "vertical", "diagonal"]


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(28, 28), (15, 21)])
@pytest.mark.parametrize(("wavelet", "level"), [("haar", 1), ("db2", 2), ("bior2.2", 1), ("db4", 1)])
def test_all_bands_are_the_image(wavelet: str, level: int, size: tuple[int, int]) -> None:
    x = images(2, 3, *size)
    y = WaveletReconstruction(keep=BANDS, wavelet=wavelet, level=level)(x)  # type: ignore[arg-type]
    assert float((x - y).abs().max()) <= 1e-12


@pytest.mark.parametrize("keep", [["horizontal"], ["vertical", "diagonal"], ["approximation"], None])
def test_against_pywavelets(keep: Any) -> None:
    x = images(2, 3, 17, 22)
    found = WaveletReconstruction(keep=keep, wavelet="db2", level=2)(x)
    names = keep or BANDS[1:]
    parts = pywt.wavedec2(x.numpy(), "db2", mode="symmetric", level=2)
    kept = [parts[0] * ("approximation" in names)]
    kept += [tuple(b * (n in names) for n, b in zip(BANDS[1:], bands, strict=True)) for bands in parts[1:]]
    expected = pywt.waverec2(kept, "db2", mode="symmetric")[..., :17, :22]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_bands_add_up_and_details_see_no_constant() -> None:
    x = images(1, 1, 16, 16)
    parts = [WaveletReconstruction(keep=[band], level=1)(x) for band in BANDS]  # type: ignore[list-item]
    torch.testing.assert_close(torch.stack(parts).sum(0), x, rtol=0, atol=1e-12)
    assert float(WaveletReconstruction()(torch.full_like(x, 3.0)).abs().max()) < 1e-12
    assert float(WaveletModulusMaxima()(torch.full_like(x, 3.0)).abs().max()) < 1e-12


@pytest.mark.parametrize(("wavelet", "level"), [("haar", 1), ("haar", 3), ("db2", 2)])
def test_details_against_scipy(wavelet: str, level: int) -> None:
    x = images(2, 3, 18, 15)
    low, high = filters_of(wavelet)

    def along(values: Any, taps: torch.Tensor, dilation: int, axis: int) -> Any:
        spread = np.zeros(dilation * (len(taps) - 1) + 1)
        spread[::dilation] = taps.numpy()
        total = len(spread) - 1
        # SciPy centres a filter of length n at n // 2; ours has total // 2 pixels before.
        shift = total // 2 - (len(spread) - 1 - len(spread) // 2)
        return ndimage.convolve1d(values, spread, axis=axis, mode="nearest", origin=shift)

    expected = x.numpy()
    for step in range(level - 1):
        expected = along(along(expected, low, 2**step, 2), low, 2**step, 3)
    d = 2 ** (level - 1)
    along_x = along(along(expected, low, d, 2), high, d, 3)
    along_y = along(along(expected, high, d, 2), low, d, 3)
    found = dilated_details(x, low, high, level)
    np.testing.assert_allclose(found[0].numpy(), along_x, atol=1e-12)
    np.testing.assert_allclose(found[1].numpy(), along_y, atol=1e-12)


def test_maxima_against_a_loop() -> None:
    gx, gy = images(1, 2, 9, 8), images(1, 2, 9, 8, seed=1)
    found = local_maxima(gx, gy)
    modulus = torch.hypot(gx, gy)
    expected = torch.zeros_like(modulus)
    kept = 0
    for c, y, x in product(range(2), range(9), range(8)):
        angle = float(torch.rad2deg(torch.atan2(gy[0, c, y, x], gx[0, c, y, x]))) % 180
        dy, dx = [(0, 1), (1, 1), (1, 0), (1, -1), (0, 1)][int((angle + 22.5) // 45)]

        def at(j: int, i: int, c: int = c) -> float:
            return float(modulus[0, c, j, i]) if 0 <= j < 9 and 0 <= i < 8 else 0.0

        here = at(y, x)
        if here >= at(y - dy, x - dx) and here > at(y + dy, x + dx):
            expected[0, c, y, x] = here
            kept += 1
    assert torch.equal(found, expected)
    assert 20 < kept < 100


def test_a_step_is_one_line() -> None:
    x = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    x[..., 5:] = 2.0
    edges = WaveletModulusMaxima()(x)[0, 0]
    # Where a convolution's sum of +-2 times the taps is 1e-17 instead of zero depends on the processor.
    assert (edges > 1e-12).sum(1).tolist() == [1] * 12
    assert len({int(row.argmax()) for row in edges}) == 1
    turned = WaveletModulusMaxima()(x.transpose(2, 3))[0, 0]
    torch.testing.assert_close(turned, edges.T)


@pytest.mark.parametrize("layer", [WaveletReconstruction, WaveletModulusMaxima])
def test_as_layer_and_as_transform(layer: Any) -> None:
    x = images(4, 1, 16, 16).float()
    edges = layer()(x)
    assert edges.shape == x.shape
    torch.testing.assert_close(layer()(x[1]), edges[1])
    torch.testing.assert_close(layer(output="add")(x), x + edges)
    torch.testing.assert_close(layer(output="append")(x), torch.cat([x, edges], 1))
    assert not list(layer().state_dict())
    assert layer()(x.half()).dtype == torch.float16
    network = nn.Sequential(layer(output="append"), nn.Conv2d(2, 3, 3))
    x.requires_grad_()
    network(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().max()) > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer()(x), edges)


@pytest.mark.parametrize(
    ("layer", "options", "error", "message"),
    [
        (WaveletReconstruction, {"wavelet": "hair"}, ValueError, "wavelet must be a discrete wavelet"),
        (WaveletReconstruction, {"wavelet": 3}, TypeError, "wavelet must be a name"),
        (WaveletReconstruction, {"level": 0}, ValueError, "level must be an integer >= 1"),
        (WaveletReconstruction, {"output": "glue"}, ValueError, "output must be one of"),
        (WaveletReconstruction, {"keep": []}, TypeError, "keep must be a non-empty list"),
        (WaveletReconstruction, {"keep": "horizontal"}, TypeError, "keep must be a non-empty list"),
        (WaveletReconstruction, {"keep": ["upwards"]}, ValueError, "keep may hold 'approximation'"),
        (WaveletModulusMaxima, {"wavelet": "mexh"}, ValueError, "wavelet must be a discrete wavelet"),
    ],
)
def test_wrong_arguments(layer: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer(**options)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), TypeError, "convert images first"),
        (np.zeros((1, 8, 8)), TypeError, "got ndarray"),
        (torch.zeros(8, 8), ValueError, "takes \\(B, C, H, W\\)"),
        (torch.zeros(1, 1, 8, 6), ValueError, "too small for 'db2' at level=2"),
    ],
)
def test_wrong_inputs(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        WaveletReconstruction(level=2)(x)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def blocked(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "ptwt":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ImportError, match=r"lightning-filterdiv\[wavelets\]"):
        WaveletReconstruction()


def test_a_data_module_transforms_its_images_once() -> None:
    plain, enhanced = Digits(seed=3), Digits(seed=3, transform=WaveletReconstruction(output="add"))
    plain.setup()
    enhanced.setup()
    for before, after in ((plain._train, enhanced._train), (plain._test, enhanced._test)):
        assert before is not None
        assert after is not None
        expected = WaveletReconstruction(output="add")(before.tensors[0])
        torch.testing.assert_close(after.tensors[0], expected)
        assert not torch.equal(after.tensors[0], before.tensors[0])
    with pytest.raises(ValueError, match=r"must keep the shape \(1, 8, 8\) of images, WaveletReconstruction made \(2,"):
        Digits(transform=WaveletReconstruction(output="append")).setup()
