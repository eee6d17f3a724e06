"""The callback: what it acts on, its schedule, what it logs, and whom it refuses."""

from __future__ import annotations

import csv
import logging
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from benchmarks.models import CifarResNet
from lightning_filterdiv import BasisOrthonormality, WeightAsynchronousUpdate
from lightning_filterdiv.orthonormality import DEFAULT_WEIGHTS, OrthonormalityPenalty
from lightning_filterdiv.shared_basis import share_filter_bases, shared_bases
from tests.suites.test_resume import KINDS
from tests.support.training import STEPS_PER_EPOCH, Classifier, ManualClassifier, batches, differing, fit, same


def sharing_classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    net = CifarResNet(14, channels=1, width=8, classes=4)
    return Classifier(net=share_filter_bases(net, shared=4, **options))


def _excess(model: nn.Module) -> float:
    found = [basis.weight.detach().flatten(1) for _, basis, _ in shared_bases(model)]
    return max(float((rows @ rows.T - torch.eye(len(rows))).square().mean()) for rows in found)


def test_shared_bases_are_the_default_targets_and_stay_orthonormal() -> None:
    callback = BasisOrthonormality()
    run = fit([callback], model=sharing_classifier(), max_epochs=4)
    plain = fit(model=sharing_classifier(), max_epochs=4)
    names = [f"net.stage{i}.1.conv1.shared" for i in (1, 2, 3)]
    assert list(callback.layers) == names
    assert _excess(run.model) < 0.2 * _excess(plain.model)
    seen: dict[str, float] = {}

    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.update(callback.values())

    fit([callback, Looks()], model=sharing_classifier(), max_epochs=1)
    assert list(seen) == ["stage1", "stage2", "stage3", "total"]
    entries = [4**2, 8**2, 16**2]
    pooled = sum(seen[f"stage{i}"] * n for i, n in zip((1, 2, 3), entries, strict=True)) / sum(entries)
    assert seen["total"] == pytest.approx(pooled)


def test_include_overrides_the_default() -> None:
    callback = BasisOrthonormality(form="soft", include=["net.conv", "net.stage3.0.*"])
    fit([callback], model=sharing_classifier(), max_epochs=1)
    assert list(callback.layers) == ["net.conv", "net.stage3.0.conv1", "net.stage3.0.conv2"]
    unique = BasisOrthonormality(unique=True, exclude=["net.stage1.*"])
    fit([unique], model=sharing_classifier(), max_epochs=1)
    assert list(unique.layers) == [f"net.stage{i}.1.conv1.shared" for i in (2, 3)]


