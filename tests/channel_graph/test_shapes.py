"""Results on meta that are looked up or inferred are those that the kernels give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph.modules import tensor_names
from lightning_filterdiv.channel_graph.record import operator_name
from lightning_filterdiv.channel_graph.recorder import record
from lightning_filterdiv.channel_graph.shapes import MetaResults

aten = torch.ops.aten


def _meta(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.to(memory_format=torch.channels_last) if last else tensor


_IMAGE, _LAST, _GATE = _meta(2, 8, 5, 6), _meta(2, 8, 5, 6, last=True), _meta(2, 8, 1, 1)
_WHOLE = _meta(2, 8, 5, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.relu.default, (_IMAGE,), {}),
        (aten.hardswish.default, (_LAST,), {}),
        (aten.gelu.default, (_IMAGE,), {"approximate": "tanh"}),
        (aten.mul.Tensor, (_IMAGE, _GATE), {}),
        (aten.mul.Tensor, (_GATE, _LAST), {}),
        (aten.mul.Tensor, (_WHOLE, 2), {}),
        (aten.mul.Tensor, (_WHOLE, 2.0), {}),
        (aten.add.Tensor, (_WHOLE, _IMAGE), {}),
        (aten.add.Tensor, (_meta(2, 1, 6), _meta(3, 1)), {}),
        (aten.add.Tensor, (_WHOLE, _meta()), {}),
        (aten.gt.Scalar, (_IMAGE, 0), {}),
        (aten.relu.default, (_IMAGE.transpose(1, 2),), {}),
        (aten.clone.default, (_LAST,), {"memory_format": torch.contiguous_format}),
        (aten.mean.dim, (_LAST, [2, 3], True), {}),
        (aten.cat.default, ([_IMAGE, _GATE.expand(2, 8, 5, 6)], 1), {}),
        (aten.native_layer_norm.default, (_IMAGE, [6], None, None, 1e-5), {}),
    ],
)
def test_results_are_those_of_the_kernels(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    wanted = func(*args, **kwargs)
    results = MetaResults()
    for _ in range(3):  # made, then looked up
        found = results(func, args, kwargs)
        pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
        for mine, theirs in pairs:
            assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


class _WritesASlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        nn.functional.hardswish(x[:, :4], True)
        nn.functional.relu6(x, inplace=True)
        return x


def test_an_activation_in_place_writes_what_it_is_called_on() -> None:
    model = _WritesASlice()
    made = record(model, ((torch.rand(1, 3, 8, 8),), {}), tensor_names(model))
    names = [operator_name(node, raw=True) for node in made.calls]
    assert names.count("hardswish") == 1
    assert names.count("hardtanh") == 1
    assert "slice_scatter" in names
    assert names.index("hardswish") < names.index("slice_scatter") < names.index("hardtanh")
