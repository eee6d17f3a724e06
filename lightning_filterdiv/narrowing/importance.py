"""Importance of each channel of a group, for coupled layers together. Channels with high scores are kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_filterdiv.channel_graph import ChannelGraph, ChannelGroup
from lightning_filterdiv.channel_graph.answers import layer_of
from lightning_filterdiv.channel_graph.modules import copy_network
from lightning_filterdiv.filters import find_prefix, named_modules, named_tensors
from lightning_filterdiv.narrowing.clusters import layer_kernels
from lightning_filterdiv.tensors.randomness import keyed_generator
from lightning_filterdiv.tensors.sharing import share

__all__ = [
    "GatedLayer", "Importance", "Loss", "ScoreFunction", "batch_inputs", "channel_scores", "gate_means", "gated_layers",
    "known_gate_means", "redundancy_scores", "without_gates",
]  # fmt: skip

Importance = Literal["l1", "l2", "bn_scale", "taylor", "gates", "redundancy", "random"]
#: (network, group) -> (size,) importance of its channels.
ScoreFunction = Callable[[nn.Module, ChannelGroup], Tensor]
#: (network, batch) -> scalar loss.
Loss = Callable[[nn.Module, Any], Tensor]
#: Ridge of the regression in "redundancy", relative to the squared length of a filter.
_RIDGE = 1e-2


@runtime_checkable
class GatedLayer(Protocol):
    """A layer that holds a gate, as made by :func:`~lightning_filterdiv.channel_importance.insert_gates`.

    Attributes:
        gate: the gate.
        gated_layer: name of the sibling whose channels the gate measures; empty for the layer itself.
    """

    gate: nn.Module
    gated_layer: str

    def fold_gate(self, mean: Tensor) -> None:
        """Multiply a constant gate ``(C,)`` into the layer, and become an ordinary one."""


def gated_layers(model: nn.Module) -> dict[str, GatedLayer]:
    """Return canonical name of each layer whose channels a gate measures -> layer that holds the gate."""
    hosts: dict[str, GatedLayer] = {}
    for name, module in named_modules(model).items():
        if isinstance(module, GatedLayer):
            parent, layer = name.rpartition(".")[0], module.gated_layer
            hosts[name if not layer else f"{parent}.{layer}" if parent else layer] = module
    return hosts


def channel_scores(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    importance: Importance | Mapping[str, Tensor] | ScoreFunction = "l2",
    *,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Score the channels of groups.

    Args:
        model: the traced network; it is left as it was.
        graph: its channel graph.
        groups: what to score.
        importance: one of

            - ``"l1"``, ``"l2"``: norm of the filters, relative to the mean of their layer, mean over coupled layers;
            - ``"bn_scale"``: mean ``|gamma|`` of the batch norms that act on the channel (network slimming);
            - ``"taylor"``: squared first-order change of the loss when the columns that read the channel are zeroed,
              mean over batches (Molchanov et al., CVPR 2019, with the gate at the consumers);
            - ``"redundancy"``: share of a filter that the others of its layer cannot express (ridge regression on
              unit-length filters). The most redundant filter goes first, then the others are judged without it;
            - ``"random"``;
            - a dict of layer -> (C,) scores of its filters, as
              :attr:`~lightning_filterdiv.ChannelImportance.importance`;
            - a function of ``(model, group)`` that returns (size,) scores.
        batches: for ``"taylor"``.
        loss: function of ``(model, batch)``; ``None``: cross-entropy of ``model(batch[0])`` and ``batch[1]``.
        seed: seed of ``"random"``.

    Returns:
        Group name -> (size,) float64 scores on the CPU, and layer -> why its channels have none.

    Raises:
        ValueError: an unknown importance, missing batches, or scores of a wrong shape or that are not finite, by name.
    """
    if isinstance(importance, Mapping):
        return _given(graph, groups, importance)
    if callable(importance):
        return {group.name: _checked(importance(model, group), group, "importance") for group in groups}, {}
    if importance not in get_args(Importance):
        raise ValueError(
            f"importance must be one of {', '.join(map(repr, get_args(Importance)))}, a dict of layer -> scores, or a "
            f"function of (model, group); got {importance!r}"
        )
    if importance == "gates":
        raise ValueError("importance='gates' is measured before the gates are removed: see gate_means")
    if importance == "taylor":
        scores = _taylor(model, groups, batches, loss)
    elif importance == "redundancy":
        scores = redundancy_scores(model, graph, groups)
    elif importance == "random":
        scores = {
            g.name: torch.rand(g.size, generator=keyed_generator("prune", seed, g.name), dtype=torch.float64)
            for g in groups
        }
    elif importance == "bn_scale":
        return _norm_scales(model, groups)
    else:
        order = 1 if importance == "l1" else 2
        tensors = named_tensors(model)
        scores = {group.name: _norms(model, tensors, group, order) for group in groups}
    return {group.name: _checked(scores[group.name], group, f"{importance!r}") for group in groups}, {}