def test_weight_at_follows_the_milestones() -> None:
    callback = BasisOrthonormality(form="srip", weight=0.5, milestones={20: 1e-3, 5: 0.1, 120: 0.0})
    found = [callback.weight_at(epoch, 0) for epoch in (0, 4, 5, 19, 20, 119, 120, 500)]
    assert found == pytest.approx([0.5, 0.5, 0.05, 0.05, 5e-4, 5e-4, 0, 0])
    assert {form: BasisOrthonormality(form=form).weight_at(0, 0) for form in DEFAULT_WEIGHTS} == dict(DEFAULT_WEIGHTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_auto_is_what_it_says(shared: bool, optimizer: str, caplog: pytest.LogCaptureFixture) -> None:
    """Equal to the explicit choice bit by bit, and the log names it with the reason."""
    torch.manual_seed(0)

    def model() -> Any:
        made = sharing_classifier() if shared else Classifier()
        if optimizer == "adam":
            made.configure_optimizers = lambda: torch.optim.AdamW(made.parameters(), lr=1e-3)
        return made

    explicit: dict[str, Any] = {"form": "basis" if shared else "soft", "decoupled": optimizer == "adam"}
    auto = BasisOrthonormality()
    with caplog.at_level(logging.INFO):
        first = fit([auto], model=model(), max_epochs=1)
    second = fit([BasisOrthonormality(**explicit)], model=model(), max_epochs=1)
    assert same(first.model.state_dict(), second.model.state_dict())
    assert auto.resolved_form == explicit["form"]
    assert auto.base_weight == DEFAULT_WEIGHTS[auto.resolved_form]
    line = next(text for text in caplog.messages if "BasisOrthonormality: form" in text)
    form = (
        "form 'basis' (auto: shared bases), weight 10" if shared else "form 'soft' (auto: no shared bases), weight 0.01"
    )
    way = "decoupled from the gradient (auto: AdamW)" if optimizer == "adam" else "added to the gradient (auto: SGD)"
    assert line == f"BasisOrthonormality: {form} (the form's own), {way}"


def test_the_log_says_that_steps_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit([BasisOrthonormality(form="soft", every_n_steps=4)], max_epochs=1)
    assert "weight 0.01 (the form's own), one step in 4, with 4 times the weight, added to the gradient" in caplog.text


def test_auto_with_ordinary_layers_of_a_network_with_shared_bases() -> None:
    callback = BasisOrthonormality(include=["net.conv", "net.stage3.0.*"])
    fit([callback], model=sharing_classifier(), max_epochs=1)
    assert callback.resolved_form == "soft"
    assert BasisOrthonormality(unique=True).resolved_form == "basis"


@pytest.mark.parametrize("written", ["auto", "true", "false"])
def test_yaml_takes_both_kinds_of_decoupled(written: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BasisOrthonormality, "callback")
    given = parser.parse_string(f"callback: {{form: auto, decoupled: {written}, squared: null}}").callback
    assert given.decoupled == {"auto": "auto", "true": True, "false": False}[written]
    assert BasisOrthonormality(**given.as_dict()).decoupled == given.decoupled


def test_the_defaults_of_0_1_resume_with_a_warning() -> None:
    state = BasisOrthonormality().state_dict()
    state["arguments"] |= {"form": "basis", "decoupled": False, "squared": False}
    expected = r"form: 'basis' -> 'auto', decoupled: False -> 'auto', squared: False -> None"
    with pytest.warns(UserWarning, match=expected):
        BasisOrthonormality().load_state_dict(state)


class _Ramp(BasisOrthonormality):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.asked: list[tuple[int, int]] = []

    def weight_at(self, epoch: int, step: int) -> float:
        self.asked.append((epoch, step))
        return 0.0 if step < 8 else 1.0


def test_weight_at_is_the_method_to_override() -> None:
    callback = _Ramp(form="soft")
    fit([callback], max_epochs=2)
    steps = [step for _, step in callback.asked]
    assert set(range(2 * STEPS_PER_EPOCH)) <= set(steps)
    assert {epoch for epoch, _ in callback.asked} == {0, 1}
    switched_off = fit([_Ramp(form="soft")], max_epochs=1).tensors()
    plain = fit(max_epochs=1).tensors()
    assert all(torch.equal(plain[name], value) for name, value in switched_off.items())


@pytest.mark.parametrize("decoupled", [False, True])
def test_every_nth_step_of_each_optimizer_has_n_times_the_weight(
    decoupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second optimizer steps at every other batch: its own steps count, not those of the trainer."""
    seen: dict[int, list[float]] = {}
    original = OrthonormalityPenalty.before_step

    def before_step(self: OrthonormalityPenalty, *, weight: float, **options: Any) -> None:
        seen.setdefault(id(self.optimizer), []).append(weight)
        original(self, weight=weight, **options)

    monkeypatch.setattr(OrthonormalityPenalty, "before_step", before_step)
    callback = BasisOrthonormality(form="soft", weight=0.02, every_n_steps=4, decoupled=decoupled)
    run = fit([callback], model=ManualClassifier(), max_epochs=2)
    steps = [2 * STEPS_PER_EPOCH, STEPS_PER_EPOCH]
    weights = [seen[id(optimizer)] for optimizer in run.trainer.optimizers]
    assert weights == [[0.08 if step % 4 == 0 else 0.0 for step in range(count)] for count in steps]
    assert callback.extra_state()["taken"] == [[0, steps[0]], [1, steps[1]]]


class _Negative(BasisOrthonormality):
    def weight_at(self, epoch: int, step: int) -> float:
        return -1.0


def test_a_negative_weight_of_a_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight_at\(epoch, step\)"):
        fit([_Negative()], max_epochs=1)


def _logged(folder: Any) -> list[dict[str, str]]:
    """Rows of the CSV file in which the penalty was logged."""
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["filterdiv/orthonormality/total"]]


def test_logs_every_layer_and_the_total(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    callback = BasisOrthonormality(form="soft", weight=0.25)
    fit([callback], max_epochs=2, logger=logger, log_every_n_steps=4)
    names = [f"filterdiv/orthonormality/{name}" for name in ("net.0", "net.3", "net.5", "net.7", "total", "weight")]
    ours = _logged(tmp_path)
    assert set(names) <= ours[0].keys()
    assert [int(row["step"]) for row in ours] == [0, 4, 6, 8, 12]
    for row in ours:
        parts = [float(row[name]) for name in names[:4]]
        assert float(row[names[4]]) == pytest.approx(sum(parts))
        assert float(row[names[5]]) == 0.25
    assert float(ours[-1][names[4]]) < float(ours[0][names[4]])


def test_logging_every_zero_steps_means_at_the_end_of_epochs_only(tmp_path: Any) -> None:
    logger = CSVLogger(tmp_path)
    fit([BasisOrthonormality()], max_epochs=2, logger=logger, log_every_n_steps=0)
    assert [int(row["step"]) for row in _logged(tmp_path)] == [STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH]


class _TwoOptimizers(ManualClassifier):
    """The basis is in one optimizer, what its layers add to it in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = sharing_classifier().net

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        unique = [p for name, p in self.named_parameters() if ".unique." in name]
        others = [p for name, p in self.named_parameters() if ".unique." not in name]
        return [torch.optim.SGD(others, lr=0.05), torch.optim.SGD(unique, lr=0.05)], []


def test_a_gram_in_two_optimizers_counts_once() -> None:
    callback = BasisOrthonormality(unique=True)
    seen: list[dict[str, float]] = []

    class Looks(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(callback.values())

    fit([callback, Looks()], model=_TwoOptimizers(), max_epochs=1)
    parts = [value for name, value in seen[0].items() if name != "total"]
    assert len(parts) == 3
    assert min(parts) <= seen[0]["total"] <= max(parts), "a mean over pooled entries"


def test_accumulation_adds_the_penalty_once() -> None:
    """Four micro-batches of the same images equal one step; the penalty must not count four times."""

    class Zero(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0 * super().training_step(batch, batch_idx)

    once = fit([BasisOrthonormality(form="soft")], model=Zero(), max_steps=3, max_epochs=-1)
    four = fit([BasisOrthonormality(form="soft")], model=Zero(), max_steps=3, max_epochs=-1, accumulate_grad_batches=4)
    for name, value in once.model.state_dict().items():
        if name.endswith("weight"):
            torch.testing.assert_close(four.model.state_dict()[name], value, msg=name)


def test_the_penalty_is_logged_and_decays_under_manual_optimization() -> None:
    fit([BasisOrthonormality(form="soft")], model=ManualClassifier(), max_epochs=1)
    with pytest.raises(RuntimeError, match="an optimizer step reached BasisOrthonormality without"):
        fit([BasisOrthonormality(form="soft")], model=ManualClassifier(wrapped=False), max_epochs=1)


def test_penalties_come_before_masks() -> None:
    fit([BasisOrthonormality(), WeightAsynchronousUpdate()], max_epochs=1)
    with pytest.raises(MisconfigurationException, match="BasisOrthonormality must come before"):
        fit([WeightAsynchronousUpdate(), BasisOrthonormality()], max_epochs=1)


class _Searches(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.05, line_search_fn=self.optimizer_name or None)


def test_lbfgs() -> None:
    fit([BasisOrthonormality(form="soft")], model=_Searches(""), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="LBFGS with a line search"):
        fit([BasisOrthonormality(form="soft")], model=_Searches("strong_wolfe"), max_epochs=1)


def test_refusals_name_the_layer() -> None:
    model = Classifier(net=nn.Sequential(nn.ConvTranspose2d(1, 4, 3), nn.Flatten(), nn.Linear(400, 4)))
    with pytest.raises(MisconfigurationException, match=r"net\.0 is a transposed convolution"):
        fit([BasisOrthonormality(form="convolutional", include=["net.0"])], model=model, max_epochs=1)
    with pytest.raises(MisconfigurationException, match="unique=True, but no layer"):
        fit([BasisOrthonormality(unique=True)], max_epochs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_with_shared_bases_resumes_exactly(kind: str, tmp_path: Any) -> None:
    arguments, step = KINDS[kind]

    def run(seed: int, *callbacks: pl.Callback, **options: Any) -> Any:
        model = sharing_classifier()
        for parameter in model.parameters():
            parameter.data.add_(seed)
        used = [BasisOrthonormality(unique=True), *callbacks]
        return fit(used, model=model, max_epochs=3, validation=batches(steps=1), **options)

    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **arguments)
    whole = run(0, checkpoint)
    resumed = run(1, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
    assert min(resumed.model.losses) == step
    assert not differing(whole.tensors(), resumed.tensors())


def test_linear_layers_are_penalised_where_asked() -> None:
    """The gradient of SO on a classifier, ``4 (W W^T - I) W``, beside that of the convolutions."""
    model = Classifier()
    callback = BasisOrthonormality(form="soft", weight=0.5, linear=True, decoupled=False)
    gradients: dict[str, torch.Tensor] = {}

    class Before(pl.Callback):
        gradient_stage = 0

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            gradients.setdefault("before", model.net[-1].weight.grad.clone())

    class After(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            weight = model.net[-1].weight.detach()
            gram = weight @ weight.T - torch.eye(len(weight))
            added = 4 * 0.5 * gram @ weight
            gradients.setdefault("expected", gradients["before"] + added)
            gradients.setdefault("after", model.net[-1].weight.grad.clone())

    fit([Before(), callback, After()], model=model)
    torch.testing.assert_close(gradients["after"], gradients["expected"], rtol=1e-5, atol=1e-6)
    linear = next(name for name, module in model.named_modules() if module is model.net[-1])
    assert linear in callback.layers


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, ["*.{last}"], "convolutions"),
        (["net.{last}"], None, "linear"),
        (["net.0", "net.{last}"], None, "both"),
    ],
)
def test_patterns_mean_linear_layers_too(include: Any, exclude: Any, expected: str) -> None:
    model = Classifier()
    last = str(len(model.net) - 1)
    include, exclude = (None if given is None else [p.format(last=last) for p in given] for given in (include, exclude))
    chosen = BasisOrthonormality(linear=True, include=include, exclude=exclude).choose(model)
    kinds = {type(layer) for layer in chosen.values()}
    assert kinds == {
        "convolutions": {nn.Conv2d}, "linear": {nn.Linear}, "both": {nn.Conv2d, nn.Linear}
    }[expected]  # fmt: skip
    ordinary: list[nn.Module] = list(BasisOrthonormality().choose(model).values())
    assert not any(isinstance(layer, nn.Linear) for layer in ordinary)


def test_linear_layers_have_no_kernels() -> None:
    with pytest.raises(ValueError, match="linear=True, but form='convolutional' is about kernels"):
        BasisOrthonormality(linear=True, form="convolutional")
