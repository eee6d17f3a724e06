"""Where figures go: Lightning's loggers have no common call for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from matplotlib.figure import Figure

__all__ = ["log_figure"]


def log_figure(trainer: pl.Trainer, folder: Path, tag: str, make: Callable[[], Figure], step: int) -> None:
    """Draw one figure and hand it to every TensorBoard logger; without one, write a PNG under ``folder``.

    Args:
        trainer: its loggers decide.
        folder: where PNG files go when no logger takes figures.
        tag: for example ``filterdiv/figures/similarity/conv1``; the path of the PNG file follows it.
        make: draws the figure.
        step: global step.

    Raises:
        OSError: the PNG file cannot be written.
    """
    figure = make()
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    boards = [experiment for experiment in experiments if experiment is not None and hasattr(experiment, "add_figure")]
    for board in boards:
        board.add_figure(tag, figure, global_step=step, close=False)
    if not boards:
        path = folder / f"{tag}-step{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