def _checked(scores: object, group: ChannelGroup, what: str) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != (group.size,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"{what} of {group.name!r} must be a tensor with one number per channel, {group.size}; got {got}"
        )
    scores = scores.detach().double().cpu()
    if not bool(scores.isfinite().all()):
        raise ValueError(
            f"{what} of {group.name!r} holds NaN or inf; has the training diverged? Start from a checkpoint before that"
        )
    return scores


# -- of weights --------------------------------------------------------------------------------------------------------


def _writers(group: ChannelGroup) -> list[str]:
    """Return the layers that write the channels, without those that act on them depthwise."""
    return list(dict.fromkeys(layer_of(part.tensor) for part in group.parts if part.kind == "filter"))


def _norms(model: nn.Module, tensors: Mapping[str, Tensor], group: ChannelGroup, order: int) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    layers = list(dict.fromkeys([*_writers(group), *group.layers]))
    for layer in layers:
        norms = torch.linalg.vector_norm(layer_kernels(model, tensors, group, layer), order, dim=1)
        total += norms / norms.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return total / len(layers)


def redundancy_scores(
    model: nn.Module, graph: ChannelGraph, groups: Sequence[ChannelGroup], *, among_ranks: bool = False
) -> dict[str, Tensor]:
    """Return the share of each filter that the others of its layer cannot express, in order of removal.

    With unit-length filters as rows of ``F``, the unexplained share of filter j in a ridge regression on the others is
    ``1 / A_jj - ridge`` with ``A = (F F^T + ridge)^-1``. Removing it leaves the Schur complement of ``A_jj``: the
    backward elimination of all filters is one Cholesky factorisation of ``A`` with the largest diagonal as pivot.

    Args:
        model: the traced network.
        graph: its channel graph.
        groups: groups to score. Filters of coupled layers count as one long filter, each layer scaled to the same
            total. Filters of a grouped convolution that read different inputs do not express each other.
        among_ranks: divide the groups among the ranks of the default process group, all of which must call this.

    Returns:
        Group name -> (size,) float64 in [0, 1].
    """
    from scipy.linalg.lapack import dpstrf

    tensors, modules = named_tensors(model), named_modules(model)
    by_name = {group.name: group for group in groups}

    def score(name: str) -> Tensor:
        group = by_name[name]
        gram = torch.zeros(group.size, group.size, dtype=torch.float64)
        for layer in _writers(group):
            kernels = layer_kernels(model, tensors, group, layer)
            inner = kernels @ kernels.T / kernels.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
            if group.blocks is not None and getattr(modules.get(layer), "groups", 1) > 1:
                inner = inner * (group.blocks[:, None] == group.blocks[None, :])
            gram += inner
        length = gram.diagonal().sqrt().clamp_min(1e-150)  # a filter of zeros stays one, and goes first
        gram = gram / length.outer(length)
        inverse = torch.linalg.inv(gram + _RIDGE * torch.eye(group.size, dtype=torch.float64))
        factor, pivots, _, _ = dpstrf(inverse.numpy(), lower=1)
        left = 1 / torch.from_numpy(factor).diagonal().square() - _RIDGE
        scores = torch.empty(group.size, dtype=torch.float64)
        scores[torch.from_numpy(pivots).long() - 1] = left.clamp(0, 1).cummax(0).values
        return scores

    weights = {
        name: sum(tensors[part.tensor].numel() for part in group.parts if part.kind == "filter")
        for name, group in by_name.items()
    }
    costs = {name: group.size * weights[name] + 2.0 * group.size**3 for name, group in by_name.items()}
    return share(costs, score, among_ranks=among_ranks)


