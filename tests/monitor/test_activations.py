"""Correlations between channels, against a plain computation in float64. Measuring them changes nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_filterdiv import FilterSimilarityMonitor, RePr
from lightning_filterdiv.filters import select_filters
from lightning_filterdiv.monitor import ChannelRedundancy
from lightning_filterdiv.monitor.activations import (
    ACTIVATION_METRICS,
    ChannelMoments,
    channel_redundancy,
    in_function_only,
    measure_channels,
)
from lightning_filterdiv.monitor.functional import Dropped
from lightning_filterdiv.similarity import cosine_similarity
from tests.support.training import Classifier, batches, differing, fit


def plain(outputs: list[Tensor]) -> dict[str, float]:
    """Everything at once, in float64: correlation matrix, its mean, singular values of the standardised channels."""
    columns = torch.cat([batch.double().transpose(0, 1).flatten(1) for batch in outputs], dim=1)
    centred = columns - columns.mean(dim=1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    rows = torch.where(norm > 1e-7 * columns.mean(dim=1, keepdim=True).abs(), centred / norm, 0.0)
    overlap = (rows @ rows.mT).abs().fill_diagonal_(0.0)
    count = len(overlap)
    values = torch.linalg.svdvals(rows)
    share = values[values > 0] / values.sum()
    return {
        "mean_abs_correlation": float(overlap.sum() / (count * (count - 1))),
        "channel_effective_rank": float(torch.exp(-(share * share.log()).sum())) / count,
        "channel_twins": float((overlap.amax(dim=1) > 0.9).double().mean()),
    }


class Twins(nn.Module):
    """Two layers; channels 1 and 2 of the second are one, up to scale and rounding, from different weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(6, 8, 1)
        with torch.no_grad():
            # Channel 3 of the first layer doubles channel 2: reading the one or the other is the same function.
            self.first.weight[3], self.first.bias[3] = self.first.weight[2], self.first.bias[2]
            self.second.weight[1:3] = 0.0
            self.second.weight[1, 2], self.second.weight[2, 3] = 1.0, -2.0

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.second(torch.relu(self.drop(self.norm(self.first(images)))))
        return hidden


def _outputs(network: nn.Module, layers: dict[str, Any], inputs: list[Tensor]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        conv.register_forward_hook(lambda *call, name=name: seen[name].append(call[-1]))
        for name, conv in layers.items()
    ]
    network.eval()
    with torch.no_grad():
        for part in inputs:
            network(part)
    for handle in handles:
        handle.remove()
    return seen


def test_streamed_numbers_equal_a_plain_computation_in_float64() -> None:
    network = Twins()
    layers: dict[str, Any] = select_filters(network)
    inputs = [torch.randn(size, 3, 9, 7) + 1 for size in (5, 1, 8)]
    correlations = measure_channels(network, layers, lambda: [network(part) for part in inputs])
    cosines = {name: cosine_similarity(conv.weight.detach().flatten(1)) for name, conv in layers.items()}
    measured = channel_redundancy(correlations, cosines)
    for name, outputs in _outputs(network, layers, inputs).items():
        expected = plain(outputs)
        for metric, value in expected.items():
            assert measured[name][metric] == pytest.approx(value, abs=1e-6), (name, metric)
    assert measured["second"]["channel_twins"] >= 2 / 8
    assert measured["second"]["twins_in_function_only"] >= 2 / 8
    assert measured["first"]["twins_in_function_only"] == 0, "its twins are twins in their weights"
    pairs = {(p.first, p.second): p for p in in_function_only(correlations["second"], cosines["second"])}
    assert pairs[1, 2].correlation == pytest.approx(-1, abs=1e-6)
    assert pairs[1, 2].cosine == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_large_means_and_scales_lose_nothing(scale: float, offset: float) -> None:
    """Sums of squares would: the deviation is a millionth of the mean."""
    torch.manual_seed(0)
    outputs = [(torch.randn(4, 5, 30, dtype=torch.float64) + offset) * scale for _ in range(6)]
    moments = ChannelMoments()
    for batch in outputs:
        moments.update(batch)
    assert moments.moments is not None
    correlation = moments.moments.correlation()
    measured = channel_redundancy({"a": correlation}, {"a": correlation})["a"]
    for metric, value in plain(outputs).items():
        assert measured[metric] == pytest.approx(value, abs=1e-6), metric


