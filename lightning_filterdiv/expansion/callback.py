"""``ExpandNet``: expand the network while it trains. It is compact before, after, and in every checkpoint."""

from __future__ import annotations

from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from lightning_filterdiv.expansion.cost import NetworkMacs, composing_macs, is_compiled
from lightning_filterdiv.expansion.functional import Kind
from lightning_filterdiv.expansion.layers import Factors, Layer, factor_product, factors_of, show_compact
from lightning_filterdiv.expansion.surgery import Initial, Kinds, choose_layers, contract, draw_all, set_factors
from lightning_filterdiv.filters import Conv
from lightning_filterdiv.tensors.arguments import check_choice, check_flag, check_integer
from lightning_filterdiv.training.callback import FilterCallback

__all__ = ["ExpandNet"]

#: Share of a step's multiply-adds above which composing causes a warning.
_SMALL_SHARE = 0.1


class ExpandNet(FilterCallback):
    """Train an over-parameterised network and keep the compact one (ExpandNets, Guo et al., NeurIPS 2020).

    Layers are expanded in ``setup``, before ``configure_optimizers``. They are contracted when the fit ends, also after
    an error. ``state_dict`` always shows the compact network, so every checkpoint loads into the model's own class,
    with or without this callback. The callback's state holds the factors, so a resume with it is exact.

    Args:
        kind: ``"CL"``: 1x1, k x k, 1x1 for each convolution larger than 1x1; ``"CK"``: 3x3 convolutions for kernels of
            5x5 and more; ``"FC"``: three linear layers for each; ``"CL+FC"``, ``"CK+FC"``: both.
        rate: ratio of the channels of the factors to those of the layer.
        initial: ``"keep"``: start from the weights that the network has; ``"fresh"``: draw new ones.
        expand_image: also give ``rate`` times more channels to the first factor of convolutions that read an image (at
            most 3 channels). By default that factor keeps the image's channels. With ``CK`` such a layer then cannot
            represent its old weights, and starts from new ones.
        include: patterns of layers; ``None`` for all layers of ``kind``.
        exclude: patterns of layers to leave as they are.
        seed: seed of the factors.
        check_ranks_every_n_steps: see :class:`~lightning_filterdiv.FilterCallback`.

    Raises:
        TypeError, ValueError: a bad argument, by name.
        ExpansionError, NoLayersError: at ``setup``: a selected layer cannot be expanded, or none is left.
        MisconfigurationException: the optimizer was made before ``setup``, or the resumed checkpoint holds no factors.
    """

    fixed_on_resume = dict.fromkeys(("initial", "seed"), "the factors are those of the checkpoint")
    trainable_only = (
        False  # frozen layers are expanded too, because they may be unfrozen; they get their own weights back
    )

    def __init__(
        self,
        *,
        kind: Kinds = "CL",
        rate: int = 4,
        initial: Initial = "keep",
        expand_image: bool = False,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        seed: int = 0,
        check_ranks_every_n_steps: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude, check_ranks_every_n_steps=check_ranks_every_n_steps)
        self.kind = check_choice("kind", kind, Kinds)
        self.rate = check_integer("rate", rate, low=1)
        self.initial = check_choice("initial", initial, Initial)
        self.expand_image = check_flag("expand_image", expand_image)
        self.seed = check_integer("seed", seed, low=0)
        self._expanded: dict[str, Layer] = {}
        self._hooks: list[RemovableHandle] = []
        self._kept: dict[str, tuple[nn.Module | None, Factors]] = {}
        self._replaced: dict[int, tuple[str, nn.Parameter]] = {}
        self._origin: dict[str, tuple[dict[str, nn.Parameter], Factors]] = {}
        self._network_macs = NetworkMacs(nn.Identity())

    # ------------------------------------------------------------------ expand, contract

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Expand before the optimizers are made."""
        super().setup(trainer, pl_module, stage)
        present = {id(module) for module in pl_module.modules()}
        if any(id(layer) not in present for layer in self._expanded.values()):
            self._contract()  # a fit of this network ended without our on_exception
        if stage != "fit" or self._expanded:
            return
        self.check_built(pl_module, values=True)
        chosen = choose_layers(pl_module, self.kind, self.include, self.exclude)
        before = _numbers(pl_module)
        compact = {name: dict(layer.named_parameters()) for name, (layer, _) in chosen.items()}
        others = {n: (layer, kind) for n, (layer, kind) in chosen.items() if not self._resume(n, layer, kind)}
        # Weights from training are never discarded, nor those of a layer that does not train.
        trained = [name for name, (layer, _) in others.items() if self._kept.get(name, (None, {}))[0] is layer]
        drawn = draw_all(others, self.rate, self.initial, self.seed, self.expand_image, trained) if others else {}
        for name, factors in drawn.items():
            set_factors(*chosen[name], self.rate, factors)
            self._expanded[name] = chosen[name][0]
        for name, layer in self._expanded.items():
            self._hooks += show_compact(layer)
            self._replaced |= {id(p): (name, p) for p in compact[name].values()}
            if not any(p.requires_grad for p in layer.parameters()):
                self._origin[name] = (compact[name], _copies(layer))
        rank_zero_info(f"ExpandNet: {before:,} parameters become {_numbers(pl_module):,} while training")

    def _resume(self, name: str, layer: Layer, kind: Kind) -> bool:
        """Expand a layer with the factors of an earlier fit of this network, unless its weights have changed."""
        owner, factors = self._kept.get(name, (None, {}))
        if owner is not layer:
            return False
        compact = dict(layer.named_parameters())
        set_factors(layer, kind, self.rate, factors)
        if all(torch.equal(getattr(layer, key), value) for key, value in compact.items()):
            self._expanded[name] = layer
            return True
        contract(layer)
        layer._parameters.update(compact)
        return False

    def _contract(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for name, layer in self._expanded.items():
            factors = _copies(layer)
            self._kept[name] = (layer, factors)
            contract(layer)
            compact, start = self._origin.get(name, ({}, {}))
            if compact and all(torch.equal(factors[key], start[key].to(factors[key])) for key in start):
                # Nothing moved: restore the original weights, without the rounding of factors.
                for key, parameter in compact.items():
                    layer.get_parameter(key).data.copy_(parameter)
        self._expanded, self._replaced, self._origin = {}, {}, {}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the compact network."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._contract()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the compact network."""
        super().on_exception(trainer, pl_module, exception)
        self._contract()

    # ------------------------------------------------------------------ checks

    def choose(self, pl_module: pl.LightningModule) -> dict[str, Conv]:
        """Return the expanded layers."""
        return cast(dict[str, Conv], dict(self._expanded))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse compact weights for which no factors were restored."""
        if stale := self._stale_layers():
            raise MisconfigurationException(
                f"the checkpoint holds compact weights of {stale[0]!r} but no factors: it was saved without "
                f"ExpandNet, or with save_weights_only=True, and cannot be resumed with it. Load its weights into the "
                f"model (load_from_checkpoint) and start a new fit with initial='keep'"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse compact weights that were loaded during training."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if stale := self._stale_layers():
            raise MisconfigurationException(
                f"a state_dict with other weights of {stale[0]!r} was loaded during training, and the factors of "
                f"ExpandNet cannot follow. Load it before the fit, or leave the layer out with exclude"
            )

    def _stale_layers(self) -> list[str]:
        return [name for name, layer in self._expanded.items() if factor_product(layer).stale]

    def prepare(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse optimizers that still hold the weights that factors replaced."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in self._replaced:
                        raise MisconfigurationException(
                            f"{type(optimizer).__name__} holds the weight of {self._replaced[id(parameter)][0]!r} from "
                            f"before ExpandNet expanded it; make optimizers in configure_optimizers, not earlier"
                        )

        if not is_compiled(pl_module):
            self._network_macs = NetworkMacs(pl_module)
            return
        # Adding and removing hooks would compile every graph twice.
        rank_zero_info(
            f"ExpandNet: composing weights takes {composing_macs(self._expanded.values()) / 1e9:.3g} G multiply-adds "
            f"of every step. They are not compared with those of the network, which is compiled"
        )

    def release(self) -> None:
        """Stop counting multiply-adds."""
        self._network_macs.close()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Warn before the first step if composing takes more than a tenth of it."""
        network, self._network_macs.total = self._network_macs.total, 0
        self._network_macs.close()
        if network:
            composing = composing_macs(self._expanded.values())
            if composing > _SMALL_SHARE * (network + composing):
                rank_zero_warn(
                    f"ExpandNet: composing weights takes {composing / 1e9:.3g} G multiply-adds of every step, the "
                    f"network itself {network / 1e9:.3g} G for this batch: a step costs about "
                    f"{1 + composing / network:.1f} times a plain one, and on a CPU often more. A larger batch or "
                    f"larger images, a smaller rate, or exclude for the widest layers make it cheaper"
                )

    def _check_restored_layers(self, saved: Any, present: Any) -> None:
        super()._check_restored_layers(saved, {**present, **self.layers})  # linear layers too

    # ------------------------------------------------------------------ state

    def extra_state(self) -> dict[str, Any]:
        """Return the factors as a list of (layer, parameter, tensor)."""
        factors = {name: _copies(layer) for name, layer in self._expanded.items()}
        if not factors:
            factors = {name: kept for name, (_, kept) in self._kept.items()}
        return {"factors": [[name, key, tensor] for name, kept in factors.items() for key, tensor in kept.items()]}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the factors."""
        if not isinstance(state["factors"], list):
            raise TypeError("factors must be a list of (layer, parameter, tensor)")
        saved: dict[str, Factors] = {}
        for name, key, tensor in state["factors"]:
            saved.setdefault(name, {})[key] = tensor
        for name, layer in self._expanded.items():
            own = {key: tuple(p.shape) for key, p in factors_of(layer).items()}
            given = {key: tuple(tensor.shape) for key, tensor in saved.get(name, {}).items()}
            if own != given:
                raise ValueError(
                    f"the factors of {name!r} have shapes {list(given.values())} there, {list(own.values())} here: "
                    f"resume with the same kind, rate, expand_image and layers"
                )
        for name, layer in self._expanded.items():
            with torch.no_grad():
                for key, parameter in factors_of(layer).items():
                    parameter.copy_(saved[name][key])
            factor_product(layer).stale = False
        if not self._expanded:
            self._kept = {name: (None, factors) for name, factors in saved.items()}


def _numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if not is_lazy(p))


def _copies(layer: nn.Module) -> Factors:
    return {key: p.detach().clone() for key, p in factors_of(layer).items()}
