"""The gradient that is added equals that of the plain sum over layers, for every kind of layer and optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cost.fake_device import KernelCounter
from benchmarks.models import CifarResNet
from lightning_filterdiv.filters import filter_matrix, select_filters
from lightning_filterdiv.orthonormality import (
    OrthonormalityPenalty,
    basis_penalty,
    convolutional_orthogonality,
    double_soft_orthogonality,
    filter_blocks,
    mutual_coherence_penalty,
    soft_orthogonality,
    spectral_restricted_isometry,
)
from lightning_filterdiv.orthonormality.penalty import Form
from lightning_filterdiv.shared_basis import FilterBasis, SharedBasisConv2d, share_filter_bases, shared_bases
from tests.support.fake_gpu import needs_fake_gpu

FORMS: tuple[Form, ...] = ("basis", "soft", "double_soft", "mutual_coherence", "srip", "convolutional")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2)),
    "more filters than fan-in": lambda: nn.Conv2d(1, 12, 3),
    "conv3d": lambda: nn.Conv3d(3, 4, (3, 2, 1)),
    "grouped": lambda: nn.Conv2d(6, 9, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 12, 3, groups=6),
    "strided and dilated": lambda: nn.Conv2d(4, 6, 5, stride=2, dilation=2),
    "channels_last": lambda: nn.Conv2d(6, 8, (3, 2)).to(memory_format=torch.channels_last),
    "wide channels_last": lambda: nn.Conv2d(2, 24, 2).to(
        memory_format=torch.channels_last
    ),  # more filters than entries
    "grouped channels_last": lambda: nn.Conv2d(6, 8, 3, groups=2).to(memory_format=torch.channels_last),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, (3, 2)),
    "transposed grouped": lambda: nn.ConvTranspose2d(6, 8, (3, 2), groups=2),
}


def _plain(form: str, layers: list[nn.Module], starts: dict[int, Tensor]) -> Tensor:
    """The penalty of all layers, one after the other, group by group, by autograd."""
    total = torch.zeros((), dtype=torch.float64)
    entries = 0
    for index, conv in enumerate(layers):
        weight, groups = conv.weight, conv.groups
        if isinstance(conv, nn.ConvTranspose2d):
            parts = [part.transpose(0, 1) for part in weight.chunk(groups, dim=0)]
        else:
            parts = list(weight.chunk(groups, dim=0))
        for number, part in enumerate(parts):
            rows = part.flatten(1)
            entries += len(rows) ** 2
            if form == "basis":
                total = total + basis_penalty(rows) * len(rows) ** 2
            elif form == "srip":
                total = total + spectral_restricted_isometry(rows, starts[index][number])
            elif form == "convolutional":
                stride = [s // d if s % d == 0 else s for s, d in zip(conv.stride, conv.dilation, strict=True)]
                total = total + convolutional_orthogonality(part, stride)
            else:
                function = {
                    "soft": soft_orthogonality,
                    "double_soft": double_soft_orthogonality,
                    "mutual_coherence": mutual_coherence_penalty,
                }[form]
                total = total + function(rows)
    return total / entries if form == "basis" else total


# The convolutional form of a transposed layer is refused, see below.
DEFINED = [(form, kind) for form in FORMS for kind in LAYERS if form != "convolutional" or "transposed" not in kind]


@pytest.mark.parametrize(("form", "kind"), DEFINED)
def test_the_gradient_is_that_of_the_plain_sum(form: Form, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([LAYERS[kind]() for _ in range(3)]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    blocks = filter_blocks(model, select_filters(model, ["*"]))
    penalty = OrthonormalityPenalty(blocks, optimizer, form=form, seed=4)
    penalty.before_step(weight=0.3, step=9)
    found = [conv.weight.grad.clone() for conv in model]
    starts = penalty._starts(9)
    drawn = {} if form != "srip" else dict(enumerate(starts[0].view(3, model[0].groups, -1)))
    model.zero_grad()
    (0.3 * _plain(form, list(model), drawn)).backward()
    for got, conv in zip(found, model, strict=True):
        torch.testing.assert_close(got, conv.weight.grad, rtol=1e-10, atol=1e-12)
    values = penalty.values(9)
    assert list(values) == ["0", "1", "2"]
    if form in ("mutual_coherence", "srip"):
        torch.testing.assert_close(penalty.total(values), _plain(form, list(model), drawn).detach())


def test_values_subtract_what_is_unreachable() -> None:
    model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.Conv2d(12, 4, 3)).double()
    for conv in model:
        conv.weight.data = nn.init.orthogonal_(conv.weight.data)
    blocks = filter_blocks(model, select_filters(model))
    for form in ("basis", "soft", "double_soft"):
        values = OrthonormalityPenalty(blocks, torch.optim.SGD(model.parameters(), lr=0.1), form=form).values()
        assert all(float(value) < 1e-20 for value in values.values()), form
    raw = basis_penalty([filter_matrix(conv) for conv in model])
    assert float(raw) == pytest.approx((12 - 9) / (144 + 16))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("unique", [False, True])
def test_shared_bases_are_one_gram_per_stage(double: bool, unique: bool) -> None:
    torch.manual_seed(0)
    model = share_filter_bases(CifarResNet(14), shared=4, unique=1, double=double).double()
    for _, basis, _ in shared_bases(model):
        nn.init.normal_(basis.weight, std=0.2)
    layers = select_filters(model, [name for name, _, _ in shared_bases(model)])
    blocks = filter_blocks(model, layers, unique=unique)
    assert [block.name for block in blocks] == ["stage1", "stage2", "stage3"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    OrthonormalityPenalty(blocks, optimizer).before_step(weight=10, step=0)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    # The paper's sum, pair by pair.
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for stage in ("stage1", "stage2", "stage3"):
        bases = {id(b): (b, own) for _, b, own in shared_bases(model) if b.gram == stage}
        shared = torch.cat([b.weight.flatten(1) for b, _ in bases.values()])
        total = total + (shared @ shared.T - torch.eye(len(shared))).square().sum()
        pairs += len(shared) ** 2
        for _, layer in [entry for _, own in bases.values() for entry in own] if unique else []:
            own = layer.unique.weight.flatten(1)
            total = total + (shared @ own.T).square().sum() + (own @ own.T - torch.eye(len(own))).square().sum()
            pairs += len(shared) * len(own) + len(own) ** 2
    (10 * total / pairs).backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12, msg=name)


def test_separate_grams_have_separate_means() -> None:
    """ResNet-50-Shared++: the mean over 3x3 bases plus the mean over 1x1 bases, not the mean over all."""
    from torchvision.models.resnet import Bottleneck, ResNet

    model = share_filter_bases(ResNet(Bottleneck, [3, 3, 3, 3], num_classes=2, width_per_group=8), double=True).double()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    blocks = filter_blocks(model, select_filters(model, [name for name, _, _ in shared_bases(model)]))
    assert {block.pool for block in blocks} == {"conv2", "conv3"}
    for _, basis, _ in shared_bases(model):
        basis.weight.data.normal_(std=0.2)
    OrthonormalityPenalty(blocks, torch.optim.SGD(model.parameters(), lr=1)).before_step(weight=1, step=0)
    found = {name: basis.weight.grad.clone() for name, basis, _ in shared_bases(model)}
    model.zero_grad()
    matrices = {name: (basis.pool, basis.weight.flatten(1)) for name, basis, _ in shared_bases(model)}
    sum(basis_penalty([m for p, m in matrices.values() if p == pool]) for pool in ("conv2", "conv3")).backward()
    for name, basis, _ in shared_bases(model):
        torch.testing.assert_close(found[name], basis.weight.grad, rtol=1e-9, atol=1e-12)


def _two_layers() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def test_decoupled_moves_weights_after_the_step_by_rate_times_weight_times_gradient() -> None:
    model, optimizer = _two_layers()
    plain = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        theirs.grad = mine.grad.clone()
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, form="soft", decoupled=True)
    for _ in range(3):
        penalty.before_step(weight=0.7, step=0)
        optimizer.step()
        penalty.after_step()
        reference.step()
        for conv in plain:
            leaf = conv.weight.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(soft_orthogonality(leaf.flatten(1)), leaf)
            conv.weight.data -= 0.01 * 0.7 * gradient
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    for mine, theirs in zip(optimizer.state.values(), reference.state.values(), strict=True):
        torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"])  # the moments never saw the penalty


def test_decoupled_uses_the_learning_rate_of_every_parameter() -> None:
    """Shared and unique filters of one Gram may be in different groups, or in no group at all."""
    torch.manual_seed(0)
    model = share_filter_bases(CifarResNet(14), shared=4, stages=["stage1"])
    ((name, basis, own),) = shared_bases(model)
    uniques = [layer.unique.weight for _, layer in own if layer.unique is not None]
    rates = [0.1, 0.01]
    groups = [{"params": [basis.weight], "lr": rates[0]}, {"params": uniques[:1], "lr": rates[1]}]
    optimizer = torch.optim.SGD(groups)
    for weight in (basis.weight, *uniques):
        nn.init.normal_(weight, std=0.3)
        weight.grad = torch.zeros_like(weight)
    blocks = filter_blocks(model, select_filters(model, [name]), unique=True)
    coupled = OrthonormalityPenalty(blocks, optimizer)
    coupled.before_step(weight=10, step=0)
    gradients = [basis.weight.grad.clone(), uniques[0].grad.clone()]
    before = [weight.detach().clone() for weight in (basis.weight, *uniques)]
    decoupled = OrthonormalityPenalty(blocks, optimizer, decoupled=True)
    decoupled.before_step(weight=10, step=0)
    decoupled.after_step()
    for weight, old, gradient, rate in zip((basis.weight, uniques[0]), before, gradients, rates, strict=False):
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(weight.detach(), old - rate * gradient)
    assert all(torch.equal(weight, old) for weight, old in zip(uniques[1:], before[2:], strict=True))


def test_a_step_that_did_not_happen_is_forgotten() -> None:
    model, optimizer = _two_layers()
    before = copy.deepcopy(model.state_dict())
    penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, form="soft", decoupled=True)
    penalty.before_step(weight=1, step=0)
    penalty.before_step(weight=0, step=0)
    penalty.after_step()
    penalty.after_step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_parameters_without_gradient_are_never_given_one() -> None:
    model, optimizer = _two_layers()
    model[1].weight.grad = None
    model[2].weight.requires_grad_(False)
    kept = model[2].weight.grad.clone()
    for decoupled in (False, True):
        before = model[1].weight.detach().clone()
        penalty = OrthonormalityPenalty(
            filter_blocks(model, select_filters(model)), optimizer, form="soft", decoupled=decoupled
        )
        touched = model[0].weight.grad.clone(), model[0].weight.detach().clone()
        penalty.before_step(weight=1, step=0)
        penalty.after_step()
        assert model[1].weight.grad is None
        assert torch.equal(model[1].weight, before)
        assert torch.equal(model[2].weight.grad, kept)
        assert torch.equal(model[0].weight.grad, touched[0]) is decoupled
        assert torch.equal(model[0].weight, touched[1]) is not decoupled


def test_gradients_are_edited_in_place() -> None:
    """DDP's buckets are views of them."""
    model, optimizer = _two_layers()
    storages = [parameter.grad.data_ptr() for parameter in model.parameters() if parameter.grad is not None]
    penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, form="srip")
    penalty.before_step(weight=1, step=0)
    assert storages == [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]