def test_chunks_and_vectors_and_constant_channels() -> None:
    torch.manual_seed(0)
    long, whole = torch.randn(2, 3, 40_000), ChannelMoments()
    long[:, 1] = 7.0
    whole.update(long)
    parts = ChannelMoments()
    for part in long.split(1000, dim=2):
        parts.update(part)
    assert whole.moments is not None
    assert parts.moments is not None
    assert torch.allclose(whole.moments.correlation(), parts.moments.correlation(), atol=1e-12)
    assert whole.moments.correlation()[1].tolist() == [0, 0, 0], "a constant channel correlates with nothing"
    vectors = ChannelMoments()
    vectors.update(torch.randn(50, 4))
    assert vectors.moments is not None
    assert vectors.moments.positions == 50
    broken = ChannelMoments()
    broken.update(torch.full((2, 2, 3), torch.nan))
    assert broken.moments is not None
    matrix = broken.moments.correlation()
    assert all(value != value for value in channel_redundancy({"a": matrix}, {"a": matrix})["a"].values())


def test_layers_of_one_width_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    original = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: calls.append(tuple(matrix.shape)) or original(matrix))
    matrices = {name: torch.eye(width, dtype=torch.float64) for name, width in (("a", 4), ("b", 6), ("c", 4))}
    assert list(channel_redundancy(matrices, matrices)) == ["a", "b", "c"]
    assert calls == [(2, 4, 4), (1, 6, 6)]


def test_dropped_channels_do_not_count() -> None:
    network, images = Twins(), torch.randn(4, 3, 8, 8)
    layers: dict[str, Any] = select_filters(network)
    correlations = measure_channels(network, layers, lambda: network(images), {"second": Dropped([1, 5])})
    whole = measure_channels(network, layers, lambda: network(images))
    kept = [0, 2, 3, 4, 6, 7]
    assert torch.equal(correlations["second"], whole["second"][kept][:, kept])
    assert torch.equal(correlations["first"], whole["first"])


def test_measuring_leaves_the_network_as_it_was() -> None:
    network = Twins().train()
    network.norm.eval()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()

    def fails() -> None:
        network(torch.rand(2, 3, 5, 5))
        torch.rand(1)
        network.norm.running_mean.add_(1)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        measure_channels(network, select_filters(network), fails)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == [True, True, False, True, True]
    assert not differing(before, network.state_dict())
    assert not network.first._forward_hooks


def test_layers_inside_a_compiled_network_are_seen() -> None:
    network = Twins()
    compiled = torch.compile(network, backend="eager")
    images = torch.randn(2, 3, 8, 8)
    compiled(images)
    found = measure_channels(network, select_filters(network), lambda: compiled(images))
    assert list(found) == ["first", "second"]


# --------------------------------------------------------------------------- torchmetrics


def test_metric_equals_the_plain_computation_and_joins_ranks() -> None:
    torch.manual_seed(0)
    outputs = [torch.randn(size, 5, 6, 6) + torch.arange(5.0)[:, None, None] for size in (3, 4, 1, 2)]
    for figure, value in plain(outputs).items():
        whole, one, two = (ChannelRedundancy(5, figure) for _ in range(3))
        for batch in outputs:
            whole.update(batch)
        one.update(outputs[0])
        for batch in outputs[1:]:
            two.update(batch)
        assert float(whole.compute()) == pytest.approx(value, abs=1e-6)
        # What torchmetrics does with states of several ranks that have no reduction: they are stacked.
        for name in ("positions", "mean", "products"):
            setattr(one, name, torch.stack([getattr(one, name), getattr(two, name)]))
        one._computed = None
        assert float(one.compute()) == pytest.approx(value, abs=1e-6)
    whole.reset()
    whole.update(outputs[0])
    assert float(whole.compute()) == pytest.approx(plain(outputs[:1])["channel_twins"], abs=1e-6)


def test_wrong_input_of_the_metric() -> None:
    metric = ChannelRedundancy(4)
    with pytest.raises(ValueError, match=r"activations must be \(N, 4, \*positions\), got \(2, 5, 3\)"):
        metric.update(torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="channels must be"):
        ChannelRedundancy(0)
    with pytest.raises(ValueError, match="figure must be one of"):
        ChannelRedundancy(4, "median")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- the callback


