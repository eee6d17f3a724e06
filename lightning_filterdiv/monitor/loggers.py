"""Write figures and the callbacks' arguments to loggers, for which Lightning has no common call.

A figure is drawn once, and its pixels are passed to every logger that accepts images. Loggers are recognised by their
methods, so that both of Lightning's namespaces and subclasses work.
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
#: Function of (tag, pixels, global step).
Sink = Callable[[str, Pixels, int], None]


def _sink(logger: Any) -> Sink | None:
    """Return the function that gives an image to this logger; ``None`` if the logger accepts none."""
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
    """Write figures to every logger that accepts images, or to PNG files if none does.

    Args:
        loggers: loggers of the trainer. Only rank 0 may use them.
        folder: folder for PNG files, ``<tag>-step<step>.png``.
        discard: draw, but write nothing.
    """

    def __init__(self, loggers: Sequence[Any], folder: Path, discard: bool = False) -> None:
        self._sinks = [] if discard else [sink for logger in loggers if (sink := _sink(logger)) is not None]
        self.folder = folder
        self.writes_files = not self._sinks and not discard

    def write(self, tag: str, figure: Figure, step: int) -> None:
        """Draw ``figure`` and pass it to the loggers.

        Args:
            tag: tag such as ``filterdiv_figures/similarity/conv1``.
            figure: the figure, which is not kept.
            step: global step.

        Raises:
            WriteError: the PNG file cannot be written.
            Exception: error of a logger. The other loggers have received the figure.
        """
        pixels = to_rgb(figure)
        failed: list[Exception] = []
        for sink in self._sinks:
            try:
                sink(tag, pixels, step)
            except Exception as error:  # loggers raise errors of many types
                failed.append(error)
        if failed:
            raise failed[0]
        if self.writes_files:
            # The name of a layer comes last, and may hold anything but dots.
            parts = [safe_file_name(part) for part in f"{tag}-step{step:06d}.png".split("/", _LEVELS)]
            self.folder.mkdir(parents=True, exist_ok=True)
            write_files(self.folder, {"/".join(parts): as_png(pixels)})


class ArgumentRecord:
    """Record of the callbacks and their arguments, for the loggers' view of hyper-parameters.

    TensorBoard shows only the first record of a run. Lightning writes one with the module's hyper-parameters and a
    placeholder, ``hp_metric``, of -1. Our record therefore comes first and includes the module's. The placeholder is
    not written.

    Args:
        callbacks: all callbacks of the trainer; those with a method ``arguments`` are recorded.
        module: module whose hyper-parameters are recorded, if it saves any for loggers.
        data: data module, likewise, or ``None``.
    """

    def __init__(self, callbacks: Iterable[Any], module: Any, data: Any) -> None:
        self.arguments = _arguments(callbacks)
        self._saved: dict[str, Any] = {}
        for owner in (data, module):
            if getattr(owner, "_log_hyperparams", False):
                self._saved |= dict(owner.hparams_initial)
        self._silenced: list[Any] = []

    def write(self, logger: Any, metrics: Sequence[str]) -> None:
        """Write the record to ``logger``.

        Args:
            logger: any of Lightning's.
            metrics: tags of the scalars that TensorBoard shows beside it.
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
        # If the module itself logs hp_metric, its column stays.
        shown = dict.fromkeys([*metrics, *(["hp_metric"] if placeholder else [])], 0.0)
        for summary in hparams(_flat(self._saved) | self.arguments, shown):
            experiment._get_file_writer().add_summary(summary)

    def close(self) -> None:
        """Restore the loggers, after Lightning has written its record."""
        for logger in self._silenced:
            logger._default_hp_metric = True
        self._silenced = []


def _arguments(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Return ``callbacks/<name>`` -> arguments that are not defaults, and ``settings/...`` -> each value.

    TensorBoard shows the first five names in alphabetical order.
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
    """Return numbers and strings by name, with levels joined by ``/``. Other values, flags too, become text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{key}/")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            flat[f"{above}{key}"] = value if number or isinstance(value, str) else str(value)
    return flat
