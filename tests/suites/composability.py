"""Try which callbacks work together, and in which order, in one fit of three epochs each.

    python -m tests.suites.composability   # writes benchmarks/results/composability.json, for tables of docs/support.md

A pair works if the fit ends with finite weights, if these differ from those of each callback alone (for callbacks that
change training), and if filters that one of them holds still through a step stay bit-identical.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)
from torch import Tensor, nn

from lightning_filterdiv import FilterCallback, RePr, WeightAsynchronousUpdate
from lightning_filterdiv.filters import filter_matrix
from tests.registry import ONE_EACH, Case
from tests.support.training import Classifier, Run, batches, differing, fit, since_lightning_2_6

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "composability.json"
WORKS, SWAP = "works", "swap"


class _SAM(torch.optim.SGD):
    """Sharpness-aware minimisation: the gradient at a point uphill moves the weights."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in weights if p.grad is not None]).norm()
        uphill = [0.05 * p.grad / (norm + 1e-12) for p in weights if p.grad is not None]
        torch._foreach_add_(weights, uphill)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(weights, uphill)
        super().step()
        return loss


class _Lookahead(torch.optim.SGD):
    """Every second step goes half the way back to the weights two steps before."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.slow: dict[int, Tensor] = {}
        self.count = 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        weights = [p for group in self.param_groups for p in group["params"]]
        self.slow = self.slow or {id(p): p.detach().clone() for p in weights}
        loss = super().step(closure)
        self.count += 1
        if self.count % 2 == 0:
            with torch.no_grad():
                for p in weights:
                    self.slow[id(p)].lerp_(p, 0.5)
                    p.copy_(self.slow[id(p)])
        return loss


class _With(Classifier):
    def __init__(self, optimizer: type[torch.optim.SGD], scale: float) -> None:
        super().__init__(lr_scale=scale)
        self.optimizer_class = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_class(self.parameters(), lr=0.05 * self.lr_scale)


class _Finetuned(Classifier):
    """With a backbone for BackboneFinetuning: the first convolutions, under the name that patterns expect too."""

    @property
    def backbone(self) -> nn.Module:
        return self.net[:7]  # type: ignore[return-value, index]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05 * self.lr_scale)


#: What else users put beside a callback: callbacks, and options of the trainer; ``model`` makes the model.
BESIDE: dict[str, tuple[Callable[[Path], list[Callback]], dict[str, Any]]] = {
    "EMA": (lambda folder: [since_lightning_2_6("EMAWeightAveraging")(decay=0.9)], {}),
    "SWA": (lambda folder: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)], {}),
    "ModelPruning": (lambda folder: [ModelPruning("l1_unstructured", amount=0.2)], {}),
    "BackboneFinetuning": (
        lambda folder: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01)],
        {"model": _Finetuned},
    ),
    "SAM": (lambda folder: [], {"model": lambda lr_scale: _With(_SAM, lr_scale)}),
    "Lookahead": (lambda folder: [], {"model": lambda lr_scale: _With(_Lookahead, lr_scale)}),
    "early stopping": (lambda folder: [EarlyStopping("val_loss", patience=5)], {}),
    "top-k checkpoints": (
        lambda folder: [ModelCheckpoint(dirpath=folder, monitor="val_loss", save_top_k=2, filename="{epoch}")], {},
    ),
    "timer": (lambda folder: [Timer(timedelta(hours=1))], {}),
    "clipping by norm": (lambda folder: [], {"gradient_clip_val": 0.5}),
    "clipping by value": (lambda folder: [], {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
}  # fmt: skip


def held_filters(callback: FilterCallback) -> dict[str, Tensor]:
    """Layer -> ``(n,)`` filters that must not move in the step under way."""
    if isinstance(callback, RePr):
        return callback.dropped
    if isinstance(callback, WeightAsynchronousUpdate) and callback.hold == "update" and callback.axis == "out":
        return {name: (~chosen).nonzero().flatten() for name, chosen in callback.last_subsets().items()}
    return {}


class Still(Callback):
    """Raises where a held filter is not bit-still, over a step and what other callbacks do until its batch ends."""

    def __init__(self, watched: list[FilterCallback]) -> None:
        self.watched, self.checks = watched, 0
        self._before: list[tuple[FilterCallback, str, Tensor, Tensor]] = []

    def on_before_optimizer_step(self, *_: Any) -> None:
        self._before = [
            (callback, layer, rows, filter_matrix(callback.layers[layer])[rows].clone())
            for callback in self.watched
            for layer, rows in held_filters(callback).items()
            if rows.numel() and layer in callback.layers
        ]

    def on_train_batch_end(self, *_: Any) -> None:
        for callback, layer, rows, before in self._before:
            self.checks += 1
            if not torch.equal(filter_matrix(callback.layers[layer])[rows], before):
                raise HeldFiltersMovedError(f"filters of {layer!r} that {type(callback).__name__} holds have moved")
        self._before = []


class HeldFiltersMovedError(AssertionError):
    """A filter that a callback holds still moved."""


def _train(callbacks: list[Callback], scale: float, **options: Any) -> Run:
    options = dict(options)
    model = options.pop("model", Classifier)(lr_scale=scale)
    watched = [callback for callback in callbacks if isinstance(callback, RePr | WeightAsynchronousUpdate)]
    still = [Still(watched)] if watched else []
    run = fit([*callbacks, *still], model=model, max_epochs=3, validation=batches(steps=1), **options)
    assert all(check.checks for check in still), "nothing was held"
    return run


def _outcome(make: Callable[[], list[Callback]], parts: list[Case], scale: float, **options: Any) -> str:
    try:
        run = _train(make(), scale, **options)
    except AssertionError:
        raise
    except Exception as error:
        return SWAP if "Swap the two" in str(error) else f"refused: {error}"
    weights = run.tensors()
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    for case in parts:
        others = [c.make() for c in parts if c is not case]
        if case.trains_differently and not options:
            alone = _train(others, scale).tensors()
            assert differing(weights, alone), f"{case.name} did nothing beside {[c.name for c in parts]}"
    return WORKS


def pairs() -> dict[str, dict[str, str]]:
    """First callback of the list -> second -> what happens."""
    found: dict[str, dict[str, str]] = {}
    for first in ONE_EACH:
        row = found.setdefault(first.cls.__name__, {})
        for second in ONE_EACH:
            if first.cls is not second.cls:
                scale = min(first.lr_scale, second.lr_scale)
                row[second.cls.__name__] = _outcome(
                    lambda a=first, b=second: [a.make(), b.make()], [first, second], scale
                )
    return found


def beside(folder: Path) -> dict[str, dict[str, str]]:
    """Callback -> what stands beside it -> what happens."""
    found: dict[str, dict[str, str]] = {}
    for case in ONE_EACH:
        row = found.setdefault(case.cls.__name__, {})
        for name, (others, options) in BESIDE.items():
            place = folder / case.name / name
            row[name] = _outcome(lambda c=case, o=others, p=place: [c.make(), *o(p)], [], case.lr_scale, **options)
    return found


def everything(folder: Path) -> dict[str, Any]:
    """Both tables."""
    with warnings.catch_warnings(), contextlib.chdir(folder):  # where the monitor writes its figures
        warnings.simplefilter("ignore")
        return {"pairs": pairs(), "beside": beside(folder)}


def main() -> None:
    """Write the result file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        result = everything(Path(folder))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
