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
        "Tensor of shape (0, 1, 8, 8)",
        "check the folder, split or indices",
    ),
    Row(
        "numbers instead of images",
        lambda: estimate_depth_bound(torch.zeros(10)),
        ImageDataError,
        "shape (10,)",
        "at least height and width",
    ),
    Row(
        "a path instead of images",
        lambda: estimate_depth_bound("images"),
        ImageDataError,
        "str",
        "a DataLoader",
    ),
    Row(
        "vectors in a data set",
        lambda: estimate_depth_bound(TensorDataset(torch.zeros(4, 7), torch.zeros(4))),
        ImageDataError,
        "TensorDataset",
        "Give a data set of images",
    ),
    Row(
        "vectors in a list",
        lambda: estimate_depth_bound([torch.zeros(3)]),
        ImageDataError,
        "(3,) float32",
        "Give a data set of images",
    ),
    Row(
        "an empty list",
        lambda: estimate_depth_bound([]),
        ImageDataError,
        "items of list",
        "check the folder, split or indices",
    ),
    Row(
        "text from a loader",
        lambda: estimate_depth_bound(DataLoader(["a", "b"])),
        ImageDataError,
        "DataLoader over list",
        "Give a data set of images",
    ),
    Row(
        "images with NaN",
        lambda: estimate_depth_bound(torch.full((2, 8, 8), float("nan"))),
        ImageDataError,
        "image 0",
        "Repair or remove it",
    ),
    Row(
        "complex images",
        lambda: estimate_depth_bound(torch.zeros(2, 8, 8, dtype=torch.complex64)),
        TypeError,
        "torch.complex64",
        "absolute values",
    ),
    Row(
        "vectors in training",
        lambda: fit([EntropyDepthBound()], loader=[(torch.zeros(4, 7), torch.zeros(4).long())]),
        ImageDataError,
        "(4, 7) float32",
        "Give a data set of images",
    ),
    Row(
        "batches that come once",
        lambda: fit([EntropyDepthBound()], loader=iter([(torch.zeros(4, 1, 8, 8), torch.zeros(4).long())])),
        ImageDataError,
        "list_iterator",
        "Measure another copy with estimate_depth_bound",
    ),
    Row(
        "batches of numbers for gates",
        lambda: measure_importance(insert_gates(net()), [3]),
        TypeError,
        "int",
        "a tuple that begins with one",
    ),
    Row(
        "no batch for gates",
        lambda: measure_importance(insert_gates(net()), []),
        ValueError,
        "batches",
        "give at least one batch",
    ),
    Row(
        "integers into a wavelet",
        lambda: WaveletReconstruction(wavelet="haar")(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
        TypeError,
        "torch.uint8",
        "convert images first",
    ),
    Row(
        "a matrix into a wavelet",
        lambda: WaveletReconstruction(wavelet="haar")(torch.zeros(8, 8)),
        ValueError,
        "(8, 8)",
        "(B, C, H, W)",
    ),
    Row(
        "images too small for a wavelet",
        lambda: WaveletReconstruction(wavelet="db4", level=2)(torch.zeros(1, 1, 8, 8)),
        ValueError,
        "8x8",
        "lower level or a shorter wavelet",
    ),
]
