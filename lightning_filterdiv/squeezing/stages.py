"""Squeeze a network in several stages, with training in each."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import nn

from lightning_filterdiv.centripetal.callback import CentripetalSGD
from lightning_filterdiv.channel_graph import ChannelGraph
from lightning_filterdiv.files import write_files
from lightning_filterdiv.narrowing.cost import network_cost
from lightning_filterdiv.narrowing.files import load_merged, save_merged
from lightning_filterdiv.narrowing.prune import classification_accuracy, prune_channels
from lightning_filterdiv.narrowing.widths import kept_count
from lightning_filterdiv.tensors.arguments import check_choice, check_number

__all__ = ["PUBLISHED_STAGES", "Squeezed", "StageReport", "StageRow", "squeeze_in_stages"]

#: Shares of the original widths in the recipe for ResNet-56 on CIFAR-10.
PUBLISHED_STAGES = (13 / 16, 11 / 16, 5 / 8)
Target = Literal["keep_fraction", "target_macs", "target_parameters"]
#: ``fit(model, callbacks, checkpoint)`` trains in a Trainer of its own.
Fit = Callable[[nn.Module, list[Callback], str | None], None]


@dataclass(frozen=True)
class StageRow:
    """One stage.

    Attributes:
        stage: wanted share of the original.
        channels: channels of all groups after the stage.
        parameters: parameters after the stage.
        macs: multiply-accumulate operations on the example inputs after the stage.
        change: relative change of the outputs by narrowing: by the projection for C-SGD, or by pruning before its fit.
        accuracy: share of right predictions on ``loader`` at the end of the stage; ``None`` without one.
    """

    stage: float
    channels: int
    parameters: int
    macs: int
    change: float
    accuracy: float | None = None


@dataclass(frozen=True)
class StageReport:
    """All stages; ``str(report)`` is a table."""

    rows: tuple[StageRow, ...]

    def __str__(self) -> str:
        lines = [f"{'stage':>7} {'channels':>9} {'parameters':>12} {'MACs':>15} {'change':>8} {'accuracy':>9}"]
        for row in self.rows:
            accuracy = "" if row.accuracy is None else f"{100 * row.accuracy:.2f} %"
            lines.append(
                f"{row.stage:>7.4g} {row.channels:>9,} {row.parameters:>12,} {row.macs:>15,} {row.change:>8.1e} "
                f"{accuracy:>9}"
            )
        return "\n".join(lines)


class Squeezed(NamedTuple):
    """The network after the last stage, and the table of all."""

    network: nn.Module
    report: StageReport


def squeeze_in_stages(
    model: nn.Module,
    fit: Fit,
    example_inputs: Any = None,
    *,
    method: Literal["csgd", "prune"] = "csgd",
    stages: Sequence[float] = PUBLISHED_STAGES,
    target: Target = "keep_fraction",
    folder: str | os.PathLike[str] | None = None,
    loader: Iterable[Any] | None = None,
    tolerance: float = 1e-3,
    **arguments: Any,
) -> Squeezed:
    """Narrow and train once per stage. Parameters are replaced between fits, never inside one.

    Every stage is a fit of its own, with a new optimizer and learning rate. With ``folder`` an interrupted run
    continues when it is started again with the same arguments: finished stages are read from the folder, and the
    unfinished fit gets its checkpoint. Under DDP every rank runs this; rank 0 writes.

    Args:
        model: network or LightningModule to squeeze, in its state before the first stage, also when a run continues.
            The first stage of C-SGD trains it in place.
        fit: ``fit(model, callbacks, checkpoint)``: train ``model`` in a new Trainer with these callbacks, and hand
            ``checkpoint`` (a path or ``None``) to ``trainer.fit(..., ckpt_path=checkpoint)``. The callbacks are
            CentripetalSGD for ``"csgd"``, and with ``folder`` a ModelCheckpoint.
        example_inputs: for the trace; ``None``: ``example_input_array``.
        method: ``"csgd"``: train with :class:`CentripetalSGD`, then merge. ``"prune"``:
            :func:`~lightning_filterdiv.narrowing.prune_channels`, then train.
        stages: shares of the *original* network, from wide to narrow.
        target: quantity that ``stages`` are shares of: widths, multiply-accumulate operations or parameters.
        folder: folder for the files that an interrupted run needs to continue. It is made if it is missing.
        loader: batches of (inputs, labels) for the accuracy after each stage.
        tolerance: see :func:`~lightning_filterdiv.narrowing.merge.merge_channels`.
        **arguments: further arguments of CentripetalSGD or prune_channels.

    Raises:
        ValueError: stages do not shrink, or are outside (0, 1]; the folder belongs to another run.
        NotTiedError: the clusters of a stage of C-SGD did not become equal.
        TargetError: a stage is out of reach.
    """
    checked = [check_number(f"stages[{i}]", stage, above=0.0, high=1.0) for i, stage in enumerate(stages)]
    if not checked or any(b >= a for a, b in itertools.pairwise(checked)):
        raise ValueError(f"stages must be shares of the original widths that shrink, got {list(stages)!r}")
    check_choice("method", method, Literal["csgd", "prune"])
    check_choice("target", target, Target)
    if given := [name for name in ("keep_fraction", "target_macs", "target_parameters") if name in arguments]:
        raise ValueError(f"{given[0]} is what stages and target decide; give stages=... and target={given[0]!r}")
    network = arguments.get("network")
    original = _Original(ChannelGraph.trace(model, example_inputs, network=network))
    notes = _Notes(folder, {"method": method, "target": target, "stages": checked})
    rows = list(notes.rows)
    if rows and (end := notes.path(len(rows), "end")) is not None:
        model = load_merged(model, end)
    for number, stage in enumerate(checked[len(rows) :], start=len(rows) + 1):
        graph = ChannelGraph.trace(model, example_inputs, network=network)
        rule = {target: original.share(graph, target, stage)}
        callbacks, checkpoint = notes.callbacks(number)
        if method == "csgd":
            squeeze = CentripetalSGD(**rule, **arguments)
            fit(model, [squeeze, *callbacks], checkpoint)
            model, report = squeeze.merge(model, example_inputs, tolerance=tolerance)
            change = report.projection
        else:
            pruned = prune_channels(model, example_inputs, **rule, verbose=_is_first_rank(), **arguments)
            model, change = pruned.network, pruned.report.change
            if (start := notes.path(number, "start")) is not None and start.exists():
                model = load_merged(model, start)  # bit for bit, independent of measurements on other batches
            notes.save(number, "start", model)
            fit(model.train(), callbacks, checkpoint)
        rows.append(original.row(ChannelGraph.trace(model, example_inputs, network=network), stage, change))
        if loader is not None:
            rows[-1] = StageRow(**{**asdict(rows[-1]), "accuracy": classification_accuracy(model, loader)})
        notes.save(number, "end", model)
        notes.finish(number, rows[-1])
    result = StageReport(tuple(rows))
    rank_zero_info(f"squeezed in {len(rows)} stages\n{result}")
    return Squeezed(model, result)


def _is_first_rank() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


class _Original:
    """Size of the original, to which the shares of all stages refer."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.sizes = {group.name: group.size for group in graph.groups}
        self.costs = {"target_macs": network_cost(graph, "macs").full}
        self.costs["target_parameters"] = network_cost(graph, "parameters").full

    def share(self, graph: ChannelGraph, target: Target, stage: float) -> Any:
        """Return the share of the present network that is ``stage`` of the original."""
        if target != "keep_fraction":
            now = network_cost(graph, "macs" if target == "target_macs" else "parameters").full
            return min(1.0, stage * self.costs[target] / now)
        fractions: dict[str, float] = {}
        for group in graph.groups:
            wanted = kept_count(self.sizes.get(group.name, group.size), stage)
            # By layer name. If a layer is split into several groups, the widest share counts.
            share = min(1.0, wanted / group.size)
            for layer in group.layers:
                fractions[layer] = max(share, fractions.get(layer, 0.0))
            # Layers that share channels need equal shares.
            widest = max(fractions[layer] for layer in group.layers)
            fractions |= dict.fromkeys(group.layers, widest)
        return fractions

    def row(self, graph: ChannelGraph, stage: float, change: float) -> StageRow:
        """Return the row of the network of ``graph``."""
        return StageRow(
            stage=stage,
            channels=sum(group.size for group in graph.groups),
            parameters=round(network_cost(graph, "parameters").full),
            macs=round(network_cost(graph, "macs").full),
            change=change,
        )