def _norm_scales(model: nn.Module, groups: Sequence[ChannelGroup]) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors, modules = named_tensors(model), named_modules(model)
    scores: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for group in groups:
        scales = [
            tensors[part.tensor].detach().double().cpu()[part.rows].abs().mean(1)
            for part in group.parts
            if part.kind == "member"
            and part.tensor.endswith(".weight")
            and isinstance(modules.get(layer_of(part.tensor)), nn.modules.batchnorm._NormBase)
        ]
        if scales:
            scores[group.name] = _checked(torch.stack(scales).mean(0), group, "'bn_scale'")
        else:
            missing |= dict.fromkeys(group.layers, "no batch norm behind it has a scale, which 'bn_scale' reads")
    return scores, missing


# -- of data -----------------------------------------------------------------------------------------------------------


def batch_inputs(batch: Any) -> Any:
    """Return the inputs of a batch: a tensor, or the first entry of a tuple or list.

    Raises:
        TypeError: anything else.
    """
    if isinstance(batch, list | tuple) and batch:
        return batch[0]
    if isinstance(batch, Tensor):
        return batch
    raise TypeError(
        f"a batch must be a tensor (B, C, H, W) or a tuple that begins with one, got {type(batch).__name__}"
    )


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    if not (isinstance(batch, list | tuple) and len(batch) >= 2 and isinstance(batch[1], Tensor)):
        raise ValueError(
            "importance='taylor' needs batches of (inputs, labels) for the cross-entropy, or loss=..., a function of "
            "(model, batch)"
        )
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _taylor(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any] | None, loss: Loss | None
) -> dict[str, Tensor]:
    if batches is None:
        raise ValueError("importance='taylor' needs batches=..., a few batches of (inputs, labels)")
    copied = copy_network(model).eval()
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    tensors = named_tensors(copied)
    readers = {part.tensor for group in groups for part in group.parts if part.kind == "consumer"}
    names = [name for name in readers if tensors[name].requires_grad]
    scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    count = 0
    for batch in batches:
        count += 1
        with torch.enable_grad():
            value = (loss or _cross_entropy)(copied, batch)
            gradients = torch.autograd.grad(value, [tensors[name] for name in names], allow_unused=True)
        found = dict(zip(names, gradients, strict=True))
        for group in groups:
            change = torch.zeros(group.size, dtype=torch.float64)
            for part in group.parts:
                gradient = found.get(part.tensor) if part.kind == "consumer" else None
                if gradient is not None:
                    products = (gradient * tensors[part.tensor].detach()).double()
                    change += part.entries(products).flatten(1).sum(1).cpu()
            scores[group.name] += change.square()
    if not count:
        raise ValueError("batches holds no batch to measure the importance on; give at least one")
    return {name: total / count for name, total in scores.items()}