class WithExample(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(8, 1, 8, 8)


def _logged(folder: Path) -> list[dict[str, str]]:
    with next(folder.rglob("metrics.csv")).open() as file:
        return [row for row in csv.DictReader(file) if row.get("Filters/mean_abs_correlation")]


def _fixed(model: Classifier, images: Tensor) -> dict[str, dict[str, float]]:
    layers: dict[str, Any] = select_filters(model)
    return {name: plain(outputs) for name, outputs in _outputs(model, layers, [images]).items()}


@pytest.mark.parametrize("sanity", [1, 0])
def test_the_first_validation_batch_is_measured_at_every_look(sanity: int, tmp_path: Path) -> None:
    images = next(iter(batches(steps=2)))[0]
    monitor = FilterSimilarityMonitor(activations=True, figures_every_n_looks=1)
    run = fit(
        [monitor],
        max_epochs=2,
        validation=batches(steps=2),
        num_sanity_val_steps=sanity,
        logger=[CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")],
    )
    rows = _logged(tmp_path / "csv")
    assert [row["step"] for row in rows] == (["0", "6", "12"] if sanity else ["6", "12"])
    expected = _fixed(run.model, images)
    for name, row in expected.items():
        for metric, value in row.items():
            assert float(rows[-1][f"filterdiv_layers/{metric}/{name}"]) == pytest.approx(value, abs=1e-5), (
                name,
                metric,
            )
    mean = sum(row["mean_abs_correlation"] for row in expected.values()) / len(expected)
    assert float(rows[-1]["Filters/mean_abs_correlation"]) == pytest.approx(mean, abs=1e-5)
    assert {metric for metric in ACTIVATION_METRICS if f"Filters/{metric}" in rows[0]} == {*ACTIVATION_METRICS}
    assert monitor._batch is None, "the batch is let go of"


def test_the_example_is_measured_where_there_is_no_validation(tmp_path: Path) -> None:
    model = WithExample()
    fit(
        [FilterSimilarityMonitor(activations=True, figures=False)],
        model=model,
        max_epochs=1,
        logger=CSVLogger(tmp_path),
    )
    rows = _logged(tmp_path)
    assert [row["step"] for row in rows] == ["0", "6"]
    value = _fixed(model, model.example_input_array)["net.5"]["mean_abs_correlation"]
    assert float(rows[-1]["filterdiv_layers/mean_abs_correlation/net.5"]) == pytest.approx(value, abs=1e-5)


def test_neither_is_an_error_that_names_the_fix() -> None:
    with pytest.raises(MisconfigurationException, match=r"activations=True.*validation loader.*example_input_array"):
        fit([FilterSimilarityMonitor(activations=True, figures=False)], max_epochs=1)


class Noisy(Classifier):
    """Dropout and batch norm, which a forward pass in training mode would move."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.net(images))
        return output


def test_training_is_bit_identical_with_it(tmp_path: Path) -> None:
    def train(callbacks: list[Any]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return fit(
            callbacks, model=Noisy(), max_epochs=2, validation=batches(steps=1), num_sanity_val_steps=1
        ).tensors()

    monitor = FilterSimilarityMonitor(activations=True, figures=False)
    assert not differing(train([]), train([monitor]))
    assert len(monitor._snapshots) == 3


def test_filters_that_repr_has_out_are_not_among_the_channels(tmp_path: Path) -> None:
    seen: dict[int, int] = {}

    class Counts(FilterSimilarityMonitor):
        def _correlations(self, trainer: Any, dropped: Any) -> dict[str, Tensor]:
            found = super()._correlations(trainer, dropped)
            seen[trainer.global_step] = len(found["net.5"])
            return found

    method = RePr(full_epochs=1, sub_epochs=1, cycles=1, prune_fraction=0.4, include=["net.5"])
    monitor = Counts(activations=True, figures=False)
    fit([method, monitor], max_epochs=3, validation=batches(steps=1), num_sanity_val_steps=1)
    assert seen == {0: 8, 6: 8, 12: 5, 18: 8}
