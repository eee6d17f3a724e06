"""Heat maps side by side show each layer in its own order, on one scale."""

from __future__ import annotations

import pytest
import torch

from lightning_filterdiv.monitor.comparison import compare_heat_maps
from lightning_filterdiv.monitor.figures import heat_map_top
from lightning_filterdiv.monitor.views import view_layer


def test_maps_stand_side_by_side_on_one_scale() -> None:
    torch.manual_seed(0)
    diverse, alike = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(4, 6, 3)
    with torch.no_grad():
        alike.weight[3:] = alike.weight[:3]
    views = {"before": view_layer("conv", alike), "after": view_layer("conv", diverse)}
    figure = compare_heat_maps(views)
    before, after, _ = figure.axes
    assert [axes.get_title(loc="left").splitlines()[0] for axes in (before, after)] == ["before", "after"]
    assert f"mean |cos| {views['after'].pairs().mean():.3f} = " in after.get_title(loc="left")
    shown = torch.from_numpy(before.images[0].get_array().filled())
    order = views["before"].order
    assert torch.equal(shown, views["before"].cosine[order][:, order])
    assert int((shown.diagonal(offset=1) > 0.999).sum()) == 3  # three pairs of duplicates, side by side
    assert before.images[0].get_clim() == after.images[0].get_clim()
    assert before.images[0].get_clim()[1] == max(map(heat_map_top, views.values()))


def test_a_layer_of_one_filter_and_no_layer() -> None:
    assert len(compare_heat_maps({"one": view_layer("conv", torch.nn.Conv2d(1, 1, 3))}).axes) == 2
    with pytest.raises(ValueError, match="views is empty"):
        compare_heat_maps({})
