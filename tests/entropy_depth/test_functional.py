"""Entropy against hand-made values and scikit-image, the rounding rule, the statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import shannon_entropy
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_filterdiv.entropy_depth import functional, image_entropy
from lightning_filterdiv.entropy_depth.functional import EntropyStatistics, Measurement, depth_from_entropy
from tests.support.fake_gpu import needs_fake_gpu

DTYPES = [
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_made_images(dtype: torch.dtype) -> None:
    constant = torch.full((16, 16), 7).to(dtype)
    halves = torch.tensor([3, 90]).repeat(128).view(16, 16).to(dtype)
    uniform = torch.arange(256).view(16, 16).to(dtype)
    entropy = image_entropy(torch.stack([constant, halves, uniform]))
    assert entropy.dtype == torch.float64
    assert entropy.tolist() == pytest.approx([0, math.log(2), math.log(256)], abs=1e-12)
    assert str(float(entropy[0])) == "0.0"


def test_bool_and_negative_zero() -> None:
    assert float(image_entropy(torch.tensor([[True, False]]))) == pytest.approx(math.log(2))
    assert float(image_entropy(torch.tensor([[0.0, -0.0]]))) == 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    levels=st.integers(1, 256),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_scikit_image(seed: int, shape: tuple[int, ...], levels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, levels, shape, generator=generator).to(dtype)
    expected = [shannon_entropy(image.double().numpy(), base=math.e) for image in images]
    assert image_entropy(images).tolist() == pytest.approx(expected, abs=1e-12)


def test_equals_scikit_image_on_continuous_values() -> None:
    images = np.random.default_rng(0).normal(size=(20, 3, 13, 11))
    images[:, :, :4] = np.round(images[:, :, :4], 1)
    for array in (images, images.astype(np.float32)):
        expected = [shannon_entropy(image, base=math.e) for image in array]
        assert image_entropy(torch.from_numpy(array)).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_chunks_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 200, (37, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = image_entropy(images)
    monkeypatch.setattr(functional, "_CHUNK", 1000)
    assert torch.equal(image_entropy(images), whole)
    assert torch.equal(image_entropy(images.permute(0, 2, 3, 1)), whole), "the layout plays no part"


def test_scaling_leaves_it_unchanged() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert image_entropy(images.float() / 255).tolist() == pytest.approx(image_entropy(images).tolist(), abs=1e-12)


def test_normalising_per_channel_raises_it() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    mean, std = torch.tensor([0.49, 0.48, 0.45]).view(3, 1, 1), torch.tensor([0.25, 0.24, 0.26]).view(3, 1, 1)
    normalised = (images.float() / 255 - mean) / std
    assert bool((image_entropy(normalised) > image_entropy(images) + 0.3).all())


@needs_fake_gpu
def test_devices_are_not_mixed() -> None:
    """On fake GPU tensors: histograms are made where the images are."""
    with FakeTensorMode():
        for dtype in (torch.uint8, torch.int32):
            images = torch.zeros(3, 8, 8, dtype=dtype, device="cuda")
            with pytest.raises(Exception, match="bincount"):  # its size depends on data, which fake tensors lack
                image_entropy(images)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"must be \(N, ...\)"),
        (torch.zeros(3, 0, 4), ValueError, "must have entries"),
        (torch.zeros(2, 4, dtype=torch.complex64), TypeError, "must be real numbers"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), ValueError, "image 1 holds NaN"),
        (torch.tensor([[math.inf, 1.0]]), ValueError, "image 0 holds infinite values"),
    ],
)
def test_wrong_images(images: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        image_entropy(images)


def test_no_images_give_no_entropies() -> None:
    assert image_entropy(torch.zeros(0, 3, 4)).shape == (0,)


def test_statistics_do_not_depend_on_the_parts() -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e3
    statistics = EntropyStatistics()
    for part in values.split([1, 0, 300, 699]):
        statistics.add(part)
    assert statistics.count == 1000
    assert statistics.mean == pytest.approx(float(values.mean()), rel=1e-13)
    assert statistics.std == pytest.approx(float(values.std(correction=0)), rel=1e-9)
    assert EntropyStatistics().std == 0


@pytest.mark.parametrize(
    ("entropy", "ceil", "floor", "nearest"),
    [
        (0.0, 1, 1, 1),
        (2.853, 3, 2, 3),
        (2.5, 3, 2, 3),
        (math.log(256), 6, 5, 6),
        (8 + 1e-14, 8, 8, 8),
        (8 - 1e-14, 8, 8, 8),
    ],
)
def test_rounding(entropy: float, ceil: int, floor: int, nearest: int) -> None:
    assert depth_from_entropy(entropy) == ceil
    assert depth_from_entropy(entropy, "floor") == floor
    assert depth_from_entropy(entropy, "round") == nearest


def test_units() -> None:
    measured = Measurement(math.log(16), math.log(2), 1500, "drawings", ("blurred",))
    nats, bits = measured.bound(), measured.bound("bits", "floor")
    assert (nats.bound, bits.bound) == (3, 4)
    assert bits.entropy == pytest.approx(4)
    assert bits.std == pytest.approx(1)
    assert bits.describe() == (
        "entropy 4.000 ± 1.000 bits (mean and deviation over 1,500 images: drawings). "
        "Bound: at most 4 convolutions per stage (heuristic, see docs).\nnote: blurred"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: depth_from_entropy(2.0, "up"), "rounding must be one of"),  # type: ignore[arg-type]
        (lambda: depth_from_entropy(-1.0), "entropy must be a finite number >= 0"),
        (lambda: depth_from_entropy(math.nan), "entropy must be a finite number >= 0"),
        (lambda: Measurement(1, 0, 1).bound("bytes"), "unit must be one of"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