class _Notes:
    """Files from which an interrupted run continues; none without a folder."""

    def __init__(self, folder: str | os.PathLike[str] | None, asked: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.rows: list[StageRow] = []
        self.asked = asked
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if (self.folder / "stages.json").exists():
                found = json.loads((self.folder / "stages.json").read_text())
                if found["asked"] != asked:
                    raise ValueError(
                        f"{self.folder} holds a run with {found['asked']}, not {asked}; name another folder"
                    )
                self.rows = [StageRow(**row) for row in found["rows"]]

    def path(self, number: int, when: str) -> Path | None:
        """Return the file of the network at the start or the end of a stage."""
        return None if self.folder is None else self.folder / f"stage{number}-{when}.pt"

    def callbacks(self, number: int) -> tuple[list[Callback], str | None]:
        """Return a callback that keeps the last checkpoint of a stage, and the present checkpoint."""
        if self.folder is None:
            return [], None
        place = self.folder / f"stage{number}"
        last = place / "last.ckpt"
        keeper = ModelCheckpoint(dirpath=place, save_top_k=0, save_last=True, enable_version_counter=False)
        return [keeper], str(last) if last.exists() else None

    def save(self, number: int, when: str, model: nn.Module) -> None:
        """Write a network, once, on rank 0."""
        path = self.path(number, when)
        if path is not None and _is_first_rank() and not path.exists():
            save_merged(model, path)

    def finish(self, number: int, row: StageRow) -> None:
        """Mark a stage as done once its network is on disk. All ranks wait for that."""
        if self.folder is not None:
            self.rows.append(row)
            if _is_first_rank():
                content = json.dumps({"asked": self.asked, "rows": [asdict(r) for r in self.rows]}, indent=1)
                write_files(self.folder, {"stages.json": content.encode()})
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
