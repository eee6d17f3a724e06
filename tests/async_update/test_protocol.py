"""Layers that are left alone, steps out of order, bad arguments, and the storage of weights during a fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_filterdiv.async_update.functional import (
    AsynchronousUpdate,
)
from lightning_filterdiv.filters import select_filters
from tests.async_update.networks import LAYERS, OPTIMIZERS, expected_masks, give_gradients, net, several, values

# --- what is left alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_parameters_without_gradient_get_none_and_keep_their_value(hold: str) -> None:
    model = several(LAYERS["conv2d"])
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    before = values(list(model.parameters()))
    give_gradients(list(model.parameters()), 0)
    silent = [model["a"].weight, model["b"].bias, model["c"].weight, model["c"].bias]
    original = model["b"].weight.grad.clone()
    for parameter in silent:
        parameter.grad = None
    update.before_step(0)
    if hold == "gradient":  # the mask of b, not of its neighbour a that has no gradient
        subset = update.last_subsets["b"]
        assert torch.equal(model["b"].weight.grad, original * subset.view(-1, 1, 1, 1))
        assert not torch.equal(subset, update.last_subsets["a"])
    optimizer.step()
    update.after_step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        if any(parameter is p for p in silent):
            assert parameter.grad is None
            assert torch.equal(parameter, old)
            assert not optimizer.state.get(parameter)
        else:
            assert not torch.equal(parameter, old)


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_no_gradients_at_all(hold: str) -> None:
    model = net()
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    before = values(list(model.parameters()))
    update.before_step(0)
    optimizer.step()
    update.after_step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_parameters_of_another_optimizer_are_left_alone(hold: str) -> None:
    model = several(LAYERS["conv2d"])
    mine = [*model["a"].parameters(), model["b"].weight]
    theirs = [p for p in model.parameters() if not any(p is q for q in mine)]
    optimizer, other = OPTIMIZERS["sgd"](mine), OPTIMIZERS["sgd"](theirs)
    pointers = [p.data_ptr() for p in theirs]
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    assert update.layer_names == ["a", "b"]
    assert [p.data_ptr() for p in theirs] == pointers
    give_gradients(list(model.parameters()), 0)
    before, gradients = values(theirs), [p.grad.clone() for p in theirs]
    update.before_step(0)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(theirs, gradients, strict=True))
    other.step()  # between the two: its update must survive
    optimizer.step()
    moved = values(theirs)
    update.after_step()
    for parameter, new, old in zip(theirs, moved, before, strict=True):
        assert torch.equal(parameter, new)
        assert not (new == old).any()  # the bias of b too, whose weight is held


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_frozen_layers_are_left_alone(hold: str) -> None:
    model = several(LAYERS["conv2d"])
    model["a"].requires_grad_(False)
    optimizer = OPTIMIZERS["adamw"](list(model.parameters()))
    pointer, before = model["a"].weight.data_ptr(), model["a"].weight.clone()
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    assert update.layer_names == ["b", "c"]
    give_gradients([p for p in model.parameters() if p.requires_grad], 0)
    update.before_step(0)
    optimizer.step()
    update.after_step()
    assert model["a"].weight.grad is None
    assert model["a"].weight.data_ptr() == pointer
    assert torch.equal(model["a"].weight, before)


# --- protocol and errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_a_step_that_was_not_announced_is_an_error(hold: str) -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)
    message = r"optimizer\.step\(\) ran without AsynchronousUpdate\.before_step"
    with pytest.raises(RuntimeError, match=message):
        update.after_step()
    update.before_step(0)
    update.after_step()
    with pytest.raises(RuntimeError, match=message):
        update.after_step()
    update.before_step(1)
    update.release()
    with pytest.raises(RuntimeError, match=message):
        update.after_step()


def test_a_step_that_never_happened_leaves_no_trace() -> None:
    conv = nn.Conv2d(3, 8, 3).double()
    optimizer = OPTIMIZERS["sgd"](list(conv.parameters()))
    update = AsynchronousUpdate({"conv": conv}, optimizer)
    give_gradients(list(conv.parameters()), 0)
    update.before_step(0)  # overflow: the scaler skips the step
    with torch.no_grad():
        conv.weight.fill_(7)  # the user loads weights
    update.before_step(1)
    optimizer.step()
    update.after_step()
    subset = update.last_subsets["conv"]
    assert (conv.weight[~subset] == 7).all()
    assert not (conv.weight[subset] == 7).any()


def test_an_optimizer_without_any_of_the_layers_is_refused() -> None:
    model = net()
    message = "none of the layers has a trainable weight in this optimizer"
    with pytest.raises(ValueError, match=message):
        AsynchronousUpdate(select_filters(model), torch.optim.SGD(model[5].parameters(), 0.1))
    with pytest.raises(ValueError, match=message):
        AsynchronousUpdate({}, torch.optim.SGD(model.parameters(), 0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for conv in select_filters(model).values():
        conv.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        AsynchronousUpdate(select_filters(model), optimizer)


def test_layers_on_several_devices_are_refused() -> None:
    layers = {"a": nn.Conv2d(1, 2, 1), "b": nn.Conv2d(1, 2, 1, device="meta")}
    optimizer = torch.optim.SGD([conv.weight for conv in layers.values()], 0.1)
    with pytest.raises(ValueError, match=r"must be on one device, got \['cpu', 'meta'\]"):
        AsynchronousUpdate(layers, optimizer)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("update_fraction", 0.0, ValueError),
        ("update_fraction", 1.5, ValueError),
        ("update_fraction", float("nan"), ValueError),
        ("update_fraction", "half", TypeError),
        ("axis", "output", ValueError),
        ("sampling", "uniform", ValueError),
        ("hold", "weights", ValueError),
    ],
)
def test_a_bad_argument_is_refused_by_name(argument: str, value: object, error: type[Exception]) -> None:
    """Without these checks a typo in ``hold`` would run the other algorithm."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(error, match=f"^{argument} must be .*, got "):
        AsynchronousUpdate(select_filters(model), optimizer, **{argument: value})


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_bad_fraction_for_one_step_is_refused(fraction: float) -> None:
    model = net()
    update = AsynchronousUpdate(select_filters(model), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=f"^fraction must be .*got {fraction}"):
        update.before_step(0, fraction)


