"""Run inside ``torchrun --nproc-per-node 2``: every callback under DDP, ranks bit-identical after every step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_filterdiv import EntropyDepthBound, RePr, WeightAsynchronousUpdate
from lightning_filterdiv.squeezing import squeeze_in_stages
from lightning_filterdiv.tensors.rank_check import RankDivergenceError, check_ranks_agree
from tests.registry import SLOW_CASES, Case
from tests.suites.test_resume import KINDS
from tests.support.training import Classifier, Run, batches, differing, fit

Make = Callable[[], list[Callback]]
RANK = 0


def setup_module() -> None:
    global RANK
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    RANK = dist.get_rank()
    assert dist.get_world_size() == 2


class Witness(Callback):
    """Compares all parameters across ranks after every step, and keeps what each rank saw and drew."""

    def __init__(self) -> None:
        self.steps = 0
        self.inputs: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps += 1
        self.inputs.append(float(batch[0].sum()))
        check_ranks_agree(dict(pl_module.named_parameters()), f"after step {trainer.global_step}")
        for callback in trainer.callbacks:
            if isinstance(callback, WeightAsynchronousUpdate):
                subsets = callback.last_subsets()
                assert subsets or trainer.global_step == 0
                check_ranks_agree({name: mask.to(torch.int8) for name, mask in subsets.items()}, "subsets")


class SeedsPerRank(Callback):
    """User code that decorrelates augmentation in the common way, and draws from the global generator."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.global_rank)
        torch.rand(3 + trainer.global_rank)


def shared(path: Path) -> Path:
    """The folder of rank 0."""
    box = [str(path)]
    dist.broadcast_object_list(box)
    return Path(box[0])


def fit_ddp(callbacks: list[Callback], *, max_steps: int = 50, strategy: Any = "ddp", **options: Any) -> Run:
    loader = batches(rank=RANK, world_size=2)
    if isinstance(strategy, str):
        strategy = DDPStrategy(process_group_backend="gloo")
    options = {"max_epochs": -1, "strategy": strategy, "devices": 2} | options
    return fit(callbacks, loader=loader, max_steps=max_steps, **options)


def raises_on_every_rank(action: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...]) -> str:
    """Both ranks must fail, else the other would wait for ever."""
    try:
        action()
    except error as caught:
        message = str(caught)
    else:
        message = ""
    box: list[Any] = [None, None]
    dist.all_gather_object(box, bool(message))
    assert all(box), box
    return message


@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_ranks_stay_identical(case: Case) -> None:
    witness = Witness()
    fit_ddp([SeedsPerRank(), case.make(), witness])
    assert witness.steps == 50
    inputs: list[Any] = [None, None]
    dist.all_gather_object(inputs, witness.inputs)
    assert all(left != right for left, right in zip(*inputs, strict=True)), "ranks must see different data"