def test_scaled_gradients_get_a_scaled_penalty() -> None:
    grads = []
    for scale in (None, torch.tensor(1024.0)):
        model, optimizer = _two_layers()
        for parameter in model.parameters():
            parameter.grad.zero_()  # type: ignore[union-attr]
        penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, form="soft")
        penalty.before_step(weight=1, step=0, gradient_scale=scale)
        grads.append(model[0].weight.grad.clone())
    torch.testing.assert_close(1024 * grads[0], grads[1])


def test_a_learning_rate_on_the_device_stays_a_tensor() -> None:
    moved = []
    for rate in (0.01, torch.tensor(0.01)):
        model, _ = _two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        penalty = OrthonormalityPenalty(
            filter_blocks(model, select_filters(model)), optimizer, form="soft", decoupled=True
        )
        penalty.before_step(weight=1, step=0)
        penalty.after_step()
        moved.append(model[0].weight.detach().clone())
    torch.testing.assert_close(moved[0], moved[1])


def test_bfloat16_weights_are_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3)).bfloat16()
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    penalty = OrthonormalityPenalty(
        filter_blocks(model, select_filters(model)), torch.optim.SGD(model.parameters(), lr=1), form="soft"
    )
    penalty.before_step(weight=1, step=0)
    leaf = model[0].weight.detach().float().requires_grad_()
    soft_orthogonality(leaf.flatten(1)).backward()
    torch.testing.assert_close(model[0].weight.grad, leaf.grad.bfloat16(), rtol=0.01, atol=1e-6)


