"""Figures say and show what they claim."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from lightning_filterdiv.filters import write_filters
from lightning_filterdiv.monitor.activations import in_function_only
from lightning_filterdiv.monitor.events import FilterEvent, collect_deviations, collect_events
from lightning_filterdiv.monitor.figures import (
    channel_heat_map,
    cosine_distribution,
    kernel_mosaic,
    similarity_heat_map,
    to_rgb,
)
from lightning_filterdiv.monitor.functional import Dropped
from lightning_filterdiv.monitor.history_figures import Snapshot, deviation_curves, dropped_filters, network_summary
from lightning_filterdiv.monitor.views import mergeable_filters, similarity_order, view_layer
from lightning_filterdiv.similarity import cosine_similarity, expected_abs_cosine


def texts(figure: Figure) -> str:
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [axes.get_title(loc="left"), axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
        found += [label.get_text() for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]]
    return "\n".join(found)


def layer(rows: torch.Tensor, name: str = "stage.conv") -> Any:
    conv = nn.Conv2d(rows.shape[1], rows.shape[0], 1)
    write_filters(conv, range(len(rows)), rows)
    return view_layer(name, conv)


def test_titles_stay_inside_the_figure() -> None:
    """Long names, many filters, and filters that are out make the longest lines."""
    conv = nn.Conv2d(64, 150, 3)
    view = view_layer("backbone.stage3.block12.a.long.name.conv2", conv, Dropped(range(30)))
    for figure in (similarity_heat_map(view, "after epoch 120"), kernel_mosaic(view, "after epoch 120")):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (heading,) = (text for text in figure.texts if text.get_text() == figure.get_suptitle())
        assert heading.get_window_extent(canvas.get_renderer()).x1 <= figure.bbox.x1


# --------------------------------------------------------------------------- views


def test_order_puts_duplicates_side_by_side() -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 40)
    filters = torch.cat([base, -2 * base])[torch.randperm(12)]
    order = similarity_order(cosine_similarity(filters))
    assert sorted(order) == list(range(12))
    ordered = cosine_similarity(filters).abs()[order][:, order]
    assert int((ordered.diagonal(offset=1) > 0.999).sum()) == 6
    assert similarity_order(torch.eye(2)) == [0, 1]


def test_mergeable_filters_form_groups_whose_pairs_are_all_alike() -> None:
    """Five directions 10 degrees apart: neighbours are alike at 0.98, but a chain of them is not one group."""
    angles = torch.arange(5) * torch.pi / 18
    chain = torch.stack([angles.cos(), angles.sin()], dim=1)
    cosine = cosine_similarity(chain)
    assert mergeable_filters(cosine, 0.98) == 2
    assert mergeable_filters(cosine, 0.7) == 4
    assert mergeable_filters(cosine, 0.99) == 0
    opposite = cosine_similarity(torch.cat([torch.eye(3), -torch.eye(3)]))
    assert mergeable_filters(opposite, 0.9) == 0, "opposite filters compute different things behind a ReLU"
    assert mergeable_filters(torch.ones(1, 1), 0.5) == 0


@pytest.mark.parametrize(
    "conv",
    [nn.Conv1d(4, 6, 5), nn.Conv3d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(4, 1, 3)],
    ids=lambda conv: type(conv).__name__,
)
def test_every_kind_of_convolution_is_drawn(conv: Any) -> None:
    view = view_layer("layer", conv)
    assert view.kernels.shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)
    for figure in (similarity_heat_map(view), kernel_mosaic(view), cosine_distribution([view])):
        assert to_rgb(figure).std() > 5


def test_weights_that_are_not_finite_are_drawn() -> None:
    conv = nn.Conv2d(3, 5, 3)
    conv.weight.data[2] = float("nan")
    conv.weight.data[3] = float("inf")
    view = view_layer("diverged", conv)
    assert bool(view.cosine.isfinite().all())
    for figure in (similarity_heat_map(view), kernel_mosaic(view), cosine_distribution([view])):
        to_rgb(figure)
    to_rgb(network_summary([Snapshot(0, 0, {"a": float("nan")}), Snapshot(1, 5, {"a": float("nan")})]))
    to_rgb(network_summary([Snapshot(0, 0, {"one filter": 0.0})]))


# --------------------------------------------------------------------------- layers


def test_heat_map_says_what_it_shows() -> None:
    filters = torch.eye(4, 9)
    filters[3] = -2 * filters[0]
    figure = similarity_heat_map(layer(filters), "after epoch 3")
    axes, bar = figure.axes
    assert "stage.conv, after epoch 3" in texts(figure)
    assert "4 filters (of 9 weights)" in texts(figure)
    assert "mean |cos| 0.167 = 0.61 x chance" in texts(figure)
    assert "|cos|" in bar.get_ylabel()
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert sorted(np.diag(shown, 1)) == [0, 0, 1], "the pair is side by side"
    assert np.isnan(np.diag(shown)).all(), "a filter is not compared with itself"


def test_the_scale_of_a_heat_map_follows_the_data_and_is_said() -> None:
    """64 random filters of 4608 weights: |cos| 0.012 on average, black on a scale from 0 to 1."""
    torch.manual_seed(0)
    view = layer(torch.randn(64, 4608))
    figure = similarity_heat_map(view)
    low, top = figure.axes[0].images[0].get_clim()
    assert low == 0
    assert top == pytest.approx(np.quantile(view.pairs(), 0.99))
    assert top / view.chance == pytest.approx(3.2, abs=0.4)
    assert f"brightest: {top:.2f} = {top / view.chance:.1f} x or more" in texts(figure)
    assert f"{top:.2f}" in [label.get_text() for label in figure.axes[1].get_yticklabels()]
    pixels = to_rgb(figure)[150:500, 100:450].mean()
    fixed = similarity_heat_map(view)
    fixed.axes[0].images[0].set_clim(0.0, 1.0)
    assert pixels > 2 * to_rgb(fixed)[150:500, 100:450].mean(), "a fixed scale would be black"


def test_what_is_out_is_not_drawn() -> None:
    conv = nn.Conv2d(3, 6, 3)
    view = view_layer("conv", conv, Dropped([1, 4], [0]))
    assert (view.count, view.fan_in, view.out, view.numbers) == (4, 18, 2, [0, 2, 3, 5])
    assert torch.equal(view.kernels, conv.weight.detach()[[0, 2, 3, 5]][:, 1:])
    assert "2 are out and do not count" in texts(similarity_heat_map(view))


def test_channels_alike_in_function_are_named() -> None:
    view = layer(torch.eye(4, 9))
    correlation = torch.eye(4, dtype=torch.float64)
    correlation[0, 2] = correlation[2, 0] = -0.97
    pairs = in_function_only(correlation, view.signed)
    figure = channel_heat_map(view, correlation, pairs, "after epoch 3")
    assert "1 pairs in function only, e.g. 0, 2: 0.97, |cos| 0.00" in texts(figure)
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0)


def test_distribution_is_drawn_over_chance() -> None:
    torch.manual_seed(0)
    views = [layer(torch.randn(30, 27), "first"), layer(torch.randn(20, 64), "second"), layer(torch.ones(1, 3), "one")]
    figure = cosine_distribution(views, "before training")
    (axes,) = figure.axes
    means = [line.get_xdata()[0] for line in axes.lines if line.get_color() == "black"]
    assert means == pytest.approx([views[i].pairs().mean() / expected_abs_cosine(d) for i, d in ((0, 27), (1, 64))])
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() != "-"] == [1.0], "random filters"
    assert "first" in texts(figure)
    assert "one" not in [label.get_text() for label in axes.get_yticklabels()], "one filter has no pair"
    assert f"mean {float(means[0]):.2f} x,  max |cos| {views[0].pairs().max():.2f}" in texts(figure)


def test_colour_kernels_are_shown_in_colour_and_in_order() -> None:
    conv = nn.Conv2d(3, 4, 2)
    write_filters(conv, range(4), torch.tensor([[1.0] * 4 + [0.0] * 8, [0.0] * 4 + [1.0] * 4 + [0.0] * 4] * 2))
    view = view_layer("rgb", conv)
    figure = kernel_mosaic(view)
    grid = np.asarray(figure.axes[0].images[0].get_array())
    assert grid.shape == (5, 5, 3)
    first, second = grid[0, 0], grid[0, 3]
    assert np.allclose(first, second), "duplicates side by side"
    assert sorted(first.tolist()) == [0.5, 0.5, 1.0]
    assert np.allclose(grid[2], 1.0), "white gaps"


def test_other_kernels_are_projected_on_the_main_input_direction() -> None:
    torch.manual_seed(0)
    pattern, direction = torch.randn(6, 3, 3), torch.randn(5).abs()
    conv = nn.Conv2d(5, 6, 3)
    write_filters(conv, range(6), torch.einsum("jhw,c->jchw", pattern, direction).flatten(1))
    view = view_layer("deep", conv)
    grid = np.asarray(kernel_mosaic(view).axes[0].images[0].get_array())
    expected = pattern[view.order[0]] * direction.norm()
    assert np.allclose(grid[:3, :3], expected.numpy(), atol=1e-4)


def test_many_kernels_are_thinned_and_pointwise_ones_are_rows() -> None:
    view = view_layer("wide", nn.Conv2d(40, 300, 1))
    figure = kernel_mosaic(view)
    assert "256 of 300 kernels 1x1" in texts(figure)
    assert figure.axes[0].images[0].get_array().shape == (256, 32)


# --------------------------------------------------------------------------- history


EVENTS = [
    FilterEvent("RePr", "drop", 1, 2, 40, {"a": [1, 2], "b": [0]}),
    FilterEvent("RePr", "regrow", 1, 3, 60, {"a": [1, 2], "b": [0]}),
    FilterEvent("RePr", "drop", 2, 5, 100, {"a": [2, 3]}),
]
DEVIATIONS = {"a": [(0, 1.0, 1.0), (50, 0.02, 0.01), (100, 0.0, 1e-4)], "b": [(0, 0.5, 0.5), (100, 1e-3, 2e-3)]}
LOOKS = [Snapshot(epoch, 20 * epoch, {"a": 3.0 - 0.2 * epoch, "b": 1.0}) for epoch in (0, 1, 2, 4, 6)]


def test_summary_has_a_row_per_layer_the_total_and_a_line_per_event() -> None:
    figure = network_summary(LOOKS, EVENTS)
    axes, beside = figure.axes[:2]
    mesh = axes.collections[0]
    assert np.allclose(np.asarray(mesh.get_array()).reshape(2, 5)[0], np.log2([3.0, 2.8, 2.6, 2.2, 1.8]))
    edges = mesh.get_coordinates()[0, :, 0]
    assert edges.tolist() == [-0.5, 0.5, 1.5, 2.5, 4.5, 6.5]
    assert sorted({float(line.get_xdata()[0]) for line in axes.lines}) == [2.5, 3.5, 5.5]
    assert [text.get_text() for text in axes.texts] == ["drop", "regrow", "drop"]
    total = beside.lines[0]
    assert list(total.get_xdata()) == [0, 1, 2, 4, 6]
    assert list(total.get_ydata()) == pytest.approx([2.0, 1.9, 1.8, 1.6, 1.4])
    assert "all layers: 2.00 x → 1.40 x;  red: RePr" in texts(figure)
    assert "colour: mean |cos| over chance" in texts(figure)
    assert {"a", "b"} <= {label.get_text() for label in axes.get_yticklabels()}


def test_summary_tells_layers_far_apart() -> None:
    """A layer at 15 times chance does not darken one at 2 times beside one at 1 time."""
    figure = network_summary([Snapshot(0, 0, {"deep": 15.0, "two": 2.0, "one": 1.0, "single": 0.0})])
    mesh = figure.axes[0].collections[0]
    colours = mesh.cmap(mesh.norm(np.log2([15.0, 2.0, 1.0])))[:, :3]
    assert np.abs(colours[1] - colours[2]).max() > 0.15
    assert "all layers: 6.00 x" in texts(figure), "a layer without a pair does not count"


@pytest.mark.parametrize("layers", [1, 3, 20, 200])
def test_summary_fills_a_card_of_time_series(layers: int) -> None:
    """Its images have this shape, and a picture is shown whole."""
    looks = [Snapshot(epoch, epoch, {f"layer{i}": 1.0 for i in range(layers)}) for epoch in (0, 3, 6)]
    height, width, _ = to_rgb(network_summary(looks, EVENTS, DEVIATIONS)).shape
    assert width / height == pytest.approx(1.8, abs=0.05)


def test_summary_names_at_most_a_dozen_layers_without_the_modules_they_share() -> None:
    few = network_summary([Snapshot(0, 0, {"net.stem": 1.0, "net.block.0.conv": 1.1})])
    assert [label.get_text() for label in few.axes[0].get_yticklabels()] == ["stem", "block.0.conv"]
    many = network_summary([Snapshot(0, 0, {f"net.blocks.{k}.conv": 1.0 for k in range(30)})])
    assert [label.get_text() for label in many.axes[0].get_yticklabels()] == [f"{k}.conv" for k in range(0, 30, 3)]
    nested = network_summary([Snapshot(0, 0, {"net.a": 1.0, "net.a.inner": 1.0})])
    assert [label.get_text() for label in nested.axes[0].get_yticklabels()] == ["a", "a.inner"]


def test_summary_shows_the_deviation() -> None:
    figure = network_summary(LOOKS, (), DEVIATIONS)
    lower = figure.axes[2]
    measured, forecast = lower.lines
    assert lower.get_yscale() == "log"
    assert list(measured.get_xdata()) == [0, 2.5, 5]
    assert list(measured.get_ydata()) == [1.0, 0.02, 1e-3], "the largest of all layers"
    assert list(forecast.get_ydata()) == [1.0, 0.01, 2e-3]


def test_colours_go_by_depth_and_a_legend_names_layers() -> None:
    names = [f"layer{index}" for index in range(20)]
    figure = deviation_curves({name: [(0, 1.0, 1.0), (9, 0.1, 0.1)] for name in reversed(names)}, names)
    assert figure is not None
    solid = figure.axes[0].lines[::2]
    assert len(solid) == 20
    green = [line.get_color()[1] for line in solid]
    assert green == sorted(green), "dark to bright from the first layer to the last"
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert len(legend) == 12
    assert (legend[0], legend[-1]) == ("layer0", "layer19")
    assert "12 of 20 layers are named" in texts(figure)


def test_dropped_filters_are_cells() -> None:
    figure = dropped_filters(EVENTS, {"a": 6})
    assert figure is not None
    tables = [np.asarray(axes.collections[0].get_array()).reshape(2, -1) for axes in figure.axes]
    assert tables[0].tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
    assert tables[1].tolist() == [[1], [0]]
    assert "a: 3 of 6 filters were dropped, 1 more than once" in texts(figure)
    assert "cycle 2" in texts(figure)
    assert len(dropped_filters(EVENTS, {}, max_layers=1).axes) == 1
    assert dropped_filters(EVENTS[1:2], {}) is None


def test_deviation_against_its_forecast() -> None:
    figure = deviation_curves(DEVIATIONS)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    solid, dashed = axes.lines[:2]
    assert list(solid.get_ydata()) == [1.0, 0.02, 1e-9], "exactly 0 stays on the axis"
    assert list(dashed.get_ydata()) == [1.0, 0.01, 1e-4]
    assert dashed.get_linestyle() == "--"
    assert solid.get_color() == dashed.get_color()
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]
    assert deviation_curves({}) is None
    to_rgb(figure)


def test_events_are_asked_for_by_name() -> None:
    class Reports:
        def filterdiv_events(self) -> list[dict[str, Any]]:
            return [event._asdict() for event in EVENTS]

        def filterdiv_deviation(self) -> dict[str, Any]:
            return DEVIATIONS | {"empty": []}

    class Broken:
        def filterdiv_events(self) -> list[dict[str, Any]]:
            return [{"kind": "drop", "cycle": 1, "epoch": 2, "step": 3}]

    assert [event.kind for event in collect_events([object(), Reports()])] == ["drop", "regrow", "drop"]
    assert collect_events([Reports()])[0].source == "Reports"
    assert collect_deviations([object(), Reports()]) == DEVIATIONS
    with pytest.raises(ValueError, match=r"Broken.filterdiv_events\(\) reports an event without 'filters'"):
        collect_events([Broken()])


@pytest.mark.parametrize("name", ["x" * 80, "a.b"])
def test_names_of_any_length_leave_room_for_the_picture(name: str) -> None:
    figure = network_summary([Snapshot(0, 0, {name: 0.1}), Snapshot(1, 9, {name: 0.2})])
    to_rgb(figure)
    assert figure.axes[0].get_position().width > 0.3


def test_figures_are_freed() -> None:
    gc.collect()
    before = sum(type(thing) is Figure for thing in gc.get_objects())
    view = layer(torch.eye(4, 9))
    for _ in range(5):
        to_rgb(similarity_heat_map(view))
    gc.collect()
    assert sum(type(thing) is Figure for thing in gc.get_objects()) == before