@contextlib.contextmanager
def no_all_reduce() -> Iterator[None]:
    """The control: DDP that never synchronises gradients."""
    original = nn.parallel.DistributedDataParallel.forward

    def forward(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        with self.no_sync():
            return original(self, *inputs, **kwargs)

    nn.parallel.DistributedDataParallel.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.parallel.DistributedDataParallel.forward = original  # type: ignore[method-assign]


def test_the_witness_sees_unsynchronised_ranks() -> None:
    with no_all_reduce():
        message = raises_on_every_rank(lambda: fit_ddp([Witness()], max_steps=3), RankDivergenceError)
    assert "after step 1" in message
    assert "net.0.weight" in message


class _GlobalDraws(WeightAsynchronousUpdate):
    """Mutant: draws from the global generator."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        draws = self._updates[0]._draws
        draws._key, draws._for = (int(torch.randint(1000, ())), ""), None
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def test_global_randomness_is_caught() -> None:
    raises_on_every_rank(lambda: fit_ddp([SeedsPerRank(), _GlobalDraws(), Witness()], max_steps=5), RankDivergenceError)


def check_resume(make: Make, kind: str, folder: Path) -> None:
    arguments, step = KINDS[kind]
    # Driven by epochs: in a fit driven by max_steps Lightning 2.6 itself repeats an epoch after an epoch-end resume.
    options: dict[str, Any] = {"validation": batches(steps=1), "max_steps": -1, "max_epochs": 3}
    checkpoint = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **arguments)
    whole = fit_ddp([*make(), checkpoint], **options)
    resumed = fit_ddp(
        [*make(), Witness()], model=Classifier(seed=1), ckpt_path=str(folder / f"step={step}.ckpt"), **options
    )
    assert min(resumed.model.losses) == step
    wrong = differing(whole.tensors(), resumed.tensors())
    assert not wrong, wrong


#: What differs between kinds is the same at any world size, where all four are tried.
FEW_KINDS = [kind if kind == "mid_epoch" else pytest.param(kind, marks=pytest.mark.soak) for kind in KINDS]


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_resume_without_a_callback(kind: str, tmp_path: Path) -> None:
    check_resume(list, kind, shared(tmp_path))


@pytest.mark.parametrize("kind", FEW_KINDS)
@pytest.mark.parametrize("case", SLOW_CASES, ids=lambda case: case.name)
def test_resume(case: Case, kind: str, tmp_path: Path) -> None:
    check_resume(lambda: [case.make()], kind, shared(tmp_path))


def test_two_cycles_of_repr() -> None:
    witness, callback = Witness(), RePr(full_epochs=1, sub_epochs=1, cycles=2, next_layer="small_random")
    fit_ddp([SeedsPerRank(), callback, witness], max_steps=36)
    assert witness.steps == 36
    assert [event["kind"] for event in callback.history] == ["drop", "regrow"] * 2
    histories: list[Any] = [None, None]
    dist.all_gather_object(histories, callback.history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("option", ["static_graph", "find_unused_parameters", "gradient_as_bucket_view"])
@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_options_of_ddp(option: str, hold: Any) -> None:
    """With gradients as views of DDP's buckets, assigning ``.grad`` instead of editing it would part the ranks."""
    strategy = DDPStrategy(process_group_backend="gloo", **{option: True})
    witness = Witness()
    fit_ddp([WeightAsynchronousUpdate(hold=hold), witness], max_steps=12, strategy=strategy)
    assert witness.steps == 12


def test_accumulation_under_ddp() -> None:
    witness = Witness()
    callback = WeightAsynchronousUpdate(hold="gradient")
    fit_ddp([callback, witness], max_steps=6, accumulate_grad_batches=3)
    assert callback.extra_state() == {"steps": [6]}


def test_shared_bases_stay_one_parameter_in_sync(tmp_path: Path) -> None:
    """Several layers use a basis: DDP reduces its gradient once, and a resume ends bit-identical."""
    from benchmarks.models import CifarResNet
    from lightning_filterdiv import BasisOrthonormality
    from lightning_filterdiv.shared_basis import share_filter_bases, shared_bases

    def classifier(seed: int) -> Classifier:
        torch.manual_seed(seed)
        net = share_filter_bases(CifarResNet(14, channels=1, width=8, classes=4), shared=4)
        return Classifier(net=net)

    options: dict[str, Any] = {"validation": batches(steps=1), "max_steps": -1, "max_epochs": 3}
    arguments, step = KINDS["mid_epoch"]
    checkpoint = ModelCheckpoint(dirpath=shared(tmp_path), filename="{step}", save_top_k=-1, **arguments)
    whole = fit_ddp([SeedsPerRank(), BasisOrthonormality(), checkpoint, Witness()], model=classifier(0), **options)
    names = [name for name, _ in whole.model.named_parameters() if "shared" in name]
    assert names == [f"net.stage{i}.1.conv1.shared.weight" for i in (1, 2, 3)]
    path = shared(tmp_path) / f"step={step}.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert [key for key in saved if "shared" in key] == names
    again = fit_ddp([BasisOrthonormality(), Witness()], model=classifier(1), ckpt_path=str(path), **options)
    assert not differing(whole.tensors(), again.tensors())
    assert len(list(shared_bases(again.model))) == 3


@pytest.mark.parametrize("method", ["csgd", "prune"])
def test_stages_end_alike_on_both_ranks(method: str, tmp_path: Path) -> None:
    """Rank 0 writes what a run goes on from; both ranks read it, and end with the same network."""
    folder = shared(tmp_path)

    def train(model: nn.Module, callbacks: list[Callback], checkpoint: str | None) -> None:
        assert checkpoint is None
        fit_ddp(callbacks, model=model, max_steps=-1, max_epochs=1)

    torch.manual_seed(0)
    images = next(iter(batches()))[0][:2]
    more = {"tolerance": float("inf")} if method == "csgd" else {"importance": "l1"}

    def run(fits: Any) -> nn.Module:
        model = Classifier()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).reshape(parameter.shape))
        return squeeze_in_stages(model, fits, images, method=method, stages=(0.8, 0.6), folder=folder, **more).network

    network = run(train)
    check_ranks_agree(dict(network.named_parameters()), "after the stages")
    again = run(lambda *_: pytest.fail("nothing is left to fit"))
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