def test_srip_is_deterministic_for_seed_and_step() -> None:
    def gradient(seed: int, step: int) -> Tensor:
        model, optimizer = _two_layers()
        penalty = OrthonormalityPenalty(filter_blocks(model, select_filters(model)), optimizer, form="srip", seed=seed)
        torch.manual_seed(step * 17)  # the global generator has no say
        penalty.before_step(weight=1, step=step)
        return model[1].weight.grad.clone()

    assert torch.equal(gradient(0, 3), gradient(0, 3))
    assert not torch.equal(gradient(0, 3), gradient(0, 4))
    assert not torch.equal(gradient(0, 3), gradient(1, 3))


@needs_fake_gpu
@pytest.mark.parametrize("unique", [False, True])
def test_kernels_follow_stages_not_layers(unique: bool) -> None:
    """On a fake GPU: nothing crosses to the host, and a deeper network starts as many kernels."""
    counts = []
    for depth in (20, 44):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            model = share_filter_bases(CifarResNet(depth), shared=4, double=True)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            layers = select_filters(model, [name for name, _, _ in shared_bases(model)])
            blocks = filter_blocks(model, layers, unique=unique)
            penalty = OrthonormalityPenalty(blocks, torch.optim.SGD(model.parameters(), lr=0.1))
            with KernelCounter() as counter:
                penalty.before_step(weight=1, step=0)
            counts.append(counter.kernels)
    assert counts[0] == counts[1]
    assert 0 < counts[0].total() <= 40


