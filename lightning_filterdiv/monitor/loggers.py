"""Where figures and the callbacks' arguments go: Lightning's loggers have no common call for them.

A figure is drawn once, and its pixels are handed to every logger that takes images. Loggers are recognised by what they
can do, so that both of Lightning's namespaces and subclasses work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from lightning_filterdiv.files import safe_file_name, write_files
from lightning_filterdiv.monitor.figures import to_rgb
from lightning_filterdiv.monitor.pixels import as_png

__all__ = ["ArgumentRecord", "FigureWriter"]

_LEVELS = 2  # of a tag, above the layer
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
        loggers: loggers of the trainer; on other ranks than 0 none may be touched.
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
            tag: for example ``filterdiv_figures/similarity/conv1``.
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


class ArgumentRecord:
    """Which callbacks ran with which arguments, for the loggers' view of hyper-parameters.

    TensorBoard shows the first record of a run only, and Lightning writes one with the module's hyper-parameters and a
    placeholder, ``hp_metric``, of -1. So ours comes first, holds the module's too, and the placeholder is not written.

    Args:
        callbacks: all of the trainer; those with a method ``arguments`` count.
        module: its hyper-parameters, where it saves any for loggers.
        data: likewise, a data module or ``None``.
    """

    def __init__(self, callbacks: Iterable[Any], module: Any, data: Any) -> None:
        self.arguments = _arguments(callbacks)
        self._saved: dict[str, Any] = {}
        for owner in (data, module):
            if getattr(owner, "_log_hyperparams", False):
                self._saved |= dict(owner.hparams_initial)
        self._silenced: list[Any] = []

    def write(self, logger: Any, metrics: Sequence[str]) -> None:
        """Hand the record to ``logger``.

        Args:
            logger: any of Lightning's.
            metrics: tags of the scalars shown beside it in TensorBoard.
        """
        experiment: Any = getattr(logger, "experiment", None)
        if not hasattr(experiment, "_get_file_writer"):  # not TensorBoard's
            logger.log_hyperparams(self.arguments)
            return
        from torch.utils.tensorboard.summary import hparams

        placeholder = getattr(logger, "_default_hp_metric", False)
        if placeholder:
            logger._default_hp_metric = False
            self._silenced.append(logger)
        # A module that logs hp_metric itself keeps its column.
        shown = dict.fromkeys([*metrics, *(["hp_metric"] if placeholder else [])], 0.0)
        for summary in hparams(_flat(self._saved) | self.arguments, shown):
            experiment._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Let loggers be as they were: Lightning has handed them its record."""
        for logger in self._silenced:
            logger._default_hp_metric = True
        self._silenced = []


def _arguments(callbacks: Iterable[Any]) -> dict[str, Any]:
    """``callbacks/<name>`` -> what is not the default, for all with ``arguments``; ``settings/...`` -> each value.

    TensorBoard shows the first five names in the order of the alphabet.
    """
    ours = [callback for callback in callbacks if callable(getattr(callback, "arguments", None))]
    written: dict[str, str] = {}
    values: dict[str, Any] = {}
    for callback in ours:
        name, count = type(callback).__name__, 1
        while f"settings/{name}" in values:
            count += 1
            name = f"{type(callback).__name__}_{count}"
        arguments = callback.arguments()
        defaults = {key: p.default for key, p in signature(type(callback)).parameters.items()}
        chosen = [f"{key}={value!r}" for key, value in arguments.items() if defaults.get(key, ...) != value]
        written[f"callbacks/{name}"] = ", ".join(chosen) or "defaults"
        values[f"settings/{name}"] = arguments
    return written | _flat(values)


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Numbers and strings by name, levels joined by ``/``; anything else, flags too, as it is written."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}/")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            flat[f"{above}{key}"] = value if number or isinstance(value, str) else str(value)
    return flat
