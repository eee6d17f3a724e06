"""Images and batches that are refused."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_filterdiv import (
    EntropyDepthBound,
)
from lightning_filterdiv.channel_importance import insert_gates, measure_importance
from lightning_filterdiv.entropy_depth import estimate_depth_bound
from lightning_filterdiv.entropy_depth.images import ImageDataError
from lightning_filterdiv.wavelet import WaveletReconstruction
from tests.suites.wrong_uses.row import Row
from tests.suites.wrong_uses.support import (
    net,
)
from tests.support.training import fit

DATA: list[Row] = [
    Row(
        "no images at all",
        lambda: estimate_depth_bound(torch.zeros(0, 1, 8, 8)),
        ImageDataError,
        "Tensor of shape (0, 1, 8, 8): no image came, there is nothing to measure; check the folder, split or indices",
    ),
    Row(
        "numbers instead of images",
        lambda: estimate_depth_bound(torch.zeros(10)),
        ImageDataError,
        "Tensor of shape (10,) holds no images: they need at least height and width",
    ),
    Row(
        "a path instead of images",
        lambda: estimate_depth_bound("images"),
        ImageDataError,
        "cannot find images in str: give a tensor (N, ...), a data set, a DataLoader or a LightningDataModule",
    ),
    Row(
        "vectors in a data set",
        lambda: estimate_depth_bound(TensorDataset(torch.zeros(4, 7), torch.zeros(4))),
        ImageDataError,
        "items of TensorDataset hold no images: an item has (7,) float32, () float32. Give a data set of images, or a "
        "loader whose batches hold them as a tensor (N, ...) with two or more dimensions per image",
    ),
    Row(
        "vectors in a list",
        lambda: estimate_depth_bound([torch.zeros(3)]),
        ImageDataError,
        "items of list hold no images: an item has (3,) float32. Give a data set of images, or a loader whose batches "
        "hold them as a tensor (N, ...) with two or more dimensions per image",
    ),
    Row(
        "an empty list",
        lambda: estimate_depth_bound([]),
        ImageDataError,
        "items of list: no image came, there is nothing to measure; check the folder, split or indices",
    ),
    Row(
        "text from a loader",
        lambda: estimate_depth_bound(DataLoader(["a", "b"])),
        ImageDataError,
        "batches of a DataLoader over list hold no images: a batch has str. Give a data set of images, or a loader "
        "whose batches hold them as a tensor (N, ...) with two or more dimensions per image",
    ),
    Row(
        "images with NaN",
        lambda: estimate_depth_bound(torch.full((2, 8, 8), float("nan"))),
        ImageDataError,
        "Tensor of shape (2, 8, 8), in the 2 images after the first 0: image 0 holds NaN: it has no entropy. Repair "
        "or remove it",
    ),
    Row(
        "complex images",
        lambda: estimate_depth_bound(torch.zeros(2, 8, 8, dtype=torch.complex64)),
        TypeError,
        "images must be real numbers, got torch.complex64; measure their absolute values",
    ),
    Row(
        "vectors in training",
        lambda: fit([EntropyDepthBound()], loader=[(torch.zeros(4, 7), torch.zeros(4).long())]),
        ImageDataError,
        "batches of list hold no images: a batch has (4, 7) float32, (4,) int64. Give a data set of images, or a "
        "loader whose batches hold them as a tensor (N, ...) with two or more dimensions per image",
    ),
    Row(
        "batches that come once",
        lambda: fit([EntropyDepthBound()], loader=iter([(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())])),
        ImageDataError,
        "list_iterator can be read only once, and measuring would leave nothing to train on. Measure another copy with "
        "estimate_depth_bound, and train without EntropyDepthBound",
    ),
    Row(
        "batches of numbers for gates",
        lambda: measure_importance(insert_gates(net()), [3]),
        TypeError,
        "a batch must be a tensor (B, C, H, W) or a tuple that begins with one, got int",
    ),
    Row(
        "no batch for gates",
        lambda: measure_importance(insert_gates(net()), []),
        ValueError,
        "batches holds no images to measure importance on; give at least one batch",
    ),
    Row(
        "integers into a wavelet",
        lambda: WaveletReconstruction(wavelet="haar")(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
        TypeError,
        "WaveletReconstruction takes floating tensors, got torch.uint8; convert images first",
    ),
    Row(
        "a matrix into a wavelet",
        lambda: WaveletReconstruction(wavelet="haar")(torch.zeros(8, 8)),
        ValueError,
        "WaveletReconstruction takes (B, C, H, W) or (C, H, W), got (8, 8)",
    ),
    Row(
        "images too small for a wavelet",
        lambda: WaveletReconstruction(wavelet="db4", level=2)(torch.zeros(1, 1, 8, 8)),
        ValueError,
        "images of 8x8 are too small for 'db4' at level=2, which reaches 14 pixels; take a lower level or a shorter "
        "wavelet",
    ),
]
