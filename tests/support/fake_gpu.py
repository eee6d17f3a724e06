"""Fake CUDA tensors on a machine without CUDA: from some release of torch on they need no driver."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def _works() -> bool:
    try:
        with FakeTensorMode():
            torch.nn.Conv2d(3, 3, 3, device="cuda")  # draws random numbers on the device
    except (RuntimeError, AssertionError):
        return False
    return True


needs_fake_gpu = pytest.mark.skipif(not _works(), reason="this torch makes no fake CUDA tensors without a driver")