# --- storage, memory format, plain loop --------------------------------------------------------------------------


def test_release_gives_the_weights_storages_of_their_own() -> None:
    model = several(LAYERS["channels_last"])
    parameters = list(model.parameters())
    before, strides = values(parameters), [p.stride() for p in parameters]
    update = AsynchronousUpdate(select_filters(model), OPTIMIZERS["sgd"](parameters))
    shared = {p.untyped_storage().data_ptr() for p in parameters}
    assert len(shared) < len(parameters)
    update.release()
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    for parameter, old, stride in zip(parameters, before, strides, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.stride() == stride
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def test_weights_that_moved_to_another_storage_are_still_held() -> None:
    model = several(LAYERS["conv2d"])
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS["adamw"](parameters)
    layers = select_filters(model)
    update = AsynchronousUpdate(layers, optimizer)
    give_gradients(parameters, 0)
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    before = values(parameters)
    update.before_step(0)
    optimizer.step()
    model["a"].weight.data = model["a"].weight.data.clone()  # and once more, between the two
    update.after_step()
    for parameter, old, mask in zip(parameters, before, expected_masks(model, layers, update, "out"), strict=True):
        assert torch.equal(parameter[~mask], old[~mask])
        assert not (parameter[mask] == old[mask]).any()


def test_the_plain_loop_of_the_docstring() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    parameters, start = list(model.parameters()), values(list(model.parameters()))
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 6, 6, generator=generator), torch.tensor([0, 1, 0, 1])) for _ in range(12)]
    loss = nn.CrossEntropyLoss()

    update = AsynchronousUpdate(select_filters(model), optimizer, update_fraction=0.5, seed=0)
    losses = []
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        losses.append(loss(model(x), y))
        losses[-1].backward()
        update.before_step(step)
        optimizer.step()
        update.after_step()
    update.release()

    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    assert losses[-1].isfinite()
    for conv, old in ((model[0], start[0]), (model[3], start[4])):
        # In twelve steps every filter has been drawn: none is where it started.
        assert ((conv.weight != old).flatten(1).any(1)).all()
    twin = net()
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(one, two) for one, two in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_a_bias_of_two_layers_is_always_updated(hold: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].bias = model[0].bias
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold)  # type: ignore[arg-type]
    give_gradients(list(model.parameters()), 0)
    before = model[0].bias.detach().clone()
    update.before_step(0)
    optimizer.step()
    update.after_step()
    assert bool((model[0].bias != before).all())
    for conv, mask in zip(model, update.last_subsets.values(), strict=True):
        assert int(mask.sum()) == 2, conv


@pytest.mark.parametrize("hold", ["update", "gradient"])
def test_autocast_around_the_calls_changes_nothing(hold: str) -> None:
    results = []
    for enabled in (False, True):
        model = net()
        optimizer = OPTIMIZERS["sgd"](list(model.parameters()))
        update = AsynchronousUpdate(select_filters(model), optimizer, hold=hold, rescale=True)
        give_gradients(list(model.parameters()), 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            update.before_step(0)
            optimizer.step()
            update.after_step()
        results.append(values(list(model.parameters())))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_the_number_of_kernels_does_not_grow_with_depth() -> None:
    def kernels(depth: int) -> int:
        model = nn.Sequential(*[nn.Conv2d(4, 4, 3) for _ in range(depth)])
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        update = AsynchronousUpdate(select_filters(model), optimizer)
        give_gradients(list(model.parameters()), 0)
        update.before_step(0)  # allocates the snapshots
        update.after_step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            update.before_step(1)
            update.after_step()
        return sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))

    assert kernels(2) == kernels(20) > 0
