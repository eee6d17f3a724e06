"""The ``FilterSimilarityMonitor`` callback."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl

from lightning_filterdiv.arguments import check_flag, check_integer
from lightning_filterdiv.callback import FilterCallback
from lightning_filterdiv.filters import filter_matrix
from lightning_filterdiv.monitor.figures import similarity_heat_map
from lightning_filterdiv.monitor.functional import METRICS, redundancy_metrics
from lightning_filterdiv.monitor.loggers import log_figure
from lightning_filterdiv.similarity import expected_abs_cosine

__all__ = ["FilterSimilarityMonitor"]


class FilterSimilarityMonitor(FilterCallback):
    """Log how alike the filters of each layer are, before training and after every ``every_n_epochs``-th epoch.

    Scalars go to every logger as ``filterdiv/<metric>/<layer>`` and ``filterdiv/<metric>/network`` (the mean over
    layers); heat maps go to TensorBoard as ``filterdiv/figures/similarity/<layer>``, without TensorBoard to PNG files
    in the log directory. It reads weights, changes nothing, and costs nothing on the epochs between. Rank 0 only.

    Args:
        every_n_epochs: how often to look.
        scalars: log numbers.
        figures: draw heat maps.
        max_figures: draw at most so many layers: those whose mean |cos| is largest above that of random filters.
        include: patterns of layers; ``None`` for every ``Conv1d/2d/3d``, frozen ones too.
        exclude: patterns of layers to leave out.

    Raises:
        TypeError, ValueError: a bad argument, by name.
    """

    trainable_only = False
    shares_layers = True

    def __init__(
        self,
        *,
        every_n_epochs: int = 1,
        scalars: bool = True,
        figures: bool = True,
        max_figures: int = 8,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        self.every_n_epochs = check_integer("every_n_epochs", every_n_epochs, low=1)
        self.scalars = check_flag("scalars", scalars)
        self.figures = check_flag("figures", figures)
        self.max_figures = check_integer("max_figures", max_figures, low=1)
        self._figure_layers: list[str] = []
        self._folder = Path()

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look before the first step, so that every plot has its starting point."""
        # log_dir is agreed on by a collective: every rank must ask, though only rank 0 writes.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        self._figure_layers = [name for name in self._figure_layers if name in self.layers]
        if trainer.global_step == 0:
            self._look(trainer, "before training")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look again after the epoch's last step."""
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._look(trainer, f"after epoch {trainer.current_epoch + 1}")

    def _look(self, trainer: pl.Trainer, when: str) -> None:
        if not trainer.is_global_zero:
            return
        metrics = redundancy_metrics(self.layers)
        if self.scalars:
            flat = {f"filterdiv/{metric}/{name}": row[metric] for name, row in metrics.items() for metric in METRICS}
            flat |= {
                f"filterdiv/{metric}/network": fmean(row[metric] for row in metrics.values()) for metric in METRICS
            }
            for logger in trainer.loggers:
                logger.log_metrics(flat, step=trainer.global_step)
        if self.figures:
            # The same layers throughout a run, or TensorBoard's time slider would jump between layers.
            self._figure_layers = self._figure_layers or self._most_alike(metrics)
            for name in self._figure_layers:
                draw = partial(similarity_heat_map, filter_matrix(self.layers[name]), name, when)
                log_figure(trainer, self._folder, f"filterdiv/figures/similarity/{name}", draw, trainer.global_step)

    def _most_alike(self, metrics: dict[str, dict[str, float]]) -> list[str]:
        def excess(name: str) -> float:
            return metrics[name]["mean_abs_cosine"] - expected_abs_cosine(filter_matrix(self.layers[name]).shape[1])

        names = sorted(metrics, key=excess, reverse=True)[: self.max_figures]
        return [name for name in metrics if name in names]

    def reset(self) -> None:
        """Choose the layers to draw anew."""
        self._figure_layers = []

    def extra_state(self) -> dict[str, Any]:
        """The layers that are drawn: the same ones after a resume."""
        return {"figure_layers": list(self._figure_layers)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the layers that are drawn."""
        names = state["figure_layers"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"figure_layers must be a list of names, got {names!r}")
        self._figure_layers = list(names)