def gate_means(model: nn.Module, batches: Iterable[Any] | None) -> dict[str, Tensor]:
    """Return the mean gate of every gated layer over images, in eval mode.

    Args:
        model: trained network with gates; it is not changed.
        batches: batches of inputs, or of tuples that begin with them.

    Returns:
        Canonical layer name -> ``(C,)`` float64 on the CPU.

    Raises:
        ValueError: no gates, or no batches.
    """
    layers = gated_layers(model)
    if not layers:
        raise ValueError(
            f"importance='gates' needs a network that was trained with ChannelImportance and still has its gates; "
            f"{type(model).__name__} has none: pass importance=callback.importance, or choose another importance"
        )
    if batches is None:
        raise ValueError("importance='gates' needs batches=..., a few batches of images to measure the gates on")
    sums: dict[str, Tensor] = {}
    images = 0

    def watch(name: str) -> Any:
        def hook(gate: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = cast(Any, gate).factors(inputs[0]).double().sum(0).cpu()
            sums[name] = sums[name] + seen if name in sums else seen

        return hook

    modes = {module: module.training for module in model.modules()}
    handles = [layer.gate.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                x = batch_inputs(batch)
                if not isinstance(x, Tensor):
                    raise TypeError(
                        f"a batch must be a tensor (B, C, H, W) or a tuple that begins with one, got "
                        f"{type(batch).__name__}"
                    )
                images += len(x)
                model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not images:
        raise ValueError("batches holds no images to measure importance on; give at least one batch")
    return {name: total / images for name, total in sums.items()}


def known_gate_means(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean gate of every gated layer from measured means.

    Args:
        model: with gates.
        given: layer -> (C,) mean gates, as :attr:`~lightning_filterdiv.ChannelImportance.importance`; names may be
            those of the network around or inside ``model``.

    Returns:
        Canonical layer name -> (C,).

    Raises:
        ValueError: a gate has no mean or one of another width, or numbers are no means of gates, by name.
    """
    hosts, modules = gated_layers(model), named_modules(model)
    strip, add = (find_prefix(given, modules) if given else None) or ("", "")
    known = {add + name.removeprefix(strip): torch.as_tensor(values).detach() for name, values in given.items()}
    for name in hosts:
        if name not in known:
            raise ValueError(
                f"importance has no mean of the gate that {name!r} still has: pass callback.importance of the fit, or "
                f"importance='gates' with batches=...; remove_gates takes gates out"
            )
        values, filters = known[name], len(cast(Tensor, modules[name].weight))
        if values.shape != (filters,) or not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(
                f"importance of {name!r} must be mean gates of its {filters} channels, in [0, 1], because it still has "
                f"its gate; remove_gates takes gates out"
            )
    return {name: known[name] for name in hosts}


@torch.no_grad()
def without_gates(model: nn.Module, means: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of ``model`` without gates, whose constant ``means`` are multiplied into the layers that held
    them."""
    copied = copy_network(model)
    for name, layer in gated_layers(copied).items():
        layer.fold_gate(means[name])
    return copied


def _given(
    graph: ChannelGraph, groups: Sequence[ChannelGroup], importance: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    strip, add = (find_prefix(importance, graph.layers) if importance else None) or ("", "")
    known = {add + name.removeprefix(strip): values for name, values in importance.items()}
    scores: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    for group in groups:
        found = []
        for layer in group.producers:
            if layer not in known:
                continue
            values = torch.as_tensor(known[layer])
            if values.shape != (graph.filter_count(layer),):
                raise ValueError(
                    f"importance of {layer!r} is that of {len(values)} channels, but the layer has "
                    f"{graph.filter_count(layer)}: it was measured on another network; measure it on this one"
                )
            own = values.detach().double().cpu()[group.rows(layer)]
            found.append(own if own.ndim == 1 else own.mean(1))
        if found:
            scores[group.name] = _checked(torch.stack(found).mean(0), group, "importance")
        else:
            missing |= dict.fromkeys(group.layers, "importance says nothing about it")
    return scores, missing


def limited(batches: Iterable[Any] | None, most: int) -> list[Any] | None:
    """Return the first ``most`` batches, read once; ``None`` for none."""
    return None if batches is None else list(itertools.islice(batches, most))
