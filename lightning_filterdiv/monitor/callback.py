"""The ``FilterSimilarityMonitor`` callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from matplotlib.figure import Figure

from lightning_filterdiv.files import why_unwritable
from lightning_filterdiv.filters import NoLayersError, check_patterns, filter_count, filter_matrix, select_filters
from lightning_filterdiv.monitor.events import collect_deviations, collect_events
from lightning_filterdiv.monitor.figures import cosine_distribution, kernel_mosaic, similarity_heat_map
from lightning_filterdiv.monitor.functional import METRICS, redundancy_metrics
from lightning_filterdiv.monitor.history_figures import Snapshot, deviation_curves, dropped_filters, redundancy_timeline
from lightning_filterdiv.monitor.layout import custom_scalars_layout
from lightning_filterdiv.monitor.loggers import FigureWriter
from lightning_filterdiv.monitor.views import view_layer
from lightning_filterdiv.similarity import expected_abs_cosine
from lightning_filterdiv.tensors.arguments import check_flag, check_integer
from lightning_filterdiv.training.callback import FilterCallback

__all__ = ["FilterSimilarityMonitor"]

_TAG = "filterdiv/figures"


def _itself(figure: Figure) -> Figure:
    return figure


class FilterSimilarityMonitor(FilterCallback):
    """Show how alike the filters of each layer are, before training and after every ``every_n_epochs``-th epoch.

    Scalars go to every logger as ``filterdiv/<metric>/<layer>`` and ``filterdiv/<metric>/network`` (the mean over
    layers). Figures, ``filterdiv/figures/...``, go to TensorBoard, Weights & Biases and MLflow; where no logger takes
    them, to PNG files in the log directory: similarity heat maps and kernels of some layers, the distribution of
    similarities, and a timeline of all layers with what other callbacks did. It reads weights, changes nothing, and
    costs nothing on the epochs between. Rank 0 only. A figure or number that cannot be drawn or written (a full disk, a
    logger without its server) does not stop training: the first failure of each is a warning.

    Args:
        every_n_epochs: how often to look.
        scalars: log numbers.
        figures: draw.
        max_figures: heat maps and kernels of at most so many layers. Before training those whose mean |cos| is largest
            above that of random filters; from the first look after it on those whose mean changed most, the same ones
            until the end.
        figure_layers: patterns of the layers to draw, at most ``max_figures`` of them, instead of this choice.
        include: patterns of layers; ``None`` for every ``Conv1d/2d/3d``, frozen ones too.
        exclude: patterns of layers to leave out.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    trainable_only = False
    shares_layers = True
    silenced_by = {"numbers": "scalars=False", "figures": "figures=False"}

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        scalars: bool = True,
        figures: bool = True,
        max_figures: int = 8,
        figure_layers: list[str] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs, low=1)
        self.scalars = check_flag("scalars", scalars)
        self.figures = check_flag("figures", figures)
        self.max_figures = check_integer("max_figures", max_figures, low=1)
        self.figure_layers = check_patterns("figure_layers", figure_layers)
        if self.figure_layers == []:
            raise ValueError("figure_layers=[] selects no layer; use figures=False to draw nothing")
        self._named: list[str] = []
        self._drawn: list[str] = []
        self._snapshots: list[Snapshot] = []
        self._writer: FigureWriter | None = None
        self._trains = True

    # ------------------------------------------------------------------ when

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the loggers and look before the first step, so that every plot has its starting point."""
        if self.figure_layers is not None:
            self._named = [name for name in select_filters(pl_module, self.figure_layers) if name in self.layers]
            if not self._named:
                raise NoLayersError(
                    f"figure_layers={self.figure_layers!r} names only layers that include and exclude leave out"
                )
        # log_dir is agreed on by a collective: every rank must ask, though only rank 0 writes.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if self.figures:
            self._open(trainer, folder)
        if trainer.is_global_zero and self.scalars:
            self.attempt("numbers", partial(self._lay_out, trainer))
        self._drawn = [name for name in self._drawn if name in self.layers]
        if not self._snapshots:
            when = "before training" if trainer.global_step == 0 else "at the start"
            self._take_snapshot(trainer, trainer.current_epoch, when)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make up a look: a checkpoint of an epoch's last batch resumes here, without the hook at the epoch's end."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx > 0:
            return
        # The epoch that StochasticWeightAveraging appends trains nothing: it puts the averages in and updates norms.
        self._trains = not trainer.fit_loop._skip_backward
        completed = trainer.current_epoch
        if self._trains and self._snapshots and self._snapshots[-1].epoch < completed and self.should_log(completed):
            self._take_snapshot(trainer, completed, f"after epoch {completed}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take another snapshot after the last step; callbacks that average weights have put the trained ones back."""
        if self._trains and self.should_log(trainer.current_epoch + 1):
            self._take_snapshot(trainer, trainer.current_epoch + 1, f"after epoch {trainer.current_epoch + 1}")

    def should_log(self, completed: int) -> bool:
        """The decision, to be overridden: whether to look when ``completed`` epochs are done."""
        return completed % self.every_n_epochs == 0

    # ------------------------------------------------------------------ where to

    def _open(self, trainer: pl.Trainer, folder: Path) -> None:
        reason = ""
        if trainer.is_global_zero:
            # fast_dev_run has no loggers: everything is drawn, nothing is written.
            dry: bool = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a connector
            self._writer = FigureWriter(trainer.loggers, folder, discard=dry)
            reason = why_unwritable(folder, folder=True) if self._writer.writes_files else ""
        # All ranks must fail together, or the others would wait for rank 0 for ever.
        if reason := trainer.strategy.broadcast(reason):
            raise OSError(
                f"FilterSimilarityMonitor cannot write figures to {folder} ({reason}). Set default_root_dir or the "
                f"logger's save_dir to a folder that can be written, or figures=False"
            )
        if self._writer is not None and self._writer.writes_files:
            rank_zero_info(f"FilterSimilarityMonitor: no logger takes figures, PNG files go to {folder / _TAG}")

    def _lay_out(self, trainer: pl.Trainer) -> None:
        """TensorBoard's Custom Scalars page."""
        repr_runs = any(type(callback).__name__ == "RePr" for callback in self._others(trainer))
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_custom_scalars"):
                experiment.add_custom_scalars(custom_scalars_layout(list(self.layers), repr_runs))

    @staticmethod
    def _others(trainer: pl.Trainer) -> list[Any]:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        return callbacks

    # ------------------------------------------------------------------ what

    def _take_snapshot(self, trainer: pl.Trainer, epoch: int, when: str) -> None:
        if not trainer.is_global_zero:
            return
        metrics = redundancy_metrics(self.layers)
        means = {name: row["mean_abs_cosine"] for name, row in metrics.items()}
        self._snapshots.append(Snapshot(epoch, trainer.global_step, means))
        if self.scalars:
            flat = {f"{metric}/{name}": row[metric] for name, row in metrics.items() for metric in METRICS}
            flat |= {f"{metric}/network": fmean(row[metric] for row in metrics.values()) for metric in METRICS}
            self.log_metrics(flat)
        if self._writer is not None:
            self.attempt("figures", partial(self._write_figures, self._writer, trainer, when))

    def _write_figures(self, writer: FigureWriter, trainer: pl.Trainer, when: str) -> None:
        for tag, draw in self._draw(trainer, when):

            def write(tag: str = tag, draw: Callable[[], Figure] = draw) -> None:
                writer.write(f"{_TAG}/{tag}", draw(), trainer.global_step)

            self.attempt("figures", write)

    def _draw(self, trainer: pl.Trainer, when: str) -> Iterator[tuple[str, Callable[[], Figure]]]:
        """Tags and what draws them: only one figure is alive at a time, and one that fails is one."""
        views = [view_layer(name, self.layers[name]) for name in self.layers_to_draw()]
        for view in views:
            yield f"similarity/{view.name}", partial(similarity_heat_map, view, when)
            yield f"kernels/{view.name}", partial(kernel_mosaic, view, when)
        yield "distribution", partial(cosine_distribution, views, when)
        del views
        others = self._others(trainer)
        events, deviations = collect_events(others), collect_deviations(others)
        yield "timeline", partial(redundancy_timeline, self._snapshots, events, deviations)
        counts = {name: filter_count(conv) for name, conv in self.layers.items()}
        if (dropped := dropped_filters(events, counts, self.max_figures)) is not None:
            yield "dropped", partial(_itself, dropped)
        if (curves := deviation_curves(deviations, self.max_figures)) is not None:
            yield "deviation", partial(_itself, curves)

    def layers_to_draw(self) -> list[str]:
        """Names of the layers drawn at this look, in the order of the network."""
        if self._named:
            return self._named[: self.max_figures]
        if self._drawn:
            return self._drawn
        first, last = self._snapshots[0].means, self._snapshots[-1].means
        trained = len(self._snapshots) > 1

        def interest(name: str) -> float:
            if trained:
                return abs(last[name] - first.get(name, last[name]))
            return last[name] - expected_abs_cosine(filter_matrix(self.layers[name]).shape[1])

        names = sorted(last, key=interest, reverse=True)[: self.max_figures]
        chosen = [name for name in last if name in names]
        if trained:
            # The same ones from now on, or TensorBoard's step slider would jump between layers.
            self._drawn = chosen
        return chosen

    # ------------------------------------------------------------------ state

    def release(self) -> None:
        """Let go of the loggers."""
        self._writer = None

    def reset(self) -> None:
        """Forget the looks of an earlier fit."""
        self._drawn, self._snapshots = [], []

    def extra_state(self) -> dict[str, Any]:
        """The looks so far and the layers that are drawn: timeline and choice go on after a resume."""
        return {"drawn": list(self._drawn), "looks": [list(snapshot) for snapshot in self._snapshots]}

    def arguments_changed(self, saved: Mapping[str, Any]) -> None:
        """Choose the layers to draw anew, if another number of them is wanted."""
        if "max_figures" in saved:
            self._drawn = []

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`extra_state`."""
        drawn, looks = state["drawn"], state["looks"]
        if not isinstance(drawn, list) or not all(isinstance(name, str) for name in drawn):
            raise TypeError(f"drawn must be a list of names, got {drawn!r}")
        if not isinstance(looks, list) or not all(len(look) == 3 and isinstance(look[2], dict) for look in looks):
            raise TypeError("looks must be a list of epoch, step and means by layer")
        self._drawn, self._snapshots = list(drawn), [Snapshot(*look) for look in looks]