def test_importance_is_the_mean_over_all_ranks(tmp_path: Path) -> None:
    """Of the images that both ranks saw, also in a run that rank 0's checkpoint resumed in the middle of an epoch."""
    from lightning_filterdiv import ChannelImportance

    class Recorder(ChannelImportance):
        def prepare(self, trainer: Any, pl_module: Any) -> None:
            super().prepare(trainer, pl_module)
            self.rows: dict[str, list[torch.Tensor]] = {}
            for name, conv in self.layers.items():
                conv.gate.excite.register_forward_hook(  # type: ignore[union-attr,operator]
                    lambda m, i, out, name=name: self.rows.setdefault(name, []).append(torch.sigmoid(out.detach()))
                )

    options: dict[str, Any] = {"max_steps": -1, "max_epochs": 2}
    arguments, step = KINDS["mid_epoch"]
    checkpoint = ModelCheckpoint(dirpath=shared(tmp_path), filename="{step}", save_top_k=-1, **arguments)
    callback = Recorder()
    fit_ddp([callback, checkpoint], **options)
    differ = []
    for name, gates in callback.importance.items():
        own = torch.cat(callback.rows[name][-6:]).double()
        assert len(own) == 6 * 16
        rows: list[Any] = [None, None]
        dist.all_gather_object(rows, own)
        torch.testing.assert_close(gates, torch.cat(rows).mean(0), rtol=1e-6, atol=1e-9)
        differ.append(not torch.equal(rows[0].mean(0), rows[1].mean(0)))
    assert any(differ), "ranks must see different images"
    resumed = ChannelImportance()
    path = shared(tmp_path) / f"step={step}.ckpt"
    # A subclass has a state key of its own; its state is that of its parent.
    saved = torch.load(path, weights_only=True)
    saved["callbacks"] = {resumed.state_key: saved["callbacks"][callback.state_key]}
    if RANK == 0:
        torch.save(saved, shared_copy := path.with_name("parent.ckpt"))
        assert shared_copy.exists()
    dist.barrier()
    fit_ddp([resumed], ckpt_path=str(path.with_name("parent.ckpt")), model=Classifier(seed=1), **options)
    assert list(resumed.importance) == list(callback.importance)
    for name, gates in callback.importance.items():
        assert torch.equal(gates, resumed.importance[name])


def test_the_monitor_writes_once(tmp_path: Path) -> None:
    """Beside RePr, with figures: one writer, no hang, and every rank knows the looks."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_filterdiv import FilterSimilarityMonitor

    folder = shared(tmp_path)
    pl.seed_everything(0, verbose=False)
    monitor = FilterSimilarityMonitor(max_figures=1)
    method = RePr(full_epochs=1, sub_epochs=1, cycles=1)
    fit_ddp([method, monitor, Witness()], max_steps=18, logger=TensorBoardLogger(folder))
    dist.barrier()
    assert len(list(folder.rglob("events.out.tfevents*"))) == 1
    assert [look.step for look in monitor._snapshots] == [0, 6, 12, 18]


def test_the_depth_bound_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On rank 0; every rank has its bound and depth."""
    from lightning_filterdiv.entropy_depth import callback

    calls: list[int] = []
    original = callback.measure
    monkeypatch.setattr(callback, "measure", lambda *a, **o: (calls.append(RANK), original(*a, **o))[1])
    bound = EntropyDepthBound(action="log")
    fit_ddp([SeedsPerRank(), bound], max_steps=3)
    assert bound.bound is not None
    assert bound.depth is not None
    found: list[Any] = [None, None]
    dist.all_gather_object(found, (calls, bound.bound, bound.depth))
    assert [part[0] for part in found] == [[0], []]
    assert found[0][1:] == found[1][1:]
    assert found[0][2].total == 4
    assert "only rank 0 measured" in found[0][1].notes[-1]


def test_a_bound_that_cannot_be_measured_ends_every_rank() -> None:
    """An error on rank 0 alone would leave the others waiting."""
    broken = batches(rank=RANK, world_size=2)
    broken.tensors = (torch.full_like(broken.tensors[0], torch.nan), broken.tensors[1])
    options: dict[str, Any] = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": 2, "max_epochs": 1}
    message = raises_on_every_rank(
        lambda: fit([EntropyDepthBound()], loader=broken, **options), (ValueError, RuntimeError)
    )
    assert "image 0 holds NaN" in message


def test_an_unwritable_folder_stops_no_rank(tmp_path: Path) -> None:
    """Rank 0 alone cannot write; nobody waits for it."""
    from lightning_filterdiv import FilterSimilarityMonitor

    blocked = shared(tmp_path) / "file"
    blocked.write_text("not a folder")
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit_ddp([FilterSimilarityMonitor()], max_steps=3, default_root_dir=blocked / "logs")
    assert run.trainer.global_step == 3
    said = [str(warning.message) for warning in caught if "could not write figures" in str(warning.message)]
    assert len(said) == (RANK == 0)