def test_convolutional_without_the_square_against_autograd() -> None:
    """The norm of each layer, of all its groups together; layers where no shifts overlap included."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 12, 1)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    blocks = filter_blocks(model, select_filters(model))
    penalty = OrthonormalityPenalty(blocks, optimizer, form="convolutional", squared=False)
    norms: dict[str, torch.Tensor] = {}
    for name, conv in model.named_children():
        assert isinstance(conv, nn.Conv2d)
        kernels = conv.weight.view(conv.groups, -1, *conv.weight.shape[1:])
        norms[name] = convolutional_orthogonality(kernels, conv.stride).sum().sqrt()
        unreachable = conv.groups * max(0, kernels.shape[1] - kernels[0, 0].numel())
        assert torch.allclose(penalty.values()[name], norms[name].detach() - unreachable**0.5)
    expected = torch.autograd.grad(torch.stack(list(norms.values())).sum(), [block.parameters[0] for block in blocks])
    for block in blocks:
        block.parameters[0].grad = torch.zeros_like(block.parameters[0])
    penalty.before_step(weight=0.5, step=0)
    for block, gradient in zip(blocks, expected, strict=True):
        torch.testing.assert_close(block.parameters[0].grad, 0.5 * gradient, rtol=1e-6, atol=1e-8)
    squared = OrthonormalityPenalty(blocks, optimizer, form="convolutional").values()
    assert torch.allclose(squared["0"], norms["0"].detach().square()), "the default keeps the square"


def test_refusals() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3))
    blocks = filter_blocks(model, select_filters(model, ["*"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="0 is a transposed convolution"):
        OrthonormalityPenalty(blocks, optimizer, form="convolutional")
    with pytest.raises(ValueError, match="form must be one of"):
        OrthonormalityPenalty(blocks, optimizer, form="hard")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="squared=True belongs to form='srip' or 'convolutional'"):
        OrthonormalityPenalty(blocks, optimizer, form="soft", squared=True)
    with pytest.raises(ValueError, match="none of the layers has a trainable weight in this optimizer"):
        OrthonormalityPenalty(blocks, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    elsewhere = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, device="meta"))
    both = filter_blocks(elsewhere, select_filters(elsewhere))
    with pytest.raises(ValueError, match="must be on one device"):
        OrthonormalityPenalty(both, torch.optim.SGD(elsewhere.parameters(), lr=0.1))
    clash = nn.Sequential(
        SharedBasisConv2d(FilterBasis(2, 3, 3, gram="one"), 4), SharedBasisConv2d(FilterBasis(4, 3, 3, gram="one"), 4)
    )
    with pytest.raises(ValueError, match="'one' have filters of different shapes"):
        filter_blocks(clash, select_filters(clash))
    search = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    with pytest.raises(ValueError, match="line search compares losses that lack the penalty"):
        OrthonormalityPenalty(blocks, search, form="soft")
    with pytest.raises(ValueError, match="decoupled=True needs steps of one evaluation"):
        OrthonormalityPenalty(blocks, torch.optim.LBFGS(model.parameters()), form="soft", decoupled=True)
    with pytest.raises(ValueError, match="unique=True, but no layer"):
        filter_blocks(model, select_filters(model, ["*"]), unique=True)
    shared = share_filter_bases(CifarResNet(14), shared=4)
    named = select_filters(shared, [name for name, _, _ in shared_bases(shared)])
    with pytest.raises(ValueError, match="stage1: unique=True is defined for form='basis' only"):
        OrthonormalityPenalty(filter_blocks(shared, named, unique=True), optimizer, form="soft")


def test_a_parameter_of_several_blocks_is_moved_by_each() -> None:
    """And never twice by one operation, which on a GPU would lose one of the two."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).double()
    conv.weight.grad = torch.zeros_like(conv.weight)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    (block,) = filter_blocks(conv, {"conv": conv})
    OrthonormalityPenalty([block], optimizer, form="soft").before_step(weight=1, step=0)
    once = conv.weight.grad.clone()
    penalty = OrthonormalityPenalty([block, replace(block, name="again")], optimizer, form="soft")
    conv.weight.grad.zero_()
    penalty.before_step(weight=1, step=0)
    torch.testing.assert_close(conv.weight.grad, 2 * once)
    for bank, moves in zip(penalty._banks, penalty._moves, strict=True):
        for move in moves:
            assert len({id(bank.tensors[i]) for i in move.places}) == len(move.places)
