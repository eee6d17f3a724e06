"""The ``FilterSimilarityMonitor`` callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure
from torch import Tensor

from lightning_filterdiv.filters import NoLayersError, check_patterns, filter_count, filter_matrix, select_filters
from lightning_filterdiv.monitor.activations import ACTIVATION_METRICS, channel_redundancy, in_function_only
from lightning_filterdiv.monitor.events import collect_deviations, collect_dropped, collect_events
from lightning_filterdiv.monitor.figures import (
    channel_heat_map,
    cosine_distribution,
    kernel_mosaic,
    similarity_heat_map,
)
from lightning_filterdiv.monitor.functional import METRICS, Dropped, live_filters, redundancy_metrics
from lightning_filterdiv.monitor.history_figures import Snapshot, deviation_curves, dropped_filters, network_summary
from lightning_filterdiv.monitor.layout import custom_scalars_layout, tag_names
from lightning_filterdiv.monitor.loggers import ArgumentRecord, FigureWriter
from lightning_filterdiv.monitor.replay import FixedBatch
from lightning_filterdiv.monitor.views import view_layer
from lightning_filterdiv.selection import quote_names
from lightning_filterdiv.similarity import cosine_similarity, expected_abs_cosine
from lightning_filterdiv.tensors.arguments import check_flag, check_integer
from lightning_filterdiv.training.callback import FilterCallback
from lightning_filterdiv.training.learning_rates import fit_epochs

__all__ = ["FilterSimilarityMonitor"]

#: Group of the summary and of the network's numbers. TensorBoard sorts capitals first, so pages open with it.
_NETWORK = "Filters"
#: Tag of the summary; it sorts before the numbers.
_SUMMARY = f"{_NETWORK}/all_layers"
_LAYERS = "filterdiv_layers"
_FIGURES = "filterdiv_figures"


def _itself(figure: Figure) -> Figure:
    return figure


class FilterSimilarityMonitor(FilterCallback):
    """Show how alike the filters of each layer are, before training and after every ``every_n_epochs``-th epoch.

    Scalars go to every logger: ``Filters/<metric>``, the mean over layers with at least two filters, and
    ``filterdiv_layers/<metric>/<layer>``. Figures go to TensorBoard, Weights & Biases and MLflow; where no logger takes
    them, to PNG files in the log directory: ``Filters/all_layers`` sums up all layers over the epochs,
    ``filterdiv_figures/...`` shows some layers filter by filter. Filters that a callback (RePr) has dropped do not
    count: all numbers are those of the network without them.

    The monitor changes nothing, and costs nothing in epochs without a snapshot. Under DDP the layers are divided among
    the ranks for the numbers. Rank 0 alone draws, measures activations and writes. A figure or number that cannot be
    measured, drawn or written (a full disk, no permission, a logger without its server) does not stop training. The
    first failure of each kind causes a warning.

    Args:
        every_n_epochs: epochs between two snapshots.
        scalars: log numbers.
        figures: draw figures.
        figures_every_n_looks: snapshots between two drawings. The first and the last snapshot are always drawn.
        max_figures: largest number of layers whose heat map and kernels are drawn. They are evenly spaced from the
            first layer to the last, and the same for the whole fit.
        figure_layers: patterns of the layers to draw, at most ``max_figures`` of them, instead of this choice.
        activations: also measure the absolute correlation between the channels of each layer. It is measured on the
            first validation batch, without validation on ``example_input_array``, by one forward pass in evaluation
            mode per snapshot.
        include: patterns of layers; ``None`` for every ``Conv1d/2d/3d``, frozen ones too.
        exclude: patterns of layers to leave out.

    Raises:
        TypeError, ValueError: a bad argument, by name.
        MisconfigurationException: ``activations=True`` with neither validation nor ``example_input_array``.
    """

    trainable_only = False
    shares_layers = True
    silenced_by = {"numbers": "scalars=False", "figures": "figures=False", "activations": "activations=False"}

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        scalars: bool = True,
        figures: bool = True,
        figures_every_n_looks: int = 10,
        max_figures: int = 8,
        figure_layers: list[str] | None = None,
        activations: bool = False,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs, low=1)
        self.scalars = check_flag("scalars", scalars)
        self.figures = check_flag("figures", figures)
        self.figures_every_n_looks = check_integer("figures_every_n_looks", figures_every_n_looks, low=1)
        self.max_figures = check_integer("max_figures", max_figures, low=1)
        self.figure_layers = check_patterns("figure_layers", figure_layers)
        if self.figure_layers == []:
            raise ValueError("figure_layers=[] selects no layer; use figures=False to draw nothing")
        self.activations = check_flag("activations", activations)
        self._named: list[str] = []
        self._tags: dict[str, str] = {}
        self._snapshots: list[Snapshot] = []
        self._without_scale = False  # snapshots of 0.1 hold mean |cos| itself
        self._drawn = True  # the last snapshot has been drawn
        self._writer: FigureWriter | None = None
        self._record: ArgumentRecord | None = None
        self._batch: FixedBatch | None = None
        self._trains = True

    # ------------------------------------------------------------------ when

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Hand the callbacks' arguments to the loggers before Lightning hands them the module's."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._batch = FixedBatch(pl_module) if self.activations and trainer.is_global_zero else None
        dry = bool(getattr(trainer, "fast_dev_run", False))
        if trainer.is_global_zero and not dry:
            self.attempt("hyper-parameters", partial(self._write_arguments, trainer, pl_module))

    def _write_arguments(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._record = ArgumentRecord(self._others(trainer), pl_module, getattr(trainer, "datamodule", None))
        shown = [f"{_NETWORK}/{name}" for name in METRICS] if self.scalars else []
        for logger in trainer.loggers:
            self.attempt("hyper-parameters", partial(self._record.write, logger, shown))

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the loggers and take a snapshot before the first step, so that every plot has a starting point."""
        if self.figure_layers is not None:
            self._named = [name for name in select_filters(pl_module, self.figure_layers) if name in self.layers]
            if not self._named:
                raise NoLayersError(
                    f"figure_layers={self.figure_layers!r} names only layers that include and exclude leave out; name "
                    f"some of {quote_names(list(self.layers))}"
                )
        if self._record is not None:
            self._record.close()
        self._find_batch(trainer, pl_module)
        # log_dir runs a collective, so every rank must read it, although only rank 0 writes.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._tags = tag_names(self.layers)
        if trainer.is_global_zero:
            if self.figures:
                self.attempt("figures", partial(self._open, trainer, folder))
            if self.scalars:
                self.attempt("numbers", partial(self._lay_out, trainer))
        if self._without_scale:
            chance = {name: expected_abs_cosine(filter_matrix(conv).shape[1]) for name, conv in self.layers.items()}
            self._snapshots = [look.scaled(chance) for look in self._snapshots]
            self._without_scale = False
        if not self._snapshots:
            when = "before training" if trainer.global_step == 0 else "at the start"
            self._take_snapshot(trainer, trainer.current_epoch, when)

    def _find_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.activations:
            return
        if not trainer.enable_validation and pl_module.example_input_array is None:
            raise MisconfigurationException(
                "FilterSimilarityMonitor(activations=True) needs a batch to measure on, and this fit has neither "
                "validation nor an example_input_array: pass a validation loader, set example_input_array in the "
                "LightningModule, or use activations=False"
            )
        if self._batch is None or self._batch.known:
            return
        if trainer.enable_validation:
            rank_zero_info(
                "FilterSimilarityMonitor: there was no sanity check (num_sanity_val_steps=0), activations are measured "
                "from the first validation on"
            )
        else:
            self._batch.take_example(pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the first validation batch. Its inputs are used for all later measurements."""
        if self._batch is not None and batch_idx == 0 and dataloader_idx == 0:
            self._batch.watch()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop watching."""
        if self._batch is not None and self._batch.stop():
            self.warn_once(
                "activations",
                "saw no forward call in the first validation batch, neither of the LightningModule nor of an only "
                "child with convolutions: define forward and call it in validation_step",
            )
            self._batch = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot that is missing. A checkpoint of an epoch's last batch resumes here, without the hook at the
        epoch's end."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx > 0:
            return
        # The epoch that StochasticWeightAveraging appends does not train. It loads the averages and updates norms.
        self._trains = not trainer.fit_loop._skip_backward
        completed = trainer.current_epoch
        if self._trains and self._snapshots and self._snapshots[-1].epoch < completed and self.should_log(completed):
            self._take_snapshot(trainer, completed, f"after epoch {completed}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take a snapshot after the last step. Callbacks that average weights have restored the trained ones by
        then."""
        if self._trains and self.should_log(trainer.current_epoch + 1):
            self._take_snapshot(trainer, trainer.current_epoch + 1, f"after epoch {trainer.current_epoch + 1}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the last snapshot if its figures are missing because of early stopping."""
        super().on_train_end(trainer, pl_module)
        if not self._drawn and self._writer is not None:
            dropped = collect_dropped(self._others(trainer), self.layers)
            self._draw_all(trainer, "at the end", dropped, self._correlations(trainer, dropped))

    def should_log(self, completed: int) -> bool:
        """True if a snapshot is due after ``completed`` epochs. An override must answer alike on all ranks."""
        return completed % self.every_n_epochs == 0

    def _is_last(self, trainer: pl.Trainer, completed: int) -> bool:
        epochs = fit_epochs(trainer)
        planned = epochs is not None and not any(map(self.should_log, range(completed + 1, epochs + 1)))
        return planned or trainer.should_stop

    # ------------------------------------------------------------------ where to

    def _open(self, trainer: pl.Trainer, folder: Path) -> None:
        # With fast_dev_run there are no loggers. Everything is drawn and nothing is written.
        dry: bool = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a connector
        self._writer = FigureWriter(trainer.loggers, folder, discard=dry)
        if self._writer.writes_files:
            rank_zero_info(f"FilterSimilarityMonitor: no logger takes figures, PNG files go to {folder / _FIGURES}")

    def _lay_out(self, trainer: pl.Trainer) -> None:
        """Lay out the Custom Scalars page of TensorBoard."""
        repr_runs = any(type(callback).__name__ == "RePr" for callback in self._others(trainer))
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_custom_scalars"):
                layout = custom_scalars_layout(list(self._tags.values()), repr_runs, self.activations)
                experiment.add_custom_scalars(layout)

    @staticmethod
    def _others(trainer: pl.Trainer) -> list[Any]:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        return callbacks

    # ------------------------------------------------------------------ what

    def _take_snapshot(self, trainer: pl.Trainer, epoch: int, when: str) -> None:
        dropped = collect_dropped(self._others(trainer), self.layers)
        metrics = redundancy_metrics(self.layers, dropped, among_ranks=trainer.world_size > 1)
        ratios = {name: row["cosine_over_chance"] for name, row in metrics.items()}
        self._snapshots.append(Snapshot(epoch, trainer.global_step, ratios))
        if not trainer.is_global_zero:
            return
        draws = self._writer is not None and (
            (len(self._snapshots) - 1) % self.figures_every_n_looks == 0 or self._is_last(trainer, epoch)
        )
        correlations = self._correlations(trainer, dropped) if self.scalars or draws else {}
        if self.scalars:
            self.log_metrics(self._numbers(metrics, dropped) | self._channel_numbers(correlations, dropped))
        self._drawn = False
        if draws:
            self._draw_all(trainer, when, dropped, correlations)

    def _numbers(self, metrics: Mapping[str, Mapping[str, float]], dropped: Mapping[str, Dropped]) -> dict[str, float]:
        # A layer of one filter has no pair, so it is not part of the network's mean.
        paired = [row for name, row in metrics.items() if self._live_count(name, dropped) > 1] or list(metrics.values())
        numbers = {f"{_NETWORK}/{metric}": fmean(row[metric] for row in paired) for metric in METRICS}
        return numbers | {
            f"{_LAYERS}/{metric}/{self._tags[name]}": row[metric] for name, row in metrics.items() for metric in METRICS
        }

    def _live_count(self, name: str, dropped: Mapping[str, Dropped]) -> int:
        return filter_count(self.layers[name]) - len(dropped.get(name, Dropped()).filters)

    def _correlations(self, trainer: pl.Trainer, dropped: Mapping[str, Dropped]) -> dict[str, Tensor]:
        """Return correlations between channels on the fixed batch; empty without a batch."""
        found: dict[str, Tensor] = {}
        batch = self._batch
        if batch is not None and batch.known:

            def measure() -> None:
                with trainer.precision_plugin.forward_context():
                    found.update(batch.correlations(self.layers, dropped))

            self.attempt("activations", measure, "measure")
        return found

    def _channel_numbers(self, correlations: Mapping[str, Tensor], dropped: Mapping[str, Dropped]) -> dict[str, float]:
        if not correlations:
            return {}
        cosines = {
            name: cosine_similarity(live_filters(self.layers[name], Dropped(gone.filters) if gone else None))
            for name in correlations
            for gone in [dropped.get(name)]
        }
        measured = channel_redundancy(correlations, cosines)
        paired = [row for name, row in measured.items() if len(correlations[name]) > 1] or list(measured.values())
        numbers = {f"{_NETWORK}/{metric}": fmean(row[metric] for row in paired) for metric in ACTIVATION_METRICS}
        return numbers | {
            f"{_LAYERS}/{metric}/{self._tags[name]}": row[metric]
            for name, row in measured.items()
            for metric in ACTIVATION_METRICS
        }

    def log_metrics(self, numbers: Mapping[str, float]) -> None:
        """Log numbers to all loggers under their own names. If one fails, the others still get them."""
        if self.trainer.is_global_zero:
            values = {name: float(value) for name, value in numbers.items()}
            for logger in self.trainer.loggers:
                self.attempt("numbers", partial(logger.log_metrics, values, step=self.trainer.global_step))

    def _draw_all(
        self, trainer: pl.Trainer, when: str, dropped: Mapping[str, Dropped], correlations: Mapping[str, Tensor]
    ) -> None:
        self._drawn = True
        assert self._writer is not None
        writer = self._writer

        def write_each() -> None:
            for tag, draw in self._draw(trainer, when, dropped, correlations):
                self.attempt("figures", partial(write, tag, draw))

        def write(tag: str, draw: Callable[[], Figure]) -> None:
            writer.write(tag, draw(), trainer.global_step)

        self.attempt("figures", write_each)

    def _draw(
        self, trainer: pl.Trainer, when: str, dropped: Mapping[str, Dropped], correlations: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Callable[[], Figure]]]:
        """Yield tags and functions that draw. Only one figure exists at a time, and a failure costs only that
        figure."""
        others = self._others(trainer)
        events, deviations = collect_events(others), collect_deviations(others)
        yield _SUMMARY, partial(network_summary, self._snapshots, events, deviations)
        views = [view_layer(name, self.layers[name], dropped.get(name)) for name in self.layers_to_draw()]
        for view in views:
            tag = self._tags[view.name]
            yield f"{_FIGURES}/similarity/{tag}", partial(similarity_heat_map, view, when)
            yield f"{_FIGURES}/kernels/{tag}", partial(kernel_mosaic, view, when)
            if view.name in correlations:
                correlation = correlations[view.name].cpu()
                pairs = in_function_only(correlation, view.signed)
                yield f"{_FIGURES}/channels/{tag}", partial(channel_heat_map, view, correlation, pairs, when)
        yield f"{_FIGURES}/distribution", partial(cosine_distribution, views, when)
        del views
        counts = {name: filter_count(conv) for name, conv in self.layers.items()}
        if (figure := dropped_filters(events, counts, self.max_figures)) is not None:
            yield f"{_FIGURES}/dropped", partial(_itself, figure)
        if (curves := deviation_curves(deviations, list(self.layers))) is not None:
            yield f"{_FIGURES}/deviation", partial(_itself, curves)

    def layers_to_draw(self) -> list[str]:
        """Return the names of the layers to draw, in the order of the network. They are the same for the whole fit."""
        if self._named:
            return self._named[: self.max_figures]
        names, count = list(self.layers), min(self.max_figures, len(self.layers))
        return [names[round(index * (len(names) - 1) / max(1, count - 1))] for index in range(count)]

    # ------------------------------------------------------------------ state

    def release(self) -> None:
        """Release the loggers."""
        self._writer = None
        if self._record is not None:
            self._record.close()
        if self._batch is not None:
            self._batch.stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the batch."""
        super().teardown(trainer, pl_module, stage)
        self._batch = None

    def reset(self) -> None:
        """Forget the snapshots of an earlier fit."""
        self._snapshots, self._without_scale, self._drawn = [], False, True

    def extra_state(self) -> dict[str, Any]:
        """Return the snapshots so far, so that the summary continues after a resume."""
        key = "looks" if self._without_scale else "snapshots"
        return {key: [list(snapshot) for snapshot in self._snapshots]}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`, also that of 0.1."""
        self._without_scale = "snapshots" not in state and "looks" in state
        looks = state["looks" if self._without_scale else "snapshots"]
        if not isinstance(looks, list) or not all(len(look) == 3 and isinstance(look[2], dict) for look in looks):
            raise TypeError("snapshots must be a list of epoch, step and numbers by layer")
        self._snapshots = [Snapshot(*look) for look in looks]
