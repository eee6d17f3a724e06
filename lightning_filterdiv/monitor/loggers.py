"""Where figures go: Lightning's loggers have no common call for them.

A figure is drawn once, and its pixels are handed to every logger that takes images. Loggers are recognised by what they
can do, so that both of Lightning's namespaces and subclasses work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from lightning_filterdiv.files import safe_file_name, write_files
from lightning_filterdiv.monitor.figures import to_rgb
from lightning_filterdiv.monitor.page import as_png

__all__ = ["FigureWriter"]

_LEVELS = 3  # of a tag, above the layer
Pixels = npt.NDArray[np.uint8]
#: Takes (tag, pixels, global step).
Sink = Callable[[str, Pixels, int], None]


def _sink(logger: Any) -> Sink | None:
    """How this logger takes images; ``None``: it does not."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard
        return lambda tag, pixels, step: experiment.add_image(tag, pixels, step, dataformats="HWC")
    if hasattr(logger, "log_image"):  # Weights & Biases
        return lambda tag, pixels, step: logger.log_image(tag, [Image.fromarray(pixels)], step=step)
    if hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        return lambda tag, pixels, step: experiment.log_image(
            logger.run_id, Image.fromarray(pixels), key=tag, step=step
        )
    return None


class FigureWriter:
    """Hands figures to every logger that takes images; if none does, writes PNG files.

    Args:
        loggers: of the trainer; on other ranks than 0 none may be touched.
        folder: where PNG files go, ``<tag>-step<step>.png``.
        discard: draw, but write nothing.
    """

    def __init__(self, loggers: Sequence[Any], folder: Path, discard: bool = False) -> None:
        self._sinks = [] if discard else [sink for logger in loggers if (sink := _sink(logger)) is not None]
        self.folder = folder
        self.writes_files = not self._sinks and not discard

    def write(self, tag: str, figure: Figure, step: int) -> None:
        """Draw ``figure`` and give it away.

        Args:
            tag: for example ``filterdiv/figures/similarity/conv1``.
            figure: is not kept.
            step: global step.

        Raises:
            WriteError: the PNG file cannot be written.
            Exception: what a logger raises; the other loggers have got the figure.
        """
        pixels = to_rgb(figure)
        failed: list[Exception] = []
        for sink in self._sinks:
            try:
                sink(tag, pixels, step)
            except Exception as error:  # loggers have errors of their own
                failed.append(error)
        if failed:
            raise failed[0]
        if self.writes_files:
            # The name of a layer comes last, and may hold anything but dots.
            parts = [safe_file_name(part) for part in f"{tag}-step{step:06d}.png".split("/", _LEVELS)]
            self.folder.mkdir(parents=True, exist_ok=True)
            write_files(self.folder, {"/".join(parts): as_png(pixels)})
